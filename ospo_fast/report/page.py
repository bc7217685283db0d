"""Puts the page together and writes it: one file, no request to anywhere, the same bytes for the same run."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path

import jinja2
from markupsafe import Markup

from ospo_fast.errors import UsageError
from ospo_fast.records import write_atomic
from ospo_fast.report import inspector, stats
from ospo_fast.report.charts import short
from ospo_fast.report.images import Album
from ospo_fast.report.load import mapping, number, pairs, read_run, text
from ospo_fast.report.masks import load_masks

HERE = Path(__file__).parent
ABSENT = "not measured"


def write_report(run_dir: Path, out: Path | None = None, *, limit: int = 120, gallery_limit: int = 24) -> Path:
    """Writes the report of a run as one self-contained HTML page and returns its path.

    run_dir: a run folder, finished or not; what it lacks reads "not measured" or is left out. out: the page's file, or
    a folder for its index.html; None is run_dir/report/index.html. limit, gallery_limit: at most this many items in
    the pair inspector and cards in the before/after gallery; the page says how many it leaves out. The page appears
    whole or not at all.

    Raises OspoError for a folder that is missing or holds nothing to report, for a broken summary.json or stages.json
    and for an output that cannot be written; UsageError for a limit below 1. Broken images and masks become
    placeholders that say so.
    """
    for name, value in (("limit", limit), ("gallery_limit", gallery_limit)):
        if value < 1:
            raise UsageError(f"{name}: got {value}, expected at least 1")
    run_dir = Path(run_dir)
    target = run_dir / "report" / "index.html" if out is None else Path(out)
    if target.is_dir() or (out is not None and target.suffix.lower() not in {".html", ".htm"}):
        target /= "index.html"
    html = render(run_dir, limit=limit, gallery_limit=gallery_limit)
    write_atomic(target, html.encode("utf-8", "replace"))  # a record may hold half a surrogate pair
    return target


def render(run_dir: Path, *, limit: int, gallery_limit: int) -> str:
    """The page of a run folder as text."""
    run = read_run(run_dir)
    album = Album(run.root)
    chosen = inspector.sample(run, limit)
    every = [pair for item in run.items for pair in pairs(item)]
    masks = {str(pair["item_id"]): load_masks(run.root, pair) for pair in every if "mask_path" in pair}
    items = [
        inspector.describe(item, run, album, masks.get(str(item["item_id"])) or load_masks(run.root, item))
        for item in chosen
    ]
    gallery = stats.gallery(run.gallery, album, gallery_limit)
    faults = Counter(album.faults + [reason for reason in masks.values() if isinstance(reason, str)])
    evaluation = mapping(run.summary.get("evaluation"))
    script = (HERE / "report.js").read_text(encoding="utf-8")
    environment = _environment()
    return environment.get_template("template.html").render(
        title=run.root.resolve().name,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),  # the package's own file
        script=Markup(script),  # the package's own file
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        summary=run.summary,
        headline=stats.headline(run.summary),
        kinds=stats.kinds(run),
        stages=stats.stages(run),
        guidance=stats.guidance_tables(evaluation),
        note=text(evaluation.get("note")),
        rule=text(evaluation.get("rule")),
        curves=stats.curves(run.log),
        funnel=stats.funnel(run),
        losses=stats.losses(run),
        diagnostics=stats.mask_diagnostics((sides for sides in masks.values() if isinstance(sides, dict)), every),
        gallery=gallery,
        sources=album.sources,
        total=len(run.items),
        shown=len(items),
        statuses=stats.statuses(run),
        shown_statuses=Counter(item["status"] for item in items),
        item_kinds=sorted({item["kind"] for item in items}),
        reasons=sorted({item["group"] for item in items if item["group"]}),
        data=script_json({"items": items, "sources": album.sources, "pixelated": album.pixelated}),
        pixelated=album.pixelated,
        versions=run.summary.get("versions"),
        config=run.config,
        notes=[
            *run.notes,
            *(f"{reason}" + (f" ({count} times)" if count > 1 else "") for reason, count in faults.items()),
        ],
    )


def script_json(value: object) -> Markup:
    """JSON that is safe inside a <script> element: no `<`, `>`, `&` or line separator appears in it."""
    dumped = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        dumped = dumped.replace(character, f"\\u{ord(character):04x}")
    return Markup(dumped)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return ABSENT if value is None else f"{100 * value:.{digits}f}%"


def points(value: float | None, digits: int = 1) -> str:
    """A difference of two shares in percentage points, signed."""
    return ABSENT if value is None else f"{100 * value:+.{digits}f}".replace("-", "\u2212")


def signed(value: float | None, digits: int = 2) -> str:
    """A signed number with a true minus sign."""
    return "" if value is None else f"{value:+.{digits}f}".replace("-", "\u2212")


def duration(value: float | None) -> str:
    """Seconds as 48.2 s, 5 min 12 s or 2 h 03 min."""
    if value is None:
        return ABSENT
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, points=points, signed=signed, duration=duration, short=short, number=number
    )
    environment.globals.update(error_of=stats.standard_error)
    return environment

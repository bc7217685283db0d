"""Build and write the page: one file that requests nothing, with the same bytes for the same run."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from ospo_fast.errors import Failure, UsageError
from ospo_fast.pipeline import describe_kept
from ospo_fast.records import iter_pairs, os_errors, sweep_temporary_files, write_atomic
from ospo_fast.report import inspector, stats
from ospo_fast.report.charts import format_number
from ospo_fast.report.images import Album
from ospo_fast.report.load import load_run, mapping, number, text
from ospo_fast.report.masks import load_masks
from ospo_fast.restarts import refuse_links

if TYPE_CHECKING:
    from ospo_fast.report.masks import Arrays

HERE = Path(__file__).parent


def write_report(run_dir: Path, out: Path | None = None, *, limit: int = 120, gallery_limit: int = 24) -> Path:
    """Write the report of a run as one self-contained HTML page.

    Broken files, images, masks and records are named on the page. The page is written atomically.

    Args:
        run_dir: a run folder, finished or not. Sections without data are omitted. Values that are missing in the
            summary.json of a demo are "not measured"; a run without that file has only the values that it knows.
        out: the file, or a folder for index.html; default: run_dir/report/index.html.
        limit: maximum number of prompts in the pair inspector. The page states how many it omits.
        gallery_limit: maximum number of cards in the before/after gallery.

    Returns:
        The path of the page.

    Raises:
        OspoError: the folder is missing, holds nothing that can be reported, or the page cannot be written; without
            `out`, also where report/ is a symbolic link.
        UsageError: a limit below 1.

    """
    for name, value in (("limit", limit), ("gallery_limit", gallery_limit)):
        if value < 1:
            raise UsageError(f"{name}: got {value}, expected at least 1")
    run_dir = Path(run_dir)
    target = run_dir / "report" / "index.html" if out is None else Path(out)
    with os_errors("write", target):
        if out is None:
            refuse_links(target.parent)
            sweep_temporary_files(target.parent)
        if target.is_dir() or (out is not None and target.suffix.lower() not in {".html", ".htm"}):
            target /= "index.html"
    with os_errors("read", run_dir):
        html = render(run_dir, limit=limit, gallery_limit=gallery_limit)
    write_atomic(target, html.encode("utf-8", "replace"))  # a record may hold a lone surrogate
    return target


def render(run_dir: Path, *, limit: int, gallery_limit: int) -> str:
    """The page of a run folder."""
    run = load_run(run_dir)
    album = Album(run.root)
    records = [item.record for item in run.items]
    pairs = list(iter_pairs(records))
    masks = [load_masks(run.root, pair.pair) for pair in pairs]
    of_first_pair: dict[str, Arrays | Failure] = {}
    for pair, result in zip(pairs, masks, strict=True):  # not by pair_id: an item may have the id of another's pair
        of_first_pair.setdefault(pair.record["item_id"], result)
    items = [
        inspector.describe(item, run, album, of_first_pair.get(item.record["item_id"]))
        for item in inspector.sample(run.items, limit)
    ]
    gallery = stats.gallery(run.gallery, album, gallery_limit)
    with_path = (result for pair, result in zip(pairs, masks, strict=True) if pair.pair.get("mask_path"))
    failures = Counter(map(str, [*album.failures, *(result for result in with_path if isinstance(result, Failure))]))
    summary = stats.own_summary(run) if run.own else run.summary
    script = (HERE / "report.js").read_text(encoding="utf-8")
    return _template().render(
        title=run.root.resolve().name,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),  # the package's own file
        script=Markup(script),  # the package's own file
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        own=run.own,
        selected=not run.own or "pairs" in summary,
        pictured=bool(album.sources or album.failures),
        summary=summary,
        headline=stats.headline(summary),
        kinds=stats.kind_rows(run),
        stages=stats.stage_rows(run),
        guidance=stats.guidance_tables(mapping(run.summary, "evaluation")),
        rule=text(mapping(run.summary, "evaluation").get("rule")),
        curves=stats.curves(run.log, run.kept),
        kept=describe_kept(run.kept) if number(run.kept.get("step")) is not None else "",
        funnel=stats.funnel(run),
        drop_reasons=stats.drop_reasons(run),
        diagnostics=stats.mask_diagnostics([m for m in masks if not isinstance(m, Failure)], records),
        guide=stats.mask_guide(run),
        gallery=gallery,
        total=len(run.items),
        shown=len(items),
        statuses=stats.status_counts(run.items),
        shown_statuses=Counter(item["status"] for item in items),
        item_kinds=sorted({item["kind"] for item in items}),
        reasons=sorted({item["group"] for item in items if item["group"]}),
        data=script_json({"items": items, "sources": album.sources}),
        pixelated=album.pixelated,
        versions=run.versions,
        settings=stats.changed_settings(run),
        adapter=run.adapter,
        config=run.config,
        notes=[*run.notes, *(f"{reason} ({n} times)" if n > 1 else reason for reason, n in failures.items())],
    )


def script_json(value: object) -> Markup:
    """Encode JSON that is safe inside a <script> element: without `<`, `>`, `&` and line separators."""
    dumped = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        dumped = dumped.replace(character, f"\\u{ord(character):04x}")
    return Markup(dumped)


def percent(value: float) -> str:
    """Format a share as a percentage."""
    return f"{100 * value:.1f}%"


def points(value: float) -> str:
    """Format a difference of two shares in percentage points, signed."""
    return f"{100 * value:+.1f}".replace("-", "\u2212")


def signed(value: float) -> str:
    """Format a number with two decimals, signed."""
    return f"{value:+.2f}".replace("-", "\u2212")


def integer(value: float) -> str:
    """Format a whole number with thousands separators."""
    return f"{value:,.0f}"


def duration(value: float) -> str:
    """Format seconds as 48.2 s, 5 min 12 s or 2 h 03 min."""
    if value < 60:
        return f"{value:.1f} s"
    seconds = round(value)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


@functools.cache  # compiling the template takes longer than rendering a small run
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    for function in (percent, points, signed, integer, duration, format_number):
        environment.filters[function.__name__] = _skip_none(function)
    return environment.get_template("template.html")


def _skip_none(function: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else function(value)

"""The figures of the page's static part: headline, tables, funnel, curves, mask diagnostics, gallery."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ospo_fast.report.charts import histogram, line_chart
from ospo_fast.report.inspector import DROPPED, KEPT, general, margin_of, reason_of, status_of
from ospo_fast.report.load import STORES, entries, kind_of, mapping, number, pairs, text
from ospo_fast.report.masks import SIDES, coverage, entropy, overlap

if TYPE_CHECKING:
    from collections.abc import Iterable

    from markupsafe import Markup

    from ospo_fast.report.images import Album
    from ospo_fast.report.load import Record, Run

CURVES: tuple[tuple[str, str, tuple[float | None, float | None]], ...] = (
    ("alignment", "Alignment", (0, 1)),
    ("loss", "Loss", (None, None)),
    ("simpo", "SimPO term", (None, None)),
    ("conditional", "Conditional term", (None, None)),
    ("sft", "SFT term", (None, None)),
    ("accuracy", "Pair accuracy", (0, 1)),
    ("margin", "Reward margin", (None, None)),
    ("mask_coverage", "Share of the image under online masks", (0, 1)),
    ("lr", "Learning rate", (0, None)),
    ("grad_norm", "Gradient norm", (0, None)),
)


def headline(summary: Record) -> dict[str, Any]:
    """Before, after, gain, their standard errors and the seeds; None for each that summary.json does not give.

    Errors of before and after are looked for in `evaluation` too, at its `guidance_scale`. `alignment_std` is the
    standard error of the gain.
    """
    before, after = number(summary.get("alignment_before")), number(summary.get("alignment_after"))
    evaluation = mapping(summary.get("evaluation"))
    errors = {side: standard_error(summary, f"alignment_{side}") for side in ("before", "after", "gain")}
    scale = str(evaluation.get("guidance_scale"))
    for side in ("before", "after"):
        if errors[side] is None:
            errors[side] = standard_error(mapping(evaluation.get(side)), scale)
    if errors["gain"] is None:
        errors["gain"] = number(summary.get("alignment_std"))
    return {
        "before": before,
        "after": after,
        "gain": None if before is None or after is None else after - before,
        "seeds": _seeds(summary.get("seeds")),
        "errors": errors,
    }


def standard_error(record: Record, name: str) -> float | None:
    """The standard error that a record gives for its figure `name`, as `<name>_std` or inside the figure, or None."""
    inside = mapping(record.get(name))
    candidates = [record.get(f"{name}_{ending}") for ending in ("std", "se", "standard_error")]
    candidates += [inside.get(key) for key in ("standard_error", "se", "std")]
    return next((error for error in map(number, candidates) if error is not None), None)


def kinds(run: Run) -> list[dict[str, Any]]:
    """Per kind: items, pairs, mean margin of the run; alignment before and after with standard errors, where given.

    A missing standard error of a share p over n drawings is √(p(1−p)/n).
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in run.items:
        groups[kind_of(record)].append(record)
    measured = mapping(mapping(run.summary.get("evaluation")).get("by_kind"))
    rows = []
    for kind in [*groups, *(str(kind) for kind in measured if kind not in groups)]:
        records = groups.get(kind, [])
        kept = [record for record in records if status_of(record, run.reached[str(record["item_id"])]) == KEPT]
        found = [pair for record in kept for pair in pairs(record)]
        margins = [margin for margin in map(margin_of, found) if margin is not None]
        entry = mapping(measured.get(kind))
        count = number(entry.get("n"))
        before, after = number(entry.get("before")), number(entry.get("after"))
        rows.append(
            {
                "kind": kind,
                "items": len(records),
                "pairs": len(found),
                "margin": fmean(margins) if margins else None,
                "before": before,
                "after": after,
                "before_error": _share_error(standard_error(entry, "before"), before, count),
                "after_error": _share_error(standard_error(entry, "after"), after, count),
                "change": None if before is None or after is None else after - before,
                "n": int(count) if count is not None else None,
            }
        )
    return rows


def stages(run: Run) -> list[dict[str, Any]]:
    """Per stage: seconds, items, items a second, peak MB; stages in the order in which they run."""
    order = {name: place for place, name in enumerate(STORES)}
    longest = max((number(entry.get("seconds")) or 0.0 for entry in run.stages.values()), default=0.0)
    rows = []
    for name, entry in sorted(run.stages.items(), key=lambda pair: order.get(pair[0], len(order))):
        seconds, items = number(entry.get("seconds")), number(entry.get("items"))
        rows.append(
            {
                "name": name,
                "seconds": seconds,
                "items": items,
                "share": (seconds or 0.0) / longest if longest else 0.0,
                "rate": items / seconds if items and seconds else None,
                "peak_mb": number(entry.get("peak_mb")),
            }
        )
    return rows


def funnel(run: Run) -> list[dict[str, Any]]:
    """From prompts to masked pairs: at each step how many there are, out of how many there could be."""
    items = run.items
    if not items:
        return []
    variants = sum(1 for record in items for variant in entries(record.get("negative_prompt")) if variant)
    per_item = max((len(entries(record.get("negative_prompt"))) for record in items), default=0)
    images: dict[str, list[Record]] = {side: [] for side in ("base", "negative")}
    for record in items:
        for side, found in images.items():
            metadata = record.get(f"{side}_metadata")
            found += (
                [entry for entry in metadata.values() if isinstance(entry, dict)] if isinstance(metadata, dict) else []
            )
    drawn = sum(map(len, images.values()))
    kept = [record for record in items if status_of(record, run.reached[str(record["item_id"])]) == KEPT]
    found = [pair for record in kept for pair in pairs(record)]
    steps: list[tuple[str, str, int, int]] = [("prompts", "Prompts written", len(items), len(items))]
    if per_item:
        steps.append(("variants", "Near-miss variants", variants, per_item * len(items)))
    if drawn:
        most = max(len(mapping(record.get("base_metadata"))) for record in items)
        draws = max(1, math.ceil(most / (per_item or most or 1)))
        steps.append(("images", "Images drawn", drawn, max((draws + 1) * variants, drawn)))
    for side, label in (("base", "Base images judged right"), ("negative", "Variant images judged wrong")):
        judged = [entry for entry in images[side] if isinstance(entry.get("kept"), bool)]
        if judged:
            steps.append((side, label, sum(entry["kept"] for entry in judged), len(judged)))
    if {"select", "masks"} & set(run.present):
        steps.append(("pairs", "Prompts with a pair", len(kept), len(items)))
    if "masks" in run.present:
        steps.append(
            ("masks", "Pairs with object masks", sum(bool(pair.get("mask_path")) for pair in found), len(found))
        )
    return [{"name": name, "label": label, "count": count, "of": of} for name, label, count, of in steps]


def losses(run: Run) -> list[tuple[str, list[tuple[str, int]]]]:
    """Why things fell out, counted: (what, [(reason, count), …]), the most frequent first."""
    dropped: Counter[str] = Counter()
    verdicts: dict[str, Counter[str]] = {"base": Counter(), "negative": Counter()}
    variants: Counter[str] = Counter()
    unmasked: Counter[str] = Counter()
    for record in run.items:
        reached = run.reached[str(record["item_id"])]
        status = status_of(record, reached)
        if status != KEPT:
            dropped[general(reason_of(record, reached))] += 1
        elif "masks" in run.present:
            bare = (text(pair.get("mask_reason")) for pair in pairs(record) if not pair.get("mask_path"))
            unmasked.update(general(reason or "no reason recorded") for reason in bare)
        variants.update(general(text(reason)) for reason in entries(record.get("variant_reasons")) if reason)
        for side, counter in verdicts.items():
            metadata = record.get(f"{side}_metadata")
            for entry in metadata.values() if isinstance(metadata, dict) else ():
                if isinstance(entry, dict) and entry.get("kept") is False:
                    counter[general(text(entry.get("reason")) or "no reason recorded")] += 1
    earlier = [
        (f"Left out by the {name} stage", _counts(entry.get("dropped")))
        for name, entry in run.stages.items()
        if isinstance(entry.get("dropped"), dict)
    ]
    tables = [
        *earlier,
        ("Variants left out", variants.most_common()),
        ("Prompts without a pair", dropped.most_common()),
        ("Base images turned down", verdicts["base"].most_common()),
        ("Variant images turned down", verdicts["negative"].most_common()),
        ("Pairs without masks", unmasked.most_common()),
    ]
    return [(label, counts) for label, counts in tables if counts]


def curves(log: list[Record]) -> list[dict[str, Any]]:
    """One chart for each quantity of the training log that has at least one finite value."""
    charts = []
    for name, label, bounds in CURVES:
        rows = [(step, value, _error(line, name)) for line in log for step, value in _reading(line, name)]
        rows.sort(key=lambda row: row[0])
        if not rows or (name == "conditional" and not any(value for _, value, _ in rows)):
            continue
        points = [(step, value) for step, value, _ in rows]
        markers = name == "alignment"
        svg = line_chart(
            points,
            label=f"{label} over {len(points)} training steps, from {points[0][1]:.4g} to {points[-1][1]:.4g}",
            errors=[error for _, _, error in rows] if markers else None,
            markers=markers,
            noisy=name != "lr",
            bounds=bounds,
        )
        charts.append({"name": name, "label": label, "svg": svg, "last": points[-1][1]})
    return charts


def mask_diagnostics(found: Iterable[dict[str, Any]], records: Iterable[Record] = ()) -> dict[str, Any] | None:
    """Coverage, entropy, overlap and alarms over the masks that load_masks gives; None where there are none.

    Of the records, `mask_stats` give the mean entropy of the attention of each layer, and `unmatched_objects` the
    objects that have no mask of their own, counted by reason.
    """
    covers: dict[str, list[float]] = {side: [] for side in SIDES}
    entropies, overlaps = [], []
    for sides in found:
        for side in SIDES:
            covers[side].append(coverage(sides[side]["union"]))
            entropies += [value for value in map(entropy, sides[side]["maps"]) if value is not None]
        value = overlap(sides["chosen"]["union"], sides["rejected"]["union"])
        overlaps += [] if value is None else [value]
    every = [*covers["chosen"], *covers["rejected"]]
    if not every:
        return None
    chart: Markup = histogram(every, label=f"Share of the grid covered by each of {len(every)} masks")
    return {
        "items": len(covers["chosen"]),
        "chosen": fmean(covers["chosen"]),
        "rejected": fmean(covers["rejected"]),
        "entropy": fmean(entropies) if entropies else None,
        "overlap": fmean(overlaps) if overlaps else None,
        "empty": sum(value == 0 for value in every),
        "full": sum(value == 1 for value in every),
        "chart": chart,
        **_mask_records(records),
    }


def _mask_records(records: Iterable[Record]) -> dict[str, Any]:
    layers: dict[int, list[float]] = defaultdict(list)
    unmatched: Counter[str] = Counter()
    for record in records:
        unmatched.update(text(reason) for reason in mapping(record.get("unmatched_objects")).values())
        stats = mapping(record.get("mask_stats"))
        for side in SIDES:
            for layer, value in zip(
                entries(stats.get("layers")), entries(mapping(stats.get(side)).get("entropy")), strict=False
            ):
                reading = number(value)
                if isinstance(layer, int) and reading is not None:
                    layers[layer].append(reading)
    return {
        "layers": [(layer, fmean(values)) for layer, values in sorted(layers.items())],
        "unmatched": unmatched.most_common(),
    }


def gallery(lines: list[Record], album: Album, limit: int) -> dict[str, Any] | None:
    """Drawings of the same prompts and seeds before and after training, `limit` of them spread evenly over the file."""
    known = [line for line in lines if isinstance(line.get("before"), dict) and isinstance(line.get("after"), dict)]
    if not known:
        return None
    counts = Counter(_outcome(line) for line in known)
    size = min(limit, len(known))
    cards = [
        {
            "prompt": text(line.get("prompt")),
            "kind": text(line.get("kind")) or "unknown",
            "outcome": _outcome(line),
            "sides": [
                {"name": side, "image": album.add(line[side].get("path")), "correct": line[side].get("correct")}
                for side in ("before", "after")
            ],
        }
        for line in (known[index * len(known) // size] for index in range(size))
    ]
    outcomes = ("mended", "broken", "right", "wrong", "unjudged")
    shown = Counter(card["outcome"] for card in cards)
    return {
        "cards": cards,
        "counts": {name: counts[name] for name in outcomes if counts[name]},
        "shown": {name: shown[name] for name in outcomes if shown[name]},
        "total": len(known),
        "kinds": sorted({card["kind"] for card in cards}),
    }


def guidance_tables(evaluation: object) -> list[dict[str, Any]]:
    """Alignment before and after at each guidance scale, on test and on validation prompts: title and rows of each."""
    given = mapping(evaluation)
    own = mapping(given.get("each_at_its_best"))
    tables = []
    for title, source in (("Test prompts", given), ("Validation prompts", mapping(given.get("validation")))):
        sides = {side: mapping(source.get(side)) for side in ("before", "after")}
        rows = [
            {
                "name": scale,
                "chosen": scale == str(given.get("guidance_scale")),
                **{side: number(found.get(scale)) for side, found in sides.items()},
                **{f"{side}_error": standard_error(found, scale) for side, found in sides.items()},
            }
            for scale in sorted({scale for found in sides.values() for scale in found}, key=_scale)
        ]
        if rows and source is given and own:
            name = f"each its best ({text(own.get('guidance_before'))}, {text(own.get('guidance_after'))})"
            best = {side: number(own.get(side)) for side in ("before", "after")}
            rows.append({"name": name, "chosen": False, **best, "before_error": None, "after_error": None})
        if rows:
            tables.append({"title": title, "rows": rows})
    return tables


def statuses(run: Run) -> dict[str, int]:
    """How many items are kept, dropped and unfinished."""
    counts = Counter(status_of(record, run.reached[str(record["item_id"])]) for record in run.items)
    return {name: counts[name] for name in (KEPT, DROPPED, "unfinished") if counts[name]}


def _outcome(line: Record) -> str:
    before, after = line["before"].get("correct"), line["after"].get("correct")
    if not isinstance(before, bool) or not isinstance(after, bool):
        return "unjudged"
    if before == after:
        return "right" if after else "wrong"
    return "mended" if after else "broken"


def _reading(line: Record, name: str) -> list[tuple[float, float]]:
    step, value = number(line.get("step")), number(line.get(name))
    return [] if step is None or value is None else [(step, value)]


def _error(line: Record, name: str) -> float | None:
    given = standard_error(line, name)
    return number(line.get("standard_error")) if given is None and name == "alignment" else given


def _scale(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return math.inf, name


def _share_error(given: float | None, share: float | None, count: float | None) -> float | None:
    if given is not None or share is None or not count or not 0 <= share <= 1:
        return given
    return math.sqrt(share * (1 - share) / count)


def _counts(value: object) -> list[tuple[str, int]]:
    if not isinstance(value, dict):
        return []
    counts = Counter({str(reason): int(count) for reason, count in value.items() if number(count)})
    return counts.most_common()


def _seeds(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        counts = ", ".join(f"{_count(entry)} {key}" for key, entry in value.items() if key != "note")
        return f"{counts}; {text(value['note'])}" if "note" in value else counts
    return _count(value)


def _count(value: object) -> str:
    return str(len(value)) if isinstance(value, (list, tuple)) else text(value)

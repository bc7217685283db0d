"""The numbers of the page: headline, tables, funnel, curves, mask diagnostics, gallery."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from ospo_fast.config import MODEL_FILES, Config, load_config, model_family, saved_values
from ospo_fast.errors import Failure, attempt
from ospo_fast.ops.object_masks import spatial_entropy
from ospo_fast.records import ROLES, SIDES, image_verdicts, iter_pairs
from ospo_fast.report.charts import histogram, line_chart
from ospo_fast.report.inspector import margin, reason_group
from ospo_fast.report.load import DROPPED, KEPT, MAX_BYTES, UNFINISHED, Item, Run, mapping, number, text
from ospo_fast.report.masks import coverage, union_iou
from ospo_fast.stages.mask_stats import run_stats
from ospo_fast.stages.train_settings import loss_config, uses_masks, uses_stored_masks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ospo_fast.records import Pair, Record
    from ospo_fast.report.images import Album
    from ospo_fast.report.masks import Arrays

CURVES: tuple[tuple[str, str, tuple[float | None, float | None]], ...] = (
    ("alignment", "Alignment", (0, 1)),
    ("reward", "Mean reward", (None, None)),
    ("kl", "KL divergence from the model before training", (0, None)),
    ("loss", "Loss", (None, None)),
    ("simpo", "SimPO term", (None, None)),
    ("conditional", "Conditional term", (None, None)),
    ("sft", "SFT term", (None, None)),
    ("accuracy", "Pair accuracy", (0, 1)),
    ("margin", "Reward margin", (None, None)),
    ("chosen_logps", "Log-probability of chosen images", (None, None)),
    ("rejected_logps", "Log-probability of rejected images", (None, None)),
    ("validation/loss", "Loss of held-out pairs", (None, None)),
    ("validation/accuracy", "Accuracy of held-out pairs", (0, 1)),
    ("validation/margin", "Reward margin of held-out pairs", (None, None)),
    ("validation/chosen_logps", "Log-probability of held-out chosen images", (None, None)),
    ("validation/rejected_logps", "Log-probability of held-out rejected images", (None, None)),
    ("mask_coverage", "Online mask coverage", (0, 1)),
    ("lr", "Learning rate", (0, None)),
    ("grad_norm", "Gradient norm", (0, None)),
)
MAX_CATEGORIES = 12  # that have charts of their own
OUTCOMES = ("fixed", "broken", "correct", "wrong", "unjudged")


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """Alignment before and after training and its gain, with standard errors; None where summary.json has no value."""
    before, after = number(summary.get("alignment_before")), number(summary.get("alignment_after"))
    return {
        "before": before,
        "after": after,
        "gain": _difference(after, before),
        "errors": {
            "before": number(summary.get("alignment_before_std")),
            "after": number(summary.get("alignment_after_std")),
            "gain": number(summary.get("alignment_std")),
        },
        "seeds": _describe_seeds(mapping(summary, "seeds")),
    }


def own_summary(run: Run) -> dict[str, float]:
    """Return what a run without summary.json knows of the numbers in it: alignment, pairs, and seconds of all stages.

    Alignment is that of the evaluations during training, on validation prompts: before the first step, and of the
    weights that training kept, or else of the last evaluation.
    """
    values: dict[str, float | None] = {}
    evaluations = {
        step: line
        for line in run.log
        if (step := number(line.get("step"))) is not None and number(line.get("alignment")) is not None
    }
    last = number(run.kept.get("step")) if run.kept else max(evaluations, default=None)
    for side, step in (("before", 0.0), ("after", last)):
        known = step is not None and (step > 0 or side == "before" or bool(run.kept))
        line = evaluations.get(step, {}) if step is not None and known else {}
        values[f"alignment_{side}"] = number(line.get("alignment"))
        values[f"alignment_{side}_std"] = _count(line.get("standard_error"))
    if any(item.status != UNFINISHED for item in run.items):
        values["pairs"] = float(len(_pairs(run.items)))
    if seconds := [value for row in run.stages.values() if (value := _count(row.get("seconds"))) is not None]:
        values["seconds"] = sum(seconds)
    return {name: value for name, value in values.items() if value is not None}


def changed_settings(run: Run) -> list[tuple[str, str, str]]:
    """Return key, value and default of each setting that differs from the defaults of the run's preset and model."""
    config = _config(run)
    if isinstance(config, Failure):
        return []
    # A preset that is named replaces the loss of the model's family, so it is named only where the run named one.
    named = [] if config.preset == Config.preset else [f"preset={config.preset}"]
    defaults = load_config(named, family=model_family(config.model))
    values, usual = (dict(_flatten(saved_values(one))) for one in (config, replace(defaults, preset=Config.preset)))
    of_run = {"out", "prompts.exclude"}  # paths that each run has
    return [
        (key, _yaml(values.get(key)), _yaml(usual.get(key)))
        for key in dict.fromkeys([*values, *usual])
        if key not in of_run and values.get(key) != usual.get(key)
    ]


def kind_rows(run: Run) -> list[dict[str, Any]]:
    """Items, pairs and mean margin of each kind of prompt; alignment before and after, with standard errors."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in run.items:
        groups[item.kind].append(item)
    evaluated = mapping(run.summary, "evaluation", "by_kind")
    rows = []
    for kind in dict.fromkeys([*groups, *evaluated]):
        pairs = _pairs(groups[kind])
        margins = [value for value in map(margin, pairs) if value is not None]
        metrics = {name: number(value) for name, value in mapping(evaluated, kind).items()}
        before, after = metrics.get("before"), metrics.get("after")
        rows.append(
            {
                "kind": kind,
                "items": len(groups[kind]),
                "pairs": len(pairs),
                "margin": fmean(margins) if margins else None,
                "before": before,
                "after": after,
                "before_error": metrics.get("before_std"),
                "after_error": metrics.get("after_std"),
                "change": _difference(after, before),
                "prompts": metrics.get("n"),
            }
        )
    return rows


STAGE_COSTS = ("device_seconds", "tokens_s", "images_s", "mfu", "kept", "dropped")  # of `work.sum_costs`


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """Seconds, items, rate, cost and peak MB of each stage, and its share of the time of the longest stage."""
    longest = max((_count(metrics.get("seconds")) or 0.0 for metrics in run.stages.values()), default=0.0)
    rows = []
    for name, metrics in run.stages.items():
        seconds, items, peak_mb = (_count(metrics.get(key)) for key in ("seconds", "items", "peak_mb"))
        rate = items / seconds if items and seconds else None
        share = seconds / longest if seconds else 0.0
        rows.append(
            {"name": name, "seconds": seconds, "share": share, "items": items, "rate": rate, "peak_mb": peak_mb}
            | {key: _count(metrics.get(key)) for key in STAGE_COSTS}
        )
    return rows


def funnel(run: Run) -> list[dict[str, Any]]:
    """The steps from prompts to pairs with masks, each with its count and the maximum of it."""
    records = [item.record for item in run.items]
    if not records:
        return []
    steps: list[tuple[str, str, int, int]] = [("prompts", "Prompts", len(records), len(records))]
    negatives = [record.get("negative_prompt") or [] for record in records]
    per_item, variants = max(map(len, negatives)), sum(1 for prompts in negatives for prompt in prompts if prompt)
    if per_item:
        steps.append(("variants", "Hard negatives", variants, per_item * len(records)))
    images = [list(image_verdicts(record)) for record in records]
    generated = sum(map(len, images))
    if generated:
        max_base = max(sum(role == "base" for role, *_ in own) for own in images)
        per_variant = 1 + max(1, math.ceil(max_base / (per_item or max_base or 1)))
        steps.append(("images", "Images generated", generated, max(per_variant * variants, generated)))
    for role, label in zip(ROLES, ("Base images judged correct", "Negative images judged wrong"), strict=True):
        found = [verdict.get("kept") for own in images for key, _, verdict in own if key == role]
        kept = [value for value in found if value is not None]
        if kept:
            steps.append((role, label, sum(kept), len(kept)))
    if any(item.status != UNFINISHED for item in run.items):
        steps.append(("pairs", "Prompts with a pair", sum(item.status == KEPT for item in run.items), len(records)))
    pairs = _pairs(run.items)
    if any("mask_path" in pair or "mask_reason" in pair for pair in pairs):
        steps.append(
            ("masks", "Pairs with object masks", sum(bool(pair.get("mask_path")) for pair in pairs), len(pairs))
        )
    return [{"name": name, "label": label, "count": count, "of": of} for name, label, count, of in steps]


def on_pairs(run: Run) -> bool:
    """Return whether training is on pairs: that of GRPO is on prompts alone."""
    return not any("policy" in row for row in run.log)


def drop_reasons(run: Run) -> list[tuple[str, list[tuple[str, int]]]]:
    """Count the reasons why hard negatives, prompts, images and masks were dropped.

    Returns:
        (what, [(reason, count), …]) of each, most frequent first.

    """
    records = [item.record for item in run.items]
    reasons: dict[str, Iterable[str | None]] = {
        "Hard negatives skipped": (reason for record in records for reason in record.get("variant_reasons") or []),
        "Prompts without a pair": (item.reason for item in run.items),
        "Base images not judged correct": _dropped_images(records, "base"),
        "Negative images not judged wrong": _dropped_images(records, "negative"),
        "Pairs without masks": (pair.get("mask_reason") for pair in _pairs(run.items)),
    }
    if not on_pairs(run):
        del reasons["Prompts without a pair"]
    counts = {label: Counter(reason_group(reason) for reason in given if reason) for label, given in reasons.items()}
    return [(label, counter.most_common()) for label, counter in counts.items() if counter]


def curves(log: list[dict[str, Any]], kept: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """One chart for each quantity of the training log that has at least one finite value.

    The number over a chart is the last one; over the metric that chose the `kept` weights, that of these weights.
    """
    charts = []
    for name, label, bounds in (*CURVES, *_category_curves(log)):
        rows = [
            (step, value, _count(line.get("standard_error")))
            for line in log
            if (step := number(line.get("step"))) is not None and (value := number(line.get(name))) is not None
        ]
        rows.sort(key=lambda row: row[0])
        if not rows or (name == "conditional" and not any(value for _, value, _ in rows)):
            continue
        points = [(step, value) for step, value, _ in rows]
        evaluated = name == "alignment" or name.startswith("validation/")
        svg = line_chart(
            points,
            label=f"{label} over {len(points)} training steps, from {points[0][1]:.4g} to {points[-1][1]:.4g}",
            errors=[error for _, _, error in rows] if name == "alignment" else None,
            markers=evaluated,
            noisy=name != "lr",
            bounds=bounds,
        )
        chosen = number(kept.get("value")) if kept and kept.get("metric") == name else None
        charts.append({"name": name, "label": label, "svg": svg, "last": points[-1][1] if chosen is None else chosen})
    return charts


def _category_curves(log: list[dict[str, Any]]) -> list[tuple[str, str, tuple[None, None]]]:
    """The log-probabilities of categories of prompts: of the held-out pairs if there are any, else of steps."""
    labels = {name: label for name, label, _ in CURVES}
    keys = {key for line in log for key in line}
    for part in ("validation/", ""):
        names = [f"{part}{side}_logps" for side in SIDES]
        found = {key.removeprefix(f"{names[0]}/") for key in keys if key.startswith(f"{names[0]}/")}
        if found:
            categories = sorted(found)[:MAX_CATEGORIES]
            return [(f"{n}/{c}", f"{labels[n]}: {c[:40]}", (None, None)) for c in categories for n in names]
    return []


def mask_diagnostics(masks: list[Arrays], records: list[Record]) -> dict[str, Any] | None:
    """Means of coverage, entropy and IoU over the masks of all pairs, and counts of empty and full masks.

    From the records: mean entropy per layer, and counts of objects without a mask by reason. None without masks.
    """
    if not masks:
        return None
    covered = {side: [coverage(arrays[side]["union"]) for arrays in masks] for side in SIDES}
    maps = [torch.from_numpy(arrays[side]["maps"]) for arrays in masks for side in SIDES]
    entropies = [value for part in maps for value in spatial_entropy(part[part.sum((1, 2)) > 0]).tolist()]
    entropies = [value for value in map(number, entropies) if value is not None]  # of maps with negative values
    ious = [iou for iou in map(union_iou, masks) if iou is not None]
    shares = [share for side in SIDES for share in covered[side]]
    unmatched = Counter(reason for record in records for reason in (record.get("unmatched_objects") or {}).values())
    return {
        "items": len(masks),
        **{side: fmean(covered[side]) for side in SIDES},
        "entropy": fmean(entropies) if entropies else None,
        "iou": fmean(ious) if ious else None,
        "empty": shares.count(0),
        "full": shares.count(1),
        "chart": histogram(shares, label=f"Share of the grid covered by each of {len(shares)} masks"),
        "layers": run_stats(records)["entropy"],
        "unmatched": unmatched.most_common(),
    }


def mask_guide(run: Run) -> dict[str, Any]:
    """Collect what the explanation of the masks says: the settings of the run, and on Shapes the measured mask IoU.

    `recorded` is False where the run has no readable configuration; the settings are then the defaults. `iou` and
    `full` (of a mask of ones) are of the iteration that the page shows, or None.
    """
    loaded = _config(run)
    config = Config() if isinstance(loaded, Failure) else loaded
    loss = attempt(loss_config, config)
    if isinstance(loss, Failure):
        loaded, config, loss = loss, Config(), loss_config(Config())
    iterations = run.summary.get("iterations")
    first = iterations[0] if isinstance(iterations, list) and iterations else run.summary
    iou = number(mapping(first).get("mask_iou"))
    recorded = not isinstance(loaded, Failure)
    return {
        "recorded": recorded,
        "scaler": config.masks.scaler,
        "soft": config.masks.soft,
        "predicting": config.masks.rows == "predicting",
        "substring": config.masks.match == "substring",
        "choose": config.masks.choose,
        "official": config.masks.official is not None,
        "used": uses_masks(config),
        "online": not uses_stored_masks(config),
        "alpha": loss.mask_alpha,
        "gamma": loss.mask_gamma,
        "blur": loss.mask_blur,
        "shapes": iou is not None or (recorded and model_family(config.model) in MODEL_FILES),
        "iou": iou,
        "full": number(mapping(first).get("mask_iou_all_ones")),
    }


def gallery(lines: list[dict[str, Any]], album: Album, limit: int) -> dict[str, Any] | None:
    """Images of the same prompts and seeds before and after training, `limit` of them spaced evenly over the file."""
    lines = [line for line in lines if mapping(line, "before") and mapping(line, "after")]
    if not lines:
        return None
    size = min(limit, len(lines))
    cards = []
    for line in (lines[index * len(lines) // size] for index in range(size)):
        sides = []
        for side in ("before", "after"):
            image = album.add(text(line[side].get("path")))
            source, failure = (None, image.reason) if isinstance(image, Failure) else (album.sources[image], "")
            sides.append({"name": side, "source": source, "failure": failure, "correct": line[side].get("correct")})
        cards.append(
            {
                "prompt": str(line.get("prompt", "")),
                "kind": str(line.get("kind", "unknown")),
                "outcome": _outcome(line),
                "sides": sides,
            }
        )
    counts, shown = Counter(map(_outcome, lines)), Counter(card["outcome"] for card in cards)
    return {
        "cards": cards,
        "counts": {name: counts[name] for name in OUTCOMES if counts[name]},
        "shown": {name: shown[name] for name in OUTCOMES if shown[name]},
        "total": len(lines),
        "kinds": sorted({card["kind"] for card in cards}),
    }


def guidance_tables(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Alignment before and after at each guidance scale, of test and validation prompts: title and rows of each."""
    tables = []
    for title, source in (("Test prompts", evaluation), ("Validation prompts", mapping(evaluation, "validation"))):
        rows = []
        for scale in sorted({*mapping(source, "before"), *mapping(source, "after")}, key=_scale_order):
            row: dict[str, Any] = {"name": scale, "chosen": scale == str(evaluation.get("guidance_scale"))}
            for side in ("before", "after"):
                metrics = mapping(source, side, scale)
                row |= {side: number(metrics.get("alignment")), f"{side}_error": number(metrics.get("standard_error"))}
            rows.append(row)
        best = mapping(source, "each_at_its_best")
        if best:
            name = f"best of each ({best.get('guidance_before')}, {best.get('guidance_after')})"
            values = {side: number(best.get(side)) for side in ("before", "after")}
            rows.append({"name": name, "chosen": False, **values, "before_error": None, "after_error": None})
        if rows:
            tables.append({"title": title, "rows": rows})
    return tables


def status_counts(items: list[Item]) -> dict[str, int]:
    """Count the kept, dropped and unfinished items."""
    counts = Counter(item.status for item in items)
    return {name: counts[name] for name in (KEPT, DROPPED, UNFINISHED) if counts[name]}


def _config(run: Run) -> Config | Failure:
    """The configuration of the run, without the files of other folders that it may name."""
    path = run.root / "config.yaml"
    if not (path.is_file() and path.stat().st_size <= MAX_BYTES):
        return Failure("no configuration")
    return attempt(load_config, ["templates=null", "read_from=[]"], saved=path)


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield dotted keys and values. Counts of kinds stay one value: that of the defaults has other kinds."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and (not prefix or key == "train.loss"):
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _yaml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _pairs(items: list[Item]) -> list[Pair]:
    return [pair.pair for pair in iter_pairs(item.record for item in items)]


def _dropped_images(records: list[Record], role: str) -> Iterable[str]:
    images = (verdict for record in records for key, _, verdict in image_verdicts(record) if key == role)
    return (image.get("reason") or "no reason recorded" for image in images if image.get("kept") is False)


def _outcome(line: dict[str, Any]) -> str:
    before, after = line["before"].get("correct"), line["after"].get("correct")
    if not isinstance(before, bool) or not isinstance(after, bool):
        return "unjudged"
    if before == after:
        return "correct" if after else "wrong"
    return "fixed" if after else "broken"


def _count(value: object) -> float | None:
    """A number that cannot be negative, such as seconds; None if it is."""
    found = number(value)
    return None if found is None or found < 0 else found


def _scale_order(name: str) -> tuple[float, str]:
    """The order of guidance scales: by value, and at the end the names that are no numbers."""
    try:
        value = number(float(name))
    except ValueError:
        value = None
    return math.inf if value is None else value, name


def _difference(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value - base


def _describe_seeds(seeds: dict[str, Any]) -> str:
    """Format the seeds, for example "1 training, 2 sampling; note"."""
    counts = ", ".join(f"{len(values)} {name}" for name, values in seeds.items() if isinstance(values, list))
    return "; ".join(part for part in (counts, text(seeds.get("note"))) if part)

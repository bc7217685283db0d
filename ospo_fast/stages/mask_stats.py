"""Statistics of object masks: of a pair, as its record holds them, and of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from torch import Tensor

from ospo_fast.ops.object_masks import mask_iou
from ospo_fast.records import SIDES, Record


def pair_stats(unions: Tensor, entropies: Tensor, layers: list[int], selected: Tensor | None) -> dict[str, Any]:
    """Return `mask_stats` of a pair from its unions (2, H, W) and the entropies (L, 2, O) of its attention maps.

    selected (2, O): indices into the L `layers`, where one was selected for each object.

    Returns:
        "layers": the L layers.
        "iou": of the two masks; None if both are empty.
        "alarms": such as "chosen: empty".
        "chosen", "rejected": "coverage" (share of cells in the mask), "entropy" (per layer, mean over the objects) and
        "picked" (the selected layers).

    """
    iou = mask_iou(unions[0], unions[1])
    stats: dict[str, Any] = {"layers": layers, "iou": None if iou is None else round(iou, 4), "alarms": []}
    for n, side in enumerate(SIDES):
        share = float((unions[n] > 0).double().mean())
        if share in (0.0, 1.0):
            stats["alarms"].append(f"{side}: {'full' if share else 'empty'}")
        entropy = [round(float(value), 4) for value in entropies[:, n].mean(-1)]
        stats[side] = {"coverage": round(share, 4), "entropy": entropy}
        if selected is not None:
            stats[side]["picked"] = [layers[int(index)] for index in selected[n]]
    return stats


def run_stats(records: Iterable[Record]) -> dict[str, Any]:
    """Return the statistics of a run, from the records of its masks stage.

    They count pairs with and without masks (an item without a pair counts once), the reasons of the latter, alarms and
    nouns without a token, and hold the means of coverage, overlap and entropy per layer; a mean of nothing is None.
    """
    masked: list[dict[str, Any]] = []
    reasons, unmatched = Counter[str](), 0
    for record in records:
        unmatched += len(record.get("unmatched_objects") or ())
        entries: list[Any] = [*record.get("pairs", ())] or [record]
        for entry in entries:
            if entry.get("mask_stats"):
                masked.append(entry["mask_stats"])
            elif not entry.get("mask_path"):
                reasons[entry.get("mask_reason", "no mask")] += 1
    entropies: dict[int, list[float]] = {}
    for stats in masked:
        for side in SIDES:
            for layer, value in zip(stats["layers"], stats[side]["entropy"], strict=True):
                entropies.setdefault(layer, []).append(value)

    def mean(values: list[float]) -> float | None:
        return round(fmean(values), 4) if values else None

    return {
        "items": len(masked),
        "without": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
        "unmatched_objects": unmatched,
        "coverage": {side: mean([stats[side]["coverage"] for stats in masked]) for side in SIDES},
        "iou": mean([stats["iou"] for stats in masked if stats["iou"] is not None]),
        "entropy": {str(layer): mean(values) for layer, values in sorted(entropies.items())},
        "alarms": dict(Counter(alarm for stats in masked for alarm in stats["alarms"])),
    }

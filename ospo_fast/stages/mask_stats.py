"""Figures about object masks: of an item, as its record holds them, and of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ospo_fast.records import Record

SIDES = ("chosen", "rejected")


def map_entropy(maps: Tensor) -> Tensor:
    """−Σ p log p / log(H·W) of maps (..., H, W) divided by their sums: 1 is spread evenly; 0 for a map of zeros."""
    cells = maps.flatten(-2).double().clamp(min=0)
    p = cells / cells.sum(-1, keepdim=True).clamp(min=1e-300)
    entropy: Tensor = torch.special.entr(p).sum(-1) / torch.tensor(max(p.shape[-1], 2)).double().log()
    return entropy


def item_stats(unions: Tensor, entropies: Tensor, layers: list[int], picked: Tensor | None) -> dict[str, Any]:
    """What `mask_stats` of a record holds.

    unions (2, H, W) of chosen and rejected; entropies (L, 2, O) of the attention maps of each layer; picked (2, O): the
    layers chosen for each object, where one was. → {"layers": …, "iou": of the two masks or None where both are empty,
    "alarms": ["chosen: empty", …], "chosen" and "rejected": {"coverage": share of cells in the mask, "entropy": mean
    over the objects, for each layer, "picked": …}}.
    """
    covered = unions > 0
    either = int((covered[0] | covered[1]).sum())
    stats: dict[str, Any] = {
        "layers": layers,
        "iou": round(int((covered[0] & covered[1]).sum()) / either, 4) if either else None,
        "alarms": [],
    }
    for side, name in enumerate(SIDES):
        share = float(covered[side].double().mean())
        if share in (0.0, 1.0):
            stats["alarms"].append(f"{name}: {'full' if share else 'empty'}")
        stats[name] = {
            "coverage": round(share, 4),
            "entropy": [round(float(value), 4) for value in entropies[:, side].mean(-1)],
        }
        if picked is not None:
            stats[name]["picked"] = [layers[int(index)] for index in picked[side]]
    return stats


def run_stats(records: Iterable[Record]) -> dict[str, Any]:
    """The figures of a run, from the records of its masks stage.

    Items with and without masks, the reasons of the latter; means of coverage, overlap and, for each layer, entropy;
    alarms; nouns that no token matched. None where there is nothing to take a mean of.
    """
    kept, reasons, unmatched = [], Counter[str](), 0
    for record in records:
        unmatched += len(record.get("unmatched_objects", ()))
        if record.get("mask_stats"):
            kept.append(record["mask_stats"])
        elif not record.get("mask_path"):
            reasons[record.get("mask_reason", "no mask")] += 1
    entropies: dict[int, list[float]] = {}
    for stats in kept:
        for side in SIDES:
            for layer, value in zip(stats["layers"], stats[side]["entropy"], strict=True):
                entropies.setdefault(layer, []).append(value)

    def mean(values: list[float]) -> float | None:
        return round(fmean(values), 4) if values else None

    return {
        "items": len(kept),
        "without": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
        "unmatched_objects": unmatched,
        "coverage": {side: mean([stats[side]["coverage"] for stats in kept]) for side in SIDES},
        "iou": mean([stats["iou"] for stats in kept if stats["iou"] is not None]),
        "entropy": {str(layer): mean(values) for layer, values in sorted(entropies.items())},
        "alarms": dict(Counter(alarm for stats in kept for alarm in stats["alarms"])),
    }

"""One layer per object in place of the mean over layers: the sharpest, or the one that splits best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops.otsu import otsu_threshold

RULES = ("entropy", "separability")
REDUCTIONS = ("mean", "max")


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """What `choose_layers` returns."""

    maps: Tensor  # (B, O, H, W): of the chosen layers, in [0, 1]
    layers: Tensor  # (B, O) int64, indices into the layers given
    scores: Tensor  # (L, B, O): entropy (the lowest is chosen) or separability (the highest)


def choose_layers(
    maps: Tensor,
    used: Tensor,
    *,
    rule: str = "entropy",
    reduce: str = "max",
    temperature: float = 0.8,
) -> LayerChoice:
    """The layer of each object by a rule on its map m in each layer.

    maps (L, B, O, C, H, W): attention on each of an object's C tokens; used (B, O, C) bool: which of them there are.
    In each layer x = (x − min)/(max − min + 1e-8) over tokens and cells, then m = max or mean over the tokens.
    "entropy": the lowest −Σ p log p / log(H·W) of p = softmax(m / temperature) over the cells. "separability": the
    highest variance between the classes, w·(1 − w)·(m1 − m0)², on either side of Otsu's threshold. The first of equal
    layers. An object without tokens has a map of zeros and layer 0.
    Raises OpError: shapes that do not fit, unknown rules, values that are not finite.
    Source: the official implementation's variants.
    """
    if maps.dim() != 6 or not maps.is_floating_point() or 0 in (maps.shape[0], *maps.shape[4:]):
        raise OpError(f"choose_layers: maps are {maps.dtype} {tuple(maps.shape)}, expected float (L, B, O, C, H, W)")
    if used.dtype != torch.bool or used.shape != maps.shape[1:4]:
        raise OpError(
            f"choose_layers: used is {used.dtype} {tuple(used.shape)}, expected bool {tuple(maps.shape[1:4])}"
        )
    if rule not in RULES or reduce not in REDUCTIONS or not temperature > 0:
        raise OpError(
            f"choose_layers: rule is {rule!r}, reduce {reduce!r}, temperature {temperature}; expected one of "
            f"{', '.join(RULES)}, one of {', '.join(REDUCTIONS)}, and a positive number"
        )
    some = used[..., None, None]  # (B, O, C, 1, 1)
    if not bool(torch.where(some, maps, 0).isfinite().all()):
        raise OpError("choose_layers: maps hold NaN or infinity, expected finite attention")
    fused = _fused(maps.detach().float(), some, reduce)
    if rule == "entropy":
        p = (fused.flatten(3) / temperature).softmax(-1)
        scores = torch.special.entr(p).sum(-1) / torch.tensor(max(p.shape[-1], 2)).log()
        layers = scores.argmin(0)
    else:
        scores = _separability(fused)
        layers = scores.argmax(0)
    index = layers[None, :, :, None, None].expand(1, *fused.shape[1:])
    return LayerChoice(fused.gather(0, index)[0], layers, scores)


def best_layers(scores: Tensor, valid: Tensor, *, rule: str = "entropy", count: int = 1) -> list[int]:
    """The `count` layers that are best on the average of many objects, in ascending order: one choice for a model.

    scores (L, B, O) as of `choose_layers` with the same rule, valid (B, O) bool: which objects there are.
    Raises OpError: shapes that do not fit, an unknown rule, no object at all, more layers than there are.
    """
    if scores.dim() != 3 or valid.dtype != torch.bool or valid.shape != scores.shape[1:] or not bool(valid.any()):
        raise OpError(
            f"best_layers: scores are {scores.dtype} {tuple(scores.shape)}, valid {valid.dtype} {tuple(valid.shape)}; "
            "expected (L, B, O), and bool (B, O) with at least one object"
        )
    if rule not in RULES or not 1 <= count <= len(scores):
        raise OpError(
            f"best_layers: rule is {rule!r}, count {count}; expected one of {', '.join(RULES)}, and 1 to {len(scores)}"
        )
    mean = scores[:, valid].double().mean(1)
    order = mean.argsort(stable=True, descending=rule == "separability")
    return sorted(order[:count].tolist())


def _fused(maps: Tensor, some: Tensor, reduce: str) -> Tensor:
    """(L, B, O, H, W): tokens min-max normalised together, then reduced."""
    if maps.shape[3] == 0:
        return maps.sum(3)
    low = torch.where(some, maps, torch.inf).amin((3, 4, 5), keepdim=True)
    high = torch.where(some, maps, -torch.inf).amax((3, 4, 5), keepdim=True)
    scaled = torch.where(some, (maps - low) / (high - low + 1e-8), 0)
    return scaled.amax(3) if reduce == "max" else scaled.sum(3) / some.sum(2).clamp(min=1)


def _separability(maps: Tensor) -> Tensor:
    above = maps > otsu_threshold(maps)[..., None, None]
    share = above.float().mean((-2, -1))
    inside = torch.where(above, maps, 0).mean((-2, -1)) / share.clamp(min=1e-12)
    outside = torch.where(above, 0, maps).mean((-2, -1)) / (1 - share).clamp(min=1e-12)
    return share * (1 - share) * (inside - outside) ** 2

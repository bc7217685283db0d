"""One layer per object in place of the mean over layers: the sharpest, the one that splits best, or the one whose
mask parts what the picture shows best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops.otsu import otsu_threshold

RULES = ("entropy", "separability", "contrast")
REDUCTIONS = ("mean", "max")


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """What `choose_layers` returns."""

    maps: Tensor  # (B, O, H, W): of the chosen layers, in [0, 1]
    layers: Tensor  # (B, O) int64, indices into the layers given
    scores: Tensor  # (L, B, O): entropy (the lowest is chosen), separability or contrast (the highest)


def choose_layers(
    maps: Tensor,
    used: Tensor,
    *,
    rule: str = "entropy",
    reduce: str = "max",
    temperature: float = 0.8,
    features: Tensor | None = None,
) -> LayerChoice:
    """The layer of each object by a rule on its map m in each layer.

    maps (L, B, O, C, H, W): attention on each of an object's C tokens; used (B, O, C) bool: which of them there are.
    In each layer x = (x − min)/(max − min + 1e-8) over tokens and cells, then m = max or mean over the tokens.
    "entropy": the lowest −Σ p log p / log(H·W) of p = softmax(m / temperature) over the cells. "separability": the
    highest variance between the classes, w·(1 − w)·(m1 − m0)², on either side of Otsu's threshold. "contrast": the
    highest share of the variance of the cells' `features` that lies between the same two classes,
    (n1·|f1 − f|² + n0·|f0 − f|²) / Σ|f_i − f|². The first of equal layers. An object without tokens has a map of zeros
    and layer 0.
    features (B, H, W, E) float, for "contrast" alone: what each cell of the image shows, such as its code's embedding.
    Raises OpError: shapes that do not fit, unknown rules, values that are not finite.
    Source: the official implementation's variants; "contrast" is not from there.
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
    if (rule == "contrast") != (features is not None) or (features is not None and not _fit(features, maps)):
        got = "None" if features is None else f"{features.dtype} {tuple(features.shape)}"
        batch, height, width = maps.shape[1], *maps.shape[4:]
        raise OpError(
            f"choose_layers: features are {got} for rule {rule!r}, expected float ({batch}, {height}, {width}, E) for "
            "'contrast', else none"
        )
    if not bool(torch.where(some, maps, 0).isfinite().all()):
        raise OpError("choose_layers: maps hold NaN or infinity, expected finite attention")
    if features is not None and not bool(features.isfinite().all()):
        raise OpError("choose_layers: features hold NaN or infinity, expected finite values")
    fused = _fused(maps.detach().float(), some, reduce)
    if rule == "entropy":
        p = (fused.flatten(3) / temperature).softmax(-1)
        scores = torch.special.entr(p).sum(-1) / torch.tensor(max(p.shape[-1], 2)).log()
        layers = scores.argmin(0)
    else:
        scores = _separability(fused) if features is None else _contrast(fused, features)
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
    order = mean.argsort(stable=True, descending=rule != "entropy")
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


def _fit(features: Tensor, maps: Tensor) -> bool:
    shape = (maps.shape[1], *maps.shape[4:])
    return features.dim() == 4 and features.is_floating_point() and tuple(features.shape[:3]) == shape


def _contrast(maps: Tensor, features: Tensor) -> Tensor:
    above = (maps > otsu_threshold(maps)[..., None, None]).flatten(3).float()  # (L, B, O, cells)
    shown = features.detach().to(maps).flatten(1, 2)  # (B, cells, E)
    shown = shown - shown.mean(1, keepdim=True)
    products = shown @ shown.mT  # |sum over the cells of a mask|² without an (L, B, O, E) in memory
    inside = torch.einsum("lboi,bij,lboj->lbo", above, products, above)
    count, cells = above.sum(-1), above.shape[-1]
    between = inside * cells / (count * (cells - count)).clamp(min=1)
    total = products.diagonal(dim1=1, dim2=2).sum(-1)
    return (between / total.clamp(min=1e-12)[:, None]).clamp(0, 1)

"""Select one attention layer per object, or for a model, in place of the mean over layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops.object_masks import normalized_entropy
from ospo_fast.ops.otsu import otsu_threshold

RULES = ("entropy", "separability", "contrast")
_TEMPERATURE = 0.8  # of the softmax of "entropy"


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """Result of `choose_layers`."""

    maps: Tensor  # (B, O, H, W), of the chosen layers, in [0, 1]
    layers: Tensor  # (B, O) int64, indices into the given layers
    scores: Tensor  # (L, B, O): entropy (the lowest is chosen), separability or contrast (the highest)


def choose_layers(
    maps: Tensor,  # (L, B, O, C, H, W)
    used: Tensor,  # (B, O, C)
    *,
    rule: str = "entropy",
    features: Tensor | None = None,  # (B, H, W, E)
) -> LayerChoice:
    """Choose the layer of each object by its map m in each layer; the first of equal layers.

    In each layer, x = (x − min)/(max − min + 1e-8) over tokens and cells, then m = max over tokens. Rules:

    * "entropy": the lowest −Σ p log p / log(H·W) of p = softmax(m / 0.8) over cells.
    * "separability": the highest variance between the classes on either side of Otsu's threshold,
      w·(1 − w)·(m1 − m0)².
    * "contrast": the highest share of the variance of `features` between the same classes,
      (n1·|f1 − f|² + n0·|f0 − f|²) / Σ|f_i − f|². Not in the official code.

    Args:
        maps: (L, B, O, C, H, W) float, attention on each of an object's C tokens.
        used: (B, O, C) bool, the tokens that exist. An object without tokens gets a map of zeros and layer 0.
        rule: one of RULES.
        features: (B, H, W, E) float, what each cell of the image shows, such as its code's embedding; for "contrast".

    Raises:
        OpError: wrong shapes, an unknown rule, values that are not finite.

    """
    if maps.dim() != 6 or not maps.is_floating_point() or 0 in (maps.shape[0], *maps.shape[4:]):
        raise OpError(f"choose_layers: maps are {maps.dtype} {tuple(maps.shape)}, expected float (L, B, O, C, H, W)")
    if used.dtype != torch.bool or used.shape != maps.shape[1:4]:
        raise OpError(
            f"choose_layers: used is {used.dtype} {tuple(used.shape)}, expected bool {tuple(maps.shape[1:4])}"
        )
    if rule not in RULES:
        raise OpError(f"choose_layers: rule is {rule!r}, expected one of {', '.join(RULES)}")
    if (rule == "contrast") != (features is not None) or (features is not None and not _fit(features, maps)):
        got = "None" if features is None else f"{features.dtype} {tuple(features.shape)}"
        batch, height, width = maps.shape[1], *maps.shape[4:]
        raise OpError(
            f"choose_layers: features are {got} for rule {rule!r}, expected float ({batch}, {height}, {width}, E) for "
            "'contrast', else none"
        )
    used = used[..., None, None]  # (B, O, C, 1, 1)
    if not bool(torch.where(used, maps, 0).isfinite().all()):
        raise OpError("choose_layers: maps hold NaN or infinity, expected finite attention")
    if features is not None and not bool(features.isfinite().all()):
        raise OpError("choose_layers: features hold NaN or infinity, expected finite values")
    fused = _fuse_tokens(maps.detach().float(), used)
    if rule == "entropy":
        scores = normalized_entropy((fused.flatten(3) / _TEMPERATURE).softmax(-1))
        layers = scores.argmin(0)
    else:
        scores = _separability(fused) if features is None else _contrast(fused, features)
        layers = scores.argmax(0)
    index = layers[None, :, :, None, None].expand(1, *fused.shape[1:])
    return LayerChoice(fused.gather(0, index)[0], layers, scores)


def best_layer(scores: Tensor, valid: Tensor, *, rule: str = "entropy") -> int:
    """Return the layer with the best mean score over many objects, the first of equal layers: a choice for a model.

    Args:
        scores: (L, B, O), of `choose_layers` with the same rule.
        valid: (B, O) bool, the objects that exist.
        rule: one of RULES.

    Raises:
        OpError: wrong shapes, an unknown rule, no object.

    """
    if scores.dim() != 3 or valid.dtype != torch.bool or valid.shape != scores.shape[1:] or not bool(valid.any()):
        raise OpError(
            f"best_layer: scores are {scores.dtype} {tuple(scores.shape)}, valid {valid.dtype} {tuple(valid.shape)}; "
            "expected (L, B, O), and bool (B, O) with at least one object"
        )
    if rule not in RULES:
        raise OpError(f"best_layer: rule is {rule!r}, expected one of {', '.join(RULES)}")
    mean = scores[:, valid].double().mean(1)
    order = mean.argsort(stable=True, descending=rule != "entropy")
    return int(order[0])


def _fuse_tokens(maps: Tensor, used: Tensor) -> Tensor:
    """(L, B, O, H, W): tokens min-max normalized together, then their maximum."""
    if maps.shape[3] == 0:
        return maps.sum(3)
    low = torch.where(used, maps, torch.inf).amin((3, 4, 5), keepdim=True)
    high = torch.where(used, maps, -torch.inf).amax((3, 4, 5), keepdim=True)
    return torch.where(used, (maps - low) / (high - low + 1e-8), 0).amax(3)


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
    centered = features.detach().to(maps).flatten(1, 2)  # (B, cells, E)
    centered = centered - centered.mean(1, keepdim=True)
    products = centered @ centered.mT  # |sum over the cells of a mask|² without an (L, B, O, E) in memory
    inside = torch.einsum("lboi,bij,lboj->lbo", above, products, above)
    count, cells = above.sum(-1), above.shape[-1]
    between = inside * cells / (count * (cells - count)).clamp(min=1)
    total = products.diagonal(dim1=1, dim2=2).sum(-1)
    return (between / total.clamp(min=1e-12)[:, None]).clamp(0, 1)

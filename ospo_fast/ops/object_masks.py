"""Attention maps of objects → binary masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops.otsu import otsu_threshold


@dataclass(frozen=True, eq=False)
class ObjectMasks:
    """What `object_masks` returns."""

    maps: Tensor  # (B, O, H, W), min-max normalised to [0, 1]
    thresholds: Tensor  # (B, O), Otsu's, before the scaler
    masks: Tensor  # (B, O, H, W) uint8: maps > thresholds · scaler
    union: Tensor  # (B, H, W) uint8: any object


def object_masks(maps: Tensor, *, valid: Tensor | None = None, scaler: float = 0.8, bins: int = 256) -> ObjectMasks:
    """Per object m = (x − min)/(max − min + 1e-8), mask = m > scaler · otsu(m), and the union of the objects.

    maps (B, O, H, W) float, raw or normalised; valid (B, O) bool, None = all: an object that is not valid gives an
    empty mask, map and threshold 0, whatever its map holds. scaler: 0.8 as the official code, 1.0 as the paper.
    maps and thresholds come back fp32 (float64 for float64 maps), masks and union uint8. A constant map gives an empty
    mask; O = 0 an empty union.
    Raises OpError: shapes or dtypes that do not fit, a valid map with a value that is not finite.
    """
    if maps.dim() != 4 or not maps.is_floating_point() or 0 in maps.shape[2:]:
        raise OpError(f"object_masks: maps are {maps.dtype} {tuple(maps.shape)}, expected float (B, O, H, W)")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != maps.shape[:2]):
        raise OpError(
            f"object_masks: valid is {valid.dtype} {tuple(valid.shape)}, expected bool {tuple(maps.shape[:2])}"
        )
    if not scaler >= 0:
        raise OpError(f"object_masks: scaler is {scaler}, expected a number >= 0")
    x = maps.detach().to(torch.float64 if maps.dtype == torch.float64 else torch.float32)
    if valid is not None:
        x = torch.where(valid[..., None, None], x, 0)
    finite = x.isfinite().all(-1).all(-1)
    if not bool(finite.all()):
        b, o = (~finite).nonzero()[0].tolist()
        raise OpError(
            f"object_masks: maps[{b}, {o}] holds NaN or infinity, expected finite attention; "
            "mark it False in `valid` to leave it out"
        )
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = (x - low) / (high - low + 1e-8)
    thresholds = otsu_threshold(x, bins=bins)
    masks = x > (thresholds * scaler)[..., None, None]
    return ObjectMasks(x, thresholds, masks.to(torch.uint8), masks.any(1).to(torch.uint8))

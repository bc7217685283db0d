"""Attention maps of objects → binary masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops.otsu import fits_shared, otsu_threshold, refuse_map


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
    mask; O = 0 an empty union. float32 and half precision run in C++ on CPU, in one launch that waits for nothing on
    CUDA: there a valid map with a value that is not finite has threshold and map NaN and an empty mask.
    Raises OpError: shapes or dtypes that do not fit; elsewhere than in the CUDA kernel such a map.
    """
    _check(maps, valid, scaler, bins)
    return ObjectMasks(*torch.ops.ospo_fast.object_masks(maps.detach(), valid, float(scaler), bins))


def soft_masks(found: ObjectMasks, *, scaler: float = 0.8, sharpness: float = 100.0) -> Tensor:
    """(B, O, H, W): sigmoid(sharpness · (map − scaler · threshold)), the soft form of the masks.

    scaler as it was given to `object_masks`. The union of soft masks is their greatest value, cell by cell.
    """
    return torch.sigmoid(sharpness * (found.maps - (found.thresholds * scaler)[..., None, None]))


def object_masks_reference(
    maps: Tensor, *, valid: Tensor | None = None, scaler: float = 0.8, bins: int = 256
) -> ObjectMasks:
    """The PyTorch twin of `object_masks`: the same bits on any device, in float64 for float64 maps."""
    x = maps.detach().to(torch.float64 if maps.dtype == torch.float64 else torch.float32)
    if valid is not None:
        x = torch.where(valid[..., None, None], x, 0)
    _refuse_unusable(x, x.isfinite().all(-1).all(-1), bins)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = (x - low) / (high - low + 1e-8)
    thresholds = otsu_threshold(x, bins=bins)
    masks = x > (thresholds * scaler)[..., None, None]
    return ObjectMasks(x, thresholds, masks.to(torch.uint8), masks.any(1).to(torch.uint8))


def _check(maps: Tensor, valid: Tensor | None, scaler: float, bins: int) -> None:
    if maps.dim() != 4 or not maps.is_floating_point() or 0 in maps.shape[2:]:
        raise OpError(f"object_masks: maps are {maps.dtype} {tuple(maps.shape)}, expected float (B, O, H, W)")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != maps.shape[:2]):
        raise OpError(
            f"object_masks: valid is {valid.dtype} {tuple(valid.shape)}, expected bool {tuple(maps.shape[:2])}"
        )
    if valid is not None and valid.device != maps.device:
        raise OpError(f"object_masks: valid is on {valid.device}, maps on {maps.device}; move them to one device")
    if not scaler >= 0:
        raise OpError(f"object_masks: scaler is {scaler}, expected a number >= 0")
    if bins < 1:
        raise OpError(f"object_masks: bins is {bins}, expected a positive number")


def _refuse_unusable(maps: Tensor, usable: Tensor, bins: int) -> None:
    if not bool(usable.all()):
        b, o = (~usable).nonzero()[0].tolist()
        if bool(maps[b, o].isfinite().all()):
            refuse_map("object_masks", maps[b, o], f"maps[{b}, {o}]", bins)
        raise OpError(
            f"object_masks: maps[{b}, {o}] holds NaN or infinity, expected finite attention; "
            "mark it False in `valid` to leave it out"
        )


# ---------------------------------------------------------------- the op

torch.library.define(
    "ospo_fast::object_masks",
    "(Tensor maps, Tensor? valid, float scaler, int bins) -> (Tensor, Tensor, Tensor, Tensor)",
)

Found = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.impl("ospo_fast::object_masks", "CompositeExplicitAutograd")
def _object_masks(maps: Tensor, valid: Tensor | None, scaler: float, bins: int) -> Found:
    backend = _backend(maps, bins)
    if backend == "torch":
        twin = object_masks_reference(maps, valid=valid, scaler=scaler, bins=bins)
        return twin.maps, twin.thresholds, twin.masks, twin.union
    x = maps.float().contiguous()
    if backend == "cuda":
        return _cuda(x, valid, scaler, bins)
    found, pointers, kept = _outputs(x, valid)
    _dispatch.native().object_masks(
        *pointers, *x.shape[:2], x.shape[2] * x.shape[3], scaler, bins, torch.get_num_threads()
    )
    del kept
    _refuse_unusable(x, ~found[1].isnan(), bins)
    return found


@torch.library.register_fake("ospo_fast::object_masks")
def _(maps: Tensor, valid: Tensor | None, scaler: float, bins: int) -> Found:
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    B, objects, H, W = maps.shape
    return (
        maps.new_empty(maps.shape, dtype=dtype),
        maps.new_empty((B, objects), dtype=dtype),
        maps.new_empty(maps.shape, dtype=torch.uint8),
        maps.new_empty((B, H, W), dtype=torch.uint8),
    )


def _backend(maps: Tensor, bins: int) -> str:
    backend = "torch" if maps.dtype == torch.float64 else _dispatch.resolve("object_masks", "auto", maps.device.type)
    return "torch" if backend == "cuda" and not fits_shared(maps.shape[2] * maps.shape[3], bins) else backend


def _outputs(x: Tensor, valid: Tensor | None) -> tuple[Found, tuple[int, ...], Tensor | None]:
    """Outputs, the pointers of all tensors, and what the pointer of `valid` needs alive."""
    B, objects, H, W = x.shape
    found = (
        torch.empty_like(x),
        x.new_empty(B, objects),
        torch.empty_like(x, dtype=torch.uint8),
        x.new_empty(B, H, W, dtype=torch.uint8),
    )
    kept = None if valid is None else valid.contiguous()
    return found, (x.data_ptr(), 0 if kept is None else kept.data_ptr(), *(t.data_ptr() for t in found)), kept


def _cuda(x: Tensor, valid: Tensor | None, scaler: float, bins: int) -> Found:
    found, pointers, kept = _outputs(x, valid)
    cells = x.shape[2] * x.shape[3]
    _dispatch.native().object_masks_cuda(
        *pointers, *x.shape[:2], cells, scaler, bins, *_dispatch.device_and_stream(x.device)
    )
    del kept
    return found

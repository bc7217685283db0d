"""Compute binary object masks from attention maps, and metrics of maps and masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._dispatch import check_float, describe, pointer, readable, register_op, result_dtype
from ospo_fast.ops._transfer import widen
from ospo_fast.ops.otsu import check_bins, fits_shared_memory, map_error, thresholds_or_nan


@dataclass(frozen=True, eq=False)
class ObjectMasks:
    """Result of `object_masks`."""

    maps: Tensor  # (B, O, H, W), min-max normalized to [0, 1]
    thresholds: Tensor  # (B, O), Otsu's, before the scaler
    masks: Tensor  # (B, O, H, W) uint8: maps > thresholds · scaler
    union: Tensor  # (B, H, W) uint8: any object


def object_masks(maps: Tensor, *, valid: Tensor | None = None, scaler: float = 0.8, bins: int = 256) -> ObjectMasks:
    """Compute object masks from attention maps: min-max normalization, Otsu's threshold, union of the objects.

    m = (x − min)/(max − min + 1e-8), mask = m > scaler · otsu(m). A constant map gives an empty mask, O = 0 an empty
    union. Runs in C++ on CPU and as one CUDA launch without host synchronization; float64 and maps too large for the
    CUDA kernel run in PyTorch (`object_masks_reference`).

    Args:
        maps: (B, O, H, W) float, raw or normalized.
        valid: (B, O) bool; None = all. An invalid object gets an empty mask, and map and threshold 0, for any contents.
        scaler: factor of the thresholds: 0.8 in the official code, 1.0 in the paper.
        bins: histogram bins of Otsu's method.

    Returns:
        maps and thresholds in fp32 (float64 for float64 maps), masks and union in uint8.

    Raises:
        OpError: wrong shapes, dtypes or devices, a valid map with NaN or infinity or with too small a range for `bins`.
            On CUDA it raises nothing: map and threshold are NaN and the mask is empty, as a check would synchronize.

    """
    _check_maps(maps)
    if valid is not None and (valid.dtype != torch.bool or valid.shape != maps.shape[:2]):
        raise OpError(f"object_masks: valid is {describe(valid)}, expected bool {tuple(maps.shape[:2])}")
    if valid is not None and valid.device != maps.device:
        raise OpError(f"object_masks: valid is on {valid.device}, maps on {maps.device}; move them to one device")
    scaler = check_float("object_masks", "scaler", scaler)
    if not scaler >= 0:
        raise OpError(f"object_masks: scaler is {scaler}, expected a number >= 0")
    bins = check_bins("object_masks", bins)
    return ObjectMasks(*_object_masks(maps.detach(), valid, scaler, bins))


def object_masks_reference(
    maps: Tensor, *, valid: Tensor | None = None, scaler: float = 0.8, bins: int = 256
) -> ObjectMasks:
    """Compute `object_masks` in PyTorch, with the same bits on any device; in float64 for float64 maps."""
    _check_maps(maps)
    x = maps.detach().to(result_dtype(maps))
    if valid is not None:
        x = torch.where(valid[..., None, None], x, 0)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    normalized = (x - low) / (high - low + 1e-8)
    thresholds = thresholds_or_nan(normalized.flatten(2).flatten(0, 1), bins).view(x.shape[:2])
    _check_usable(x, ~thresholds.isnan(), bins)
    masks = normalized > (thresholds * scaler)[..., None, None]
    return ObjectMasks(normalized, thresholds, masks.to(torch.uint8), masks.any(1).to(torch.uint8))


def soft_masks(found: ObjectMasks, *, scaler: float = 0.8, sharpness: float = 100.0) -> Tensor:
    """Compute soft masks (B, O, H, W): sigmoid(sharpness · (map − scaler · threshold)).

    `scaler` is the one given to `object_masks`. The union of soft masks is their maximum, cell by cell.
    """
    scaler, sharpness = check_float("soft_masks", "scaler", scaler), check_float("soft_masks", "sharpness", sharpness)
    scores = sharpness * (found.maps - (found.thresholds * scaler)[..., None, None])
    # In float64: of float32 numbers, torch rounds those at the end of a tensor differently.
    return torch.sigmoid(widen(scores)).to(scores)


def spatial_entropy(maps: Tensor) -> Tensor:
    """Compute the normalized entropy of maps (..., H, W) divided by their sums, in float64: 1 uniform, 0 one cell.

    A map of zeros gives 0. Negative cells count as 0.
    """
    cells = widen(maps.flatten(-2)).clamp(min=0)
    largest = cells.amax(-1, keepdim=True)
    cells = cells / torch.where(largest > 0, largest, 1)  # sums of the largest numbers would be infinite
    return normalized_entropy(cells / cells.sum(-1, keepdim=True).clamp(min=1))


def normalized_entropy(p: Tensor) -> Tensor:
    """Compute −Σ p log p / log N of distributions p (..., N), in their dtype."""
    entropy: Tensor = torch.special.entr(p).sum(-1) / torch.tensor(max(p.shape[-1], 2), dtype=p.dtype).log()
    return entropy


def mask_iou(first: Tensor, second: Tensor) -> float | None:
    """Compute the intersection over union of two masks, cells > 0; None if both are empty."""
    first, second = first > 0, second > 0
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else None


def _check_maps(maps: Tensor) -> None:
    if maps.dim() != 4 or not maps.is_floating_point() or 0 in maps.shape[2:]:
        raise OpError(f"object_masks: maps are {describe(maps)}, expected float (B, O, H, W)")


def _check_usable(maps: Tensor, usable: Tensor, bins: int) -> None:
    """Raise OpError for the first map that `usable` (B, O) excludes."""
    if not bool(usable.all()):
        b, o = (~usable).nonzero()[0].tolist()
        error = map_error("object_masks", maps[b, o], f"maps[{b}, {o}]", bins)
        raise OpError(f"{error}, or mark it False in `valid`")


def _new_outputs(maps: Tensor, valid: Tensor | None = None, scaler: float = 1.0, bins: int = 256) -> tuple[Tensor, ...]:
    dtype, (B, objects, H, W) = result_dtype(maps), maps.shape
    return (
        maps.new_empty((B, objects, H, W), dtype=dtype),
        maps.new_empty((B, objects), dtype=dtype),
        maps.new_empty((B, objects, H, W), dtype=torch.uint8),
        maps.new_empty((B, H, W), dtype=torch.uint8),
    )


@register_op(
    "object_masks(Tensor maps, Tensor? valid, float scaler, int bins) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_new_outputs,
)
def _object_masks(maps: Tensor, valid: Tensor | None, scaler: float, bins: int) -> tuple[Tensor, ...]:
    backend = _dispatch.resolve("object_masks", "auto", maps.device.type, result_dtype(maps))
    cells = maps.shape[2] * maps.shape[3]
    if maps.shape[0] == 0:  # no images, whose cells may be too many for any memory
        return _new_outputs(maps)
    if backend == "torch" or (backend == "cuda" and not fits_shared_memory(cells, bins)):
        result = object_masks_reference(maps, valid=valid, scaler=scaler, bins=bins)
        return result.maps, result.thresholds, result.masks, result.union
    x, valid = readable(maps.float()), None if valid is None else readable(valid)
    outputs = _new_outputs(x)
    arguments = (pointer(x), pointer(valid), *map(pointer, outputs), *x.shape[:2], cells, scaler, bins)
    if backend == "cuda":
        _dispatch.native().object_masks_cuda(*arguments, *_dispatch.device_and_stream(x.device))
    else:
        without = _dispatch.native().object_masks(*arguments, torch.get_num_threads())
        if without:
            _check_usable(x, ~outputs[1].isnan(), bins)
    return outputs

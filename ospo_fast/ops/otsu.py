"""Otsu's threshold, bitwise equal to scikit-image."""

from __future__ import annotations

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops._dispatch import check_int, describe, pointer, readable, register_op, result_dtype

MAX_BINS = 2**16
SHARED_FLOATS = 24576  # shared memory that the CUDA kernels use for one map and its histogram


def otsu_threshold(maps: Tensor, *, bins: int = 256) -> Tensor:
    """Compute Otsu's threshold: the center of the first histogram bin that maximizes w1·w2·(m1 − m2)².

    Bins are those of numpy.histogram over [min, max] (last bin closed), summed in order in fp32 like scikit-image's
    threshold_otsu. The bits are that one's unless its variances overflow or vanish, as for cells above 1e18 or below
    1e-18: here cells of any size are scaled by a power of two. Runs in C++ on CPU and as one CUDA launch without host
    synchronization; float64 and maps too large for the CUDA kernel run in PyTorch (`otsu_threshold_reference`).

    Args:
        maps: (..., H, W) float. Half precision is widened.
        bins: histogram bins.

    Returns:
        (...) fp32 (float64 for float64 maps); of a constant map its value.

    Raises:
        OpError: maps that are not floating or have no cells, a map with NaN or infinity, or with a range that is too
            small for `bins`. On CUDA such a map raises nothing: its threshold is NaN, as a check would synchronize.

    Source: Otsu 1979; OSPO paper, object masks.

    """
    _check_form(maps)
    return _otsu_threshold(maps.detach(), check_bins("otsu_threshold", bins))


def otsu_threshold_reference(maps: Tensor, *, bins: int = 256) -> Tensor:
    """Compute `otsu_threshold` in PyTorch, with the same bits on any device; in float64 for float64 maps."""
    _check_form(maps)
    x = _flatten(maps)
    thresholds = thresholds_or_nan(x, bins)
    _check_maps(x, ~thresholds.isnan(), bins)
    return thresholds.reshape(maps.shape[:-2])


def thresholds_or_nan(x: Tensor, bins: int) -> Tensor:
    """Compute the thresholds (n,) of maps x (n, cells) in PyTorch, NaN where a map has none."""
    usable = x.isfinite().all(1, keepdim=True)
    x = torch.where(usable, x, 0)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    constant, value = low == high, low
    # A constant map gets any histogram here; its value replaces the threshold at the end.
    x, low, high = torch.where(constant, 0, x), torch.where(constant, 0, low), torch.where(constant, 1, high)
    edges = _edges(low, high, bins)
    distinct = (edges[:, 1:] > edges[:, :-1]).all(1, keepdim=True)
    if not bool(distinct.all()):  # these maps get any edges, too
        x, low, high = torch.where(distinct, x, 0), torch.where(distinct, low, 0), torch.where(distinct, high, 1)
        edges, usable = _edges(low, high, bins), usable & distinct
    counts = _histogram(x, low, high, edges)
    scale = _unit_scale(low, high)
    centers = (edges[:, :-1] * scale + edges[:, 1:] * scale) / 2
    thresholds = centers.gather(1, _best_bin(counts, centers)) / scale
    return torch.where(usable, torch.where(constant, value, thresholds), torch.nan).squeeze(1)


def _unit_scale(low: Tensor, high: Tensor) -> Tensor:
    """Powers of two that bring the largest cell of each map to about 1, within the normal numbers of the dtype.

    The variances of maps with very large or small cells would overflow or vanish. The scale changes no other bit.
    """
    size, smallest = torch.maximum(low.abs(), high.abs()), torch.finfo(low.dtype).tiny
    return (size.frexp().mantissa / size).clamp(smallest, 1 / smallest)


@register_op(
    "otsu_threshold(Tensor maps, int bins) -> Tensor",
    fake=lambda maps, bins: maps.new_empty(maps.shape[:-2], dtype=result_dtype(maps)),
)
def _otsu_threshold(maps: Tensor, bins: int) -> Tensor:
    if maps.numel() == 0:  # no maps, whose cells may be too many for any memory
        return maps.new_empty(maps.shape[:-2], dtype=result_dtype(maps))
    backend = _dispatch.resolve("otsu_threshold", "auto", maps.device.type, result_dtype(maps))
    *shape, H, W = maps.shape
    cells = H * W
    if backend == "torch" or (backend == "cuda" and not fits_shared_memory(cells, bins)):
        return otsu_threshold_reference(maps, bins=bins)
    x = readable(maps.float())
    thresholds = x.new_empty(shape)
    arguments = (pointer(x), pointer(thresholds), thresholds.numel(), cells, bins)
    if backend == "cuda":
        _dispatch.native().otsu_threshold_cuda(*arguments, *_dispatch.device_and_stream(x.device))
    else:
        without = _dispatch.native().otsu_threshold(*arguments, torch.get_num_threads())
        if without:
            _check_maps(_flatten(x), ~thresholds.isnan().flatten(), bins)
    return thresholds


def check_bins(op: str, bins: int) -> int:
    """Return the number of bins. Raises OpError if it is not positive, or so large that memory may run out."""
    return check_int(op, "bins", bins, 1, MAX_BINS)


def fits_shared_memory(cells: int, bins: int) -> bool:
    """Whether the CUDA kernels take maps of `cells` cells."""
    return cells + 5 * bins + 1 <= SHARED_FLOATS


def map_error(op: str, cells: Tensor, name: str, bins: int) -> str:
    """Describe why a map has no threshold, and the remedy."""
    if not bool(cells.isfinite().all()):
        return f"{op}: {name} holds NaN or infinity, expected finite values; check what computed it"
    return (
        f"{op}: {name} has values from {float(cells.min())} to {float(cells.max())}, expected a range that {bins} bins "
        f"divide in {cells.dtype}; min-max normalize the map first"
    )


def _flatten(maps: Tensor) -> Tensor:
    shape = maps.shape
    return maps.reshape(-1, shape[-2] * shape[-1]).to(result_dtype(maps))


def _check_form(maps: Tensor) -> None:
    if maps.dim() < 2 or not maps.is_floating_point() or 0 in maps.shape[-2:]:
        raise OpError(f"otsu_threshold: maps are {describe(maps)}, expected float (..., H, W)")


def _check_maps(x: Tensor, usable: Tensor, bins: int) -> None:
    """Raise OpError for the first map of x (n, cells) that `usable` (n,) excludes."""
    if not bool(usable.all()):
        row = int((~usable).nonzero()[0])
        raise OpError(map_error("otsu_threshold", x[row], f"map {row} (flattened)", bins))


def _edges(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """numpy.linspace(low, high, bins + 1) of each row, each operation rounded in the maps' dtype."""
    delta, ramp = high - low, torch.arange(bins + 1, dtype=low.dtype, device=low.device)
    parts = delta.new_full((), bins)  # a tensor: CUDA would multiply by the rounded reciprocal of a number
    step = delta / parts
    ramp = torch.where(step == 0, ramp / parts * delta, ramp * step)
    edges = ramp + low
    edges[:, -1:] = high
    return edges


def _histogram(x: Tensor, low: Tensor, high: Tensor, edges: Tensor) -> Tensor:
    """Counts (n, bins) by numpy's rule: guess the bin by division, then correct it by its edges."""
    bins = edges.shape[1] - 1
    index = ((x - low) / (high - low) * bins).long()
    index -= (index == bins).long()
    index -= (x < edges.gather(1, index)).long()
    index += ((x >= edges.gather(1, index + 1)) & (index != bins - 1)).long()
    return torch.zeros_like(edges[:, :-1]).scatter_add_(1, index, torch.ones_like(x))


def _best_bin(counts: Tensor, centers: Tensor) -> Tensor:
    """First argmax of the variance between the classes, (n, 1), rounded as scikit-image does."""
    weights = counts.float()  # scikit-image counts in fp32 for maps of any dtype
    weight1, weight2 = weights.cumsum(1), weights.flip(1).cumsum(1).flip(1)
    mass = counts * centers
    sums = torch.stack([mass, mass.flip(1)], -1)
    running, total = [], torch.zeros_like(sums[:, 0])
    for part in sums.unbind(1):  # torch.cumsum accumulates in a wider dtype, and the last bits decide ties
        total = total + part
        running.append(total)
    mean1, mean2 = torch.stack(running, 1).unbind(-1)
    mean1, mean2 = mean1 / weight1, mean2.flip(1) / weight2
    variance = weight1[:, :-1] * weight2[:, 1:] * (mean1[:, :-1] - mean2[:, 1:]) ** 2
    if variance.shape[1] == 0:
        return torch.zeros_like(counts[:, :1], dtype=torch.int64)
    return variance.argmax(1, keepdim=True)

"""Otsu's threshold, equal to scikit-image's to the last bit."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch

SHARED_FLOATS = 24576  # what the CUDA kernels keep of one map and its histogram


def otsu_threshold(maps: Tensor, *, bins: int = 256) -> Tensor:
    """The centre of the first histogram bin that maximises w1·w2·(m1 − m2)²; of a constant map its value.

    maps (..., H, W) float → (...) fp32 (float64 for float64 maps; half precision is widened first). Bins as numpy's
    histogram over [min, max] (last bin closed), sums in bin order in fp32, as scikit-image's threshold_otsu.
    float32 maps run in C++ on CPU, in one launch that waits for nothing on CUDA: there a map with a value that is not
    finite, or a range too small for that many bins, has the threshold NaN. `otsu_threshold_reference` is the twin; it
    takes float64, and maps that are too large for the CUDA kernel, too.
    Raises OpError: not floating, no cells; elsewhere than in the CUDA kernel such a map.
    Source: Otsu 1979; paper section on object masks.
    """
    if maps.dim() < 2 or not maps.is_floating_point() or 0 in maps.shape[-2:]:
        raise OpError(f"otsu_threshold: maps are {maps.dtype} {tuple(maps.shape)}, expected float (..., H, W)")
    if bins < 1:
        raise OpError(f"otsu_threshold: bins is {bins}, expected a positive number")
    result: Tensor = torch.ops.ospo_fast.otsu_threshold(maps.detach(), bins)
    return result


def otsu_threshold_reference(maps: Tensor, *, bins: int = 256) -> Tensor:
    """The PyTorch twin of `otsu_threshold`: the same bits, for fp32 and for float64 maps, on any device."""
    return _twin(_rows(maps), bins).reshape(maps.shape[:-2])


torch.library.define("ospo_fast::otsu_threshold", "(Tensor maps, int bins) -> Tensor")


@torch.library.impl("ospo_fast::otsu_threshold", "CompositeExplicitAutograd")
def _otsu_threshold(maps: Tensor, bins: int) -> Tensor:
    x = _rows(maps)
    backend = "torch"
    if x.dtype == torch.float32:
        backend = _dispatch.resolve("otsu_threshold", "auto", maps.device.type)
    if backend == "torch" or (backend == "cuda" and not fits_shared(x.shape[1], bins)):
        return _twin(x, bins).reshape(maps.shape[:-2])
    x, thresholds = x.contiguous(), x.new_empty(len(x))
    if backend == "cuda":
        if len(x):
            _dispatch.native().otsu_threshold_cuda(
                x.data_ptr(), thresholds.data_ptr(), *x.shape, bins, *_dispatch.device_and_stream(x.device)
            )
        return thresholds.reshape(maps.shape[:-2])
    _dispatch.native().otsu_threshold(
        x.data_ptr(), thresholds.data_ptr(), len(x), x.shape[1], bins, torch.get_num_threads()
    )
    if bool(thresholds.isnan().any()):
        row = int(thresholds.isnan().nonzero()[0])
        refuse_map("otsu_threshold", x[row], f"map {row} (flattened)", bins)
    return thresholds.reshape(maps.shape[:-2])


def fits_shared(cells: int, bins: int) -> bool:
    """Whether the CUDA kernels can take maps of so many cells."""
    return cells + 5 * bins + 1 <= SHARED_FLOATS


def _rows(maps: Tensor) -> Tensor:
    return maps.reshape(-1, maps.shape[-2] * maps.shape[-1]).to(_result_dtype(maps))


def refuse_map(op: str, cells: Tensor, name: str, bins: int) -> NoReturn:
    """OpError: why Otsu's threshold of this map cannot be had."""
    if not bool(cells.isfinite().all()):
        raise OpError(f"{op}: {name} holds NaN or infinity, expected finite values")
    raise OpError(
        f"{op}: {name} reaches from {float(cells.min())} to {float(cells.max())}, too little "
        f"or too much for {bins} bins in {cells.dtype}; min-max normalise the map first"
    )


def _twin(x: Tensor, bins: int) -> Tensor:
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite().all(1)).nonzero()[0])
        refuse_map("otsu_threshold", x[row], f"map {row} (flattened)", bins)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    constant, value = low == high, low
    # Any histogram does for a constant map: its value is put in at the end.
    x, low, high = torch.where(constant, 0, x), torch.where(constant, 0, low), torch.where(constant, 1, high)
    edges = _edges(low, high, bins)
    unsuited = ~(edges[:, 1:] > edges[:, :-1]).all(1)
    if bool(unsuited.any()):
        row = int(unsuited.nonzero()[0])
        refuse_map("otsu_threshold", x[row], f"map {row} (flattened)", bins)
    counts = _histogram(x, low, high, edges)
    centres = (edges[:, :-1] + edges[:, 1:]) / 2
    threshold = centres.gather(1, _best_bin(counts, centres))
    return torch.where(constant, value, threshold)


@torch.library.register_fake("ospo_fast::otsu_threshold")
def _(maps: Tensor, bins: int) -> Tensor:
    return maps.new_empty(maps.shape[:-2], dtype=_result_dtype(maps))


def _result_dtype(maps: Tensor) -> torch.dtype:
    return torch.float64 if maps.dtype == torch.float64 else torch.float32


def _edges(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """numpy.linspace(low, high, bins + 1) of each row, each operation rounded in the maps' dtype."""
    delta, ramp = high - low, torch.arange(bins + 1, dtype=low.dtype, device=low.device)
    parts = delta.new_full((), bins)  # a tensor: by a number, CUDA would multiply with its rounded reciprocal
    step = delta / parts
    ramp = torch.where(step == 0, ramp / parts * delta, ramp * step)
    edges = ramp + low
    edges[:, -1:] = high
    return edges


def _histogram(x: Tensor, low: Tensor, high: Tensor, edges: Tensor) -> Tensor:
    """Counts (n, bins) by numpy's rule: a a guess by division, then a step to the bin whose edges hold the value."""
    bins = edges.shape[1] - 1
    index = ((x - low) / (high - low) * bins).long()
    index -= (index == bins).long()
    index -= (x < edges.gather(1, index)).long()
    index += ((x >= edges.gather(1, index + 1)) & (index != bins - 1)).long()
    return torch.zeros_like(edges[:, :-1]).scatter_add_(1, index, torch.ones_like(x))


def _best_bin(counts: Tensor, centres: Tensor) -> Tensor:
    """First argmax of the variance between the classes, (n, 1), with the roundings of scikit-image."""
    weights = counts.float()  # scikit-image counts in fp32 whatever the maps are
    weight1, weight2 = weights.cumsum(1), weights.flip(1).cumsum(1).flip(1)
    mass = counts * centres
    sums = torch.stack([mass, mass.flip(1)], -1)
    running, total = [], torch.zeros_like(sums[:, 0])
    for part in sums.unbind(1):  # one by one: torch.cumsum keeps a wider accumulator, and the last bits decide ties
        total = total + part
        running.append(total)
    mean1, mean2 = torch.stack(running, 1).unbind(-1)
    mean1, mean2 = mean1 / weight1, mean2.flip(1) / weight2
    variance = weight1[:, :-1] * weight2[:, 1:] * (mean1[:, :-1] - mean2[:, 1:]) ** 2
    if variance.shape[1] == 0:
        return torch.zeros_like(counts[:, :1], dtype=torch.int64)
    return variance.argmax(1, keepdim=True)

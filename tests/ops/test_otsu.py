from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ospo_fast import otsu_threshold
from ospo_fast.errors import OpError
from ospo_fast.ops.otsu import otsu_threshold_reference

BOTH = pytest.mark.parametrize("function", [otsu_threshold, otsu_threshold_reference])


@BOTH
def test_golden(golden: Any, function: Callable[..., Tensor]) -> None:
    data = golden("otsu.npz")
    thresholds = function(torch.tensor(data["maps"]))
    assert thresholds.dtype == torch.float32
    np.testing.assert_array_equal(thresholds, data["threshold"])
    maps = torch.tensor(data["maps"]).view(4, 10, 24, 24)
    assert torch.equal(function(maps), thresholds.view(4, 10))
    assert torch.equal(function(maps.transpose(2, 3)), thresholds.view(4, 10))


def random_map(kind: str, rng: np.random.Generator) -> np.ndarray:
    values = rng.random(rng.integers(1, 41, 2))
    if kind == "peaks":
        values = np.where(values < 0.3, rng.normal(0.8, 0.05, values.shape), rng.normal(0.2, 0.1, values.shape))
    elif kind == "few values":
        values = np.round(values * rng.integers(1, 10))  # whole bins empty: ties between their variances
    elif kind == "two values":
        values = (values < 0.5) * 3.0 - 1
    elif kind == "skewed":
        values = values**8 * 1e-3
    elif kind == "negative":
        values = -values * 1e4 - 7
    return values


@pytest.mark.parametrize("kind", ["uniform", "peaks", "few values", "two values", "skewed", "negative"])
def test_bits_of_scikit_image(kind: str) -> None:
    threshold_otsu = pytest.importorskip("skimage.filters", reason="needs scikit-image").threshold_otsu
    rng = np.random.default_rng(0)
    for bins in (256, 256, 2, 7, 100) * 5:
        values = random_map(kind, rng)
        single = values.astype(np.float32)
        expected = float(threshold_otsu(single, nbins=bins))
        assert float(otsu_threshold(torch.tensor(single), bins=bins)) == expected
        assert float(otsu_threshold_reference(torch.tensor(single), bins=bins)) == expected
        wide = float(otsu_threshold_reference(torch.tensor(values), bins=bins))
        assert wide == float(threshold_otsu(values, nbins=bins))
    single = torch.tensor(random_map(kind, rng).astype(np.float32))
    assert torch.equal(otsu_threshold(single, bins=1), otsu_threshold_reference(single, bins=1))


@BOTH
def test_constant_maps(function: Callable[..., Tensor]) -> None:
    values = torch.tensor([0.0, 3.7, -1e30, 1e-40])
    assert torch.equal(function(values[:, None, None].expand(4, 3, 5)), values)
    assert torch.equal(function(values.view(4, 1, 1)), values)


@BOTH
def test_dtypes_and_empty_batches(function: Callable[..., Tensor]) -> None:
    maps = torch.rand(3, 8, 8)
    assert function(maps.bfloat16()).dtype == torch.float32
    assert torch.equal(function(maps.bfloat16()), function(maps.bfloat16().float()))
    assert function(maps.double()).dtype == torch.float64
    assert function(torch.rand(0, 8, 8)).shape == (0,)
    assert function(maps[0]).shape == ()
    assert not otsu_threshold(maps.requires_grad_()).requires_grad


@pytest.mark.usefixtures("poisoned")
@BOTH
def test_poisoned_memory(function: Callable[..., Tensor]) -> None:
    assert function(torch.rand(4, 6, 6)).isfinite().all()


def test_opcheck_and_compile() -> None:
    maps = torch.rand(2, 5, 5)
    torch.library.opcheck(torch.ops.ospo_fast.otsu_threshold, (maps, 256))
    compiled = torch.compile(lambda x: otsu_threshold(x * 2) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(maps), otsu_threshold(maps * 2) + 1)


@BOTH
def test_values_that_are_not_finite(function: Callable[..., Tensor]) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        maps = torch.rand(3, 4, 4)
        maps[1, 2, 3] = value
        with pytest.raises(OpError, match=r"map 1 \(flattened\) holds NaN or infinity"):
            function(maps)


@BOTH
def test_ranges_without_distinct_bins(function: Callable[..., Tensor]) -> None:
    with pytest.raises(
        OpError, match=r"map 1 .* expected a range that 256 bins divide in torch.float32; min-max normalize"
    ):
        function(torch.tensor([[[0.0, 1.0]], [[1.0, 1.0 + 2**-20]]]))
    with pytest.raises(OpError, match=r"map 0 .* expected a range"):
        function(torch.tensor([[-3e38, 3e38]]))


@pytest.mark.gpu
def test_cuda_has_the_same_bits(golden: Any) -> None:
    data = golden("otsu.npz")
    maps = torch.tensor(data["maps"])
    np.testing.assert_array_equal(otsu_threshold(maps.cuda()).cpu(), data["threshold"])
    hard = torch.rand(40, 5, 24, 24) ** 2
    hard[:, 0] = (hard[:, 0] * 6).round()
    hard[:, 1] = (hard[:, 1] < 0.5).float() * 3 - 1
    hard[:, 2] = 0.25
    hard[:, 3] = 1e30 * hard[:, 3] - 7e29
    for bins in (256, 7, 1):
        assert torch.equal(otsu_threshold(hard.cuda(), bins=bins).cpu(), otsu_threshold(hard, bins=bins))
    odd = torch.rand(2, 3, 13, 7)
    for changed in (odd.transpose(2, 3), odd.half(), odd[:0], odd.double(), torch.rand(1, 160, 160)):
        assert torch.equal(otsu_threshold(changed.cuda()).cpu(), otsu_threshold(changed))


@pytest.mark.gpu
def test_cuda_does_not_synchronize_and_marks_maps_without_threshold() -> None:
    maps = torch.rand(2, 3, 6, 6)
    maps[0, 1, 2, 2], maps[1, 0, 0, 0] = torch.nan, torch.inf
    maps[1, 2] = 1 + 2.0**-20 * maps[1, 2].round()  # too few floats between its extrema
    expected, moved = torch.tensor([[False, True, False], [True, False, True]]), maps.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        thresholds = otsu_threshold(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(thresholds.isnan().cpu(), expected)


@pytest.mark.parametrize(
    ("maps", "bins", "message"),
    [
        (torch.rand(5), 256, r"maps are torch.float32 \(5,\), expected float \(..., H, W\)"),
        (torch.ones(5, 5).int(), 256, "maps are torch.int32"),
        (torch.rand(2, 0, 5), 256, r"\(2, 0, 5\)"),
        (torch.rand(5, 5), 0, "bins is 0, expected 1 to 65536"),
    ],
)
def test_wrong_arguments(maps: Tensor, bins: int, message: str) -> None:
    with pytest.raises(OpError, match=message):
        otsu_threshold(maps, bins=bins)

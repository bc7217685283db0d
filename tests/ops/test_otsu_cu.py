"""csrc/otsu.cu on the host."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ospo_fast import otsu_threshold


@pytest.fixture(scope="session")
def run(on_host: Callable[..., Any]) -> Callable[..., Tensor]:
    kernel = on_host("otsu_threshold_cuda", "otsu.cu")

    def call(maps: Tensor, bins: int, reverse: bool = False) -> Tensor:
        thresholds = torch.full(maps.shape[:1], 77.0)
        kernel(maps, thresholds, len(maps), maps[0].numel(), bins, reverse=reverse)
        return thresholds

    return call


@pytest.mark.parametrize(("size", "bins"), [((24, 24), 256), ((13, 7), 17), ((24, 24), 1), ((1, 1), 256)])
def test_bits_equal_those_of_the_cpu_kernel(
    run: Callable[..., Tensor], hard_maps: Callable[..., Tensor], size: tuple[int, int], bins: int
) -> None:
    maps = hard_maps(1, 6, *size)[0][[0, 1, 3, 4, 5]].contiguous()  # the range of the third is too small for the bins
    for reverse in (False, True):
        assert torch.equal(run(maps, bins, reverse), otsu_threshold(maps, bins=bins))


def test_maps_without_a_threshold_are_marked(run: Callable[..., Tensor]) -> None:
    maps = torch.rand(6, 6, 6)
    maps[1, 2, 2], maps[2, 0, 0], maps[3, 5, 5] = torch.nan, torch.inf, -torch.inf
    maps[4] = 1 + 2.0**-20 * maps[4].round()  # too few floats between its extrema
    maps[5] = (maps[5] - 0.5) * 6.8e38  # a range beyond the largest float
    assert run(maps, 256).isnan().tolist() == [False, True, True, True, True, True]

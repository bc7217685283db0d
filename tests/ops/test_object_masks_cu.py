"""csrc/object_masks.cu on the host."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ospo_fast import object_masks

FIELDS = ("maps", "thresholds", "masks", "union")


@pytest.fixture(scope="session")
def run(on_host: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    kernel = on_host("object_masks_cuda", "object_masks.cu")

    def call(maps: Tensor, valid: Tensor | None = None, *, bins: int = 256, reverse: bool = False) -> list[Tensor]:
        B, objects, H, W = maps.shape
        shapes = [(maps.shape, torch.float32), ((B, objects), torch.float32), (maps.shape, torch.uint8)]
        out = [torch.full(shape, 77, dtype=dtype) for shape, dtype in [*shapes, ((B, H, W), torch.uint8)]]
        kernel(maps, valid, *out, B, objects, H * W, 0.8, bins, reverse=reverse)
        return out

    return call


@pytest.mark.parametrize(
    ("shape", "bins"),
    [
        ((2, 6, 24, 24), 256),  # 8 teams for 6 objects
        ((1, 6, 61, 61), 40),  # 4 teams, prefix sums of two batches and a rest
        ((1, 6, 111, 111), 17),  # one team of 8 warps
        ((2, 3, 13, 7), 17),
        ((1, 1, 1, 1), 256),
        ((1, 0, 5, 5), 7),
    ],
)
def test_bits_equal_those_of_the_cpu_kernel(
    run: Callable[..., list[Tensor]], hard_maps: Callable[..., Tensor], shape: tuple[int, ...], bins: int
) -> None:
    maps = hard_maps(*shape)
    for valid in (None, torch.rand(shape[:2]) < 0.8):
        expected = object_masks(maps, valid=valid, bins=bins)
        for reverse in (False, True):
            mine = run(maps, None if valid is None else valid.to(torch.uint8), bins=bins, reverse=reverse)
            for tensor, name in zip(mine, FIELDS, strict=True):
                assert torch.equal(tensor, getattr(expected, name)), name


def test_maps_that_are_not_finite_are_marked(run: Callable[..., list[Tensor]]) -> None:
    maps = torch.rand(1, 3, 6, 6)
    maps[0, 1, 2, 2], maps[0, 2, 0, 0] = torch.nan, torch.inf
    _, thresholds, masks, union = run(maps)
    assert thresholds[0].isnan().tolist() == [False, True, True]
    assert not masks[0, 1:].any()
    assert torch.equal(union, masks.amax(1))

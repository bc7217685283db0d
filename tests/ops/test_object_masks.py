from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.filters import threshold_otsu
from torch import Tensor

from ospo_fast import object_masks
from ospo_fast.errors import OpError


@pytest.mark.parametrize("index", range(2))
def test_golden(golden: Any, index: int) -> None:
    figures = golden(f"attention_masks_{index}.npz")
    scaler = float(figures["scaler"])
    for factor, error in ((1, 0), (3e-3, 4e-6)):  # normalised: the same bits; raw: what 1e-8 is of their range
        result = object_masks(torch.tensor(figures["maps"] * factor)[None], scaler=scaler)
        np.testing.assert_allclose(result.maps[0], figures["maps"], rtol=error, atol=0)
        np.testing.assert_allclose(result.thresholds[0], figures["otsu"], rtol=error, atol=0)
        np.testing.assert_array_equal(result.masks[0], figures["masks"])
        np.testing.assert_array_equal(result.union[0], figures["union"])
        soft = torch.sigmoid(100 * (result.maps - (result.thresholds * scaler)[..., None, None]))
        np.testing.assert_allclose(soft[0], figures["soft"], rtol=100 * error + 2e-6)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(0, 3),
    objects=st.integers(0, 4),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    scaler=st.sampled_from([0.8, 1.0, 0.0]),
)
def test_against_scikit_image(batch: int, objects: int, height: int, width: int, scaler: float) -> None:
    maps, valid = torch.rand(batch, objects, height, width) ** 3, torch.rand(batch, objects) < 0.7
    maps[~valid] = torch.nan
    result = object_masks(maps, valid=valid, scaler=scaler)
    assert result.masks.dtype == result.union.dtype == torch.uint8
    assert result.union.shape == (batch, height, width)
    for b in range(batch):
        union = np.zeros((height, width), bool)
        for o in range(objects):
            mask, threshold = np.zeros((height, width), bool), np.float32(0)
            if valid[b, o]:
                x = maps[b, o].numpy()
                x = (x - x.min()) / (x.max() - x.min() + np.float32(1e-8))
                threshold = threshold_otsu(x)
                mask = x > np.float32(threshold * np.float32(scaler))
            union |= mask
            assert float(result.thresholds[b, o]) == float(threshold)
            np.testing.assert_array_equal(result.masks[b, o], mask)
        np.testing.assert_array_equal(result.union[b], union)


def test_special_maps() -> None:
    maps = torch.rand(2, 3, 6, 6)
    maps[0, 1] = 0.25  # constant
    result = object_masks(maps)
    assert not result.masks[0, 1].any()
    assert result.masks[0, [0, 2]].any()
    nothing = object_masks(torch.rand(2, 0, 6, 6))
    assert nothing.masks.shape == (2, 0, 6, 6)
    assert nothing.thresholds.shape == (2, 0)
    assert torch.equal(nothing.union, torch.zeros(2, 6, 6, dtype=torch.uint8))
    shifted = object_masks(maps.transpose(2, 3))
    assert torch.equal(shifted.masks, result.masks.transpose(2, 3))
    assert object_masks(maps.half()).maps.dtype == torch.float32
    assert object_masks(maps.double()).maps.dtype == torch.float64
    assert not object_masks(maps.requires_grad_()).maps.requires_grad


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        (torch.rand(3, 6, 6), {}, r"maps are torch.float32 \(3, 6, 6\), expected float \(B, O, H, W\)"),
        (torch.ones(1, 1, 6, 6).long(), {}, "maps are torch.int64"),
        (torch.rand(1, 1, 6, 0), {}, r"\(1, 1, 6, 0\)"),
        (
            torch.rand(1, 2, 6, 6),
            {"valid": torch.ones(1, 3).bool()},
            r"valid is torch.bool \(1, 3\), expected bool \(1, 2\)",
        ),
        (torch.rand(1, 2, 6, 6), {"valid": torch.ones(1, 2)}, "valid is torch.float32"),
        (torch.rand(1, 2, 6, 6), {"scaler": -0.1}, "scaler is -0.1"),
        (torch.rand(2, 2, 6, 6).index_fill(1, torch.tensor([1]), torch.nan), {}, r"maps\[0, 1\] holds NaN or infinity"),
        (torch.full((1, 1, 2, 2), torch.inf), {}, "mark it False in `valid` to leave it out"),
    ],
)
def test_wrong_arguments(maps: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OpError, match=message):
        object_masks(maps, **options)

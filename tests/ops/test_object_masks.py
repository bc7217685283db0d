import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ospo_fast import object_masks
from ospo_fast.errors import OpError
from ospo_fast.ops.object_masks import mask_iou, object_masks_reference, soft_masks, spatial_entropy
from ospo_fast.ops.otsu import SHARED_FLOATS

FIELDS = ("maps", "thresholds", "masks", "union")


@pytest.mark.parametrize("index", range(2))
def test_golden(golden: Any, index: int) -> None:
    data = golden(f"attention_masks_{index}.npz")
    scaler = float(data["scaler"])
    for factor, error in ((1, 0), (3e-3, 4e-6)):  # normalized: the same bits; raw: 1e-8 relative to their range
        result = object_masks(torch.tensor(data["maps"] * factor)[None], scaler=scaler)
        np.testing.assert_allclose(result.maps[0], data["maps"], rtol=error, atol=0)
        np.testing.assert_allclose(result.thresholds[0], data["otsu"], rtol=error, atol=0)
        np.testing.assert_array_equal(result.masks[0], data["masks"])
        np.testing.assert_array_equal(result.union[0], data["union"])
        soft = soft_masks(result, scaler=scaler)
        np.testing.assert_allclose(soft[0], data["soft"], rtol=100 * error + 2e-6)


@pytest.mark.parametrize("scaler", [0.8, 1.0, 0.0])
@pytest.mark.parametrize(
    ("batch", "objects", "height", "width"),
    [(3, 4, 12, 11), (2, 3, 5, 7), (1, 4, 1, 12), (2, 2, 9, 1), (3, 1, 1, 1), (2, 0, 3, 4), (0, 2, 3, 4)],
)
def test_against_scikit_image(batch: int, objects: int, height: int, width: int, scaler: float) -> None:
    filters = pytest.importorskip("skimage.filters", reason="needs scikit-image")
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
                threshold = filters.threshold_otsu(x)
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


def hard_maps() -> torch.Tensor:
    """Maps whose thresholds depend on the last bit: empty bins, ties, tiny and huge ranges, a constant one."""
    maps = torch.rand(3, 6, 24, 24) ** 2
    maps[:, 0] = (maps[:, 0] * 6).round()
    maps[:, 1] = (maps[:, 1] < 0.5).float() * 3 - 1
    maps[:, 2] = maps[:, 2] * 1e-12 + 1e-3
    maps[:, 3] = 1e30 * maps[:, 3] - 7e29
    maps[:, 4] = 0.25
    return maps


@pytest.mark.parametrize("bins", [256, 7, 1])
def test_reference_has_the_same_bits(bins: int) -> None:
    maps, valid = hard_maps(), torch.rand(3, 6) < 0.8
    ours, reference = (f(maps, valid=valid, bins=bins) for f in (object_masks, object_masks_reference))
    for name in FIELDS:
        assert torch.equal(getattr(ours, name), getattr(reference, name)), name


def test_spatial_entropy() -> None:
    uniform, peak = torch.full((4, 4), 0.3), torch.zeros(4, 4)
    peak[1, 2] = 5
    entropy = spatial_entropy(torch.stack([uniform, peak, torch.zeros(4, 4), -uniform]))
    assert entropy.dtype == torch.float64
    assert entropy.tolist() == pytest.approx([1, 0, 0, 0])
    shares = torch.rand(3, 5).double()
    p = (shares / shares.sum()).flatten()
    assert float(spatial_entropy(shares)) == pytest.approx(float(-(p * p.log()).sum() / np.log(15)))


def test_mask_iou() -> None:
    first, second = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 0.5, 2]])
    assert mask_iou(first, second) == 1 / 3
    assert mask_iou(first, first.bool()) == 1
    assert mask_iou(first, 1 - first) == 0
    assert mask_iou(first * 0, second * 0) is None


@pytest.mark.usefixtures("poisoned")
def test_poisoned_memory() -> None:
    result = object_masks(torch.rand(2, 3, 5, 7), valid=torch.tensor([[True, False, True]] * 2))
    assert result.maps.isfinite().all()
    assert result.masks.max() <= 1
    assert result.union.max() <= 1
    assert (result.thresholds[:, 1] == 0).all()


def test_opcheck_and_compile() -> None:
    maps, valid = torch.rand(2, 3, 5, 5), torch.tensor([[True, False, True]] * 2)
    for which in (None, valid):
        torch.library.opcheck(torch.ops.ospo_fast.object_masks, (maps, which, 0.8, 256))
    compiled = torch.compile(lambda x: object_masks(x * 2).union + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(maps), object_masks(maps * 2).union + 1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "bins"),
    [
        ((32, 4, 24, 24), 256),  # Janus
        ((1, 1, 1, 1), 256),
        ((3, 0, 5, 7), 256),
        ((0, 2, 5, 7), 256),
        ((2, 3, 13, 7), 17),  # primes, fewer cells than threads
        ((3, 11, 24, 24), 256),  # more objects than there are warps
        ((2, 2, 100, 100), 1000),  # more shared memory than a kernel has unasked
    ],
)
def test_cuda_has_the_same_bits(shape: tuple[int, ...], bins: int) -> None:
    maps, valid = torch.rand(shape) ** 3, torch.rand(shape[:2]) < 0.8
    ours = object_masks(maps.cuda(), valid=valid.cuda(), bins=bins)
    expected = object_masks(maps, valid=valid, bins=bins)
    for name in FIELDS:
        assert torch.equal(getattr(ours, name).cpu(), getattr(expected, name)), name


@pytest.mark.gpu
def test_cuda_on_hard_maps_and_golden_values(golden: Any) -> None:
    maps = hard_maps()
    for bins in (256, 7, 1):
        ours, expected = object_masks(maps.cuda(), bins=bins), object_masks(maps, bins=bins)
        for name in FIELDS:
            assert torch.equal(getattr(ours, name).cpu(), getattr(expected, name)), name
    for index in range(2):
        data = golden(f"attention_masks_{index}.npz")
        result = object_masks(torch.tensor(data["maps"])[None].cuda(), scaler=float(data["scaler"]))
        np.testing.assert_array_equal(result.thresholds[0].cpu(), data["otsu"])
        np.testing.assert_array_equal(result.masks[0].cpu(), data["masks"])
        np.testing.assert_array_equal(result.union[0].cpu(), data["union"])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_cuda_launches_one_kernel(tmp_path: Path) -> None:
    maps = torch.rand(5, 3, 24, 24).cuda()
    object_masks(maps)
    torch.use_deterministic_algorithms(False)  # else new tensors are filled by kernels too
    with torch.profiler.profile() as profile:
        object_masks(maps)
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    launched = [event["name"] for event in events if event.get("cat") == "kernel"]
    assert ["object_masks_kernel" in name for name in launched] == [True], launched


@pytest.mark.gpu
def test_cuda_does_not_synchronize_and_marks_maps_that_are_not_finite() -> None:
    maps = torch.rand(2, 3, 6, 6).cuda()
    maps[1, 2, 3, 3] = torch.nan
    maps[0, 0, 0, 0] = torch.inf
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = object_masks(maps.transpose(2, 3))  # the copy does not synchronize either
    finally:
        torch.cuda.set_sync_debug_mode("default")
    unusable = torch.zeros(2, 3, dtype=torch.bool)
    unusable[1, 2] = unusable[0, 0] = True
    assert torch.equal(result.thresholds.isnan().cpu(), unusable)
    assert not result.masks[unusable.cuda()].any()
    assert torch.equal(result.union, result.masks.amax(1))


@pytest.mark.gpu
def test_cuda_uses_the_reference_for_large_maps_and_float64() -> None:
    for maps in (torch.rand(1, 1, 160, 160), torch.rand(2, 2, 9, 9).double()):
        assert maps[0, 0].numel() > SHARED_FLOATS or maps.dtype == torch.float64
        for name in FIELDS:
            assert torch.equal(getattr(object_masks(maps.cuda()), name).cpu(), getattr(object_masks(maps), name))


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
        (torch.rand(1, 2, 6, 6), {"valid": torch.ones(1, 2).bool().to("meta")}, "valid is on meta, maps on cpu"),
        (torch.rand(1, 2, 6, 6), {"scaler": -0.1}, "scaler is -0.1"),
        (torch.rand(1, 2, 6, 6), {"bins": 0}, "bins is 0"),
        (torch.tensor([[[[-3e38, 3e38]]]]), {}, r"maps\[0, 0\] has values from .* min-max normalize"),
        (torch.rand(2, 2, 6, 6).index_fill(1, torch.tensor([1]), torch.nan), {}, r"maps\[0, 1\] holds NaN or infinity"),
        (torch.full((1, 1, 2, 2), torch.inf), {}, "or mark it False in `valid`"),
    ],
)
def test_wrong_arguments(maps: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OpError, match=message):
        object_masks(maps, **options)

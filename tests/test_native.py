import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

from ospo_fast.ops._dispatch import DTYPES


def native() -> types.ModuleType:
    """The compiled module. Imported by each test: without it these tests fail, but collection does not."""
    return importlib.import_module("ospo_fast._C")


def thresholds(maps: torch.Tensor, threads: int) -> torch.Tensor:
    out = torch.full((len(maps),), torch.nan)
    native().otsu_threshold(maps.data_ptr(), out.data_ptr(), len(maps), maps[0].numel(), 256, threads)
    return out


def masks(maps: torch.Tensor, threads: int) -> list[torch.Tensor]:
    B, objects, H, W = maps.shape
    shapes = [(maps.shape, torch.float32), ((B, objects), torch.float32), (maps.shape, torch.uint8)]
    out = [torch.full(shape, 77, dtype=dtype) for shape, dtype in [*shapes, ((B, H, W), torch.uint8)]]
    pointers = (tensor.data_ptr() for tensor in out)
    native().object_masks(maps.data_ptr(), 0, *pointers, B, objects, H * W, 0.8, 256, threads)
    weights, union = torch.full((B, H * W), torch.nan), out[-1].float()
    native().token_weights(union.data_ptr(), weights.data_ptr(), B, H, W, 1.0, 0.5, 5, 1.0, threads)
    return [*out, weights]


def sampled(
    cond: torch.Tensor, uncond: torch.Tensor, seeds: torch.Tensor, threads: int, top_k: int = 0, top_p: float = 1.0
) -> list[torch.Tensor]:
    steps, out, errors = (torch.full_like(seeds, value) for value in (5, -7, -1))
    logps = torch.full((len(seeds),), 7.0)
    pointers = (tensor.data_ptr() for tensor in (cond, uncond, seeds, steps))
    native().sample_codes(
        *pointers, 0, 0, 0, out.data_ptr(), errors.data_ptr(), *cond.shape, 5.0, 1.0, top_k, top_p, logps.data_ptr(),
        threads,
    )  # fmt: skip
    return [out, logps]


def softmax_step(logits: torch.Tensor, labels: torch.Tensor, threads: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits, logps = logits.clone(), torch.full((len(logits),), torch.nan)
    number = DTYPES[logits.dtype]
    address = logits.data_ptr()
    native().token_logprobs(
        address, number, 0, labels.data_ptr(), 1.0, 0.0, 0, 0, 0, logps.data_ptr(), 0, 0, address, number,
        *logits.shape, threads,
    )  # fmt: skip
    return logits, logps


def scaled(dhidden: torch.Tensor, scales: torch.Tensor, threads: int = 1) -> torch.Tensor:
    out, packed_row = torch.full_like(dhidden, torch.nan), torch.arange(len(dhidden))
    pointers = (tensor.data_ptr() for tensor in (dhidden, packed_row, scales, out))
    native().scale_rows(*pointers, DTYPES[dhidden.dtype], *dhidden.shape, threads)
    return out


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    maps = torch.rand(37, 23, 29)
    assert torch.equal(thresholds(maps, 1), thresholds(maps, 3))
    maps = torch.rand(7, 3, 23, 29)
    assert all(torch.equal(one, three) for one, three in zip(masks(maps, 1), masks(maps, 3), strict=True))
    cond, uncond, seeds = torch.randn(37, 1021), torch.randn(37, 1021), torch.randint(2**62, (37,))
    for truncation in ((), (99, 0.9)):
        one, three = (sampled(cond, uncond, seeds, threads, *truncation) for threads in (1, 3))
        assert all(map(torch.equal, one, three))
        assert bool((one[1] == 7).all()) == (not truncation)  # written with truncation alone
    labels, scales = torch.randint(1021, (37,)), torch.randn(37)
    for one, three in zip(softmax_step(cond, labels, 1), softmax_step(cond, labels, 3), strict=True):
        assert torch.equal(one, three)
    assert torch.equal(scaled(cond, scales, 1), scaled(cond, scales, 3))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc lists the threads of a process")
def test_fewer_parts_than_threads_end_no_thread() -> None:
    many, few = torch.rand(8, 9, 9), torch.rand(2, 9, 9)
    thresholds(many, 4)
    threads = set(Path("/proc/self/task").iterdir())
    for maps in (few, many, few, many):
        thresholds(maps, 4)
    assert set(Path("/proc/self/task").iterdir()) <= threads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3, -7.7, 2.0**-20, 1e30])
def test_16_bit_conversions_equal_those_of_torch(dtype: torch.dtype, scale: float) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    out = scaled(every, torch.full((64,), scale))
    torch.testing.assert_close(out, (every.float() * scale).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_exponentials_of_the_softmax_step() -> None:
    # The gradient of x in a row (0, x) is -exp(x) / (1 + exp(x)).
    x = -torch.cat([torch.rand(20_000) * 87, torch.tensor([0.0, 1e-30, 86.9, 88.0, 100.0, 1e30, torch.inf])])
    rows = torch.stack([torch.zeros_like(x), x], 1)
    grad, _ = softmax_step(rows, torch.zeros(len(x), dtype=torch.int64), 1)
    exact = -x.double().exp() / (1 + x.double().exp())
    error = (grad[:, 1].double() - exact).abs() / exact.abs().clamp(min=2.0**-126)
    assert error[x > -86.9].max() < 4e-7
    assert error.max() <= 1  # 0 in place of a subnormal number


def test_maps_without_a_threshold_do_not_change_others() -> None:
    maps = torch.rand(6, 8, 8)
    maps[0, 3, 3] = torch.nan
    maps[1, 7, 7] = torch.inf
    maps[2] = torch.tensor([3e38, -3e38]).repeat(32).view(8, 8)  # a range beyond float32
    maps[3] = torch.tensor([1.0, 1.0 + 2**-23]).repeat(32).view(8, 8)  # too small a range for 256 bins
    out = thresholds(maps, 2)
    assert out[:4].isnan().all()
    assert torch.equal(out[4:], thresholds(maps[4:].clone(), 1))
    assert not out[4:].isnan().any()


def test_versions_of_driver_and_runtime() -> None:
    versions = native().cuda_versions()
    assert (versions is not None) == native().build_info()["cuda"]
    if versions is not None:
        driver, runtime = versions
        assert runtime >= 11000
        assert driver == 0 or driver >= 11000

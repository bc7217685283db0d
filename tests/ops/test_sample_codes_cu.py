"""csrc/sample_codes.cu on the host."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ospo_fast.ops._dispatch import DTYPES

STAGED, COMPUTED = 227 * 1024, 0  # bytes of shared memory: truncation keeps the keys there, or computes them again
OPTIONS = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
Sample = Callable[..., list[Tensor]]


@pytest.fixture(scope="session")
def sample(on_host: Callable[..., Any]) -> Sample:
    """Tokens, codes and error steps that the kernels write for logits (2, B, V) or (B, V)."""
    kernel = on_host("sample_codes_cuda", "sample_codes.cu")

    def call(logits: Tensor, *, shared: int = STAGED, reverse: bool = False, **options: Any) -> list[Tensor]:
        cond, uncond = logits if logits.dim() == 3 else (logits, None)
        seeds, steps, tokens, codes, errors = out = inputs(len(cond))
        given = OPTIONS | options
        kernel.variable("max_shared_bytes", ctypes.c_int).value = shared
        kernel(
            DTYPES[cond.dtype], cond, uncond, cond.stride(0), seeds, steps, tokens, tokens.stride(0), tokens.shape[1],
            codes, errors, *cond.shape, *given.values(), reverse=reverse,
            device=int(shared == COMPUTED),  # the limit of a device is read once
        )  # fmt: skip
        return out[2:]

    call.wide_loads = kernel.variable("wide_loads", ctypes.c_int64)  # type: ignore[attr-defined]
    return call


def inputs(B: int) -> list[Tensor]:
    """seeds, steps, tokens, codes, error steps."""
    seeds, steps = torch.arange(B) * 2**40 - 5, torch.arange(B) % 3
    return [seeds, steps, torch.full((B, 3), -7), torch.full((B,), -7), torch.full((B,), -1)]


def expected(logits: Tensor, **options: Any) -> list[Tensor]:
    """The same from the C++ kernel."""
    from ospo_fast import _C

    logits = logits.float().contiguous()
    cond, uncond = logits if logits.dim() == 3 else (logits, None)
    seeds, steps, tokens, codes, errors = inputs(len(cond))
    given = OPTIONS | options
    pointers = [0 if t is None else t.data_ptr() for t in (cond, uncond, seeds, steps, tokens)]
    _C.sample_codes(*pointers, 3, 3, codes.data_ptr(), errors.data_ptr(), *cond.shape, *given.values(), 0, 1)
    return [tokens, codes, errors]


def same(sample: Sample, logits: Tensor, *, shared: int = STAGED, reverse: bool = False, **options: Any) -> None:
    found = sample(logits, shared=shared, reverse=reverse, **options)
    for mine, theirs in zip(found, expected(logits, **options), strict=True):
        assert torch.equal(mine, theirs), options


@pytest.mark.parametrize("shared", [STAGED, COMPUTED])
@pytest.mark.parametrize(
    ("V", "dtype"),
    [
        (1, torch.float32),
        (3, torch.bfloat16),
        (333, torch.float16),  # most threads have no logits
        (2051, torch.bfloat16),  # the last batch is not full; many equal logits
        (2051, torch.float32),
    ],
    ids=str,
)
def test_codes_equal_those_of_the_cpu_kernel(sample: Sample, V: int, dtype: torch.dtype, shared: int) -> None:
    logits = (torch.randn(2, 3, V) * 3).to(dtype)
    logits[0, 1, ::2] = -torch.inf
    logits[0, 2] = logits[0, 2].round()
    guided: dict[str, Any] = {"guidance_scale": 2.0, "temperature": 0.7}
    some = max(V // 3, 1)
    for options in (
        {},
        {"top_k": 1},
        {"top_k": some, "temperature": 3.0},
        {"top_k": V},  # all codes
        {"top_k": V + 5},
        {"top_p": 1e-12},
        {"top_p": 0.4},
        {"top_p": 1 - 2.0**-53},
        {"top_k": some, "top_p": 0.8},
        {"top_k": 2, "top_p": 0.5, "temperature": 0.0},  # the most likely code
    ):
        same(sample, logits, shared=shared, **guided | options)
        same(sample, logits[0], shared=shared, reverse=True, **options)


@pytest.mark.parametrize(("shared", "V"), [(STAGED, 16384), (COMPUTED, 20011)])
def test_rows_of_real_length(sample: Sample, shared: int, V: int) -> None:
    logits = torch.randn(2, 1, V) * 2
    same(sample, logits, shared=shared, guidance_scale=5.0, top_k=300, top_p=0.9)
    same(sample, logits[0].bfloat16(), shared=shared, top_p=0.9)


@pytest.mark.parametrize("shared", [STAGED, COMPUTED])
def test_the_first_of_equal_logits_are_kept(sample: Sample, shared: int) -> None:
    V = 700
    tied = torch.zeros(16, V)
    tied[:, ::7] = -0.0  # equal to 0
    codes = sample(tied, shared=shared, top_p=0.03)[1]
    assert codes.max() < 21  # the fewest that reach 0.03 · 700
    assert len(codes.unique()) > 5
    codes = sample(tied, shared=shared, top_k=3)[1]
    assert codes.max() > 300
    tied[:, 350:] += 1.0
    same(sample, tied[:3], shared=shared, top_p=0.5)
    same(sample, tied[:3], shared=shared, top_p=0.9, top_k=20, reverse=True)


@pytest.mark.parametrize("shared", [STAGED, COMPUTED])
@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.5}])
def test_invalid_rows_are_marked_without_changing_others(sample: Sample, options: dict[str, Any], shared: int) -> None:
    logits = torch.randn(5, 601)
    logits[1, 600], logits[2, 3], logits[3] = torch.nan, torch.inf, -torch.inf
    same(sample, logits, shared=shared, **options)
    _, codes, errors = sample(logits, shared=shared, reverse=True, **options)
    assert errors.tolist() == [-1, 1, 2, 0, -1]
    assert codes[1:4].tolist() == [0, 0, 0]


def test_strided_rows(sample: Sample) -> None:
    logits = torch.randn(4, 3, 1000)[:2, :, :777]
    same(sample, logits, guidance_scale=3.0, top_k=99, top_p=0.95)
    same(sample, logits[0, ::2], top_p=0.95)


@pytest.mark.parametrize("V", [4096, 16391, 5])  # whole batches, a remainder, less than one load of a 16-bit dtype
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [STAGED, COMPUTED])
def test_alignment_decides_the_loads(sample: Sample, V: int, dtype: torch.dtype, shared: int) -> None:
    """Aligned rows are read 16 bytes at a time, others one logit at a time."""
    wide = 16 // dtype.itemsize
    even = -(-V // wide) * wide
    for start, stride, half, aligned in (
        (0, even, 2 * even, 2),
        (0, even + 1, 2 * (even + wide), 1),  # the second row is not aligned
        (0, even, 2 * even + 1, 0),  # nor are the unconditional rows
        (1, even, 2 * even, 0),
    ):
        memory = torch.full((4 * (even + wide),), torch.nan, dtype=dtype)
        assert memory.data_ptr() % 16 == 0
        logits = memory[start:].as_strided((2, 2, V), (half, stride, 1))
        logits.copy_(torch.randn(2, 2, V) * 2)
        logits[:, 1] = logits[:, 1].round()  # many equal ones
        for options in ({}, {"temperature": 0.0}, {"top_k": 40, "top_p": 0.9}):
            sample.wide_loads.value = 0  # type: ignore[attr-defined]
            same(sample, logits, shared=shared, guidance_scale=3.0, **options)
            loads, once = sample.wide_loads.value, 2 * aligned * (V // wide)  # type: ignore[attr-defined]
            again = shared == COMPUTED and "top_k" in options
            assert loads > once if again and once else loads == once, options


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_rows_that_overflow_by_the_temperature(sample: Sample, temperature: float, options: dict[str, Any]) -> None:
    logits = torch.tensor([[3e38, 1.0, 0.0], [-3e38, -3e38, -torch.inf], [3e38, 3e38, -3e38], [1e38, -3e38, 0.0]])
    same(sample, logits, temperature=temperature, **options)
    errors = sample(logits, temperature=temperature, **options)[2]
    assert (errors >= 0).tolist() == ([True, True, True, False] if temperature < 1 else [False] * 4)

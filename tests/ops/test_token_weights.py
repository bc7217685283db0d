import math
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from ospo_fast import token_weights
from ospo_fast.errors import OpError
from ospo_fast.ops.token_weights import MAX_BLUR_SIZE, spread_weights, token_weights_reference


def test_golden(golden: Any) -> None:
    data = golden("token_weights.npz")
    for mask, alpha, gamma, weights in zip(*(data[k] for k in ("masks", "alpha", "gamma", "weights")), strict=True):
        result = token_weights(torch.tensor(mask)[None], alpha=float(alpha), gamma=float(gamma))
        assert result.dtype == torch.float32
        np.testing.assert_allclose(result[0], weights, rtol=2e-6)


def test_formula_cell_by_cell() -> None:
    mask = torch.rand(2, 5, 7, dtype=torch.float64)
    kernel = np.exp(-0.5 * (np.arange(3) - 1.0) ** 2 / 0.7**2)
    kernel /= kernel.sum()
    expected = np.empty((2, 5, 7))
    for b in range(2):
        padded = np.pad(mask[b].numpy(), 1)
        blurred = np.array([[kernel @ padded[y : y + 3, x : x + 3] @ kernel for x in range(7)] for y in range(5)])
        expected[b] = 1 + 0.5 * ((blurred - blurred.min()) / (blurred.max() - blurred.min() + 1e-8)) ** 2
    result = token_weights(mask, alpha=0.5, gamma=2, blur_size=3, blur_sigma=0.7)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result, expected.reshape(2, 35), rtol=1e-12)


def test_empty_full_and_unblurred_masks() -> None:
    empty, full = torch.zeros(1, 6, 6), torch.ones(1, 6, 6)
    assert torch.equal(token_weights(empty), torch.ones(1, 36))
    assert token_weights(full)[0, 0] == 1  # the blur lowers the corner most
    assert token_weights(full).max() == 2
    assert token_weights(full, gamma=0.5)[0, [0, 5, 30, 35]].tolist() == [1] * 4  # equal cells stay equal
    mask = torch.rand(3, 6, 6) < 0.3
    assert torch.equal(token_weights(mask, blur_size=1), 1 + mask.flatten(1).float())
    assert torch.equal(token_weights(mask, alpha=0), torch.ones(3, 36))
    for dtype in (torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(token_weights(mask.to(dtype)), token_weights(mask))
    assert torch.equal(token_weights(mask.transpose(1, 2)), token_weights(mask.transpose(1, 2).contiguous()))
    for none in (torch.zeros(0, 6, 6), torch.zeros(0, 6, 6, dtype=torch.int64)):
        assert token_weights(none).shape == token_weights_reference(none).shape == (0, 36)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint32, torch.int64, torch.uint64])
def test_wide_integers_differ_as_small_ones_do(dtype: torch.dtype) -> None:
    """float64 holds no integer above 2^53 exactly, but the difference of two."""
    limits = torch.iinfo(dtype)
    for low, high in ((limits.max - 1, limits.max), (limits.min, limits.min + 1), (limits.min, limits.max)):
        mask = torch.tensor([[[low, high]], [[high, high]]], dtype=dtype)
        assert token_weights(mask, blur_size=1).tolist() == [[1, 2], [1, 1]]
        assert token_weights(mask, blur_sigma=1e-30).tolist() == [[1, 2], [1, 1]]
    small = torch.randint(0, 9, (2, 5, 6))
    assert torch.equal(token_weights(small.to(dtype)), token_weights_reference(small.double()).float())
    shifted = (small + 2**30).to(dtype)  # the padding is 0 still
    torch.testing.assert_close(token_weights(shifted), token_weights_reference(shifted.double()).float())
    assert torch.equal(token_weights(shifted.mT[:, ::2]), token_weights(shifted.mT[:, ::2].contiguous()))


def exact_weights(mask: torch.Tensor, size: int, sigma: float) -> np.ndarray[Any, Any]:
    """The formula in fractions, of one mask."""
    taps = [Fraction(math.exp(-0.5 * (t / sigma) ** 2)) for t in range(-(size // 2), size // 2 + 1)]
    rows = [[Fraction(x) for x in row] for row in mask.tolist()]
    for _ in range(2):
        padded = [[Fraction(0)] * (size // 2) + row + [Fraction(0)] * (size // 2) for row in rows]
        blurred = [
            [sum((a * b for a, b in zip(taps, row[x:], strict=False)), Fraction(0)) / sum(taps) for x in range(length)]
            for row, length in ((row, len(row) - size + 1) for row in padded)
        ]
        rows = [list(column) for column in zip(*blurred, strict=True)]
    cells = [x for row in rows for x in row]
    span = max(cells) - min(cells) + Fraction(1, 10**8)
    return np.array([float(1 + (x - min(cells)) / span) for x in cells])


@pytest.mark.parametrize("dtype", [torch.uint32, torch.int64, torch.uint64])
@pytest.mark.parametrize("options", [{}, {"gamma": 0.1}, {"blur_size": 3, "blur_sigma": 0.4}, {"blur_size": 1}])
def test_wide_integers_of_small_values_weigh_as_int32(dtype: torch.dtype, options: dict[str, Any]) -> None:
    lowest = -(2**31) if dtype == torch.int64 else 0
    masks = [torch.tensor([[[5, 6, 7]], [[200, 255, 200]]]), torch.randint(0, 9, (3, 5, 6)) + 1]
    masks += [torch.randint(lowest, 2**31, (3, 4, 7)), torch.randint(lowest, lowest + 4, (3, 4, 7))]
    for mask in masks:
        expected = token_weights(mask.int(), **options)
        assert torch.equal(token_weights(mask.to(dtype), **options), expected)
        assert torch.equal(token_weights_reference(mask.to(dtype), **options), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_integers_far_from_zero_with_a_blur(dtype: torch.dtype) -> None:
    """What the padding takes of every cell must not round off their differences."""
    for low in (2**62, 2**63 - 2, torch.iinfo(dtype).max - 1, torch.iinfo(dtype).min):
        for cells in ([[0, 1]], [[0, 1], [0, 0]]):  # the padding takes the same of each
            mask = torch.tensor([[[low + x for x in row] for row in cells]], dtype=dtype)
            assert torch.equal(token_weights(mask), token_weights(torch.tensor([cells], dtype=torch.int32)))
    square = torch.tensor([[[2**62, 2**62 + 1], [2**62, 2**62]]], dtype=dtype)
    np.testing.assert_allclose(token_weights(square), [[1.3775407, 2, 1, 1.3775407]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_64_bits_against_fractions(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    for low in (limits.min, limits.max - 5, -(2**33) if limits.min else 2**33, 2**53, 2**62, 2**63 - 6):
        for span in (5, limits.max - max(low, 0)):
            # With 0.115, the padding takes less than float64 can subtract from 1.
            for size, sigma in ((3, 0.115), (3, 0.2), (5, 1.0), (7, 2.0)):
                random = torch.randint(0, 2**62, (3, 4)).tolist()
                mask = torch.tensor([[low + x % (span + 1) for x in row] for row in random], dtype=dtype)
                weights = token_weights(mask[None], blur_size=size, blur_sigma=sigma)[0]
                np.testing.assert_allclose(weights, exact_weights(mask, size, sigma), rtol=1e-6)


def test_the_reference_refuses_what_the_op_does() -> None:
    for mask in (torch.zeros(2, 0, 3), torch.zeros(2, 3), torch.zeros(1, 2, 2, dtype=torch.complex64)):
        with pytest.raises(OpError, match=r"token_weights: mask "):
            token_weights_reference(mask)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.3, "alpha": 2.5},
        {"gamma": 0.0},
        {"blur_size": 1},
        {"blur_size": 9, "blur_sigma": 3.0},  # wider than the mask is high
        {"blur_size": MAX_BLUR_SIZE + 2},  # runs in PyTorch
    ],
)
def test_against_the_reference(options: dict[str, Any]) -> None:
    for shape in ((3, 24, 24), (2, 3, 17), (1, 1, 1)):
        mask = (torch.rand(shape) < 0.3).to(torch.uint8)
        mask[0] = 1
        ours, reference = token_weights(mask, **options), token_weights_reference(mask.double(), **options)
        np.testing.assert_allclose(ours, reference, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32, torch.uint64])
def test_integers_that_fp32_does_not_hold(dtype: torch.dtype) -> None:
    mask = torch.tensor([[[2**24, 2**24 + 1]]], dtype=dtype)
    weights = token_weights(mask, blur_size=1)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[1, 2]]


def test_short_integers_do_not_need_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules[token_weights_reference.__module__], "token_weights_reference")
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.float32):
        assert token_weights(torch.tensor([[[0, 1]]]).to(dtype), blur_size=1).tolist() == [[1, 2]]


@pytest.mark.parametrize("sigma", [1e-300, 5e-324])
def test_a_tiny_sigma_does_not_blur(sigma: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.int64):
        mask = torch.tensor([[[0, 3, 1], [0, 0, 2]]], dtype=dtype)
        assert torch.equal(token_weights(mask, blur_sigma=sigma), token_weights(mask, blur_size=1))


def test_mirrored_masks_have_mirrored_weights() -> None:
    mask = torch.rand(2, 6, 7) < 0.3
    weights = token_weights(mask, gamma=0.1).view(2, 6, 7)
    for axes in ((1,), (2,), (1, 2)):
        assert torch.equal(token_weights(mask.flip(axes), gamma=0.1).view(2, 6, 7), weights.flip(axes))


@pytest.mark.usefixtures("poisoned")
def test_poisoned_memory() -> None:
    assert token_weights(torch.rand(2, 5, 7) < 0.5).isfinite().all()


def test_opcheck() -> None:
    for mask in (torch.rand(2, 5, 7) < 0.5, torch.rand(2, 5, 7).double()):
        torch.library.opcheck(torch.ops.ospo_fast.token_weights, (mask, 1.0, 0.5, 5, 1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"gamma": 0.3, "alpha": 2.5}, {"blur_size": 1}, {"blur_size": 33}])
def test_cuda_against_the_reference(options: dict[str, Any]) -> None:
    # (48, 64) needs 48 KB of dynamic shared memory, the default limit, besides the static memory.
    for shape in ((32, 24, 24), (2, 3, 17), (1, 1, 1), (0, 4, 4), (2, 48, 64), (1, 70, 71), (1, 100, 100)):
        mask = torch.rand(shape) < 0.3
        np.testing.assert_allclose(
            token_weights(mask.cuda(), **options).cpu(), token_weights_reference(mask, **options), rtol=1e-7
        )
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_weights(torch.ones(2, 6, 6, dtype=torch.uint8, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_golden(golden: Any) -> None:
    data = golden("token_weights.npz")
    for mask, alpha, gamma, weights in zip(*(data[k] for k in ("masks", "alpha", "gamma", "weights")), strict=True):
        result = token_weights(torch.tensor(mask)[None].cuda(), alpha=float(alpha), gamma=float(gamma))
        np.testing.assert_allclose(result[0].cpu(), weights, rtol=2e-6)


def test_spread_weights() -> None:
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    assert spread_weights(weights, mask).tolist() == [[0, 1, 0, 2], [3, 4, 0, 0], [0, 0, 0, 0]]
    mask[1, 2] = True
    with pytest.raises(
        OpError, match=r"row 1 has 3 image tokens, the object masks 2 cells.*compute the masks on the model"
    ):
        spread_weights(weights, mask)
    mask[1, 2] = False
    finite = torch.tensor([True, True, False])  # the last row has no tokens
    assert torch.equal(spread_weights(weights, mask, finite), spread_weights(weights, mask))
    with pytest.raises(OpError, match="the object mask of row 0 holds NaN or infinity, one of 2 rows; expected finite"):
        spread_weights(weights, mask, ~finite)
    for given in (None, torch.ones(3).bool()):
        torch.library.opcheck(torch.ops.ospo_fast.spread_weights, (weights, torch.ones(3, 2).bool(), given))


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (torch.zeros(6, 6), {}, r"mask has shape \(6, 6\), expected \(B, H, W\)"),
        (torch.zeros(1, 0, 6), {}, r"mask has shape \(1, 0, 6\)"),
        (torch.zeros(1, 6, 6), {"blur_size": 4}, "blur_size is 4"),
        (torch.zeros(1, 6, 6), {"blur_sigma": 0}, "expected an odd size and a positive sigma"),
        (torch.zeros(1, 6, 6), {"alpha": -1}, "alpha is -1"),
        (torch.zeros(1, 6, 6), {"gamma": float("nan")}, "gamma nan; expected numbers >= 0"),
    ],
)
def test_wrong_arguments(mask: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OpError, match=message):
        token_weights(mask, **options)

"""Kernels read what a tensor means, at addresses that are its own, or say why not."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ospo_fast import (
    Head,
    attention_columns,
    cross_entropy,
    object_masks,
    otsu_threshold,
    sample_codes,
    token_logprobs,
    token_weights,
)
from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops.attention_columns import ColumnRequest
from ospo_fast.ops.linear import PackedLinear
from ospo_fast.ops.rms_norm import add_rms_norm

COLUMNS = torch.tensor([[[1, 2], [3, -1]]])
OPS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "object_masks": (lambda x: object_masks(x).thresholds, (torch.rand(1, 2, 4, 4),)),
    "otsu_threshold": (otsu_threshold, (torch.rand(2, 4, 4),)),
    "token_weights": (token_weights, (torch.rand(2, 4, 4),)),
    "sample_codes": (lambda x, s: sample_codes(x, seeds=s, step=0), (torch.randn(3, 50) * 9, torch.tensor([5, -6, 7]))),
    "attention_columns": (
        lambda q, k, c: attention_columns(q, k, c, rows=(4, 5)),
        (torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), COLUMNS),
    ),
    "attention_columns with lse": (
        lambda q, k, lse: attention_columns(q, k, COLUMNS, rows=(4, 5), lse=lse),
        (torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9)),
    ),
    "token_logprobs": (
        lambda x, w, y: token_logprobs(x, Head(w), y),
        (torch.randn(70, 8), torch.randn(11, 8), torch.arange(70) % 11),
    ),
    "cross_entropy": (
        lambda x, y, w: cross_entropy(x, Head(torch.ones(11, 8)), y, weights=w),
        (torch.randn(70, 8), torch.arange(70) % 11, torch.rand(70)),
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_views_with_a_negative_bit_are_read_with_their_sign(name: str) -> None:
    """As the imaginary part of a conjugate, for example."""
    function, inputs = OPS[name]
    expected = function(*inputs)
    for i, x in enumerate(inputs):
        view = torch._neg_view(-x)
        assert view.is_neg()
        torch.testing.assert_close(function(*inputs[:i], view, *inputs[i + 1 :]), expected)


@pytest.mark.parametrize("name", ["object_masks", "otsu_threshold", "token_weights", "sample_codes"])
def test_functionalized_tensors_have_no_address(name: str) -> None:
    function, inputs = OPS[name]
    torch.testing.assert_close(torch.func.functionalize(function)(*inputs), function(*inputs))


def test_tensors_without_memory_are_refused() -> None:
    with FakeTensorMode():
        fake = torch.randn(11, 8)
    for call in (
        lambda: _dispatch.pointer(fake),
        lambda: token_logprobs(torch.randn(70, 8), Head(fake), torch.arange(70) % 11),
    ):
        with pytest.raises(Exception, match=r"plain memory|[Ff]ake"):
            call()


def test_rows_beyond_the_largest_integer_are_refused() -> None:
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    for rows in ((2**63 - 1, 1), (2**63 - 5, 5), (torch.tensor([2**63 - 4]), torch.tensor([4]))):
        with pytest.raises(OpError, match="beyond the 9 positions"):
            attention_columns(q, k, COLUMNS, rows=rows, causal=False)
    with pytest.raises(OpError, match="Hq a multiple of Hkv, both at least 1"):
        attention_columns(q[:, :0], k, COLUMNS, rows=(4, 5))


def test_a_checked_request_keeps_its_numbers() -> None:
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    start, count, columns = torch.tensor([4]), torch.tensor([5]), COLUMNS.clone()
    request = ColumnRequest.from_args(columns, 1, 9, rows=(start, count))
    expected = request.run(q, k)
    start += 10**6
    columns += 10**6
    assert torch.equal(request.run(q, k), expected)


@pytest.mark.parametrize("keep_logits", [False, True])
def test_labels_that_changed_since_the_forward_are_checked_again(keep_logits: bool) -> None:
    """An array shares their memory without a version counter."""
    array = np.zeros(30, dtype=np.int64)
    weight = torch.randn(11, 8, requires_grad=True)
    logps = token_logprobs(torch.randn(30, 8), Head(weight), torch.from_numpy(array), keep_logits=keep_logits)
    array[7] = 2**31
    with pytest.raises(OpError, match=r"labels\[7\] \(flattened\) is 2147483648, expected 0 <= label < 11"):
        logps.sum().backward()


def test_copies_of_a_packed_layer_have_weights_of_their_own() -> None:
    layer, x = nn.Linear(64, 32), torch.randn(3, 64)
    packed = PackedLinear([layer])
    expected = packed(x)
    copied, loaded = copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))
    with torch.no_grad():
        layer.weight.zero_()
    packed.refresh()
    del packed
    for other in (copied, loaded):
        assert torch.equal(other(x), expected)
        other.refresh()
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(32, 64).half(), r"torch.float16 \(32, 64\) now, expected float32 \(…, 64\)"),
        (torch.zeros(32, 8), r"torch.float32 \(32, 8\) now, expected float32 \(…, 64\)"),
        (torch.zeros(8, 64), "8 rows now, expected 32"),
    ],
)
def test_a_packed_layer_refuses_other_weights(weight: Tensor, message: str) -> None:
    layer = nn.Linear(64, 32, bias=False)
    packed = PackedLinear([layer])
    layer.weight = nn.Parameter(weight)
    with pytest.raises(OpError, match=message):
        packed.refresh()


def test_norm_weights_of_another_dtype_or_stride() -> None:
    residual, weight = torch.randn(3, 32), torch.randn(32)
    strided = torch.stack([weight, -weight], 1)[:, 0]
    expected = add_rms_norm(None, residual.clone(), weight, 1e-6)
    assert torch.equal(add_rms_norm(None, residual.clone(), strided, 1e-6), expected)
    half = weight.bfloat16()
    expected = add_rms_norm(None, residual.clone(), half.float(), 1e-6)
    assert torch.equal(add_rms_norm(None, residual.clone(), half, 1e-6), expected)
    with pytest.raises(TypeError, match=r"got Tensor of torch.bfloat16, expected torch.float32"):
        add_rms_norm(residual.bfloat16(), residual, weight, 1e-6, backend="cpp")


def test_sizes_that_no_memory_holds_are_refused() -> None:
    for function, maps in ((otsu_threshold, torch.rand(4, 4)), (object_masks, torch.rand(1, 1, 4, 4))):
        with pytest.raises(OpError, match="bins is 2147483647, expected 1 to 65536"):
            function(maps, bins=2**31 - 1)


def test_temperatures_whose_quotients_are_not_finite_are_refused() -> None:
    for temperature in (1e-38, 1e31, -1.0, torch.inf, torch.nan):
        with pytest.raises(OpError, match="expected 1e-30 to 1e30, or 0 for the most likely code"):
            sample_codes(torch.tensor([[-1.0, 5.0, 7.0, 9.0]]), temperature=temperature, seeds=[0], step=0)
    assert sample_codes(torch.tensor([[-1.0, 5.0, 7.0, 9.0]]), temperature=1e-30, seeds=[0], step=0).item() == 3

"""Log-probabilities whose bits depend on nothing but their own row, and products with LoRA adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.errors import OpError
from ospo_fast.ops import Head, _dispatch, token_logprobs
from ospo_fast.ops.linear import LinearWeights, PackedLinear, invariant_gelu, invariant_linear

CODES, WIDTH, INNER = 531, 96, 72  # no multiples of a vector

pytestmark = pytest.mark.skipif(not _dispatch._native()[0], reason="needs the compiled module")


@pytest.fixture(params=["linear", "two layers"])
def head(request: pytest.FixtureRequest) -> Head:
    weight, bias = torch.randn(CODES, INNER) / 4, torch.randn(CODES)
    if request.param == "linear":
        return Head(torch.randn(CODES, WIDTH) / 4, bias)
    return Head(weight, bias, torch.randn(INNER, WIDTH) / 4, torch.randn(INNER))


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, WIDTH), torch.randint(0, CODES, (rows,))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_row_has_the_same_bits_in_any_batch(head: Head, temperature: float) -> None:
    x, labels = inputs(700)
    given: dict[str, Any] = {"temperature": temperature, "batch_invariant": True}
    whole = token_logprobs(x, head, labels, **given)
    torch.testing.assert_close(whole, token_logprobs(x, head, labels, temperature=temperature), rtol=1e-5, atol=1e-5)
    for size in (1, 2, 13, 64, 65, 300):
        rows = torch.randperm(700)[:size]
        assert torch.equal(token_logprobs(x[rows], head, labels[rows], **given), whole[rows]), size
    for chunk in (1, 5, 128):
        assert torch.equal(token_logprobs(x, head, labels, chunk_rows=chunk, **given), whole)
    ignored = labels.clone()
    ignored[::3] = -100
    kept = token_logprobs(x, head, ignored, **given)
    assert torch.equal(kept[1::3], whole[1::3])
    assert not bool(kept[::3].any())
    assert torch.equal(token_logprobs(x, head, labels, return_entropy=True, **given)[0], whole)
    strided = x.t().contiguous().t()
    assert torch.equal(token_logprobs(strided, head, labels, **given), whole)
    assert torch.equal(token_logprobs(x.view(7, 100, WIDTH), head, labels.view(7, 100), **given).flatten(), whole)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_values_are_the_same_with_gradients_and_these_are_ordinary(head: Head, trained: bool, scale: float) -> None:
    if trained:
        for tensor in head.tensors:
            if tensor is not None:
                tensor.requires_grad_(True)
    (c, labels), u = inputs(150), torch.randn(150, WIDTH)
    weights, leaves = torch.randn(150), [t for t in head.tensors if t is not None and t.requires_grad]

    def run(invariant: bool, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        own = [c.clone().requires_grad_(True), u.clone().requires_grad_(True)]
        hidden, used = own[0], head
        if scale != 1:
            hidden, used = head.guided(*own, scale, batch_invariant=invariant)
        logps = token_logprobs(hidden, used, labels, batch_invariant=invariant, **options)
        grads = torch.autograd.grad((logps * weights).sum(), [*own[: 1 + (scale != 1)], *leaves])
        return logps, grads

    found, ours = run(True)
    with torch.no_grad():
        hidden, used = head.guided(c, u, scale, batch_invariant=True) if scale != 1 else (c, head)
        assert torch.equal(token_logprobs(hidden, used, labels, batch_invariant=True), found)
    for keep in (True, False):
        again, same = run(True, keep_logits=keep, chunk_rows=40)
        assert torch.equal(again, found)
        for a, b in zip(same, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    expected, theirs = run(False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_guided_features_have_the_same_bits_in_any_batch(head: Head) -> None:
    c, u = torch.randn(2, 200, WIDTH)
    whole, _ = head.guided(c, u, 4.3, batch_invariant=True)
    for size in (1, 7, 50):
        rows = torch.randperm(200)[:size]
        assert torch.equal(head.guided(c[rows], u[rows], 4.3, batch_invariant=True)[0], whole[rows])
    torch.testing.assert_close(whole, head.guided(c, u, 4.3)[0], rtol=1e-4, atol=1e-4)


def test_what_cannot_hold_is_refused(head: Head) -> None:
    x, labels = inputs(5)
    for hidden, own, given in (
        (x.bfloat16(), head.to(torch.bfloat16), {}),
        (x.double(), head.to(torch.float64), {}),
        (x, head, {"backend": "torch"}),
    ):
        with pytest.raises(OpError, match=r"batch_invariant=True, but hidden is .* expected float32 on cpu"):
            token_logprobs(hidden, own, labels, batch_invariant=True, **given)
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CODES)),
        peft.LoraConfig(target_modules=["2"]),
    )
    with pytest.raises(OpError, match="the head has LoRA adapters"):
        token_logprobs(x, wrapped, labels, batch_invariant=True)


def test_products_with_adapters_and_their_gradients() -> None:
    """Of stacked layers, one of them with two adapters, against a product with the whole weight."""
    x = torch.randn(33, 40, dtype=torch.float64, requires_grad=True)
    w, bias, v = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((24, 40), (24,), (17, 40)))
    adapters = [
        (torch.randn(r, 40, dtype=torch.float64, requires_grad=True),
         torch.randn(24, r, dtype=torch.float64, requires_grad=True), s) for r, s in ((3, 2.0), (5, 0.3))
    ]  # fmt: skip
    leaves = [x, w, bias, v, *(t for a, b, _ in adapters for t in (a, b))]
    total = w + sum(s * b @ a for a, b, s in adapters)
    expected = torch.cat((F.linear(x, total, bias), F.linear(x, v)), 1)
    weights = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    single = [t.detach().float().requires_grad_(True) for t in leaves]
    pairs = tuple((single[i], single[i + 1], s) for i, s in ((4, 2.0), (6, 0.3)))
    product = PackedLinear([LinearWeights(single[1], single[2], pairs), LinearWeights(single[3])])
    found = product.differentiable(single[0])
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad((found * weights.float()).sum(), single)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-3)
    for t in single[1:]:
        t.requires_grad_(False)
    (only,) = torch.autograd.grad((product.differentiable(single[0]) * weights.float()).sum(), [single[0]])
    assert torch.equal(only, ours[0])
    frozen = product.differentiable(single[0].detach())
    assert not frozen.requires_grad
    assert torch.equal(frozen, product(single[0].detach()))


def test_linear_and_gelu_have_first_derivatives_alone() -> None:
    x, weight = torch.randn(3, 5, 40, requires_grad=True), torch.randn(24, 40, requires_grad=True)
    y = invariant_gelu(invariant_linear(x, weight))
    torch.testing.assert_close(y, F.gelu(F.linear(x, weight)), rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    with pytest.raises(OpError, match="second derivative"):
        dx.sum().backward()

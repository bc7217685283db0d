from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast import Head, cross_entropy
from ospo_fast.errors import OpError
from ospo_fast.ops._chunked_head import ChunkedHead
from ospo_fast.ops.token_logprobs import token_logprobs_reference

LINEAR, MLP = "linear", "mlp"


def make_head(kind: str, *, bias: bool = True, width: int = 16, codes: int = 23) -> Head:
    if kind == LINEAR:
        return Head(torch.randn(codes, width) * 0.25, torch.randn(codes) if bias else None)
    return Head(torch.randn(codes, 19) * 0.25, torch.randn(codes), torch.randn(19, width) * 0.25, torch.randn(19))


def trainable(head: Head, dtype: torch.dtype = torch.float32) -> Head:
    return Head(*(None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in head.tensors))


def weights_of(head: Head) -> list[Tensor]:
    return [tensor for tensor in head.tensors if tensor is not None]


def some_labels(*shape: int, codes: int = 23) -> Tensor:
    return torch.randint(codes, shape).masked_fill(torch.rand(shape) < 0.3, -100)


def eager(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Log-probabilities at temperature 1.4 and soft-cap 20 from all logits."""
    scores = 20 * torch.tanh(head(hidden).float() / 20)
    logps = F.log_softmax(scores / 1.4, -1)
    return logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != -100)


@pytest.fixture(params=["auto", "torch"])
def backend(request: Any) -> str:
    """Run the test with the compiled kernel and with the PyTorch reference."""
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("kind", [LINEAR, MLP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy(
    no_worse: Any, kind: str, train_head: bool, reduction: str, dtype: torch.dtype, backend: str
) -> None:
    plain, hidden, labels = (
        make_head(kind).to(dtype),
        torch.randn(4, 50, 16).to(dtype),
        some_labels(4, 50),
    )
    weights = torch.rand(4, 50)
    weights[0, :5] = 0

    def run(loss: Any, dtype: torch.dtype) -> list[Tensor]:
        head = trainable(plain, dtype) if train_head else plain.to(dtype)
        x = hidden.to(dtype, copy=True).requires_grad_()
        value = loss(x, head)
        return [value.detach(), *torch.autograd.grad(1.5 * value, [x, *(t for t in weights_of(head) if train_head)])]

    count = int((labels != -100).sum()) if reduction == "mean" else 1
    options = {"temperature": 1.4, "softcap": 20.0}
    ours = partial(
        cross_entropy, labels=labels, weights=weights, reduction=reduction, chunk_rows=16, backend=backend, **options
    )
    found = run(ours, dtype)
    usual = run(lambda x, head: -(eager(x, head, labels) * weights).sum() / count, dtype)
    exact = run(
        lambda x, head: -(token_logprobs_reference(x, head, labels, **options) * weights).sum() / count, torch.float64
    )
    # A sum of errors of both signs is small by chance, so it bounds nothing.
    torch.testing.assert_close(found[0].double(), exact[0], rtol=4 * torch.finfo(dtype).eps, atol=0)
    for mine, theirs, best in zip(found[1:], usual[1:], exact[1:], strict=True):
        no_worse(mine, theirs, best)


def test_cross_entropy_is_that_of_torch(backend: str) -> None:
    head, hidden, labels = make_head(LINEAR), torch.randn(30, 16), some_labels(30)
    for reduction in ("mean", "sum"):
        mine = cross_entropy(hidden, head, labels, reduction=reduction, backend=backend)
        torch.testing.assert_close(mine, F.cross_entropy(head(hidden), labels, reduction=reduction))
    assert cross_entropy(hidden, head, torch.full((30,), -100)) == 0
    with torch.no_grad():
        assert not cross_entropy(hidden, trainable(head), labels).requires_grad


def test_cross_entropy_computes_logits_once_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    logits = ChunkedHead.logits
    monkeypatch.setattr(ChunkedHead, "logits", lambda self, x, *a: rows.append(len(x)) or logits(self, x, *a))
    head, hidden = trainable(make_head(LINEAR)), torch.randn(20, 16, requires_grad=True)
    cross_entropy(hidden, head, torch.zeros(20).long(), chunk_rows=8).backward()
    assert rows == [8, 8, 4]


def test_backwards_of_cross_entropy() -> None:
    head, hidden, labels = trainable(make_head(MLP)), torch.randn(9, 16, requires_grad=True), some_labels(9)
    loss = cross_entropy(hidden, head, labels)
    loss.backward(retain_graph=True)
    first = hidden.grad.clone(), head.weight.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close((hidden.grad, head.weight.grad), tuple(4 * g for g in first))
    with pytest.raises((OpError, RuntimeError), match=r"second backward|retain_graph"):
        loss.backward()


def test_a_row_of_weight_0_is_not_computed() -> None:
    head, hidden = trainable(make_head(LINEAR)), torch.randn(6, 16)
    hidden[2] = torch.nan
    weights = torch.ones(6)
    weights[2] = 0
    loss = cross_entropy(hidden.requires_grad_(), head, torch.arange(6), weights=weights)
    loss.backward()
    assert loss.isfinite()
    assert all(t.grad.isfinite().all() for t in (hidden, head.weight, head.bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, "reduction is 'none', expected 'mean' or 'sum'"),
        ({"weights": torch.ones(4)}, r"weights have shape \(4,\), expected that of labels \(3,\)"),
        (
            {"weights": torch.ones(3, requires_grad=True)},
            "weights require grad, expected constants; use token_logprobs",
        ),
        ({"temperature": 0}, "cross_entropy: temperature is 0, expected a positive number"),
        ({"labels": torch.tensor([1, 23, 2])}, r"labels\[1\] \(flattened\) is 23"),
    ],
)
def test_wrong_arguments_of_cross_entropy(change: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.randn(3, 16), "head": make_head(LINEAR), "labels": torch.arange(3)} | change
    for requires_grad in (False, True):
        arguments["hidden"].requires_grad_(requires_grad)
        with pytest.raises(OpError, match=message):
            cross_entropy(**arguments)


def test_weights_that_were_partitioned_before_the_backward_are_refused() -> None:
    """As DeepSpeed ZeRO-3 does outside its context: a gradient cannot reach them."""
    weight = torch.nn.Parameter(torch.randn(23, 16))
    weight.ds_id = 0
    loss = cross_entropy(torch.randn(4, 16, requires_grad=True), Head(weight), torch.arange(4))
    whole, weight.data = weight.data, torch.empty(0)
    with pytest.raises(OpError, match=r"ZeRO-3 has partitioned its weights since the forward.*GatheredParameters"):
        loss.backward()
    weight.data = whole


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_a_scaled_loss_in_half_precision(no_worse: Any, train_head: bool, reduction: str) -> None:
    """As GradScaler scales it: before that, gradients of a mean underflow in fp16, and those of a sum overflow."""
    rows, codes, factor = 4096, 2048, 2.0**16 if reduction == "mean" else 2.0**-6
    plain = make_head(LINEAR, bias=False, codes=codes).to(torch.float16)
    hidden, labels = torch.randn(rows, 16).half(), torch.zeros(rows, dtype=torch.int64)

    def run(loss: Any, dtype: torch.dtype) -> list[Tensor]:
        head = trainable(plain, dtype) if train_head else plain.to(dtype)
        x = hidden.to(dtype, copy=True).requires_grad_()
        return list(torch.autograd.grad(factor * loss(x, head), [x, *(t for t in weights_of(head) if train_head)]))

    ours = run(partial(cross_entropy, labels=labels, reduction=reduction), torch.float16)
    usual = run(lambda x, head: F.cross_entropy(head(x).float(), labels, reduction=reduction), torch.float16)
    exact = run(lambda x, head: F.cross_entropy(head(x), labels, reduction=reduction), torch.float64)
    for mine, theirs, best in zip(ours, usual, exact, strict=True):
        no_worse(mine, theirs, best)


def test_labels_are_checked_under_the_name_of_the_op() -> None:
    with pytest.raises(OpError, match=r"^cross_entropy: labels\[1\]"):
        cross_entropy(torch.randn(3, 16, requires_grad=True), make_head(LINEAR), torch.tensor([1, 99, 2]))
    with pytest.raises(OpError, match="weights are list, expected a tensor"):
        cross_entropy(torch.randn(3, 16), make_head(LINEAR), torch.arange(3), weights=[1.0, 1.0, 1.0])


@pytest.mark.parametrize("train_head", [False, True])
def test_results_that_are_not_finite_are_refused_if_asked(train_head: bool) -> None:
    hidden, head = torch.randn(3, 16), make_head(LINEAR)
    head = trainable(head) if train_head else head
    hidden[1, 2] = torch.nan
    assert cross_entropy(hidden, head, torch.arange(3)).isnan()
    with pytest.raises(OpError, match=r"the log-probability of hidden\[1\] \(flattened\) is nan"):
        cross_entropy(hidden, head, torch.arange(3), check_finite=True)
    assert cross_entropy(hidden, head, torch.tensor([0, -100, 2]), check_finite=True).isfinite()

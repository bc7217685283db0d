import importlib
import logging
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast import Head, cross_entropy, sequence_logprobs, token_logprobs, token_weights
from ospo_fast.errors import OpError
from ospo_fast.ops._chunked_head import OPTIONS_SCHEMA, ChunkedHead, TokenLogprobsOptions
from ospo_fast.ops._head_gradients import count_labels
from ospo_fast.ops._logprob_call import default_chunk_rows
from ospo_fast.ops.scale_rows import scale_rows
from ospo_fast.ops.token_logprobs import token_logprobs_reference
from ospo_fast.ops.token_weights import spread_weights

implementation = importlib.import_module("ospo_fast.ops.token_logprobs")  # its package has a function of this name
LINEAR, MLP, SQUARE = "linear", "mlp", "square mlp"  # Janus' head is square: its projection keeps the width


def make_head(kind: str, *, bias: bool, width: int = 16, codes: int = 23, dtype: torch.dtype = torch.float32) -> Head:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).mul(shape[-1] ** -0.5).to(dtype)

    if kind == LINEAR:
        return Head(normal(codes, width), normal(codes) if bias else None)
    inner = width if kind == SQUARE else width + 3
    return Head(
        normal(codes, inner), normal(codes) if bias else None, normal(inner, width), normal(inner) if bias else None
    )


def trainable(head: Head, dtype: torch.dtype | None = None) -> Head:
    return Head(
        *(None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in head.tensors)
    )


def weights_of(head: Head) -> list[Tensor]:
    return [tensor for tensor in head.tensors if tensor is not None]


def eager(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """The usual computation: all logits, fp32 log-softmax, gather."""
    logps = F.log_softmax(head(hidden).float(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * (labels != -100)


def options_of(chunk_rows: int, backend: str = "cpp") -> TokenLogprobsOptions:
    return TokenLogprobsOptions(-100, chunk_rows, False, backend, False, 1.0, 0.0)


def some_labels(*shape: int, codes: int = 23) -> Tensor:
    labels = torch.randint(codes, shape)
    return labels.masked_fill(torch.rand(shape) < 0.3, -100)


@pytest.mark.parametrize("index", range(3))
def test_golden(golden: Any, index: int) -> None:
    data = golden(f"masked_logprob_{index}.npz")
    logits = torch.tensor(data["logits"], requires_grad=True)
    targets = F.pad(torch.tensor(data["labels"])[:, 1:], (0, 1), value=-100)
    # An identity as head, so that the hidden states are the logits.
    logps = token_logprobs(logits, Head(torch.eye(logits.shape[-1])), targets, chunk_rows=200)
    present = targets != -100
    weights = token_weights(torch.tensor(data["masks"]), alpha=float(data["alpha"]), gamma=float(data["gamma"]))
    sequences = sequence_logprobs(logps, present, spread_weights(weights, present))
    (sequences * torch.tensor(data["grad_coef"])).sum().backward()
    np.testing.assert_allclose(sequences.detach(), data["logps"], rtol=2e-6)
    np.testing.assert_allclose(sequence_logprobs(logps, present).detach(), data["logps_unmasked"], rtol=2e-6)
    np.testing.assert_allclose(logits.grad, data["grad_logits"], rtol=2e-6)


@pytest.fixture(params=["auto", "torch"])
def backend(request: Any) -> str:
    """Run the test with the compiled kernel and with the PyTorch reference."""
    return request.param


# Shape, repeats, width, codes, chunk_rows, bias. One row, repeated, as a single rounding is random; odd sizes, V no
# multiple of 8, and chunks that do not divide the rows; the shape of a small image.
SHAPES = [((1,), 16, 8, 5, None, False), ((3, 7), 1, 13, 29, 4, True), ((2, 36), 1, 128, 256, None, True)]


def compute(function: Any, kind: str, train_head: bool, dtype: torch.dtype, compute_dtype: torch.dtype, case: Any):
    """Values and gradients by a function, with inputs rounded to `dtype`."""
    shape, repeats, width, codes, _, bias = case
    torch.manual_seed(1)
    results = []
    for _ in range(repeats):
        head = make_head(kind, bias=bias, width=width, codes=codes, dtype=dtype)
        hidden, labels = torch.randn(*shape, width).to(dtype), some_labels(*shape, codes=codes)
        labels[..., 0] = 1  # at least one
        upstream = torch.randn(shape)
        weights = trainable(head, compute_dtype) if train_head else head.to(compute_dtype)
        x = hidden.to(compute_dtype, copy=True).requires_grad_()
        logps = function(x, weights, labels)
        (logps * upstream).sum().backward()
        assert (logps[labels == -100] == 0).all()
        assert (x.grad[labels == -100] == 0).all()
        results.append((logps.detach(), x.grad, *(t.grad for t in weights.tensors if t is not None and train_head)))
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("kind", [LINEAR, MLP, SQUARE])
def test_values_and_gradients(no_worse: Any, backend: str, kind: str, train_head: bool, dtype: torch.dtype) -> None:
    for case in SHAPES:
        ours = partial(token_logprobs, chunk_rows=case[4], backend=backend)
        found = compute(ours, kind, train_head, dtype, dtype, case)
        usual = compute(eager, kind, train_head, dtype, dtype, case)
        exact = compute(token_logprobs_reference, kind, train_head, dtype, torch.float64, case)
        assert found[0].dtype == torch.float32
        for mine, theirs, best in zip(found, usual, exact, strict=True):
            no_worse(mine, theirs, best)


@pytest.mark.parametrize(("kind", "dtype"), [(LINEAR, torch.float32), (LINEAR, torch.bfloat16), (MLP, torch.float16)])
def test_large_logits(no_worse: Any, kind: str, dtype: torch.dtype, backend: str) -> None:
    hidden, labels, upstream = torch.randn(200, 16), some_labels(200), torch.randn(200)
    head = make_head(kind, bias=True)
    factor = 50 / head(hidden).abs().max()
    head = Head(head.weight * factor, head.bias * factor, *head.tensors[2:]).to(dtype)

    def run(function: Any) -> tuple[Tensor, Tensor]:
        x = hidden.to(dtype, copy=True).requires_grad_()
        logps = function(x, head, labels)
        (logps * upstream).sum().backward()
        return logps.detach(), x.grad

    exact = run(lambda x, *a: token_logprobs_reference(x.double(), *a))
    ours = run(lambda *a: token_logprobs(*a, backend=backend))
    for mine, usual, best in zip(ours, run(eager), exact, strict=True):
        no_worse(mine, usual, best.double())


def test_fp32_logits_reduce_the_error_of_half_precision() -> None:
    head, labels = make_head(LINEAR, bias=True, dtype=torch.bfloat16), torch.randint(23, (200,))
    head = Head(head.weight * 16, head.bias)
    hidden = torch.randn(200, 16).bfloat16().requires_grad_()
    exact = token_logprobs_reference(hidden, head, labels)

    def error(logits_dtype: Any) -> float:
        return float((token_logprobs(hidden, head, labels, logits_dtype=logits_dtype) - exact).detach().abs().max())

    assert error("fp32") < 0.5 * error(None)
    assert error(torch.float32) == error("fp32")
    for weights in (head, trainable(head)):
        (grad,) = torch.autograd.grad(token_logprobs(hidden, weights, labels, logits_dtype="fp32").sum(), hidden)
        (best,) = torch.autograd.grad(token_logprobs_reference(hidden, head, labels).sum(), hidden)
        assert (grad - best).abs().max() < 0.01 * best.abs().max()


@pytest.mark.parametrize("kind", [LINEAR, MLP])
@pytest.mark.parametrize(
    ("function", "train_head"),
    [(token_logprobs, False), (token_logprobs, True), (token_logprobs_reference, True)],
)
def test_gradcheck(kind: str, function: Any, train_head: bool) -> None:
    head = make_head(kind, bias=True, width=3, codes=5, dtype=torch.float64)
    tensors = [t for t in head.tensors if t is not None]
    hidden, labels = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True), some_labels(2, 3, codes=5)

    def of_all(x: Tensor, *weights: Tensor) -> Tensor:
        return function(x, Head(*weights), labels)

    assert torch.autograd.gradcheck(of_all, (hidden, *(t.requires_grad_(train_head) for t in tensors)))
    assert token_logprobs(hidden, head, labels).dtype == torch.float64


def test_any_shape() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        shape = tuple(rng.randint(0, 5) for _ in range(rng.randint(0, 3)))
        width, codes = rng.randint(1, 9), rng.randint(1, 9)
        ignore = rng.choice([-100, -1, 0])
        head = make_head(rng.choice([LINEAR, MLP, SQUARE]), bias=rng.random() < 0.5, width=width, codes=codes)
        head = trainable(head) if rng.random() < 0.5 else head
        labels = torch.randint(codes, shape)
        labels = labels.masked_fill(torch.rand(shape) < rng.choice([0, 0.5, 1]), ignore)
        hidden = torch.randn(*shape, width, requires_grad=True)
        ours = token_logprobs(hidden, head, labels, ignore_index=ignore, chunk_rows=rng.randint(1, 40))
        exact = token_logprobs_reference(hidden, head, labels, ignore_index=ignore)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
        (mine,) = torch.autograd.grad(ours.sum(), hidden)
        (best,) = torch.autograd.grad(exact.sum(), hidden)
        torch.testing.assert_close(mine, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [LINEAR, MLP, SQUARE])
@pytest.mark.parametrize(
    ("train_head", "keep", "computations"), [(False, None, 1), (True, False, 2), (True, True, 1), (True, None, None)]
)
def test_chunks_change_nothing_and_bound_the_logits(
    monkeypatch: pytest.MonkeyPatch, train_head: bool, keep: bool | None, computations: int | None, kind: str
) -> None:
    rows: list[int] = []
    logits = ChunkedHead.logits
    monkeypatch.setattr(ChunkedHead, "logits", lambda self, x, *a: rows.append(len(x)) or logits(self, x, *a))
    head, labels = make_head(kind, bias=True), some_labels(50)
    head = trainable(head) if train_head else head
    active = int((labels != -100).sum())
    results = []
    for chunk in (None, 7, 1):
        hidden = torch.linspace(-1, 1, 800).view(50, 16).requires_grad_()
        for tensor in weights_of(head):
            tensor.grad = None
        logps = token_logprobs(hidden, head, labels, chunk_rows=chunk, keep_logits=keep)
        logps.square().sum().backward()
        results.append((logps.detach(), hidden.grad, *(t.grad for t in weights_of(head) if train_head)))
        assert max(rows) <= (chunk or 50)
        # Ignored rows are not computed. By default the logits of three quarters of the rows are kept.
        assert sum(rows) == (2 * active - min(active, 38) if computations is None else computations * active)
        rows.clear()
    for other in results[1:]:
        for mine, whole in zip(other, results[0], strict=True):
            # An entry of a weight's gradient is a sum over rows, in which large terms cancel.
            torch.testing.assert_close(mine, whole, rtol=1e-5, atol=5e-7 * float(whole.abs().max()))


@pytest.mark.parametrize("kind", [LINEAR, MLP, SQUARE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_logits_give_the_gradients_of_recomputed_ones(
    kind: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also twice through one graph, when kept logits must survive, and with rows that have no gradient."""
    plain, labels = make_head(kind, bias=True, dtype=dtype), some_labels(40)
    upstream = torch.randn(40)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 2e-2}
    hidden = torch.randn(40, 16).to(dtype)
    for kept_share in (1.0, 0.5):
        monkeypatch.setattr(implementation, "KEPT_SHARE", kept_share)
        for zeros in (0, 3):
            upstream[labels != -100] = torch.randn(int((labels != -100).sum()))
            upstream[:zeros] = 0
            results = []
            for keep in (False, None):
                head, x = trainable(plain), hidden.clone().requires_grad_()
                inputs = [x, *weights_of(head)]
                logps = token_logprobs(x, head, labels, chunk_rows=6, keep_logits=keep, backend=backend)
                loss = (logps * upstream).sum()
                results += [torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2)]
                results.append(torch.autograd.grad(loss, inputs))
            for other in results[1:]:
                torch.testing.assert_close(other, results[0], **tolerance)


def test_a_row_without_gradient_that_is_nan_does_not_reach_the_weights(backend: str) -> None:
    labels = torch.arange(6)
    for keep in (True, False):
        head, hidden = trainable(make_head(LINEAR, bias=True)), torch.randn(6, 16)
        hidden[2] = torch.nan
        logps = token_logprobs(hidden, head, labels, keep_logits=keep, backend=backend)
        logps[[0, 1, 3]].sum().backward()
        assert head.weight.grad.isfinite().all()
        assert head.weight.grad.any()
        assert head.bias.grad.isfinite().all()


def test_the_path_of_a_trained_head_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    from ospo_fast.ops.token_logprobs import _log_path

    head, hidden, labels = trainable(make_head(LINEAR, bias=True)), torch.randn(9, 16), torch.arange(9)
    caplog.set_level(logging.INFO, logger="ospo_fast.ops.token_logprobs")
    for keep, message in (
        (None, "keeps the logits of some rows and recomputes the others: 75% of the rows, of at most 1024 MiB"),
        (True, "keeps the logits: keep_logits=True"),
        (False, "recomputes the logits in the backward: keep_logits=False"),
    ):
        _log_path.cache_clear()
        caplog.clear()
        for _ in range(2):
            token_logprobs(hidden, head, labels, keep_logits=keep)
        assert len(caplog.messages) == 1  # not at every call
        assert message in caplog.text


def test_no_more_than_the_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(implementation, "KEPT_BYTES", 10 * 23 * 4)
    logits = ChunkedHead.logits
    monkeypatch.setattr(
        ChunkedHead, "logits", lambda self, x, rows, out=None: kept.append(out) or logits(self, x, rows, out)
    )
    token_logprobs(torch.randn(30, 16), trainable(make_head(LINEAR, bias=True)), torch.zeros(30).long())
    assert sum(len(out) for out in kept if out is not None) == 10


@pytest.mark.parametrize("rows", [5, 100])  # few rows have a path of their own
def test_neither_defaults_of_torch_nor_tracing_change_what_is_computed(rows: int) -> None:
    from torch.autograd import forward_ad
    from torch.fx.experimental.proxy_tensor import make_fx

    hidden, head, labels = torch.randn(rows, 16), make_head(LINEAR, bias=True), torch.randint(23, (rows,))
    expected = token_logprobs(hidden, head, labels)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(token_logprobs(hidden, head, labels), expected)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(token_logprobs(hidden, head, labels), expected)
    graph = make_fx(lambda x: token_logprobs(x, head, labels))(hidden)
    torch.testing.assert_close(graph(2 * hidden), token_logprobs(2 * hidden, head, labels))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward AD"):
        token_logprobs(forward_ad.make_dual(hidden, hidden), head, labels)
    with pytest.raises(RuntimeError, match="unsupported"):
        torch.jit.trace(lambda x: token_logprobs(x, head, labels), (hidden,), check_trace=False)
    with pytest.raises(OpError, match=r"called inside torch.func .*expected plain autograd"):
        torch.func.grad(lambda x: token_logprobs(x, head, labels).sum())(hidden)


def test_views_with_a_negative_bit_are_read_with_their_sign(backend: str) -> None:
    hidden, plain, labels = torch.randn(70, 16), make_head(LINEAR, bias=True), torch.randint(23, (70,))
    negative = Head(plain.weight, torch._neg_view(plain.bias))
    copied = Head(plain.weight, -plain.bias)
    for rows in (slice(0, 3), slice(None)):
        inputs = hidden[rows], labels[rows]
        mine, best = (token_logprobs(inputs[0], head, inputs[1], backend=backend) for head in (negative, copied))
        assert torch.equal(mine, best)
    upstream = torch.randn(70)
    for head in (plain, trainable(plain)):
        grads = []
        for given in (torch._neg_view(upstream), -upstream):
            x = hidden.clone().requires_grad_()
            token_logprobs(x, head, labels, backend=backend).backward(given)
            grads.append(x.grad)
        assert torch.equal(*grads)


# ---------------------------------------------------------------- temperature, soft-cap, entropy

TRANSFORMS = [(0.7, None), (1.0, 30.0), (2.5, 4.0), (1.0, None)]


def eager_with(temperature: float, softcap: float | None) -> Any:
    def run(hidden: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor]:
        scores = head(hidden)
        scores = scores.float() if scores.dtype != torch.float64 else scores
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        every = F.log_softmax(scores / temperature, -1)
        active = labels != -100
        logps = every.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * active
        return logps, -(every.exp() * every).sum(-1) * active

    return run


@pytest.mark.parametrize(("temperature", "softcap"), TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("kind", [LINEAR, MLP])
@pytest.mark.parametrize("entropy_in_loss", [False, True])
def test_temperature_softcap_and_entropy(
    no_worse: Any, backend: str, kind: str, train_head: bool, dtype: torch.dtype, temperature: float,
    softcap: float | None, entropy_in_loss: bool,
) -> None:  # fmt: skip
    upstream = torch.randn(2, 200)
    hidden, labels, plain = torch.randn(200, 16).to(dtype), some_labels(200), make_head(kind, bias=True, dtype=dtype)
    plain = Head(plain.weight * 3, *plain.tensors[1:])

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        head = trainable(plain, dtype) if train_head else plain.to(dtype)
        x = hidden.to(dtype, copy=True).requires_grad_()
        logps, entropy = function(x, head, labels)
        assert (entropy[labels == -100] == 0).all()
        loss = (logps * upstream[0]).sum() + (entropy * upstream[1]).sum() * entropy_in_loss
        grads = torch.autograd.grad(loss, [x, *(t for t in weights_of(head) if train_head)])
        return [logps.detach(), entropy.detach(), *grads]

    options = {"temperature": temperature, "softcap": softcap, "return_entropy": True}
    ours = run(partial(token_logprobs, chunk_rows=64, backend=backend, **options), dtype)
    eager = run(eager_with(temperature, softcap), dtype)
    exact = run(partial(token_logprobs_reference, **options), torch.float64)
    for mine, usual, best in zip(ours, eager, exact, strict=True):
        no_worse(mine, usual, best)


@pytest.mark.parametrize("kind", [LINEAR, MLP])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_gradcheck_of_everything(kind: str, train_head: bool, keep: bool) -> None:
    head = make_head(kind, bias=True, width=3, codes=5, dtype=torch.float64)
    tensors = [t for t in head.tensors if t is not None]
    hidden, labels = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True), some_labels(2, 3, codes=5)

    def both(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        options = {"temperature": 1.7, "softcap": 2.0, "return_entropy": True, "keep_logits": keep}
        return token_logprobs(x, Head(*weights), labels, chunk_rows=2, **options)

    assert torch.autograd.gradcheck(both, (hidden, *(t.requires_grad_(train_head) for t in tensors)))


def test_entropy_alone_in_the_loss() -> None:
    for train_head in (False, True):
        head = make_head(MLP, bias=True, dtype=torch.float64)
        head = trainable(head) if train_head else head
        hidden, labels = torch.randn(7, 16, dtype=torch.float64, requires_grad=True), some_labels(7)
        grads = []
        for function in (token_logprobs, token_logprobs_reference):
            entropy = function(hidden, head, labels, return_entropy=True)[1]
            grads.append(torch.autograd.grad(entropy.square().sum(), hidden)[0])
        torch.testing.assert_close(*grads)


def test_the_entropy_as_a_metric_computes_no_more_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    logits = ChunkedHead.logits
    monkeypatch.setattr(ChunkedHead, "logits", lambda self, x, *a: rows.append(len(x)) or logits(self, x, *a))
    hidden, labels = torch.randn(8, 16, requires_grad=True), torch.arange(8)
    logps, entropy = token_logprobs(hidden, make_head(LINEAR, bias=True), labels, return_entropy=True)
    assert entropy.requires_grad
    (logps + entropy.detach()).sum().backward()
    assert sum(rows) == 8


@pytest.mark.parametrize(("keep", "computations"), [(None, 2), (False, 2), (True, 1)])
def test_the_entropy_of_a_frozen_head_in_the_loss(
    keep: bool | None, computations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    logits = ChunkedHead.logits
    monkeypatch.setattr(ChunkedHead, "logits", lambda self, x, *a: rows.append(len(x)) or logits(self, x, *a))
    head, labels = make_head(MLP, bias=True, dtype=torch.float64), some_labels(20)
    hidden, grads = torch.randn(20, 16, dtype=torch.float64, requires_grad=True), []
    for function in (partial(token_logprobs, keep_logits=keep, chunk_rows=3), token_logprobs_reference):
        logps, entropy = function(hidden, head, labels, return_entropy=True)
        grads.append(torch.autograd.grad((logps + 0.1 * entropy).sum(), hidden)[0])
    torch.testing.assert_close(*grads)
    assert sum(rows) == computations * int((labels != -100).sum())


def test_a_backend_without_the_options_gives_the_bits_of_the_defaults(backend: str) -> None:
    head, hidden, labels = make_head(MLP, bias=True), torch.randn(9, 16), some_labels(9)
    plain = token_logprobs(hidden, head, labels, backend=backend)
    explicit = {"temperature": 1, "softcap": None, "return_entropy": False, "keep_logits": None}
    assert torch.equal(token_logprobs(hidden, head, labels, backend=backend, **explicit), plain)


def test_few_rows_take_the_same_values_as_many() -> None:
    """Small calls without gradient skip what others prepare."""
    for bias in (False, True):
        head = make_head(LINEAR, bias=bias)
        hidden, labels = torch.randn(300, 16), torch.randint(23, (300,))
        options = {"temperature": 1.3, "softcap": 5.0}
        whole = token_logprobs(hidden, head, labels, **options)
        for rows in (slice(0, 1), slice(3, 20), slice(0, 0)):
            few = token_logprobs(hidden[rows], head, labels[rows], **options)
            torch.testing.assert_close(few, whole[rows])
        strided = token_logprobs(hidden[:8:2], head, labels[:8:2], **options)
        torch.testing.assert_close(strided, whole[:8:2])
        ignored = labels[:5].clone()
        ignored[1] = -100
        assert token_logprobs(hidden[:5], head, ignored)[1] == 0
        assert token_logprobs(hidden[0], head, labels[0], **options).shape == ()


def test_layouts() -> None:
    head, labels = make_head(MLP, bias=True), some_labels(6, 4)
    hidden = torch.randn(6, 4, 16)
    plain = token_logprobs(hidden, head, labels)
    assert torch.equal(token_logprobs(hidden.transpose(0, 1), head, labels.transpose(0, 1)), plain.transpose(0, 1))
    wide = torch.randn(6, 4, 32)
    wide[..., ::2] = hidden
    assert torch.equal(token_logprobs(wide[..., ::2], head, labels), plain)
    torch.testing.assert_close(token_logprobs(hidden[2, 1], head, labels[2, 1]), plain[2, 1])
    assert torch.equal(token_logprobs(hidden, head, labels.int()), plain)
    columns = Head(head.weight.t().contiguous().t(), *head.tensors[1:])
    torch.testing.assert_close(token_logprobs(hidden, columns, labels), plain)


# No row is ignored: then nothing else copies the labels, which kernels read by address.
STRIDED_LABELS = {
    "codes[..., 1]": lambda: torch.randint(23, (2, 5, 3))[..., 1],
    "codes[:, 0]": lambda: torch.randint(23, (6, 4))[:, 0],
    "codes[:, 1:] of two": lambda: torch.randint(23, (7, 2))[:, 1:],
    "(B, 1)": lambda: torch.randint(23, (6, 1)),
    "expanded": lambda: torch.tensor(3).expand(6),
    "reversed rows": lambda: torch.randint(23, (4, 6)).t(),
}


@pytest.mark.parametrize("train_head", [False, True])
def test_strided_labels(train_head: bool, backend: str) -> None:
    plain = make_head(MLP, bias=True)
    for name, make in STRIDED_LABELS.items():
        labels, results = make(), []
        for codes in (labels, labels.clone(memory_format=torch.contiguous_format)):
            head = trainable(plain) if train_head else plain
            hidden = torch.linspace(-1, 1, labels.numel() * 16).view(*labels.shape, 16).requires_grad_()
            logps = token_logprobs(hidden, head, codes, backend=backend)
            logps.square().sum().backward()
            results.append([logps.detach(), hidden.grad, *(t.grad for t in head.tensors if train_head)])
        assert all(map(torch.equal, *results)), name
        exact = token_logprobs_reference(hidden.detach(), plain, labels)
        torch.testing.assert_close(results[0][0].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("between", [-100, 99])
def test_labels_are_counted_by_their_strides(between: int) -> None:
    labels = torch.stack([torch.tensor([1, 2, -100, 3]), torch.full((4,), between)], 1)[:, 0]
    assert count_labels(labels, 23, options_of(4)) == 3


def test_strided_arguments_of_the_ops(backend: str) -> None:
    backend = "cpp" if backend == "auto" else backend
    weights, hidden = (*make_head(MLP, bias=True).tensors, None, None), torch.randn(16, 6).t()
    options = options_of(4, backend)

    def plain(tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=torch.contiguous_format)

    for labels in (torch.tensor(3).expand(6), torch.randint(23, (6, 2))[:, 1]):
        for needs_dhidden in (True, False):
            mine, best = (
                torch.ops.ospo_fast.token_logprobs(needs_dhidden, True, 0, x, y, weights, *options)
                for x, y in ((hidden, labels), (plain(hidden), plain(labels)))
            )
            torch.testing.assert_close(mine, best)
        needed = [True] * 5 + [False] * 2
        for grad in (torch.randn(6, 2)[:, 1], torch.tensor(2.0).expand(6)):
            mine, best = (
                torch.ops.ospo_fast.token_logprobs_backward(needed, g, g, None, False, x, y, weights, *options)
                for g, x, y in ((grad, hidden, labels), (plain(grad), plain(hidden), plain(labels)))
            )
            torch.testing.assert_close(mine, best)
    packed_row, scales = torch.tensor([[0, 1, -1, 2, 3, -1], [0] * 6]).t()[:, 0], torch.randn(6, 2)[:, 1]
    mine = scale_rows(hidden, packed_row, scales, backend)
    assert torch.equal(mine, scale_rows(plain(hidden), plain(packed_row), plain(scales), backend))


@pytest.mark.parametrize("train_head", [False, True])
def test_any_upstream_gradient(train_head: bool) -> None:
    head, labels = make_head(MLP, bias=True, dtype=torch.float64), some_labels(5, 6)
    head = trainable(head) if train_head else head
    hidden = torch.randn(5, 6, 16, dtype=torch.float64, requires_grad=True)
    for loss in (
        lambda logps: logps.sum(),  # expanded
        lambda logps: logps[:, ::2].square().sum(),  # strided
        lambda logps: logps.t()[1:].cumsum(0).sum(),  # transposed
        lambda logps: logps[labels != -100].mean(),  # gathered
    ):
        (mine,) = torch.autograd.grad(loss(token_logprobs(hidden, head, labels)), hidden)
        (best,) = torch.autograd.grad(loss(token_logprobs_reference(hidden, head, labels)), hidden)
        torch.testing.assert_close(mine, best)


@pytest.mark.parametrize("kind", [LINEAR, MLP, SQUARE])
@pytest.mark.parametrize("all_active", [False, True])
def test_chunks_of_a_trained_head_share_their_buffers(kind: str, all_active: bool) -> None:
    """The number of allocated matrices does not depend on the number of chunks; only ignored rows need a gather."""
    head = make_head(kind, bias=True, width=64, codes=64)
    hidden, labels = torch.randn(24, 64), torch.randint(64, (24,))
    if not all_active:
        labels[::3] = -100

    def allocated(chunk: int) -> tuple[int, set[str]]:
        options, needed = options_of(chunk), [True] * 5 + [False] * 2
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            arguments = needed, torch.ones(24), None, None, False, hidden, labels, (*head.tensors, None, None), *options
            torch.ops.ospo_fast.token_logprobs_backward(*arguments)
        events = profile.profiler.kineto_results.events()
        matrices = [e for e in events if e.name() == "[memory]" and e.nbytes() >= 2 * 64 * 4]
        return len(matrices), {e.name() for e in events}

    (few, names), (many, _) = allocated(8), allocated(2)
    assert few == many
    assert ("aten::index_select" in names) == (not all_active)


@pytest.mark.parametrize("train_head", [False, True])
def test_two_backwards_and_accumulation(train_head: bool) -> None:
    head, labels = make_head(MLP, bias=True), some_labels(9)
    head = trainable(head) if train_head else head
    hidden = torch.randn(9, 16, requires_grad=True)
    loss = token_logprobs(hidden, head, labels).square().sum()
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * first)


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("square", [False, True])  # not: the upstream gradient is a constant
def test_second_derivative_is_refused(train_head: bool, square: bool) -> None:
    head = make_head(MLP, bias=True)
    head = trainable(head) if train_head else head
    hidden, labels = torch.randn(4, 16, requires_grad=True), torch.arange(4)
    for compute in (token_logprobs, cross_entropy):
        result = compute(hidden, head, labels)
        loss = result.square().sum() if square else result.sum()
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True, retain_graph=True)
        (plain,) = torch.autograd.grad(compute(hidden, head, labels).pow(2 if square else 1).sum(), hidden)
        torch.testing.assert_close(grad.detach(), plain)
        for ask in (
            lambda grad=grad: grad.sum().backward(),
            lambda grad=grad: torch.autograd.grad(grad.sum(), hidden),  # by name
            lambda compute=compute: torch.autograd.functional.hessian(
                lambda x: compute(x, head, labels).pow(2 if square else 1).sum(), hidden.detach()
            ),
        ):
            with pytest.raises(OpError, match="got a second derivative, expected at most a first one"):
                ask()


@pytest.mark.parametrize("train_head", [False, True])
def test_batched_gradients_are_refused(train_head: bool) -> None:
    head = make_head(MLP, bias=True)
    head = trainable(head) if train_head else head
    hidden, labels = torch.randn(4, 16, requires_grad=True), torch.arange(4)
    with pytest.raises(OpError, match="its backward got a batch of gradients"):
        torch.autograd.grad(token_logprobs(hidden, head, labels), hidden, torch.eye(4), is_grads_batched=True)
    with pytest.raises(OpError, match=r"cross_entropy: its backward got a batch.*vectorize=False"):
        torch.autograd.functional.jacobian(lambda x: cross_entropy(x, head, labels), hidden.detach(), vectorize=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("train_head", [False, True])
def test_rows_are_independent(train_head: bool, value: float) -> None:
    head, labels = make_head(MLP, bias=True), torch.arange(6)
    head = trainable(head) if train_head else head
    labels[2] = -100
    clean = torch.randn(6, 16)
    hidden = clean.clone()
    hidden[2], hidden[4] = value, value
    hidden.requires_grad_()
    logps = token_logprobs(hidden, head, labels)
    keep = torch.tensor([0, 1, 2, 3, 5])
    assert torch.equal(logps[keep], token_logprobs(clean, head, labels)[keep])
    assert logps[4].isnan()
    assert logps[2] == 0
    torch.where(logps.isnan(), 0, logps).sum().backward()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[[2, 4]] == 0).all()
    assert not train_head or all(t.grad.isfinite().all() for t in head.tensors)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_check_finite(value: float, backend: str) -> None:
    head, hidden, labels = make_head(MLP, bias=True), torch.randn(2, 3, 16), torch.tensor([[1, 2, -100], [3, 4, 5]])
    hidden[0, 2] = value  # ignored, so it is not read
    options = {"backend": backend, "check_finite": True}
    plain = token_logprobs(hidden, head, labels, backend=backend)
    assert torch.equal(token_logprobs(hidden, head, labels, **options), plain)
    hidden[1, 1] = value
    message = r"log-probability of hidden\[4\] \(flattened\) is nan, one of 1 that are not finite; expected"
    with pytest.raises(OpError, match=message):
        token_logprobs(hidden.requires_grad_(), head, labels, **options)


def test_default_chunks() -> None:
    for codes, itemsize, device, rows in (
        (16384, 4, "cpu", 512),  # 32 MiB
        (16384, 2, "cuda", 6272),  # 196 MiB, a third of 16 pairs of Janus-Pro-7B
        (16384, 4, "cuda", 3072),
        (128256, 2, "cuda", 768),  # a multiple of the tiles' 128
        (10**7, 4, "cpu", 256),
    ):
        assert default_chunk_rows(codes, itemsize, device) == rows


@pytest.mark.parametrize("train_head", [False, True])
def test_empty_and_ignored_batches(train_head: bool) -> None:
    for shape in ((0,), (2, 0), (4,)):
        head = make_head(MLP, bias=True)
        head = trainable(head) if train_head else head
        hidden = torch.full((*shape, 16), torch.nan, requires_grad=True)
        logps = token_logprobs(hidden, head, torch.full(shape, -100))
        assert torch.equal(logps, torch.zeros(shape))
        logps.sum().backward()
        assert torch.equal(hidden.grad, torch.zeros_like(hidden))
        assert not train_head or all((t.grad == 0).all() for t in head.tensors)


def test_no_grad_keeps_no_dhidden() -> None:
    head, hidden, labels = make_head(MLP, bias=True), torch.randn(5, 16), torch.arange(5)
    with torch.no_grad():
        assert not token_logprobs(hidden.requires_grad_(), trainable(head), labels).requires_grad
    weights, options = (*head.tensors, None, None), options_of(3, "torch")
    logps, _, dhidden, *_ = torch.ops.ospo_fast.token_logprobs(
        False, False, 0, hidden.detach(), labels, weights, *options
    )
    assert dhidden.numel() == 0
    torch.testing.assert_close(logps, token_logprobs(hidden, head, labels).detach())


@pytest.mark.parametrize("train_head", [False, True])
def test_autocast(train_head: bool) -> None:
    head, labels = make_head(MLP, bias=True), some_labels(8)
    head = trainable(head) if train_head else head
    hidden = torch.randn(8, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logprobs(hidden, head, labels)
    logps.sum().backward()
    assert logps.dtype == hidden.grad.dtype == torch.float32
    assert torch.equal(logps, token_logprobs(hidden.bfloat16(), head.to(torch.bfloat16), labels))
    assert not train_head or all(t.grad.dtype == torch.float32 and t.grad.any() for t in head.tensors)


@pytest.mark.parametrize("train_head", [False, True])
def test_a_backward_under_autocast_keeps_the_dtype_of_the_forward(train_head: bool) -> None:
    head, labels = make_head(MLP, bias=True), some_labels(8)
    results = []
    for enabled in (False, True):
        weights = trainable(head) if train_head else head
        hidden = torch.linspace(-1, 1, 8 * 16).view(8, 16).requires_grad_()
        loss = token_logprobs(hidden, weights, labels).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss.backward()
        results.append([hidden.grad, *(t.grad for t in weights.tensors if t is not None and train_head)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("train_head", [False, True])
def test_frozen_inputs(train_head: bool) -> None:
    """Only what requires grad receives one: hidden states of a frozen model, or one layer of the head."""
    plain, labels = make_head(MLP, bias=True, dtype=torch.float64), some_labels(8)
    hidden = torch.randn(8, 16, dtype=torch.float64)
    for chosen in range(4) if train_head else ():
        head = Head(*(t.clone().requires_grad_(i == chosen) for i, t in enumerate(plain.tensors)))
        (mine,) = torch.autograd.grad(token_logprobs(hidden, head, labels).sum(), head.tensors[chosen])
        (best,) = torch.autograd.grad(token_logprobs_reference(hidden, head, labels).sum(), head.tensors[chosen])
        torch.testing.assert_close(mine, best)
    assert not token_logprobs(hidden, plain, labels).requires_grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("train_head", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_poisoned_memory(train_head: bool, dtype: torch.dtype) -> None:
    head, labels = make_head(MLP, bias=True, dtype=dtype), some_labels(20)
    head = trainable(head) if train_head else head
    hidden = torch.randn(20, 16).to(dtype).requires_grad_()
    logps = token_logprobs(hidden, head, labels, chunk_rows=6, logits_dtype="fp32")
    logps.sum().backward()
    assert logps.isfinite().all()
    assert hidden.grad.isfinite().all()


def test_compiles_to_one_graph() -> None:
    """tests/test_loss.py compiles a trained head."""
    head = nn.Linear(16, 23, bias=False).requires_grad_(False)
    hidden, labels = torch.randn(3, 6, 16), some_labels(3, 6)

    def loss(x: Tensor) -> Tensor:
        return token_logprobs(x * 2, head, labels).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, mine = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    torch.testing.assert_close(compiled(ours), loss(mine))
    compiled(ours).backward()
    loss(mine).backward()
    torch.testing.assert_close(ours.grad, mine.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ours), loss(mine))


def test_opcheck() -> None:
    head, hidden, labels = make_head(MLP, bias=True), torch.randn(7, 16), some_labels(7)
    lora = torch.randn(7, 2), torch.randn(23, 2)
    options = options_of(3)
    ops = torch.ops.ospo_fast
    for needs_dhidden in (True, False):
        arguments = needs_dhidden, not needs_dhidden, 0, hidden, labels, (*head.tensors, None, None), *options
        torch.library.opcheck(ops.token_logprobs, arguments)
    linear = make_head(LINEAR, bias=False)
    for tensors, needs_grad in (
        ((*head.tensors, None, None), [True, True, True, True, False, False, False]),
        ((*linear.tensors, *lora), [True, False, False, False, False, True, True]),
    ):
        for grad_entropy in (None, torch.randn(7)):
            arguments = needs_grad, torch.randn(7), grad_entropy, None, False, hidden, labels, tensors, *options
            torch.library.opcheck(ops.token_logprobs_backward, arguments)
        torch.library.opcheck(ops.linear_loss, (needs_grad, torch.rand(7), hidden, labels, tensors, *options))
    packed_row = torch.tensor([0, 1, -1, 2, 3, -1, 4])
    torch.library.opcheck(ops.scale_rows, (hidden, packed_row, torch.randn(7), "cpp"))


def test_options_are_packed_in_the_order_of_the_schemas() -> None:
    names = list(TokenLogprobsOptions._fields)
    assert [part.split()[1] for part in OPTIONS_SCHEMA.split(", ")] == names
    ops = torch.ops.ospo_fast
    for op in (ops.token_logprobs, ops.token_logprobs_backward, ops.linear_loss):
        assert [argument.name for argument in op.default._schema.arguments][-len(names) :] == names


def test_ops_that_synchronize_are_tagged() -> None:
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is None:
        pytest.skip("this torch has no tag for it")
    ops = torch.ops.ospo_fast
    for op in (ops.token_logprobs, ops.token_logprobs_backward, ops.spread_weights):
        assert tag in op.default.tags
    for op in (ops.scale_rows, ops.token_weights):
        assert tag not in op.default.tags


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([1, 23, 2])}, r"labels\[1\] \(flattened\) is 23, expected 0 <= label < 23"),
        ({"labels": torch.tensor([1, 2, -1])}, r"labels\[2\] \(flattened\) is -1"),
        ({"labels": torch.zeros(3)}, "labels are torch.float32, expected int64"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels have shape \(4,\), hidden \(3, 16\)"),
        ({"hidden": torch.randn(3, 15)}, r"hidden has shape \(3, 15\), expected \(..., 16\)"),
        ({"hidden": torch.randn(3, 16).double()}, "hidden is torch.float64, the head is torch.float32; cast"),
        ({"hidden": torch.ones(3, 16).long()}, "hidden is torch.int64, expected a floating dtype"),
        ({"labels": torch.zeros(3, dtype=torch.int64, device="meta")}, "hidden is on cpu, labels on meta"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        *(({"temperature": t}, f"temperature is {t}, expected a positive number from") for t in (0, -1.0, torch.nan)),
        ({"temperature": torch.inf}, "temperature is inf"),
        *(({"temperature": t}, "temperature is .*expected a positive number from") for t in (1e-39, None, "1", True)),
        *(({"softcap": c}, "softcap is .*expected a positive number from") for c in (1e39, 1e-46, "3")),
        ({"temperature": torch.ones(3)}, r"temperature is a tensor that has shape \(3,\); expected one number"),
        ({"softcap": torch.tensor(3.0, requires_grad=True)}, "softcap is a tensor that requires grad"),
        ({"chunk_rows": 1.5}, "chunk_rows is 1.5, expected a positive number"),
        ({"ignore_index": None}, "ignore_index is None, expected an integer"),
        ({"process_group": 3}, "process_group is int, expected a torch.distributed.ProcessGroup or None"),
        ({"hidden": torch.randn(3, 16).to_sparse()}, "layout torch.sparse_coo, expected a dense tensor"),
        *(
            ({"softcap": c}, f"softcap is {c}, expected a positive number .*None for no bound")
            for c in (0, -30.0, torch.nan)
        ),
        ({"labels": torch.tensor([1, 2, -100]).view(torch.uint64)}, r"labels holds a uint64 number of 2\^63 or more"),
        ({"logits_dtype": "int8"}, "logits_dtype is 'int8', expected None or 'fp32'"),
        ({"backend": "cuda"}, "backend='cuda' cannot run here: 'cuda' takes tensors on cuda, not on cpu; use"),
        ({"backend": "fast"}, "backend='fast' is unknown, expected one of 'auto', 'torch'"),
        (
            {"backend": "cpp", "hidden": torch.randn(3, 16).double(), "head": Head(torch.randn(23, 16).double())},
            "backend='cpp' cannot run here: got torch.float64, expected float32",
        ),
        ({"head": nn.Conv1d(16, 23, 1)}, "Conv1d is not a known head"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.randn(3, 16), "head": make_head(LINEAR, bias=True), "labels": torch.arange(3)} | change
    with pytest.raises(OpError, match=message):
        token_logprobs(**arguments)

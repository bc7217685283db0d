import dataclasses
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast import Head, sequence_logprobs, token_logprobs, token_weights
from ospo_fast.errors import OpError
from ospo_fast.ops._chunked_head import ChunkedHead
from ospo_fast.ops.scale_rows import scale_rows
from ospo_fast.ops.token_logprobs import TokenLogprobsOptions, _default_chunk_rows, token_logprobs_reference
from ospo_fast.ops.token_weights import spread_weights

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


def eager(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """The usual computation: all logits, fp32 log-softmax, gather."""
    logps = F.log_softmax(head(hidden).float(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * (labels != -100)


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
@pytest.mark.parametrize("train_head", [False, True])
def test_chunks_change_nothing_and_bound_the_logits(
    monkeypatch: pytest.MonkeyPatch, train_head: bool, kind: str
) -> None:
    rows: list[int] = []
    logits = ChunkedHead._logits
    monkeypatch.setattr(ChunkedHead, "_logits", lambda self, x: rows.append(len(x)) or logits(self, x))
    head, labels = make_head(kind, bias=True), some_labels(50)
    head = trainable(head) if train_head else head
    results = []
    for chunk in (None, 7, 1):
        hidden = torch.linspace(-1, 1, 800).view(50, 16).requires_grad_()
        logps = token_logprobs(hidden, head, labels, chunk_rows=chunk)
        logps.square().sum().backward()
        results.append((logps.detach(), hidden.grad))
        assert max(rows) <= (chunk or 50)
        assert sum(rows) == int((labels != -100).sum()) * (2 if train_head else 1)  # compacted; recomputed if trained
        rows.clear()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


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
        torch.testing.assert_close(results[0][0].double(), token_logprobs_reference(hidden.detach(), plain, labels))


def test_strided_arguments_of_the_ops(backend: str) -> None:
    backend = "cpp" if backend == "auto" else backend
    head, hidden = make_head(MLP, bias=True), torch.randn(16, 6).t()
    options = TokenLogprobsOptions(-100, 4, False, backend, False).flat()

    def plain(tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=torch.contiguous_format)

    for labels in (torch.tensor(3).expand(6), torch.randint(23, (6, 2))[:, 1]):
        for needs_dhidden in (True, False):
            mine, best = (
                torch.ops.ospo_fast.token_logprobs(needs_dhidden, x, y, head.tensors, *options)
                for x, y in ((hidden, labels), (plain(hidden), plain(labels)))
            )
            torch.testing.assert_close(mine, best)
        for grad in (torch.randn(6, 2)[:, 1], torch.tensor(2.0).expand(6)):
            mine, best = (
                torch.ops.ospo_fast.token_logprobs_backward([True] * 5, g, x, y, head.tensors, *options)
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
        options = TokenLogprobsOptions(-100, chunk, False, "cpp", False).flat()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            arguments = [True] * 5, torch.ones(24), hidden, labels, head.tensors, *options
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


def test_second_derivative_is_refused() -> None:
    hidden = torch.randn(4, 16, requires_grad=True)
    loss = token_logprobs(hidden, make_head(MLP, bias=True), torch.arange(4)).square().sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


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
        assert _default_chunk_rows(codes, itemsize, device) == rows


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
    options = TokenLogprobsOptions(-100, 3, False, "torch", False).flat()
    logps, dhidden, _ = torch.ops.ospo_fast.token_logprobs(False, hidden.detach(), labels, head.tensors, *options)
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
    options = TokenLogprobsOptions(-100, 3, False, "cpp", False).flat()
    for needs_dhidden in (True, False):
        arguments = needs_dhidden, hidden, labels, head.tensors, *options
        torch.library.opcheck(torch.ops.ospo_fast.token_logprobs, arguments)
    linear = make_head(LINEAR, bias=False)
    for weights, needs_grad in ((head, [True, True, True, True, False]), (linear, [True, True, False, False, False])):
        arguments = needs_grad, torch.randn(7), hidden, labels, weights.tensors, *options
        torch.library.opcheck(torch.ops.ospo_fast.token_logprobs_backward, arguments)
    packed_row = torch.tensor([0, 1, -1, 2, 3, -1, 4])
    torch.library.opcheck(torch.ops.ospo_fast.scale_rows, (hidden, packed_row, torch.randn(7), "cpp"))


def test_options_are_packed_in_the_order_of_the_schemas() -> None:
    names = [field.name for field in dataclasses.fields(TokenLogprobsOptions)]
    for op in (torch.ops.ospo_fast.token_logprobs, torch.ops.ospo_fast.token_logprobs_backward):
        assert [argument.name for argument in op.default._schema.arguments][-len(names) :] == names
    options = TokenLogprobsOptions(1, 2, True, "torch", False)
    assert options.flat() == dataclasses.astuple(options)


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

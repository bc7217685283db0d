"""token_logprobs on a GPU: its kernels, streams, graphs and memory. The CPU tests cover the shared code."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast import Head, OSPOLoss, OSPOLossConfig, cross_entropy, token_logprobs
from ospo_fast.errors import OpError
from ospo_fast.ops._chunked_head import ChunkedHead, TokenLogprobsOptions
from ospo_fast.ops.token_logprobs import token_logprobs_reference

pytestmark = pytest.mark.gpu
SLEEP = 20_000_000  # clock cycles, about ten milliseconds


def make_head(width: int, codes: int, dtype: torch.dtype, *, mlp: bool, bias: bool) -> Head:
    sizes = [(codes, width), (codes,) if bias else None]
    sizes += [(width, width), (width,) if bias else None] if mlp else []
    return Head(*(None if s is None else (torch.randn(s, device="cuda") * width**-0.5).to(dtype) for s in sizes))


def eager(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    logps = F.log_softmax(head(hidden).float(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * (labels != -100)


def run(
    function: Any, hidden: Tensor, head: Head, labels: Tensor, upstream: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    trained = [t.requires_grad for t in head.tensors if t is not None]
    head = Head(*(None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in head.tensors))
    x = hidden.to(dtype, copy=True).requires_grad_()
    logps = function(x, head, labels)
    (logps * upstream).sum().backward()
    grads = [t.grad for t in head.tensors if t is not None and t.requires_grad]
    assert len(grads) == sum(trained)
    return [logps.detach(), x.grad, *grads]


# Rows, width, codes, chunk_rows. Janus' codes; a row that is too long for registers; one code less than Janus', so that
# rows are not aligned for vectors; an odd number of codes; one row, repeated, as its error is random.
SHAPES = [(500, 256, 16384, 200), (70, 64, 40000, None), (130, 64, 16383, 50), (33, 40, 1021, 7), (1, 8, 5, None)]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cuda", torch.bfloat16), ("cuda", torch.float16), ("cuda", torch.float32), ("torch", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
def test_values_and_gradients(no_worse: Any, backend: str, mlp: bool, train_head: bool, dtype: torch.dtype) -> None:
    for rows, width, codes, chunk in SHAPES:
        ours, results = partial(token_logprobs, chunk_rows=chunk, backend=backend), []
        for _ in range(16 if rows == 1 else 1):
            head = make_head(width, codes, dtype, mlp=mlp, bias=codes != 40000)
            head = Head(*(None if t is None else t.requires_grad_(train_head) for t in head.tensors))
            hidden, upstream = torch.randn(rows, width, device="cuda").to(dtype), torch.randn(rows, device="cuda")
            labels = torch.randint(codes, (rows,), device="cuda")
            if rows > 1:
                labels[torch.rand(rows, device="cuda") < 0.3] = -100
            arguments = hidden, head, labels, upstream
            found = run(ours, *arguments, dtype)
            usual, exact = run(eager, *arguments, dtype), run(token_logprobs_reference, *arguments, torch.float64)
            assert (found[0][labels == -100] == 0).all()
            assert (found[1][labels == -100] == 0).all()
            results.append(list(zip(found, usual, exact, strict=True)))
        for repeats in zip(*results, strict=True):
            mine, theirs, best = (torch.stack(tensors) for tensors in zip(*repeats, strict=True))
            no_worse(mine, theirs, best.double())


def eager_with(hidden: Tensor, head: Head, labels: Tensor, temperature: float, softcap: float | None) -> Any:
    scores = head(hidden).float()
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    every, active = F.log_softmax(scores / temperature, -1), labels != -100
    logps = every.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * active, -(every.exp() * every).sum(-1) * active


@pytest.mark.parametrize(("temperature", "softcap"), [(0.7, None), (1.0, 30.0), (2.5, 4.0), (1.0, None)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("train_head", "keep"), [(False, None), (True, False), (True, True)])
@pytest.mark.parametrize("entropy_in_loss", [False, True])
@pytest.mark.parametrize(("rows", "width", "codes", "chunk"), SHAPES[:4])
def test_temperature_softcap_and_entropy(
    no_worse: Any, dtype: torch.dtype, train_head: bool, keep: bool | None, temperature: float, softcap: float | None,
    entropy_in_loss: bool, rows: int, width: int, codes: int, chunk: int | None,
) -> None:  # fmt: skip
    head = make_head(width, codes, dtype, mlp=False, bias=codes != 40000)
    head = Head(head.weight * 3, head.bias)
    hidden, upstream = torch.randn(rows, width, device="cuda").to(dtype), torch.randn(2, rows, device="cuda")
    labels = torch.randint(codes, (rows,), device="cuda")
    labels[torch.rand(rows, device="cuda") < 0.3] = -100
    options = {"temperature": temperature, "softcap": softcap, "return_entropy": True}

    def results(function: Any, dtype: torch.dtype) -> list[Tensor]:
        weights = [None if t is None else t.detach().to(dtype).requires_grad_(train_head) for t in head.tensors]
        x = hidden.to(dtype, copy=True).requires_grad_()
        logps, entropy = function(x, Head(*weights), labels)
        loss = (logps * upstream[0]).sum() + (entropy * upstream[1]).sum() * entropy_in_loss
        inputs = [x, *(t for t in weights if t is not None and train_head)]
        return [logps.detach(), entropy.detach(), *torch.autograd.grad(loss, inputs)]

    ours = results(partial(token_logprobs, chunk_rows=chunk, backend="cuda", keep_logits=keep, **options), dtype)
    usual = results(partial(eager_with, temperature=temperature, softcap=softcap), dtype)
    exact = results(partial(token_logprobs_reference, **options), torch.float64)
    for mine, theirs, best in zip(ours, usual, exact, strict=True):
        no_worse(mine, theirs, best.double())


@pytest.mark.parametrize("train_head", [False, True])
def test_cross_entropy(no_worse: Any, train_head: bool) -> None:
    head = make_head(64, 16384, torch.bfloat16, mlp=True, bias=True)
    hidden, labels = torch.randn(300, 64, device="cuda").bfloat16(), torch.randint(16384, (300,), device="cuda")
    labels[::5] = -100

    def results(function: Any, dtype: torch.dtype) -> list[Tensor]:
        weights = trainable(head.to(dtype), train_head)
        x = hidden.to(dtype, copy=True).requires_grad_()
        inputs = [x, *(t for t in weights.tensors if t is not None and train_head)]
        return list(torch.autograd.grad(function(x, weights, labels), inputs))

    ours = results(partial(cross_entropy, chunk_rows=64), torch.bfloat16)
    usual = results(lambda x, h, y: F.cross_entropy(h(x).float(), y), torch.bfloat16)
    exact = results(lambda x, h, y: F.cross_entropy(h(x), y), torch.float64)
    for mine, theirs, best in zip(ours, usual, exact, strict=True):
        no_worse(mine, theirs, best)


@pytest.mark.parametrize(("mlp", "dtype"), [(False, torch.bfloat16), (True, torch.float16)], ids=str)
@pytest.mark.parametrize("train_head", [False, True])
def test_logits_up_to_50_and_fp32_logits(no_worse: Any, mlp: bool, train_head: bool, dtype: torch.dtype) -> None:
    head, hidden = make_head(128, 4096, torch.float32, mlp=mlp, bias=True), torch.randn(300, 128, device="cuda")
    factor = 50 / head(hidden).abs().max()
    head = Head(head.weight * factor, head.bias * factor, *head.tensors[2:]).to(dtype)
    head = Head(*(None if t is None else t.requires_grad_(train_head) for t in head.tensors))
    labels = torch.randint(4096, (300,), device="cuda")
    arguments = hidden.to(dtype), head, labels, torch.randn(300, device="cuda")
    usual, exact = run(eager, *arguments, dtype), run(token_logprobs_reference, *arguments, torch.float64)
    ours = run(lambda *a: token_logprobs(*a, chunk_rows=200), *arguments, dtype)
    wide = run(lambda *a: token_logprobs(*a, chunk_rows=200, logits_dtype="fp32"), *arguments, dtype)
    for results in (ours, wide):
        for mine, theirs, best in zip(results, usual, exact, strict=True):
            no_worse(mine, theirs, best)
    if not mlp:  # with a projection the features are rounded to half precision too
        assert (wide[0] - exact[0]).abs().max() < 0.2 * (ours[0] - exact[0]).abs().max()


@pytest.fixture
def returned() -> Iterator[None]:
    """Return the memory of a large test to the GPU, which other test processes may share."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("returned")
@pytest.mark.parametrize("mlp", [False, True])
def test_more_than_2_to_31_logits(no_worse: Any, mlp: bool) -> None:
    """dlogits of the last rows have offsets above 2³¹; their gradients are computed from them."""
    rows, codes = 140_000, 16384
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of free GPU memory")
    head, last = make_head(64, codes, torch.bfloat16, mlp=mlp, bias=True), slice(rows - 64, rows)
    hidden, labels = torch.randn(rows, 64, device="cuda").bfloat16(), torch.randint(codes, (rows,), device="cuda")
    upstream = torch.randn(rows, device="cuda")
    ours = run(lambda *a: token_logprobs(*a, chunk_rows=rows), hidden, head, labels, upstream, torch.bfloat16)
    few = hidden[last], head, labels[last], upstream[last]
    usual, exact = run(eager, *few, torch.bfloat16), run(token_logprobs_reference, *few, torch.float64)
    for mine, theirs, best in zip(ours, usual, exact, strict=True):
        no_worse(mine[last], theirs, best)


def test_rows_are_independent_and_labels_are_checked() -> None:
    head, labels = make_head(32, 16384, torch.bfloat16, mlp=True, bias=True), torch.arange(6, device="cuda")
    clean = torch.randn(6, 32, device="cuda").bfloat16()
    hidden = clean.clone()
    hidden[4] = torch.nan
    hidden.requires_grad_()
    logps = token_logprobs(hidden, head, labels)
    keep = torch.tensor([0, 1, 2, 3, 5], device="cuda")
    assert torch.equal(logps[keep], token_logprobs(clean, head, labels)[keep])
    assert logps[4].isnan()
    torch.where(logps.isnan(), 0, logps).sum().backward()
    assert hidden.grad.isfinite().all()
    with pytest.raises(OpError, match=r"log-probability of hidden\[4\]"):
        token_logprobs(hidden, head, labels, check_finite=True)
    with pytest.raises(OpError, match=r"labels\[0\] \(flattened\) is 16384"):
        token_logprobs(hidden, head, labels + 16384)
    for nothing in (hidden[:0], hidden):
        ignored = torch.full((len(nothing),), -100, device="cuda")
        assert (token_logprobs(nothing, head, ignored) == 0).all()


def trainable(head: Head, train_head: bool) -> Head:
    return Head(*(None if t is None else t.detach().clone().requires_grad_(train_head) for t in head.tensors))


def results_of(logps: Tensor, x: Tensor, head: Head) -> list[Tensor]:
    """Values and gradients; backward is done here."""
    logps.square().sum().backward()
    return [logps.detach(), x.grad, *(t.grad for t in head.tensors if t is not None and t.requires_grad)]


@pytest.mark.parametrize("train_head", [False, True])
def test_strided_hidden_states_and_labels(train_head: bool) -> None:
    """No row is ignored: then nothing else copies the labels."""
    plain, codes = make_head(32, 16384, torch.bfloat16, mlp=True, bias=True), torch.randint(16384, (6, 5, 3)).cuda()
    hidden = torch.randn(6, 5, 32, device="cuda").bfloat16()
    strided = torch.empty(5, 6, 64, dtype=torch.bfloat16, device="cuda").transpose(0, 1)[..., ::2].copy_(hidden)

    def results(x: Tensor, labels: Tensor) -> list[Tensor]:
        head, x = trainable(plain, train_head), x.detach().requires_grad_()
        return results_of(token_logprobs(x, head, labels), x, head)

    for labels in (codes[..., 1], codes[:, :1, 0].expand(6, 5), torch.tensor(7, device="cuda").expand(6, 5)):
        expected = results(hidden, labels.clone(memory_format=torch.contiguous_format))
        assert all(map(torch.equal, results(hidden, labels), expected))
        for mine, best in zip(results(strided, labels), expected, strict=True):  # by other GEMMs
            torch.testing.assert_close(mine, best, rtol=0.02, atol=0.02 * float(best.abs().max()))
    expected = results(hidden[:, :1], codes[:, :1, 0].clone(memory_format=torch.contiguous_format))
    assert all(map(torch.equal, results(hidden[:, :1], codes[:, :1, 0]), expected))


@pytest.mark.parametrize("train_head", [False, True])
def test_two_backwards_and_accumulation(train_head: bool) -> None:
    head = trainable(make_head(64, 16384, torch.bfloat16, mlp=True, bias=True), train_head)
    hidden = torch.randn(40, 64, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(16384, (40,), device="cuda")
    labels[::3] = -100
    loss = token_logprobs(hidden, head, labels, chunk_rows=9).square().sum()
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * first)


@pytest.mark.parametrize("train_head", [False, True])
def test_autocast(train_head: bool) -> None:
    plain, labels = make_head(64, 16384, torch.float32, mlp=True, bias=True), torch.arange(40, device="cuda")
    hidden = torch.randn(40, 64, device="cuda")
    results = []
    for cast in (True, False):
        head, x = trainable(plain, train_head), hidden.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            logps = token_logprobs(x if cast else x.bfloat16(), head if cast else head.to(torch.bfloat16), labels)
            results.append(results_of(logps, x, head))  # the backward inside, too
    assert all(tensor.dtype == torch.float32 for tensor in results[0])
    assert all(map(torch.equal, *results))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize(("codes", "logits_dtype"), [(16384, None), (16384, "fp32"), (16383, None), (40000, "fp32")])
def test_poisoned_memory(codes: int, logits_dtype: str | None, train_head: bool) -> None:
    head = trainable(make_head(64, codes, torch.bfloat16, mlp=True, bias=True), train_head)
    hidden = torch.randn(40, 64, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(codes, (40,), device="cuda")
    labels[::3] = -100
    logps = token_logprobs(hidden, head, labels, chunk_rows=9, logits_dtype=logits_dtype, backend="cuda")
    assert all(tensor.isfinite().all() for tensor in results_of(logps, hidden, head))


@pytest.mark.parametrize("mlp", [False, True])
def test_opcheck(mlp: bool) -> None:
    head = make_head(16, 64, torch.bfloat16, mlp=mlp, bias=True)
    hidden, labels = torch.randn(7, 16, device="cuda").bfloat16(), torch.randint(64, (7, 2), device="cuda")[:, 1]
    labels[2] = -100
    options, ops = TokenLogprobsOptions(-100, 3, False, "cuda", False, 1.3, 20.0), torch.ops.ospo_fast
    weights = *head.tensors, None, None
    for needs_dhidden in (True, False):
        torch.library.opcheck(ops.token_logprobs, (needs_dhidden, True, 0, hidden, labels, weights, *options))
    needs_grad = [True, True, True, mlp, mlp, False, False]
    grad = torch.randn(7, device="cuda")
    inputs = hidden, labels, weights, *options
    torch.library.opcheck(ops.token_logprobs_backward, (needs_grad, grad, grad, None, False, *inputs))
    torch.library.opcheck(ops.linear_loss, (needs_grad, grad, *inputs))
    packed_row = torch.tensor([0, 1, -1, 2, 3, -1, 4], device="cuda")
    torch.library.opcheck(ops.scale_rows, (hidden, packed_row, grad, "cuda"))


def pairs_of_images() -> tuple[torch.nn.Module, OSPOLoss, Tensor, Tensor, Tensor]:
    head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 16384))
    hidden, labels = torch.randn(6, 20, 64, device="cuda"), torch.randint(16384, (6, 20), device="cuda")
    labels[:, :8] = -100
    masks = torch.rand(4, 3, 4, device="cuda") < 0.4
    return head.cuda().bfloat16(), OSPOLoss(OSPOLossConfig.preset("full")), hidden.bfloat16(), labels, masks


@pytest.mark.parametrize("trained", [False, True])
def test_side_stream(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    """The stream sleeps before its inputs are written, before each GEMM and before the backward.

    Work that is launched on another stream would run too early.
    """
    head, loss, hidden, labels, masks = pairs_of_images()
    head.requires_grad_(trained)

    def step(x: Tensor) -> list[Tensor]:
        head.zero_grad()
        output = loss(x, labels, head, object_masks=masks)
        torch.cuda._sleep(SLEEP * (torch.cuda.current_stream() != torch.cuda.default_stream()))
        output.loss.backward()
        return [output.loss.detach(), x.grad, *(p.grad.clone() for p in head.parameters() if trained)]

    expected = step(hidden.clone().requires_grad_())
    torch.cuda.synchronize()
    for name in ("project", "logits"):
        original = getattr(ChunkedHead, name)

        def delayed(*arguments: Any, original: Any = original) -> Any:
            torch.cuda._sleep(SLEEP)
            return original(*arguments)

        monkeypatch.setattr(ChunkedHead, name, delayed)
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.full_like(hidden, torch.nan)
        torch.cuda._sleep(SLEEP)
        results = step(x.copy_(hidden).requires_grad_())
    torch.cuda.synchronize()
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("trained", [False, True])
def test_compiled(trained: bool, mode: str | None) -> None:
    head, loss, hidden, labels, masks = pairs_of_images()
    head.requires_grad_(trained)
    compiled, results = torch.compile(loss, fullgraph=True, mode=mode), []
    for function in (loss, compiled, compiled, compiled):
        torch.compiler.cudagraph_mark_step_begin()
        x = hidden.clone().requires_grad_()
        # A gradient may be in memory of the last replay, which this replay overwrites: do not add to it.
        head.zero_grad(set_to_none=True)
        output = function(x, labels, head, object_masks=masks)
        output.loss.backward()
        grads = [x.grad, *(p.grad for p in head.parameters() if trained)]
        results.append([tensor.detach().clone() for tensor in (output.loss, *grads)])  # the next replay overwrites them
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.usefixtures("returned")
def test_memory_of_16_pairs() -> None:
    """The peak above the inputs, cuBLAS's workspace included, is below 0.5 GB. All logits would be 604 MB."""
    if torch.cuda.mem_get_info()[0] < 4e9:
        pytest.skip("needs 4 GB of free GPU memory")
    head = make_head(4096, 16384, torch.bfloat16, mlp=True, bias=True)
    hidden = torch.randn(18432, 4096, device="cuda").bfloat16().requires_grad_()
    labels, peaks = torch.randint(16384, (18432,), device="cuda"), []
    for _ in range(2):  # the first one includes Triton's setup
        hidden.grad = None
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        token_logprobs(hidden, head, labels).sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 0.5e9, peaks

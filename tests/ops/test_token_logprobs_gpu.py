"""token_logprobs on a GPU: what only shows there. The rest is tested on the CPU, with the same code."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast import Head, OSPOLoss, OSPOLossConfig, token_logprobs
from ospo_fast.errors import OpError
from ospo_fast.ops.token_logprobs import token_logprobs_reference

pytestmark = pytest.mark.gpu


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


# Janus' codes with text rows between; a row that is too long for registers; an odd number of codes; one row.
@pytest.mark.parametrize(
    ("rows", "width", "codes", "chunk"),
    [(500, 256, 16384, 200), (70, 64, 40000, None), (33, 40, 1021, 7), (1, 8, 5, None)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_values_and_gradients(
    no_worse: Any,
    backend: str,
    mlp: bool,
    train_head: bool,
    dtype: torch.dtype,
    rows: int,
    width: int,
    codes: int,
    chunk: Any,
) -> None:
    results = []
    for _ in range(16 if rows == 1 else 1):  # the error of a single row is chance
        head = make_head(width, codes, dtype, mlp=mlp, bias=codes != 40000)
        head = Head(*(None if t is None else t.requires_grad_(train_head) for t in head.tensors))
        hidden, upstream = torch.randn(rows, width, device="cuda").to(dtype), torch.randn(rows, device="cuda")
        labels = torch.randint(codes, (rows,), device="cuda")
        if rows > 1:
            labels[torch.rand(rows, device="cuda") < 0.3] = -100
        arguments = hidden, head, labels, upstream
        ours = run(lambda *a: token_logprobs(*a, chunk_rows=chunk, backend=backend), *arguments, dtype)
        usual, exact = run(eager, *arguments, dtype), run(token_logprobs_reference, *arguments, torch.float64)
        assert (ours[0][labels == -100] == 0).all()
        assert (ours[1][labels == -100] == 0).all()
        results.append(list(zip(ours, usual, exact, strict=True)))
    for draws in zip(*results, strict=True):
        mine, theirs, best = (torch.stack(tensors) for tensors in zip(*draws, strict=True))
        no_worse(mine, theirs, best.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_up_to_50_and_fp32_logits(no_worse: Any, dtype: torch.dtype) -> None:
    head, hidden = make_head(128, 4096, torch.float32, mlp=False, bias=True), torch.randn(300, 128, device="cuda")
    factor = 50 / head(hidden).abs().max()
    head, labels = Head(head.weight * factor, head.bias * factor).to(dtype), torch.randint(4096, (300,), device="cuda")
    arguments = hidden.to(dtype), head, labels, torch.randn(300, device="cuda")
    usual, exact = run(eager, *arguments, dtype), run(token_logprobs_reference, *arguments, torch.float64)
    ours = run(token_logprobs, *arguments, dtype)
    wide = run(lambda *a: token_logprobs(*a, logits_dtype="fp32"), *arguments, dtype)
    for mine, theirs, best in zip(ours, usual, exact, strict=True):
        no_worse(mine, theirs, best)
    assert (wide[0] - exact[0]).abs().max() < 0.2 * (ours[0] - exact[0]).abs().max()
    no_worse(wide[1], usual[1], exact[1])


def test_more_than_2_to_31_logits(no_worse: Any) -> None:
    rows, codes = 140_000, 16384
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of free GPU memory")
    head = make_head(64, codes, torch.bfloat16, mlp=False, bias=True)
    hidden, labels = torch.randn(rows, 64, device="cuda").bfloat16(), torch.randint(codes, (rows,), device="cuda")
    ours = token_logprobs(hidden, head, labels, chunk_rows=rows)
    last = slice(rows - 64, rows)
    exact = token_logprobs_reference(hidden[last], head, labels[last])
    no_worse(ours[last], eager(hidden[last], head, labels[last]), exact)


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


def test_a_stream_of_its_own_and_compiled() -> None:
    module = torch.nn.Linear(64, 16384, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    loss = OSPOLoss(OSPOLossConfig.preset("full"))
    hidden = torch.randn(6, 20, 64, device="cuda").bfloat16()
    labels = torch.randint(16384, (6, 20), device="cuda")
    labels[:, :8] = -100
    masks = torch.rand(4, 3, 4, device="cuda") < 0.4
    results = []
    stream = torch.cuda.Stream()
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x = hidden.clone().requires_grad_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = function(x, labels, module, object_masks=masks)
            output.loss.backward()
        torch.cuda.current_stream().wait_stream(stream)
        results.append((output.loss.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0])


def test_memory_of_16_pairs() -> None:
    """Half a gigabyte above the inputs, forward and backward, where the logits alone would be 604 MB."""
    if torch.cuda.mem_get_info()[0] < 4e9:
        pytest.skip("needs 4 GB of free GPU memory")
    head = make_head(4096, 16384, torch.bfloat16, mlp=True, bias=True)
    hidden = torch.randn(18432, 4096, device="cuda").bfloat16().requires_grad_()
    labels, peaks = torch.randint(16384, (18432,), device="cuda"), []
    for _ in range(2):  # the first one includes what cuBLAS and Triton set up
        hidden.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        token_logprobs(hidden, head, labels).sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 0.5e9

"""What a call costs beyond what runs: each operation at a tiny size, less its kernel called on prepared pointers.

`overhead_us` of a row is the median of a call less that of what has to run, both from turns that alternate. What has to
run is the compiled function on the addresses of tensors that are checked already, with its products and the tensors
that it returns; for operations without a kernel, the PyTorch operations of the formula; with gradients, the same in a
torch.autograd.Function, which takes 10 to 25 µs when it is empty.
"""

from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _measure import Timing, chosen, interleaved, row, show, write
from torch import Tensor

import ospo_fast
from ospo_fast.ops import _dispatch
from ospo_fast.ops.attention_columns import ColumnRequest

CALLS = 5  # in a turn: few, so that most turns end before another process gets the core
LIMIT_US = 15  # of the dispatch, on an idle machine

Variants = dict[str, Callable[[], object]]


def logprobs(head: torch.nn.Linear, labels: Tensor) -> dict[str, Variants]:
    """Cases of token_logprobs of one row, with the same products and kernel in the bare variants."""
    native, weight, codes = _dispatch.native(), head.weight.detach(), len(head.weight)
    hidden = torch.randn(1, weight.shape[1])
    leaf = hidden.clone().requires_grad_()
    every_row = torch.arange(1)
    bias_at, labels_at = head.bias.data_ptr(), labels.data_ptr()

    def run(x: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        z = F.linear(x, weight)
        logps, z_at = z.new_empty(1), z.data_ptr()
        out_at = z_at if gradient else 0
        native.token_logprobs(
            z_at, 0, bias_at, labels_at, 1.0, 0.0, 0, 0, 0, logps.data_ptr(), 0, 0, out_at, 0, 1, codes, 1
        )
        return logps, z

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            logps, z = run(x, True)
            ctx.save_for_backward(torch.mm(z, weight))
            return logps

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (dhidden,) = ctx.saved_tensors
            out = torch.empty_like(dhidden)
            rows_at = every_row.data_ptr()
            native.scale_rows(dhidden.data_ptr(), rows_at, grad.data_ptr(), out.data_ptr(), 0, *out.shape, 1)
            return out

    call: Callable[..., Tensor] = ospo_fast.token_logprobs
    bare: Callable[..., Tensor] = Bare.apply
    return {
        "token_logprobs, no_grad": {"call": lambda: call(hidden, head, labels), "bare": lambda: run(hidden, False)},
        "token_logprobs, forward": {"call": lambda: call(leaf, head, labels), "bare": lambda: bare(leaf)},
        "token_logprobs, forward and backward": {
            "call": lambda: call(leaf, head, labels).backward(),
            "bare": lambda: bare(leaf).backward(),
        },
    }


def maps_and_codes() -> dict[str, Variants]:
    """Cases of the operations on maps and logits, which have no gradient."""
    native = _dispatch.native()
    maps, logits, seeds = torch.rand(1, 1, 4, 4), torch.randn(1, 9), torch.tensor([1])
    q, lse, columns = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4), torch.zeros(1, 1, 1, dtype=torch.long)
    maps_at, logits_at, seeds_at = maps.data_ptr(), logits.data_ptr(), seeds.data_ptr()
    step = torch.zeros(1, dtype=torch.long)
    step_at = step.data_ptr()
    bounds = [torch.tensor([bound]) for bound in (0, 2, 0, 4)]
    request = [torch.ones(1, 1), columns, *bounds]

    def otsu() -> Tensor:
        out = maps.new_empty(1)
        native.otsu_threshold(maps_at, out.data_ptr(), 1, 16, 256, 1)
        return out

    def weights() -> Tensor:
        out = maps.new_empty(1, 16)
        native.token_weights(maps_at, out.data_ptr(), 1, 4, 4, 1.0, 1.0, 5, 1.0, 1)
        return out

    def masks() -> list[Tensor]:
        out = [torch.empty_like(maps), maps.new_empty(1, 1)]
        out += [maps.new_empty(shape, dtype=torch.uint8) for shape in ((1, 1, 4, 4), (1, 4, 4))]
        native.object_masks(maps_at, 0, *(t.data_ptr() for t in out), 1, 1, 16, 0.8, 256, 1)
        return out

    def sample() -> Tensor:
        codes, errors = torch.empty_like(seeds), torch.full_like(seeds, -1)
        native.sample_codes(
            logits_at, 0, seeds_at, step_at, 0, 0, 0, codes.data_ptr(), errors.data_ptr(), 1, 9, 1.0, 1.0, 0, 1.0, 0, 1
        )
        return codes

    def attention() -> Tensor:
        out = q.new_zeros(1, 1, 2)
        tensors = [t.data_ptr() for t in (q, q, lse, *request, out)]
        strides = [stride for t in (q, q, lse) for stride in t.stride()[:3]]
        native.attention_columns(tensors, strides, [1, 1, 1, 1, 1, 16, 2, 4], 0.25, True, 1)
        return out

    of = ospo_fast
    prepared = ColumnRequest.from_args(columns, 1, 4, rows=(0, 2))
    return {
        "otsu_threshold": {"call": lambda: of.otsu_threshold(maps), "bare": otsu},
        "token_weights": {"call": lambda: of.token_weights(maps[0]), "bare": weights},
        "object_masks": {"call": lambda: of.object_masks(maps), "bare": masks},
        "sample_codes": {"call": lambda: of.sample_codes(logits, seeds=seeds, step=step), "bare": sample},
        "attention_columns": {
            "call": lambda: of.attention_columns(q, q, columns, rows=(0, 2), lse=lse),
            "bare": attention,
        },
        "ColumnRequest.run": {"call": lambda: prepared.run(q, q, lse=lse), "bare": attention},
    }


def losses() -> dict[str, Variants]:
    """Cases of the operations on numbers of sequences, which are PyTorch operations."""
    logps, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    chosen, rejected = torch.randn(2, 2)
    one = torch.zeros((), dtype=torch.float64)

    def mean() -> Tensor:
        w = mask.double()
        return ((w * torch.where(mask, logps.double(), one)).sum(1) / w.sum(1).clamp(min=1)).float()

    def preference() -> list[Tensor]:
        a, b = chosen.double(), rejected.double()
        simpo = -F.logsigmoid(5.0 * (a - b - 0.5))
        a, b = 5.0 * a.detach(), 5.0 * b.detach()
        return [t.float() for t in (simpo, a, b, a > b, a - b)]

    call = partial(ospo_fast.preference_loss, chosen, rejected, beta=5.0, gamma_beta_ratio=0.5)
    return {
        "sequence_logprobs": {"call": lambda: ospo_fast.sequence_logprobs(logps, mask), "bare": mean},
        "preference_loss": {"call": call, "bare": preference},
    }


def repeated(run: Callable[[], object]) -> None:
    for _ in range(CALLS):
        run()


def run(out: Path, quick: bool) -> None:
    if torch.cuda.is_available():
        print("dispatch is measured on CPU tensors, also where there is a GPU")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny sizes
    head = torch.nn.Linear(8, 16).requires_grad_(False)
    rows = []
    try:
        for op, variants in {**logprobs(head, torch.tensor([1])), **maps_and_codes(), **losses()}.items():
            if not chosen(op):
                continue
            turns = {name: partial(repeated, variant) for name, variant in variants.items()}
            times = interleaved(turns, tuple, seconds=0.01 if quick else 1.0)
            times = {name: Timing(*(ms / CALLS for ms in astuple(t)[:3]), t.repeats) for name, t in times.items()}
            overhead = round(1e3 * (times["call"].median_ms - times["bare"].median_ms), 2)
            print(f"{op}: {overhead} µs beyond what runs")
            for name, time in times.items():
                more = {"overhead_us": overhead, "limit_us": LIMIT_US} if name == "call" else {}
                rows.append(row(op, name, {"rows": 1}, "fp32", time, **more))
            write(rows, out, "dispatch")
    finally:
        torch.set_num_threads(threads)
    show(rows)

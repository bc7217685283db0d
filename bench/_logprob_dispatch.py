"""The time of a call of token_logprobs with one row beyond that of its matrix products, on the host."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _logprob_variants import eager
from _measure import dtype_name, row, timing_of

import ospo_fast

SIZES = {"N": 1, "D": 16, "V": 64, "linear": 1, "dispatch": 1}
WARMUP = 2  # turns


def dispatch(where: str, dtype: torch.dtype, quick: bool) -> list[dict]:
    """Time calls with a frozen linear head, as a module and as a `Head`, and the same calls of eager.

    Times are of bursts of calls, the variants in turns. `overhead_us` is the median over the turns of the difference
    to the burst of bare products in the same turn. One thread: threads do not help one row.
    """
    runs, products = _runs(where, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns, calls = (3, 4) if quick else (100, 100)
        times = _bursts(runs, turns, calls, where)
        rows = []
        for name, own in times.items():
            more: dict[str, Any] = {"calls": calls}
            if name in products:
                beyond = (ms - base for ms, base in zip(own, times[products[name]], strict=True))
                more |= {"overhead_us": round(statistics.median(beyond) * 1e3, 2), "beyond": products[name]}
            rows.append(row("token_logprobs", name, SIZES, dtype_name(dtype), timing_of(own), **more))
        return rows
    finally:
        torch.set_num_threads(threads)


def _runs(where: str, dtype: torch.dtype) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Return the calls by name, and which products each of them computes."""
    module = torch.nn.Linear(SIZES["D"], SIZES["V"], bias=False, device=where, dtype=dtype).requires_grad_(False)
    weight, head = module.weight, ospo_fast.Head(module.weight)
    hidden = torch.randn(1, SIZES["D"], device=where).to(dtype)
    x = hidden.clone().requires_grad_()
    label, one = torch.tensor([3], device=where), torch.ones(1, device=where)
    runs: dict[str, Callable[[], object]] = {
        "one product": lambda: torch.mm(hidden, weight.t()),
        "two products": lambda: torch.mm(torch.mm(hidden, weight.t()), weight),
    }
    products = {}
    functions = {"module": (ospo_fast.token_logprobs, module), "Head": (ospo_fast.token_logprobs, head)}
    for name, (function, given) in (functions | {"eager": (eager, module)}).items():

        def forward(function: Any = function, given: Any = given) -> torch.Tensor:
            return function(x, given, label)

        def forward_and_backward(forward: Any = forward) -> object:
            return torch.autograd.grad(forward(), x, one)

        runs |= {f"no grad, {name}": forward, f"forward, {name}": forward}
        runs[f"forward and backward, {name}"] = forward_and_backward
        # With gradients, the forward of this package computes ∂ℓ/∂hidden.
        products[f"no grad, {name}"] = "one product"
        products[f"forward, {name}"] = "one product" if name == "eager" else "two products"
        products[f"forward and backward, {name}"] = "two products"
    return runs, products


def _bursts(runs: dict[str, Callable[[], object]], turns: int, calls: int, where: str) -> dict[str, list[float]]:
    """Return the milliseconds of a call in each turn. Only runs whose names begin with "forward" have gradients."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARMUP + turns):
        for name, run in runs.items():
            if where == "cuda":
                torch.cuda.synchronize()
            with torch.set_grad_enabled(name.startswith("forward")):
                begin = time.perf_counter()
                for _ in range(calls):
                    run()
                elapsed = time.perf_counter() - begin
            if turn >= WARMUP:
                times[name].append(elapsed / calls * 1e3)
    return times

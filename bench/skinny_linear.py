"""skinny_linear: products of few rows with the norm, gate and sum around them, against cuBLAS and one kernel for each.

`layer` is all four products of a layer one after the other, without attention. Weights come from memory: the L2 cache
is emptied before every run, and `share` is their bytes over time and the bandwidth of a copy. The constants of the
kernel are swept. Needs a GPU.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _measure import ceilings, chosen, dtype_name, interleaved, row, show, write
from torch import Tensor

from ospo_fast.experimental.skinny_linear import skinny_linear
from ospo_fast.ops import _dispatch
from ospo_fast.ops.rms_norm import add_rms_norm
from ospo_fast.ops.silu_mul import silu_mul

# hidden, intermediate: Janus-Pro-7B and 1B
SIZES = [(4096, 11008), (2048, 5632)]
ROWS = (2, 8, 16)
SWEEP = [(32, 256, 5, 4), (16, 256, 6, 4), (32, 128, 6, 4), (64, 128, 5, 4), (32, 256, 4, 8)]
NAMES = ("COLUMNS", "DEPTH", "STAGES", "WARPS")  # of the Triton kernel
Layer = dict[str, Tensor]


def single(kind: str, x: Tensor, stream: Tensor, w: Layer) -> None:
    """One kernel for each part, as in a decoder without `skinny_linear`."""
    if kind in ("qkv", "layer"):
        h = F.linear(add_rms_norm(None, stream, w["norm"], 1e-6), w["qkv"])
    if kind in ("out", "layer"):
        delta = F.linear(h[:, : len(w["out"])].contiguous() if kind == "layer" else x, w["out"])
    if kind in ("gate_up", "layer"):
        # The sum is fused with the norm behind it; "out" and "down" by themselves run without it.
        h = add_rms_norm(delta if kind == "layer" else None, stream, w["norm"], 1e-6)
        h = silu_mul(F.linear(h, w["gate_up"]))
    if kind in ("down", "layer"):
        F.linear(h if kind == "layer" else w["gated"][: len(x)], w["down"])


def fused(kind: str, x: Tensor, stream: Tensor, w: Layer, *, backend: str = "auto") -> None:
    run = partial(skinny_linear, backend=backend)
    if kind in ("qkv", "layer"):
        h = run(stream, w["qkv"], norm=w["norm"], eps=1e-6)
    if kind in ("out", "layer"):
        run(h[:, : len(w["out"])].contiguous() if kind == "layer" else x, w["out"], add=True, out=stream)
    if kind in ("gate_up", "layer"):
        h = run(stream, w["gate_up"], norm=w["norm"], eps=1e-6, gated=True)
    if kind in ("down", "layer"):
        run(h if kind == "layer" else w["gated"][: len(x)], w["down"], add=True, out=stream)


def tuned(constants: tuple[int, ...], run: Callable[..., None]) -> Callable[..., None]:
    """Run with other constants of the kernel."""
    from ospo_fast.experimental import _skinny_linear_kernel as kernels

    def changed(*arguments: Any) -> None:
        before = [getattr(kernels, name) for name in NAMES]
        try:
            for name, value in zip(NAMES, constants, strict=True):
                setattr(kernels, name, value)
            run(*arguments)
        finally:
            for name, value in zip(NAMES, before, strict=True):
                setattr(kernels, name, value)

    return changed


def check(rows: int, w: Layer, make: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """The error against float64 is at most twice that of single modules."""
    x, stream = make()
    found = []
    for kind, backend in ((torch.float64, "torch"), (x.dtype, "torch"), (x.dtype, "auto")):
        given = {"norm": w["norm"].to(kind), "eps": 1e-6, "gated": True, "backend": backend}
        found.append(skinny_linear(stream.to(kind), w["gate_up"].to(kind), **given).double())
    exact, plain, mine = found
    bound = 2 * (plain - exact).abs().max() + torch.finfo(x.dtype).eps * exact.abs().max()
    assert (mine - exact).abs().max() <= bound, rows


def run(out: Path, quick: bool) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if device == "cpu" and not quick:
        print("needs a GPU: not measured")
        return
    rows = []
    for hidden, inner in [(64, 96)] if quick else SIZES:
        shapes = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden), "gate_up": (2 * inner, hidden)}
        shapes |= {"down": (hidden, inner), "gated": (max(ROWS), inner)}
        w = {name: (torch.randn(shape, device=device) / shape[1] ** 0.5).to(dtype) for name, shape in shapes.items()}
        w["norm"] = torch.randn(hidden, device=device).to(dtype)
        sizes = {name: w[name].numel() * w[name].element_size() for name in ("qkv", "out", "gate_up", "down")}
        sizes["layer"] = sum(sizes.values())
        limits = ceilings()
        for M in ROWS[:1] if quick else ROWS:

            def make(M: int = M, hidden: int = hidden) -> tuple[Tensor, Tensor]:
                x, stream = torch.randn(2, M, hidden, device=device).to(dtype)
                return x.contiguous(), stream.contiguous()

            check(M, w, make)
            for kind, size in sizes.items():
                if not chosen(f"{hidden} hidden, {M} rows, {kind}"):
                    continue
                variants = {"single kernels": partial(single, kind)}
                for name, available, _ in _dispatch.backends(device)["skinny_linear"]:
                    if available:
                        variants[name] = partial(fused, kind, backend=name)
                if "triton" in variants and not quick:
                    variants |= {
                        "triton, {} columns, {} deep, {} stages, {} warps".format(*constants): tuned(
                            constants, variants["triton"]
                        )
                        for constants in SWEEP
                    }
                times = interleaved(
                    variants, lambda w=w, make=make: (*make(), w), seconds=0.01 if quick else 0.1, cold=True
                )
                for name, time in times.items():
                    depth = inner if kind == "down" else hidden
                    shape = {"rows": M, "depth": depth, "columns": size // depth // w["qkv"].element_size()}
                    speed = size / time.median_ms / 1e6
                    metrics = {"part": kind, "gb_s": round(speed, 2)}
                    metrics |= limits.metrics(limits.floor_ms(bytes_moved=size), time)
                    rows.append(row("skinny_linear", name, shape, dtype_name(dtype), time, **metrics))
                write(rows, out, "skinny_linear")
    show(rows)

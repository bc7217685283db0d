"""Compiles every Triton kernel as the package launches it, without a GPU:

    PYTHONPATH=.:bench python tests/kernels/launches.py 80 90 100

A stand-in for Triton's driver takes the place of a card under the real Python wrappers, which are given tensors without
memory (device "meta") of the sizes of Janus-Pro and of the benchmarks' sweeps. So types, constants, alignment and sizes
that Triton specialises on are those of real launches. Prints for every kernel its registers, spills, barriers in loops,
shared memory against the limit of the card, and divisions and roots that are approximate.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import ospo_fast.kernels
from ospo_fast.kernels import attention_columns, gelu, scale_rows
from ospo_fast.ops import _dispatch
from ospo_fast.ops.decode_attention import decode_attention
from ospo_fast.ops.rms_norm import add_rms_norm
from ospo_fast.ops.silu_mul import silu_mul
from ospo_fast.ops.skinny_linear import skinny_linear

# Bytes of shared memory that a block may have; by CUDA's programming guide, table of compute capabilities.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
MULTIPROCESSORS = 132  # of an H100 or H200: what decides how heads are split
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
HALF, WIDE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Launch:
    """A kernel that was compiled because it was launched."""

    kernel: str
    arch: int
    types: str  # of its arguments, with what Triton knows of each: D is divisible by 16
    registers: int
    spills: int  # bytes of local memory
    shared: int
    ptx: str

    def __str__(self) -> str:
        used = f"{self.registers} registers, {self.spills} bytes of spills, {self.shared} of {SHARED[self.arch]} shared"
        return f"{self.kernel} sm_{self.arch} ({self.types}): {used}{barriers(self.ptx)}{approximations(self.ptx)}"


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes spilled to local memory, of the one function in the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def approximations(ptx: str) -> str:
    """Divisions and roots that are not rounded as IEEE 754 rounds them."""
    found = sorted(set(re.findall(r"\b(?:div|sqrt|rsqrt|rcp)\.(?:full|approx)[.\w]*", ptx)))
    return f", approximate {' '.join(found)}" if found else ""


def barriers(ptx: str) -> str:
    """Barriers of a block between a label and a branch back to it: each loop waits for all its threads there."""
    labels = {found[1]: found.start() for found in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    back = [(labels[found[1]], found.start()) for found in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx)]
    waits = [found.start() for found in re.finditer(r"\b(?:bar|barrier)\.(?:cta\.)?sync\b", ptx)]
    count = sum(any(first < wait < last for first, last in back) for wait in waits)
    return f", {count} barriers in loops" if count else ""


class Card:
    """What Triton asks of a driver, for a card that is not there. Its ordinal is its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, 0, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": SHARED[arch]},
        )

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_: None

    def launched(self) -> list[Launch]:
        """Every kernel that was launched, compiled as it was."""
        found = []
        for info in pkgutil.iter_modules(ospo_fast.kernels.__path__):
            module = importlib.import_module(f"ospo_fast.kernels.{info.name}")
            for kernel in vars(module).values():
                # Functions that kernels call have no cache.
                if isinstance(kernel, triton.JITFunction) and self.arch in kernel.device_caches:
                    found += [self._launch(compiled) for compiled in kernel.device_caches[self.arch][0].values()]
        return found

    def _launch(self, compiled: Any) -> Launch:
        source = compiled.src
        divisible = {path[0] for path, given in source.attrs.items() if ["tt.divisibility", 16] in given}
        kinds = enumerate(source.signature.values())
        types = [f"{kind}{':D' * (i in divisible)}" for i, kind in kinds if kind != "constexpr"]
        names = [source.fn.arg_names[path[0]] for path in source.constants]
        constants = [f"{name}={value}" for name, value in zip(names, source.constants.values(), strict=True)]
        shown = " ".join([*types, *constants])
        used = resources(compiled.asm["cubin"])
        return Launch(compiled.name, self.arch, shown, *used, compiled.metadata.shared, compiled.asm["ptx"])


@contextmanager
def standing_in(card: Card) -> Iterator[None]:
    """The card is Triton's, and tensors without memory are those that its kernels take."""
    before, kernels, count = driver._active, dict(_dispatch._KERNELS), attention_columns.multiprocessors
    attention_columns.multiprocessors = lambda _: MULTIPROCESSORS
    driver.set_active(card)  # type: ignore[arg-type]
    for op, backends in kernels.items():
        if "triton" in backends:
            _dispatch._KERNELS[op] = {"triton": (True, "meta")}
    try:
        yield
    finally:
        driver._active, attention_columns.multiprocessors = before, count
        _dispatch._KERNELS.update(kernels)


# ---------------------------------------------------------------- what is launched


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def decode(
    rows: int, heads: int, kv: int, width: int, length: int, dtype: torch.dtype, *, shared: bool = False
) -> None:
    """A step of attention, as the engine asks for it."""
    cache, angles = empty(2, rows, kv, length, width, dtype=dtype), empty(2, length, width, dtype=dtype)
    index = empty(2, rows, dtype=torch.int64)
    decode_attention(
        empty(rows, (heads + 2 * kv) * width, dtype=dtype), *angles, *cache, *index,
        heads=heads, scale=width**-0.5, shared_slots=shared, backend="triton",
    )  # fmt: skip


def steps() -> None:
    """Decoder steps of Janus-Pro-7B and 1B: 64, 96 and 1 images with guidance, windows of drafts; other dtypes."""
    for hidden, inner, heads in ((4096, 11008, 32), (2048, 5632, 16)):
        for rows in (192, 2, 3):  # of an odd number, the second index does not begin at a multiple of 16 bytes
            stream, norm = empty(rows, hidden), empty(hidden)
            add_rms_norm(None, stream, norm, 1e-6, backend="triton")
            add_rms_norm(empty(rows, hidden), stream, norm, 1e-6, backend="triton")
            silu_mul(empty(rows, 2 * inner), out=empty(rows, inner), backend="triton")
            decode(rows, heads, heads, 128, 704, HALF)
        decode(16, heads, heads, 128, 704, HALF, shared=True)
    for dtype, heads, kv, width in (
        (WIDE, 16, 16, 128),
        (torch.float16, 32, 8, 64),
        (WIDE, 4, 4, 16),
        (WIDE, 3, 1, 48),
    ):
        for shared in (False, True):
            decode(8, heads, kv, width, 210, dtype, shared=shared)
        add_rms_norm(
            empty(8, 67, dtype=dtype), empty(8, 67, dtype=dtype), empty(67, dtype=dtype), 1e-6, backend="triton"
        )
        silu_mul(empty(8, 2 * 67, dtype=dtype), out=empty(8, 67, dtype=dtype), backend="triton")


def sweep(bench: Any, names: tuple[str, ...], kernels: Any, run: Callable[[], None]) -> None:
    """The same with every setting that a benchmark tries."""
    before = [getattr(kernels, name) for name in names]
    try:
        for constants in bench.SWEEP:
            for name, value in zip(names, constants, strict=True):
                setattr(kernels, name, value)
            run()
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(kernels, name, value)


def skinny(hidden: int, inner: int, heads_width: int | None = None) -> None:
    """The four products of a layer, as `InferenceDecoder` asks for them."""
    stream, norm, width = empty(2, hidden), {"norm": empty(hidden), "eps": 1e-6}, heads_width or hidden
    skinny_linear(stream, empty(3 * width, hidden), **norm, out=empty(2, 3 * width), backend="triton")
    skinny_linear(empty(2, width), empty(hidden, width), add=True, out=stream, backend="triton")
    skinny_linear(stream, empty(2 * inner, hidden), **norm, gated=True, out=empty(2, inner), backend="triton")
    skinny_linear(empty(2, inner), empty(hidden, inner), add=True, out=stream, backend="triton")


def skinny_products() -> None:
    """Those of Janus-Pro, and of sizes that are no multiples of a block; a single column and depth."""
    for hidden, inner in ((4096, 11008), (2048, 5632), (72, 100)):
        skinny(hidden, inner)
    odd = {"norm": empty(1, dtype=torch.float16), "eps": 1e-6, "gated": True, "add": True}
    one = empty(3, 1, dtype=torch.float16)
    skinny_linear(one, empty(2, 1, dtype=torch.float16), **odd, out=one, backend="triton")


def columns(
    B: int, heads: int, kv: int, S: int, D: int, dtype: torch.dtype, *, objects: int = 2, each: int = 2,
    lse: bool = True, causal: bool = True,
) -> None:  # fmt: skip
    """Maps of one layer, as a capture asks for them: q and k as a decoder lays them out."""
    q, k = (empty(B, S, count, D, dtype=dtype).transpose(1, 2) for count in (heads, kv))
    table, bounds = empty(B, objects, each, dtype=torch.int64), tuple(empty(4, B, dtype=torch.int64))
    norm = empty(B, heads, S, dtype=WIDE) if lse else None
    for accumulate in (True, False):
        attention_columns.attention_columns(
            empty(B, objects, S - 24, dtype=WIDE), q, k, table, bounds, empty(B, objects, dtype=WIDE), norm,
            D**-0.5, causal, 0.5, accumulate,
        )  # fmt: skip


def captures() -> None:
    """Janus-Pro-7B with 1 and 16 sequences, its heads in parts; widths and dtypes with the fewest registers left."""
    for lse in (True, False):
        for B, heads in ((1, 32), (4, 8), (16, 32), (32, 16), (64, 1)):  # the last: each head by itself
            columns(B, heads, heads, 600, 128, HALF, lse=lse)
        columns(16, 32, 32, 600, 128, HALF, lse=lse, objects=8, each=4)  # more columns than 16
        columns(2, 8, 8, 600, 128, HALF, lse=lse, causal=False)
        for dtype, width in ((torch.float16, 256), (WIDE, 64), (WIDE, 128), (WIDE, 256), (HALF, 80), (WIDE, 16)):
            for B in (1, 64):
                columns(B, 8, 2, 600, width, dtype, lse=lse, objects=8)


def heads_of_codes() -> None:
    """GELU of Janus' head and its gradient, and the rows' scales, in chunks of 7296 rows."""
    for dtype in (HALF, torch.float16, WIDE):
        for rows, width in ((7296, 4096), (7296, 2048), (40, 67)):
            x, bias = empty(rows, width, dtype=dtype), empty(width, dtype=dtype)
            for given in (bias, None):
                gelu.gelu(x, given, empty(rows, width, dtype=dtype))
                gelu.gelu_backward(empty(rows, width, dtype=dtype), x, given)
            places, scales = empty(rows, dtype=torch.int64), empty(rows, dtype=WIDE)
            scale_rows.scale_rows(x, places, scales, empty(rows, width, dtype=dtype))


def everything() -> None:
    """All that the package and the benchmarks launch."""
    import decode_attention as decode_bench
    import skinny_linear as skinny_bench

    from ospo_fast.kernels import decode_attention as decode_kernels
    from ospo_fast.kernels import skinny_linear as skinny_kernels

    steps()
    skinny_products()
    captures()
    heads_of_codes()
    for rows, heads in ((128, 32), (128, 16), (2, 32)):
        names = ("SPLIT", "BLOCK", "WARPS")
        sweep(decode_bench, names, decode_kernels, partial(decode, rows, heads, heads, 128, 640, HALF))
    for hidden, inner in skinny_bench.SIZES:
        sweep(skinny_bench, skinny_bench.NAMES, skinny_kernels, partial(skinny, hidden, inner))


def main(archs: list[int]) -> int:
    for arch in archs:
        card = Card(arch)
        with standing_in(card):
            everything()
        launches = card.launched()
        print("\n".join(map(str, launches)))
        most = max(launches, key=lambda launch: launch.shared)
        print(
            f"sm_{arch}: {len(launches)} kernels, {sum(launch.spills > 0 for launch in launches)} with spills; most "
            f"shared memory {most.shared} of {SHARED[arch]} bytes ({most.kernel})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main([int(arch) for arch in sys.argv[1:]]))

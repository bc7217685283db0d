"""Compile every Triton kernel as the package launches it, without a GPU:

    PYTHONPATH=.:bench python tests/kernels/launches.py 80 90 100

A fake driver and tensors without memory (device "meta"), with the sizes of Janus-Pro and of the benchmarks, let the
Python wrappers of the kernels run. So the types, constants, alignments and sizes that Triton specializes on are those
of real launches. For every kernel this prints registers, spills, barriers in loops, shared memory against the limit of
the device, and approximate divisions and roots.
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

import ospo_fast.kernels
from ospo_fast.experimental import _skinny_linear_kernel
from ospo_fast.experimental.skinny_linear import skinny_linear
from ospo_fast.kernels import attention_columns, gelu, scale_rows
from ospo_fast.kernels import decode_attention as decode_kernels
from ospo_fast.ops import _dispatch
from ospo_fast.ops.decode_attention import decode_attention
from ospo_fast.ops.rms_norm import add_rms_norm
from ospo_fast.ops.silu_mul import silu_mul

# Shared memory per block in bytes: CUDA programming guide, table of compute capabilities.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
MULTIPROCESSORS = 132  # of an H100 or H200; they decide how heads are split
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
HALF, WIDE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Launch:
    """A kernel that a launch has compiled."""

    kernel: str
    arch: int
    types: str  # of its arguments, D: divisible by 16, and its constants
    registers: int
    spills: int  # bytes of local memory
    shared: int
    ptx: str

    def __str__(self) -> str:
        used = f"{self.registers} registers, {self.spills} bytes of spills, {self.shared} of {SHARED[self.arch]} shared"
        return f"{self.kernel} sm_{self.arch} ({self.types}): {used}{barriers(self.ptx)}{approximations(self.ptx)}"


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes spilled to local memory, of the function in the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def approximations(ptx: str) -> str:
    """Divisions and roots that are not rounded by IEEE 754."""
    found = sorted(set(re.findall(r"\b(?:div|sqrt|rsqrt|rcp)\.(?:full|approx)[.\w]*", ptx)))
    return f", approximate {' '.join(found)}" if found else ""


def barriers(ptx: str) -> str:
    """Barriers between a label and a branch back to it, where each iteration synchronizes the block."""
    labels = {found[1]: found.start() for found in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    back = [(labels[found[1]], found.start()) for found in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx)]
    waits = [found.start() for found in re.finditer(r"\b(?:bar|barrier)\.(?:cta\.)?sync\b", ptx)]
    count = sum(any(first < wait < last for first, last in back) for wait in waits)
    return f", {count} barriers in loops" if count else ""


class FakeDriver:
    """Triton's driver for a device that does not exist. Its ordinal is its architecture."""

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

    def launches(self) -> list[Launch]:
        """Every kernel that was launched."""
        names = [f"ospo_fast.kernels.{info.name}" for info in pkgutil.iter_modules(ospo_fast.kernels.__path__)]
        modules = [*map(importlib.import_module, names), _skinny_linear_kernel]
        kernels = [kernel for module in modules for kernel in vars(module).values()]
        # Functions that kernels call have no cache.
        launched = [k for k in kernels if isinstance(k, triton.JITFunction) and self.arch in k.device_caches]
        return [self._launch(compiled) for k in launched for compiled in k.device_caches[self.arch][0].values()]

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
def active(fake: FakeDriver) -> Iterator[None]:
    """Make the driver Triton's, and let Triton kernels take tensors without memory."""
    driver_before, kernels, count = driver._active, dict(_dispatch._KERNELS), attention_columns.multiprocessors
    attention_columns.multiprocessors = lambda _: MULTIPROCESSORS
    driver.set_active(fake)  # type: ignore[arg-type]
    _dispatch._KERNELS.update({op: {"triton": "meta"} for op, backends in kernels.items() if "triton" in backends})
    try:
        yield
    finally:
        driver._active, attention_columns.multiprocessors = driver_before, count
        _dispatch._KERNELS.update(kernels)


# ---------------------------------------------------------------- the launches


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def decode(
    rows: int, heads: int, kv: int, width: int, length: int, dtype: torch.dtype, *, shared: bool = False
) -> None:
    """Attention of a decoder step, as the engine calls it."""
    cache, angles = empty(2, rows, kv, length, width, dtype=dtype), empty(2, length, width, dtype=dtype)
    index = empty(2, rows, dtype=torch.int64)
    decode_attention(
        empty(rows, (heads + 2 * kv) * width, dtype=dtype), *angles, *cache, *index,
        heads=heads, scale=width**-0.5, shared_slots=shared, backend="triton",
    )  # fmt: skip


def norm_and_gate(rows: int, hidden: int, inner: int, dtype: torch.dtype = HALF) -> None:
    residual, norm = empty(rows, hidden, dtype=dtype), empty(hidden, dtype=dtype)
    for delta in (None, empty(rows, hidden, dtype=dtype)):
        add_rms_norm(delta, residual, norm, 1e-6, backend="triton")
    silu_mul(empty(rows, 2 * inner, dtype=dtype), out=empty(rows, inner, dtype=dtype), backend="triton")


def decoder_steps() -> None:
    """Decoder steps of Janus-Pro-7B and 1B, windows that share slots, other dtypes and head sizes."""
    for hidden, inner, heads in ((4096, 11008, 32), (2048, 5632, 16)):
        for rows in (192, 3):  # with an odd number, the second index does not start at a multiple of 16 bytes
            norm_and_gate(rows, hidden, inner)
            decode(rows, heads, heads, 128, 704, HALF)
        decode(16, heads, heads, 128, 704, HALF, shared=True)
    for dtype, heads, kv, width in (
        (torch.float16, 32, 8, 64),
        (WIDE, 16, 16, 128),
        (WIDE, 3, 1, 48),
        (WIDE, 4, 4, 16),
    ):
        decode(8, heads, kv, width, 210, dtype)
        norm_and_gate(8, 67, 67, dtype)


def skinny(hidden: int, inner: int) -> None:
    """The four products of a decoder layer."""
    stream, norm = empty(2, hidden), {"norm": empty(hidden), "eps": 1e-6}
    skinny_linear(stream, empty(3 * hidden, hidden), **norm, out=empty(2, 3 * hidden), backend="triton")
    skinny_linear(empty(2, hidden), empty(hidden, hidden), add=True, out=stream, backend="triton")
    skinny_linear(stream, empty(2 * inner, hidden), **norm, gated=True, out=empty(2, inner), backend="triton")
    skinny_linear(empty(2, inner), empty(hidden, inner), add=True, out=stream, backend="triton")


def skinny_products() -> None:
    """Products of Janus-Pro, of sizes that are no multiples of a block, and of a single column and depth."""
    for hidden, inner in ((4096, 11008), (2048, 5632), (72, 100)):
        skinny(hidden, inner)
    odd = {"norm": empty(1, dtype=torch.float16), "eps": 1e-6, "gated": True, "add": True}
    one = empty(3, 1, dtype=torch.float16)
    skinny_linear(one, empty(2, 1, dtype=torch.float16), **odd, out=one, backend="triton")


def columns(
    B: int, heads: int, kv: int, S: int, D: int, dtype: torch.dtype, *, objects: int = 2, each: int = 2,
    causal: bool = True,
) -> None:  # fmt: skip
    """Maps of one layer, as a capture calls for them: q and k in the layout of a decoder."""
    q, k = (empty(B, S, count, D, dtype=dtype).transpose(1, 2) for count in (heads, kv))
    table, bounds = empty(B, objects, each, dtype=torch.int64), tuple(empty(4, B, dtype=torch.int64))
    share, out = empty(B, objects, dtype=WIDE), empty(B, objects, S - 24, dtype=WIDE)
    for lse in (empty(B, heads, S, dtype=WIDE), None):
        attention_columns.attention_columns(
            out, q, k, table, bounds, share, lse, D**-0.5, causal, 0.5, True
        )  # fmt: skip


def captures() -> None:
    """Janus-Pro-7B with 1 and 16 sequences, its heads in parts; widths and dtypes with the fewest registers left."""
    for B, heads in ((1, 32), (4, 8), (16, 32), (32, 16), (64, 1)):  # the last: each head by itself
        columns(B, heads, heads, 600, 128, HALF)
    columns(16, 32, 32, 600, 128, HALF, objects=8, each=4)  # more than 16 columns
    columns(2, 8, 8, 600, 128, HALF, causal=False)
    for dtype, width in ((torch.float16, 256), (WIDE, 256), (HALF, 80), (WIDE, 16)):
        for B in (1, 64):
            columns(B, 8, 2, 600, width, dtype, objects=8)


def head_chunks() -> None:
    """GELU of Janus' head, its gradient and the row scales, in chunks of 7296 rows; an odd width."""
    for dtype, rows, width in ((HALF, 7296, 4096), (HALF, 40, 67), (torch.float16, 7296, 4096), (WIDE, 7296, 4096)):
        x, other = empty(2, rows, width, dtype=dtype)
        bias = None if width == 67 else empty(width, dtype=dtype)
        gelu.gelu(x, bias, other)
        gelu.gelu_backward(other, x, bias)
        scale_rows.scale_rows(x, empty(rows, dtype=torch.int64), empty(rows, dtype=WIDE), other)


def sweep(settings: list[tuple[int, ...]], names: tuple[str, ...], kernels: Any, run: Callable[[], None]) -> None:
    """Run with every setting of the constants of a module that a benchmark tries."""
    before = [getattr(kernels, name) for name in names]
    try:
        for values in settings:
            for name, value in zip(names, values, strict=True):
                setattr(kernels, name, value)
            run()
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(kernels, name, value)


def everything() -> None:
    """All launches of core."""
    decoder_steps()
    captures()
    head_chunks()


def experiments() -> None:
    """All launches of experimental kernels, and of the benchmarks that tune kernels."""
    import decode_attention as decode_bench
    import skinny_linear as skinny_bench

    skinny_products()
    sweep(decode_bench.SWEEP, ("SPLIT", "BLOCK", "WARPS"), decode_kernels, lambda: decode(2, 32, 32, 128, 640, HALF))
    sweep(skinny_bench.SWEEP, skinny_bench.NAMES, _skinny_linear_kernel, lambda: skinny(*skinny_bench.SIZES[0]))


def check_limit() -> None:
    """The fake driver refuses a kernel that needs more shared memory than a block of sm_120 has."""
    with active(FakeDriver(120)):
        try:
            sweep([(64, 256, 5)], ("COLUMNS", "DEPTH", "STAGES"), _skinny_linear_kernel, lambda: skinny(4096, 11008))
        except OutOfResources as error:
            if "Hardware limit: 101376" in str(error):
                return
    raise AssertionError("a kernel with too much shared memory was accepted")


def check_reuse() -> None:
    """Numbers of sequences, tokens, objects and columns compile nothing again."""
    fake = FakeDriver(90)
    with active(fake):
        columns(16, 8, 8, 600, 16, WIDE)
        before = len(fake.launches())
        columns(15, 8, 8, 619, 16, WIDE, objects=3, each=1)
    if len(fake.launches()) != before:
        raise AssertionError(f"{len(fake.launches())} kernels in place of {before} for another batch")


def main(archs: list[int]) -> int:
    for arch in archs:
        fake = FakeDriver(arch)
        with active(fake):
            everything()
            if arch == 90:  # H100 and H200, where benchmarks run
                experiments()
        launches = fake.launches()
        print("\n".join(map(str, launches)))
        largest = max(launches, key=lambda launch: launch.shared)
        print(
            f"sm_{arch}: {len(launches)} kernels, {sum(launch.spills > 0 for launch in launches)} with spills; largest "
            f"shared memory {largest.shared} of {SHARED[arch]} bytes ({largest.kernel})"
        )
    if 90 in archs:
        check_limit()
        check_reuse()
    return 0


if __name__ == "__main__":
    sys.exit(main([int(arch) for arch in sys.argv[1:]]))

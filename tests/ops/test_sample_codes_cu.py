"""The kernels of csrc/sample_codes.cu on the host (cuda_on_host.h): their arithmetic, cuts and synchronisation.

Not tested so: what the compiler for the GPU makes of them, its logarithms, and the launch.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ospo_fast.ops._dispatch import DTYPES
from ospo_fast.ops.sample_codes import draw_codes

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ENTRY = """
extern "C" int run(int dtype, const void* cond, const void* uncond, int64_t logit_stride, const int64_t* seeds,
                   const int64_t* steps, int64_t* tokens, int64_t token_stride, int64_t* current, int64_t* bad,
                   int64_t rows, int64_t codes, float guidance, float temperature, int64_t top_k, double top_p,
                   int shared, bool backwards) {
    most_shared = shared;
    host::backwards = backwards;
    return ospo::draw_codes_cuda(ospo::Dtype{dtype}, cond, uncond, logit_stride, seeds, steps, tokens, token_stride,
                                 current, bad, rows, codes, guidance, temperature, top_k, top_p,
                                 shared == 0, nullptr);  // a device of its own, whose limit is kept
}
extern "C" int64_t wide_loads() { return std::exchange(host::wide_loads, 0); }
"""
KEPT, READ = 227 * 1024, 0  # bytes of shared memory with which keys are kept there, and made again whenever needed
Draw = Callable[..., list[Tensor]]


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory) -> Draw:
    """Codes, marks of wrong rows and tokens that the kernels write for logits (2, B, V) or (B, V)."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("host")
    source = (CSRC / "sample_codes.cu").read_text()
    launch = r"(draw\w*<[^>]*>)<<<grid, kThreads, (\w+), stream>>>\(a\)"
    source, launches = re.subn(launch, r"launch_on_host(\1, grid, kThreads, a, \2)", source)
    room = "extern __shared__ __align__(16) uint32_t room[];"
    assert (launches, source.count(room)) == (3, 1)
    source = source.replace(room, "uint32_t* const room = reinterpret_cast<uint32_t*>(host::room.data());")
    source = "#include <utility>\n" + re.sub(r"#include <cuda_\w+\.h>\n", "", source)
    (folder / "sample_codes.cpp").write_text(source + ENTRY)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", "-fno-gnu-unique", "-DOSPO_CUDA=1"]
    flags += [f"-I{CSRC}", "-include", str(HERE / "cuda_on_host.h")]
    subprocess.run([compiler, *flags, folder / "sample_codes.cpp", "-o", folder / "draw.so"], check=True)
    library = ctypes.CDLL(str(folder / "draw.so"))
    library.wide_loads.restype = ctypes.c_int64

    def call(logits: Tensor, *, shared: int = KEPT, backwards: bool = False, **options: Any) -> list[Tensor]:
        cond, uncond = logits if logits.dim() == 3 else (logits, None)
        out = inputs(len(cond))
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (cond, uncond, *out)]
        sizes = [ctypes.c_int64(size) for size in (cond.stride(0), out[2].stride(0), *cond.shape)]
        given = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
        status = library.run(
            DTYPES[cond.dtype], *pointers[:2], sizes[0], *pointers[2:5], sizes[1], *pointers[5:], *sizes[2:],
            ctypes.c_float(given["guidance_scale"]), ctypes.c_float(given["temperature"]),
            ctypes.c_int64(given["top_k"]), ctypes.c_double(given["top_p"]), shared, backwards,
        )  # fmt: skip
        assert status == 0
        return out[2:]

    call.wide_loads = library.wide_loads  # type: ignore[attr-defined]
    return call


def inputs(B: int) -> list[Tensor]:
    """seeds, steps, tokens, codes, bad."""
    seeds, steps = torch.arange(B) * 2**40 - 5, torch.arange(B) % 3
    return [seeds, steps, torch.full((B, 3), -7), torch.full((B,), -7), torch.full((B,), -1)]


def expected(logits: Tensor, **options: Any) -> list[Tensor]:
    """The same of the C++ kernel."""
    cond, uncond = logits if logits.dim() == 3 else (logits, None)
    seeds, steps, tokens, codes, bad = inputs(len(cond))
    draw_codes(cond, uncond, seeds=seeds, steps=steps, codes=codes, bad=bad, tokens=tokens, **options)
    return [tokens, codes, bad]


def same(draw: Draw, logits: Tensor, *, shared: int = KEPT, backwards: bool = False, **options: Any) -> None:
    for mine, theirs in zip(
        draw(logits, shared=shared, backwards=backwards, **options), expected(logits, **options), strict=True
    ):
        assert torch.equal(mine, theirs), options


@pytest.mark.parametrize("shared", [KEPT, READ])
@pytest.mark.parametrize(
    ("V", "dtype"),
    [
        (1, torch.float32),
        (3, torch.bfloat16),
        (333, torch.float16),  # most threads have nothing
        (2051, torch.bfloat16),  # the last batch is not full; many equal logits
        (2051, torch.float32),
    ],
    ids=str,
)
def test_codes_of_the_cpu(draw: Draw, V: int, dtype: torch.dtype, shared: int) -> None:
    logits = (torch.randn(2, 3, V) * 3).to(dtype)
    logits[0, 1, ::2] = -torch.inf
    logits[0, 2] = logits[0, 2].round()
    guided: dict[str, Any] = {"guidance_scale": 2.0, "temperature": 0.7}
    some = max(V // 3, 1)
    for options in (
        {},
        {"top_k": 1},
        {"top_k": some, "temperature": 3.0},
        {"top_k": V},  # all codes
        {"top_k": V + 5},
        {"top_p": 1e-12},
        {"top_p": 0.4},
        {"top_p": 1 - 2.0**-53},
        {"top_k": some, "top_p": 0.8},
        {"top_k": 2, "top_p": 0.5, "temperature": 0.0},  # the likeliest code
    ):
        same(draw, logits, shared=shared, **guided | options)
        same(draw, logits[0], shared=shared, backwards=True, **options)


@pytest.mark.parametrize(("shared", "V"), [(KEPT, 16384), (READ, 20011)])
def test_rows_of_models(draw: Draw, shared: int, V: int) -> None:
    logits = torch.randn(2, 1, V) * 2
    same(draw, logits, shared=shared, guidance_scale=5.0, top_k=300, top_p=0.9)
    same(draw, logits[0].bfloat16(), shared=shared, top_p=0.9)


@pytest.mark.parametrize("shared", [KEPT, READ])
def test_only_the_first_of_equal_logits_stay(draw: Draw, shared: int) -> None:
    V = 700
    tied = torch.zeros(16, V)
    tied[:, ::7] = -0.0  # equal to 0
    codes = draw(tied, shared=shared, top_p=0.03)[1]
    assert codes.max() < 21  # the fewest that reach 0.03 · 700
    assert len(codes.unique()) > 5
    codes = draw(tied, shared=shared, top_k=3)[1]
    assert codes.max() > 300
    tied[:, 350:] += 1.0
    same(draw, tied[:3], shared=shared, top_p=0.5)
    same(draw, tied[:3], shared=shared, top_p=0.9, top_k=20, backwards=True)


@pytest.mark.parametrize("shared", [KEPT, READ])
@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.5}])
def test_wrong_rows_are_marked_and_leave_the_others_alone(draw: Draw, options: dict[str, Any], shared: int) -> None:
    logits = torch.randn(5, 601)
    logits[1, 600], logits[2, 3], logits[3] = torch.nan, torch.inf, -torch.inf
    same(draw, logits, shared=shared, **options)
    _, codes, bad = draw(logits, shared=shared, backwards=True, **options)
    assert bad.tolist() == [-1, 1, 2, 0, -1]
    assert codes[1:4].tolist() == [0, 0, 0]


def test_rows_with_a_stride(draw: Draw) -> None:
    logits = torch.randn(4, 3, 1000)[:2, :, :777]
    same(draw, logits, guidance_scale=3.0, top_k=99, top_p=0.95)
    same(draw, logits[0, ::2], top_p=0.95)


@pytest.mark.parametrize("V", [4096, 16391, 5])  # whole batches, a tail, and less than half precision's one load
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [KEPT, READ])
def test_rows_of_any_alignment(draw: Draw, V: int, dtype: torch.dtype, shared: int) -> None:
    """Aligned rows are read 16 bytes at a time, others one logit at a time; the codes are those of the CPU."""
    wide = 16 // dtype.itemsize
    even = -(-V // wide) * wide
    for start, stride, half, aligned in (
        (0, even, 2 * even, 2),
        (0, even + 1, 2 * (even + wide), 1),  # the second row begins elsewhere
        (0, even, 2 * even + 1, 0),  # so do the unconditional rows
        (1, even, 2 * even, 0),
    ):
        room = torch.full((4 * (even + wide),), torch.nan, dtype=dtype)
        assert room.data_ptr() % 16 == 0
        logits = room[start:].as_strided((2, 2, V), (half, stride, 1))
        logits.copy_(torch.randn(2, 2, V) * 2)
        logits[:, 1] = logits[:, 1].round()  # many equal ones
        draw.wide_loads()  # type: ignore[attr-defined]
        for options in ({}, {"temperature": 0.0}, {"top_k": 40, "top_p": 0.9}):
            same(draw, logits, shared=shared, guidance_scale=3.0, **options)
            loads, once = draw.wide_loads(), 2 * aligned * (V // wide)  # type: ignore[attr-defined]
            again = shared == READ and "top_k" in options
            assert loads > once if again and once else loads == once, options

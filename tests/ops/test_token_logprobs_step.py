"""The compiled softmax steps: C++; CUDA on a GPU where there is one, and its source on the host everywhere
(cuda_on_host.h).
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ospo_fast.ops._dispatch import DTYPES

ROOT = Path(__file__).parents[2]
Step = Callable[..., None]


def in_cpp(z: Tensor, bias: Tensor | None, labels: Tensor, scales: Tensor | None, logps: Tensor, out: torch.dtype):
    from ospo_fast import _C  # here, so that the source on the host is tested without it too

    bias = None if bias is None else bias.float()
    pointers = [0 if t is None else t.data_ptr() for t in (z, bias, labels, scales, logps)]
    _C.token_logprobs(pointers[0], DTYPES[z.dtype], *pointers[1:], DTYPES[out], True, *z.shape, 2)


def on_gpu(z: Tensor, bias: Tensor | None, labels: Tensor, scales: Tensor | None, logps: Tensor, out: torch.dtype):
    from ospo_fast import _C

    gpu = [None if t is None else t.cuda() for t in (z, bias, labels, scales, logps)]
    pointers = [0 if t is None else t.data_ptr() for t in gpu]
    arguments = pointers[0], DTYPES[z.dtype], *pointers[1:], DTYPES[out], True, *z.shape
    _C.token_logprobs_cuda(*arguments, 0, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    z.copy_(gpu[0])
    logps.copy_(gpu[4])


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("host")
    source = (ROOT / "csrc" / "token_logprobs.cu").read_text()
    source, launches = re.subn(
        r"(row_in_\w+<[^>]*>)<<<grid, (\d+), 0, stream>>>\(a\)", r"launch_on_host(\1, grid, \2, a)", source
    )
    assert launches == 6
    source, exponentials = re.subn(
        r'asm\("ex2\.approx\.ftz\.f32 %0, %1;" : "=f"\(y\) : "f"\((.*)\)\);', r"y = exp2_on_host(\1);", source
    )
    assert exponentials == 1
    source = re.sub(r"#include <cuda_\w+\.h>\n", "", source).replace("template <>\n__device__", "template <>\ninline")
    source += """
extern "C" int run(void* z, int dtype, void* bias, int64_t* labels, float* scales, float* logps, int out, int64_t rows,
                   int64_t codes, bool backwards) {
    host::backwards = backwards;
    return ospo::token_logprobs_cuda(z, ospo::Dtype{dtype}, bias, labels, scales, logps, ospo::Dtype{out}, true, rows,
                                    codes, 0, nullptr);
}
"""
    (folder / "token_logprobs.cpp").write_text(source)
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fno-gnu-unique", "-DOSPO_CUDA=1", f"-I{ROOT / 'csrc'}"]
    header = Path(__file__).with_name("cuda_on_host.h")
    library = folder / "step.so"
    subprocess.run([compiler, *flags, "-include", header, folder / "token_logprobs.cpp", "-o", library], check=True)
    return ctypes.CDLL(library)


def on_host(library: ctypes.CDLL, backwards: bool) -> Step:
    def step(z: Tensor, bias: Tensor | None, labels: Tensor, scales: Tensor | None, logps: Tensor, out: torch.dtype):
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (z, bias, labels, scales, logps)]
        sizes = [ctypes.c_int64(size) for size in z.shape]
        assert library.run(pointers[0], DTYPES[z.dtype], *pointers[1:], DTYPES[out], *sizes, backwards) == 0

    return step


@pytest.fixture(params=["cpp", "host", "host, threads backwards", pytest.param("gpu", marks=pytest.mark.gpu)])
def step(request: pytest.FixtureRequest) -> Step:
    if request.param.startswith("host"):
        return on_host(request.getfixturevalue("host_library"), request.param != "host")
    return in_cpp if request.param == "cpp" else on_gpu


HALF = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
WIDE = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]


@pytest.mark.parametrize(("dtype", "out"), HALF + WIDE, ids=str)
@pytest.mark.parametrize(
    "codes",
    [
        8,  # one vector of half precision: most threads have nothing
        4096,  # all registers of 128 threads
        8104,  # 256 threads, the last ones with less
        16384,  # Janus: 512 threads
        16392,  # 1024 threads, most with half of their registers; fp32 in passes
        32776,  # too long for the registers: in passes, the last one not full
        1021,  # odd: number by number
        1,
    ],
)
def test_step(step: Step, no_worse: Callable[..., None], codes: int, dtype: torch.dtype, out: torch.dtype) -> None:
    rows = 3
    z = (torch.randn(rows, codes) * 4).to(dtype)
    bias = torch.randn(codes).to(dtype) if codes % 3 else None
    scales = torch.tensor([-0.7, 0.0, 2.0]) if codes % 16 else None
    labels = torch.tensor([0, codes // 2, codes - 1])
    exact_z = z.double() + (0 if bias is None else bias.double())
    exact = exact_z.log_softmax(1)
    onehot = torch.nn.functional.one_hot(labels, codes)
    exact_residual = (onehot - exact.exp()) * (1 if scales is None else scales.double().unsqueeze(1))

    usual_z = z.float() + (0 if bias is None else bias.float())
    usual = usual_z.log_softmax(1)
    usual_residual = ((onehot - usual.exp()) * (1 if scales is None else scales.unsqueeze(1))).to(out)
    logps = torch.full((rows,), torch.nan)
    step(z, bias, labels, scales, logps, out)
    no_worse(logps, usual.gather(1, labels[:, None])[:, 0], exact.gather(1, labels[:, None])[:, 0])
    no_worse(z.view(out)[:, :codes], usual_residual, exact_residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "codes",
    [
        64,  # in registers
        16384,  # with each thread's numbers all masked or none
        33,  # in passes, number by number
        32800,  # in passes, whole threads of masked numbers first
    ],
)
def test_masked_codes(step: Step, no_worse: Callable[..., None], codes: int, dtype: torch.dtype) -> None:
    """The lowest finite number stands for a code that is left out; near it, sums over a thread's own share are 0."""
    z = (torch.randn(4, codes) * 4).to(dtype)
    z[0, : codes // 2] = torch.finfo(dtype).min
    z[1, 1:] = torch.finfo(dtype).min
    z[2, :-1] = torch.finfo(dtype).min
    labels = torch.tensor([codes - 1, 0, codes - 1, 0])
    exact, usual = z.double().log_softmax(1), z.float().log_softmax(1)
    onehot = torch.nn.functional.one_hot(labels, codes)
    logps = torch.full((4,), torch.nan)
    step(z, None, labels, None, logps, dtype)
    no_worse(logps, usual.gather(1, labels[:, None])[:, 0], exact.gather(1, labels[:, None])[:, 0])
    no_worse(z, (onehot - usual.exp()).to(dtype), onehot - exact.exp())


@pytest.mark.parametrize("codes", [64, 33, 32800])
def test_rows_with_infinities(step: Step, codes: int) -> None:
    z = torch.randn(5, codes)
    z[0, 1] = torch.nan
    z[1, 1] = torch.inf
    z[2] = -torch.inf
    z[3, : codes // 2] = -torch.inf
    z[4] = 50
    expected = z.double().log_softmax(1)
    labels, logps = torch.full((5,), codes - 1), torch.full((5,), torch.nan)
    step(z, None, labels, None, logps, torch.float32)
    torch.testing.assert_close(logps.double(), expected[:, -1], equal_nan=True, rtol=1e-6, atol=1e-6)
    assert z[:3].isnan().all()
    residual = torch.nn.functional.one_hot(labels, codes)[3:] - expected[3:].exp()
    torch.testing.assert_close(z[3:].double(), residual, rtol=1e-6, atol=1e-6)

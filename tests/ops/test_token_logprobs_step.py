"""The compiled softmax steps: C++, CUDA on a GPU, and the CUDA source on the host."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ospo_fast.ops._dispatch import DTYPES

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


@pytest.fixture(params=["cpp", "host", pytest.param("gpu", marks=pytest.mark.gpu)])
def step(request: pytest.FixtureRequest) -> Step:
    if request.param != "host":
        return in_cpp if request.param == "cpp" else on_gpu
    kernel = request.getfixturevalue("on_host")("token_logprobs_cuda", "token_logprobs.cu")

    def run(z: Tensor, bias: Tensor | None, labels: Tensor, scales: Tensor | None, logps: Tensor, out: torch.dtype):
        again = z.clone(), logps.clone()
        for (logits, result), reverse in (((z, logps), False), (again, True)):
            numbers = DTYPES[z.dtype], DTYPES[out]
            kernel(logits, numbers[0], bias, labels, scales, result, numbers[1], True, *z.shape, reverse=reverse)
        for first, second in zip((z, logps), again, strict=True):
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))

    return run


HALF = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
WIDE = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]


@pytest.mark.parametrize(("dtype", "out"), HALF + WIDE, ids=str)
@pytest.mark.parametrize(
    "codes",
    [
        8,  # one vector of a 16-bit dtype: most threads have no logits
        4096,  # all registers of 128 threads
        8104,  # 256 threads, the last ones with fewer logits
        16384,  # Janus: 512 threads
        16392,  # 1024 threads, most with half of their registers; fp32 in passes
        32776,  # too long for the registers: in passes, the last one partly filled
        1021,  # odd: one logit at a time
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
    exact_grad = (onehot - exact.exp()) * (1 if scales is None else scales.double().unsqueeze(1))

    eager_z = z.float() + (0 if bias is None else bias.float())
    eager = eager_z.log_softmax(1)
    eager_grad = ((onehot - eager.exp()) * (1 if scales is None else scales.unsqueeze(1))).to(out)
    logps = torch.full((rows,), torch.nan)
    step(z, bias, labels, scales, logps, out)
    no_worse(logps, eager.gather(1, labels[:, None])[:, 0], exact.gather(1, labels[:, None])[:, 0])
    no_worse(z.view(out)[:, :codes], eager_grad, exact_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "codes",
    [
        64,  # in registers
        16384,  # with each thread's numbers all masked or none
        33,  # in passes, one logit at a time
        32800,  # in passes, whole threads of masked numbers first
    ],
)
def test_masked_codes(step: Step, no_worse: Callable[..., None], codes: int, dtype: torch.dtype) -> None:
    """The lowest finite number masks a code. Sums over a thread's own share may then be 0."""
    z = (torch.randn(4, codes) * 4).to(dtype)
    z[0, : codes // 2] = torch.finfo(dtype).min
    z[1, 1:] = torch.finfo(dtype).min
    z[2, :-1] = torch.finfo(dtype).min
    labels = torch.tensor([codes - 1, 0, codes - 1, 0])
    exact, eager = z.double().log_softmax(1), z.float().log_softmax(1)
    onehot = torch.nn.functional.one_hot(labels, codes)
    logps = torch.full((4,), torch.nan)
    step(z, None, labels, None, logps, dtype)
    no_worse(logps, eager.gather(1, labels[:, None])[:, 0], exact.gather(1, labels[:, None])[:, 0])
    no_worse(z, (onehot - eager.exp()).to(dtype), onehot - exact.exp())


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
    grad = torch.nn.functional.one_hot(labels, codes)[3:] - expected[3:].exp()
    torch.testing.assert_close(z[3:].double(), grad, rtol=1e-6, atol=1e-6)

"""The compiled softmax steps: C++, CUDA on a GPU, and the CUDA source on the host."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ospo_fast.ops._chunked_head import RowResults, RowScales, TokenLogprobsOptions, _softmax_torch
from ospo_fast.ops._dispatch import DTYPES


@dataclass
class Step:
    """Arguments of the compiled functions, in their order. `out` None: no gradient is written."""

    z: Tensor
    bias: Tensor | None
    labels: Tensor
    temperature: float = 1.0
    softcap: float = 0.0
    scales: Tensor | None = None
    others: Tensor | None = None
    entropy_scales: Tensor | None = None
    logps: Tensor | None = None
    entropies: Tensor | None = None
    statistics: Tensor | None = None
    out: Tensor | None = None
    out_dtype: torch.dtype = torch.float32

    def tensors(self) -> dict[str, Tensor | None]:
        names = ["z", "bias", "labels", "scales", "others", "entropy_scales", "logps", "entropies", "statistics", "out"]
        return {name: getattr(self, name) for name in names}

    def arguments(self, tensors: dict[str, Any]) -> tuple[Any, ...]:
        t = tensors
        return (
            t["z"], DTYPES[self.z.dtype], t["bias"], t["labels"], 1 / self.temperature, self.softcap, t["scales"],
            t["others"], t["entropy_scales"], t["logps"], t["entropies"], t["statistics"], t["out"],
            DTYPES[self.out_dtype], *self.z.shape,
        )  # fmt: skip


Run = Callable[[Step], None]


def addresses(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    return {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}


def in_cpp(step: Step) -> None:
    from ospo_fast import _C  # here, so that the source on the host is tested without it too

    tensors = step.tensors()
    tensors["bias"] = None if step.bias is None else step.bias.float()
    _C.token_logprobs(*step.arguments(addresses(tensors)), 2)


def on_gpu(step: Step) -> None:
    from ospo_fast import _C

    gpu = {name: None if t is None else t.cuda() for name, t in step.tensors().items()}
    if step.out is step.z:
        gpu["out"] = gpu["z"]
    _C.token_logprobs_cuda(*step.arguments(addresses(gpu)), 0, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    for name in ("logps", "entropies", "statistics", "out"):
        if (to := getattr(step, name)) is not None:
            to.copy_(gpu[name])


@pytest.fixture(params=["cpp", "host", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    if request.param != "host":
        return in_cpp if request.param == "cpp" else on_gpu
    kernel = request.getfixturevalue("on_host")("token_logprobs_cuda", "token_logprobs.cu")

    def on_host(step: Step) -> None:
        first = step.tensors()
        again = {name: None if t is None else t.clone() for name, t in first.items()}
        if step.out is step.z:
            again["out"] = again["z"]
        kernel(*step.arguments(first))
        kernel(*step.arguments(again), reverse=True)
        for name, t in first.items():
            assert t is None or torch.equal(t.view(torch.uint8), again[name].view(torch.uint8))

    return on_host


HALF = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
WIDE = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
CODES = [
    8,  # one vector of a 16-bit dtype: most threads have no logits
    4096,  # all registers of 128 threads
    8104,  # 256 threads, the last ones with fewer logits
    16384,  # Janus: 512 threads
    16392,  # 1024 threads, most with half of their registers; fp32 in passes
    32776,  # too long for the registers: in passes, the last one partly filled
    1021,  # odd: one logit at a time
    1,
]


@pytest.mark.parametrize(("dtype", "out"), HALF + WIDE, ids=str)
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("in_place", [True, False])
def test_step(
    run: Run, no_worse: Callable[..., None], codes: int, dtype: torch.dtype, out: torch.dtype, in_place: bool
) -> None:
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
    logps, before = torch.full((rows,), torch.nan), z.clone()
    to = z if in_place else torch.full_like(z, torch.nan)
    run(Step(z, bias, labels, scales=scales, logps=logps, out=to, out_dtype=out))
    no_worse(logps, eager.gather(1, labels[:, None])[:, 0], exact.gather(1, labels[:, None])[:, 0])
    no_worse(to.view(out)[:, :codes], eager_grad, exact_grad)
    assert in_place or torch.equal(z, before)


def scores(z: Tensor, step: "General") -> Tensor:
    z = z if not step.softcap else step.softcap * (z / step.softcap).tanh()
    return z / step.temperature


@dataclass
class General:
    temperature: float = 1.0
    softcap: float = 0.0
    upstream: list[float] = field(default_factory=lambda: [-0.7, 0.0, 2.0])
    upstream_entropy: list[float] | None = field(default_factory=lambda: [0.3, -1.5, 0.0])


GENERAL = [
    General(0.7),  # a sharper distribution
    General(2.5, 5.0),  # where the cap bends most logits
    General(1.0, 50.0),  # where it bends few
    General(1.0, 0.0),  # entropy alone
    General(1.3, 3.0, upstream_entropy=None),
]


@pytest.mark.parametrize("case", GENERAL, ids=str)
@pytest.mark.parametrize(("dtype", "out"), [*HALF[:1], *WIDE[:2]], ids=str)
@pytest.mark.parametrize("codes", [8, 8104, 16384, 16392, 32776, 1021, 1])
def test_temperature_softcap_and_entropy(
    run: Run, no_worse: Callable[..., None], codes: int, dtype: torch.dtype, out: torch.dtype, case: General
) -> None:
    z = (torch.randn(3, codes) * 4).to(dtype)
    bias = torch.randn(codes).to(dtype) if codes % 3 else None
    labels = torch.tensor([0, codes // 2, codes - 1])
    upstream = torch.tensor(case.upstream)
    upstream_entropy = None if case.upstream_entropy is None else torch.tensor(case.upstream_entropy)

    def by_autograd(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        x = (z.to(dtype) + (0 if bias is None else bias.to(dtype))).requires_grad_()
        every = scores(x, case).log_softmax(1)
        logps, entropy = every.gather(1, labels[:, None])[:, 0], -(every.exp() * every).sum(1)
        loss = (logps * upstream).sum() + (0 if upstream_entropy is None else (entropy * upstream_entropy).sum())
        (grad,) = torch.autograd.grad(loss, x)
        return logps.detach(), entropy.detach(), grad

    exact, eager = by_autograd(torch.float64), by_autograd(torch.float32)
    logps, entropies = torch.full((3,), torch.nan), torch.full((3,), torch.nan)
    before = z.clone()
    common = {"temperature": case.temperature, "softcap": case.softcap, "scales": upstream}
    common |= {"entropy_scales": upstream_entropy, "out_dtype": out}
    run(Step(z, bias, labels, logps=logps, entropies=entropies, **common))
    assert torch.equal(z, before)  # without `out` nothing is written
    no_worse(logps, eager[0], exact[0])
    no_worse(entropies, eager[1], exact[1])
    run(Step(z, bias, labels, out=z, **common))
    no_worse(z.view(out)[:, :codes], eager[2].to(out), exact[2])


@pytest.mark.parametrize("codes", [64, 4096, 33, 16400])
def test_a_part_of_the_codes(run: Run, no_worse: Callable[..., None], codes: int) -> None:
    """Statistics of both halves give the results of the whole, and with them each half its gradients."""
    case = General(1.4, 6.0)
    whole, labels = torch.randn(4, 2 * codes) * 4, torch.tensor([0, codes - 1, codes, 2 * codes - 1])
    upstream, upstream_entropy = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([0.7, 0.0, -1.0, 2.0])
    x = whole.double().requires_grad_()
    every = scores(x, case).log_softmax(1)
    entropy = -(every.exp() * every).sum(1)
    ((every.gather(1, labels[:, None])[:, 0] * upstream).sum() + (entropy * upstream_entropy).sum()).backward()
    top = scores(whole.double(), case).max(1).values
    log_total = (scores(whole.double(), case) - top[:, None]).exp().sum(1).log()
    for first in (0, codes):
        z = whole[:, first : first + codes].contiguous()
        local = torch.where((labels >= first) & (labels < first + codes), labels - first, -1)
        statistics = torch.full((4, 4), torch.nan)
        run(Step(z, None, local, case.temperature, case.softcap, statistics=statistics))
        part = scores(z.double(), case)
        largest = part.max(1).values
        e = (part - largest[:, None]).exp()
        target = torch.where(local < 0, 0, part.gather(1, local.clamp(min=0)[:, None])[:, 0])
        expected = torch.stack([largest, e.sum(1), (e * (part - largest[:, None])).sum(1), target], 1)
        torch.testing.assert_close(statistics.double(), expected, rtol=1e-5, atol=1e-5)
        share = (largest - top).exp() * e.sum(1) / log_total.exp()
        others = share * (upstream + upstream_entropy * (largest - top - log_total + entropy.detach()))
        given = {"scales": upstream, "others": others.float(), "entropy_scales": (share * upstream_entropy).float()}
        out = torch.full_like(z, torch.nan)
        run(Step(z, None, local, case.temperature, case.softcap, **given, out=out))
        torch.testing.assert_close(out.double(), x.grad[:, first : first + codes], rtol=2e-5, atol=2e-6)


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
@pytest.mark.parametrize("entropy", [False, True])
def test_masked_codes(run: Run, no_worse: Callable[..., None], codes: int, dtype: torch.dtype, entropy: bool) -> None:
    """The lowest finite number masks a code. Sums over a thread's own share may then be 0."""
    z = (torch.randn(4, codes) * 4).to(dtype)
    z[0, : codes // 2] = torch.finfo(dtype).min
    z[1, 1:] = torch.finfo(dtype).min
    z[2, :-1] = torch.finfo(dtype).min
    labels = torch.tensor([codes - 1, 0, codes - 1, 0])
    exact, eager = z.double().log_softmax(1), z.float().log_softmax(1)
    onehot = torch.nn.functional.one_hot(labels, codes)
    logps, entropies = torch.full((4,), torch.nan), torch.full((4,), torch.nan) if entropy else None
    scales = torch.zeros(4) if entropy else None
    run(Step(z, None, labels, logps=logps, entropies=entropies, entropy_scales=scales, out=z, out_dtype=dtype))
    no_worse(logps, eager.gather(1, labels[:, None])[:, 0], exact.gather(1, labels[:, None])[:, 0])
    no_worse(z, (onehot - eager.exp()).to(dtype), onehot - exact.exp())
    if entropies is not None:
        torch.testing.assert_close(entropies.double(), -(exact.exp() * exact).sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codes", [64, 33, 32800])
@pytest.mark.parametrize("entropy", [False, True])
def test_rows_with_infinities(run: Run, codes: int, entropy: bool) -> None:
    z = torch.randn(5, codes)
    z[0, 1] = torch.nan
    z[1, 1] = torch.inf
    z[2] = -torch.inf
    z[3, : codes // 2] = -torch.inf
    z[4] = 50
    expected = z.double().log_softmax(1)
    labels, logps = torch.full((5,), codes - 1), torch.full((5,), torch.nan)
    entropies = torch.full((5,), torch.nan) if entropy else None
    run(Step(z, None, labels, logps=logps, entropies=entropies, out=z))
    torch.testing.assert_close(logps.double(), expected[:, -1], equal_nan=True, rtol=1e-6, atol=1e-6)
    assert z[:3].isnan().all()
    grad = torch.nn.functional.one_hot(labels, codes)[3:] - expected[3:].exp()
    torch.testing.assert_close(z[3:].double(), grad, rtol=1e-6, atol=1e-6)
    if entropies is not None:
        assert entropies[:3].isnan().all()
        exact = -(expected[3:].exp() * expected[3:].clamp(min=-1e4)).sum(1)
        torch.testing.assert_close(entropies[3:].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", GENERAL, ids=str)
@pytest.mark.parametrize("in_place", [True, False])
def test_the_reference_in_pytorch_agrees(case: General, in_place: bool) -> None:
    z, bias, labels = torch.randn(3, 64) * 4, torch.randn(64), torch.tensor([0, 5, -1])
    upstream, others = torch.tensor(case.upstream), torch.tensor([0.2, 0.4, -1.0])
    upstream_entropy = None if case.upstream_entropy is None else torch.tensor(case.upstream_entropy)
    found: dict[str, list[Tensor]] = {}
    for name in ("cpp", "torch"):
        logits = z.clone()
        results = [torch.full((3,), torch.nan), torch.full((3,), torch.nan), torch.full((3, 4), torch.nan)]
        out = logits if in_place else torch.full_like(logits, torch.nan)
        if name == "cpp":
            tensors = dict(zip(("logps", "entropies", "statistics"), results, strict=True))
            given = {"scales": upstream, "others": others, "entropy_scales": upstream_entropy, "out": out}
            in_cpp(Step(logits, bias, labels, case.temperature, case.softcap, **given, **tensors))
        else:
            options = TokenLogprobsOptions(-100, 4, False, "torch", False, case.temperature, case.softcap)
            scales = RowScales(upstream, upstream_entropy, others)
            _softmax_torch(logits, bias, labels, RowResults(*results), scales, options, out, torch.float32)
        found[name] = [results[0][:2], *results[1:], out]  # the last row has no label
    for cpp, reference in zip(*found.values(), strict=True):
        torch.testing.assert_close(cpp, reference, rtol=2e-5, atol=2e-6)


def test_the_tanh_of_the_cap_is_exact_to_rounding(no_worse: Callable[..., None]) -> None:
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 0, 400), torch.tensor([0.0, -0.0, 1e30, -1e30])])
    # The difference of two scores is that of two log-probabilities.
    logps = torch.empty(len(z))
    labels = torch.zeros(len(z), dtype=torch.int64)
    pairs = torch.stack([z, torch.zeros_like(z)], 1).contiguous()
    in_cpp(Step(pairs, None, labels, softcap=1.0, logps=logps))
    exact = torch.stack([z.double().tanh(), torch.zeros_like(z).double()], 1).log_softmax(1)[:, 0]
    eager = torch.stack([z.tanh(), torch.zeros_like(z)], 1).log_softmax(1)[:, 0]
    no_worse(logps, eager, exact)
    assert math.isclose(float(logps[-2]), 1 - math.log(math.e + 1), rel_tol=1e-6)


@pytest.mark.parametrize("codes", [8, 1021])
def test_statistics_show_nan(run: Run, codes: int) -> None:
    """With another maximum, other processes would take this part of the codes for a negligible one."""
    z = torch.full((3, codes), -torch.inf)
    z[0, 1], z[1, :3] = torch.nan, torch.tensor([torch.nan, -1e3, 1.0])
    statistics = torch.full((3, 4), torch.nan)
    run(Step(z, None, torch.full((3,), -1), 0.5, 0.0, statistics=statistics))
    assert statistics[:2, 0].isnan().all()
    assert statistics[2, 0] == -torch.inf

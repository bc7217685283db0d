import math
import random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ospo_fast import sample_codes
from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops.sample_codes import _truncate, _weights, philox4x32, sample_codes_into

# Known answers of the Random123 distribution: counter, key → words.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def oracle(
    cond: Tensor, uncond: Tensor | None, *, guidance_scale: float, temperature: float, seeds: list[int], step: int
) -> list[int]:
    """`sample_codes` without truncation, in Python integers and floats, code by code."""
    codes = []
    for row, seed in enumerate(seeds):
        z = cond[row].double()
        if uncond is not None:
            z = uncond[row].double() + guidance_scale * (z - uncond[row].double())
        if temperature:
            words = [random_words(v // 4, step, seed)[v % 4] for v in range(len(z))]
            z = z / temperature - torch.tensor([math.log(-math.log((w + 0.5) / 2**32)) for w in words]).double()
        codes.append(int(z.argmax()))
    return codes


def random_words(block: int, step: int, seed: int) -> list[int]:
    """Philox4x32-10, from its definition."""
    low32 = 0xFFFFFFFF
    c, k = [block, step & low32, step >> 32 & low32, 0], [seed & low32, seed >> 32 & low32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & low32, a >> 32 ^ c[3] ^ k[1], a & low32]
        k = [k[0] + 0x9E3779B9 & low32, k[1] + 0xBB67AE85 & low32]
    return c


@pytest.fixture(params=["auto", "torch"])
def backend(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the compiled kernel and with the PyTorch reference."""
    if request.param == "torch":
        monkeypatch.setitem(_dispatch._KERNELS, "sample_codes", {})
    return request.param


@pytest.fixture(scope="session")
def chisquare() -> Any:
    return pytest.importorskip("scipy.stats", reason="needs SciPy").chisquare


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    result = philox4x32(*(tuple(torch.tensor([v]) for v in values) for values in (counter, key)))
    assert [int(word) for word in result] == words


def test_against_the_definition() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        B, V = rng.randint(0, 4), rng.randint(1, 21)
        cond, uncond = torch.randn(B, V) * 3, torch.randn(B, V) * 3 if rng.random() < 0.5 else None
        options = {
            "guidance_scale": rng.choice([1.0, 5.0, 0.0]),
            "temperature": rng.choice([1.0, 0.7, 0.0, 3.0]),
            "seeds": [rng.randint(-(2**63), 2**64 - 1) for _ in range(B)],
            "step": rng.randint(0, 2**40),
        }
        codes = sample_codes(cond, uncond, **options)
        assert codes.dtype == torch.int64
        assert codes.tolist() == oracle(cond, uncond, **options)


def test_backends_sample_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cond, uncond = torch.randn(64, 1021), torch.randn(64, 1021)
    options: list[dict[str, Any]] = [{}, {"top_k": 50}, {"top_p": 0.8, "temperature": 0.9}, {"temperature": 0}]
    found = [sample_codes(cond, uncond, guidance_scale=5, seeds=range(64), step=3, **o) for o in options]
    monkeypatch.setitem(_dispatch._KERNELS, "sample_codes", {})
    for mine, o in zip(found, options, strict=True):
        assert torch.equal(sample_codes(cond, uncond, guidance_scale=5, seeds=range(64), step=3, **o), mine)


def test_backends_truncate_the_same() -> None:
    """Few values give many equal logits, and many seeds show which codes of a row are kept."""
    for seed in range(60):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        V = rng.randint(1, 60)
        values = [*(rng.uniform(-40, 40) for _ in range(rng.randint(1, 5))), 0.0, -0.0, -torch.inf]
        logits = torch.tensor(values)[torch.randint(len(values), (2, 6, V))]
        logits[:, :, V // 2] = 1.0  # finite somewhere
        options: dict[str, Any] = {
            "guidance_scale": rng.choice([1.0, 3.0]),
            "temperature": rng.choice([1.0, 0.3, 50.0]),
            "top_k": rng.randint(0, V + 1),
            "top_p": rng.choice([1e-300, 0.1, 0.5, 0.75, 0.9, 0.999, 1 - 2.0**-53, 1.0]),
            "seeds": torch.arange(6 * 50),
            "step": 1,
        }
        logits[1] = logits[1].nan_to_num(neginf=-3.0)
        cond, uncond = logits.repeat_interleave(50, 1)
        codes = sample_codes(cond, uncond, **options)
        with patch.dict(_dispatch._KERNELS, {"sample_codes": {}}):
            assert torch.equal(sample_codes(cond, uncond, **options), codes)


@pytest.mark.parametrize(("top_p", "scale"), [(0.05, 4.0), (0.5, 0.01), (0.9, 1.0), (0.9999, 4.0)])
def test_top_p_keeps_the_fewest_codes(top_p: float, scale: float) -> None:
    z = torch.randn(20, 3001) * scale
    z[::2] = z[::2].bfloat16().float()
    kept = _truncate(z, 0, top_p).isfinite()
    order = z.sort(dim=1, descending=True, stable=True).indices
    count = kept.sum(1, keepdim=True)
    assert torch.equal(kept.gather(1, order), torch.arange(3001) < count)  # the first ones of equal logits
    reached = z.double().softmax(1).gather(1, order).cumsum(1)
    rounding = 3001 * 2.0**-40
    assert (reached.gather(1, count - 1) >= top_p - rounding).all()
    assert (reached.gather(1, (count - 2).clamp(min=0))[count > 1] < top_p + rounding).all()


def test_weights_are_exponentials() -> None:
    z = torch.cat([-torch.rand(100_000) * 32, torch.tensor([0.0, -28.0, -29.0, -1e30, -torch.inf])])
    weights = _weights(z + 0.0, torch.zeros(1))
    error = (weights - z.double().exp() * 2.0**40).abs()
    assert error.max() < 0.5 + 2.0**-6
    assert weights[-5:].tolist() == [2**40, round(math.exp(-28) * 2**40), 0, 0, 0]


@pytest.mark.usefixtures("backend")
def test_distribution(chisquare: Any) -> None:
    samples, V = 100_000, 12
    logits = torch.randn(V) * 1.5
    codes = sample_codes(logits.expand(samples, V), seeds=torch.arange(samples), step=7)
    assert chisquare(torch.bincount(codes, minlength=V), (logits.double().softmax(0) * samples)).pvalue > 1e-4
    # The steps of one seed are as independent as the seeds of one step.
    codes = sample_codes(logits.expand(samples, V), seeds=[5] * samples, step=torch.arange(samples))
    assert chisquare(torch.bincount(codes, minlength=V), (logits.double().softmax(0) * samples)).pvalue > 1e-4


@pytest.mark.usefixtures("backend")
def test_distribution_with_guidance_and_truncation(chisquare: Any) -> None:
    samples, V = 100_000, 10
    cond, uncond = torch.randn(V), torch.randn(V)
    logits = (uncond + 2.0 * (cond - uncond)).double() / 1.5
    order = logits.argsort(descending=True)
    kept = logits.clone()
    kept[order[6:]] = -torch.inf  # top-k first
    probs = kept.softmax(0)
    reached = probs[order].cumsum(0)
    kept[order[int((reached < 0.8).sum()) + 1 :]] = -torch.inf  # then the fewest that reach top-p
    codes = sample_codes(
        cond.expand(samples, V),
        uncond.expand(samples, V),
        guidance_scale=2.0,
        temperature=1.5,
        top_k=6,
        top_p=0.8,
        seeds=torch.arange(samples),
        step=0,
    )
    counts, expected = torch.bincount(codes, minlength=V), kept.softmax(0) * samples
    assert (counts[expected == 0] == 0).all()
    assert 1 < int((expected > 0).sum()) < 6
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-4


@pytest.mark.usefixtures("backend")
def test_codes_depend_on_seed_and_step_only() -> None:
    cond, uncond, seeds = torch.randn(37, 333), torch.randn(37, 333), torch.randint(2**62, (37,))
    options: dict[str, Any] = {"guidance_scale": 3.0, "top_k": 100, "top_p": 0.95}
    whole = sample_codes(cond, uncond, seeds=seeds, step=4, **options)
    for rows in (torch.tensor([11]), torch.randperm(37), torch.arange(0, 37, 5)):
        assert torch.equal(sample_codes(cond[rows], uncond[rows], seeds=seeds[rows], step=4, **options), whole[rows])
    assert torch.equal(sample_codes(cond, uncond, seeds=seeds.tolist(), step=torch.full((37,), 4), **options), whole)
    unsigned = torch.full((37,), 4, dtype=torch.uint64)
    assert torch.equal(sample_codes(cond, uncond, seeds=seeds.view(torch.uint64), step=unsigned, **options), whole)
    assert not torch.equal(sample_codes(cond, uncond, seeds=seeds, step=5, **options), whole)
    assert not torch.equal(sample_codes(cond, uncond, seeds=seeds + 1, step=4, **options), whole)
    wide = torch.stack([cond, cond], -1)[..., 0]
    assert torch.equal(sample_codes(wide, uncond, seeds=seeds, step=4, **options), whole)


@pytest.mark.usefixtures("backend")
def test_guidance_and_greedy() -> None:
    cond, uncond = torch.randn(9, 50), torch.randn(9, 50)
    plain = sample_codes(cond, seeds=range(9), step=0)
    assert torch.equal(sample_codes(cond, uncond * torch.nan, seeds=range(9), step=0), plain)  # guidance 1: not read
    assert torch.equal(sample_codes(cond, guidance_scale=5, seeds=range(9), step=0), plain)
    greedy = sample_codes(cond, uncond, guidance_scale=5, temperature=0, seeds=range(9), step=0)
    assert torch.equal(greedy, (uncond + 5 * (cond - uncond)).argmax(1))
    assert torch.equal(sample_codes(cond, top_k=1, seeds=range(9), step=0), cond.argmax(1))
    assert torch.equal(sample_codes(cond, top_p=1e-9, seeds=range(9), step=0), cond.argmax(1))
    assert torch.equal(sample_codes(cond, top_k=50, top_p=1.0, seeds=range(9), step=0), plain)
    tied = torch.zeros(1000, 4)
    assert sample_codes(tied, top_k=2, seeds=range(1000), step=0).unique().tolist() == [0, 1, 2, 3]  # equal to the 2nd
    assert sample_codes(tied, top_p=0.5, seeds=range(1000), step=0).unique().tolist() == [0, 1]
    masked = cond.index_fill(1, torch.arange(0, 50, 2), -torch.inf)
    assert (sample_codes(masked, seeds=range(9), step=0) % 2 == 1).all()
    assert sample_codes(cond.bfloat16(), seeds=range(9), step=0).dtype == torch.int64


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}])
def test_invalid_logits_name_their_rows(options: dict[str, Any]) -> None:
    cond = torch.randn(5, 8)
    cond[1, 7], cond[2, 0], cond[4] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(OpError, match=r"rows \[1, 2, 4\] hold NaN, \+inf or only -inf"):
        sample_codes(cond, seeds=range(5), step=0, **options)
    with pytest.raises(OpError, match=r"rows \[1, 2, 4\]"):
        sample_codes(torch.randn(5, 8), cond, guidance_scale=2, seeds=range(5), step=0, **options)


def test_opcheck() -> None:
    cond, uncond, seeds = torch.randn(3, 9), torch.randn(3, 9), torch.arange(3)
    op = torch.ops.ospo_fast.sample_codes
    torch.library.opcheck(op, (cond, uncond, 2.0, 1.0, 0, 1.0, seeds, seeds))
    torch.library.opcheck(op, (cond, None, 1.0, 0.5, 3, 0.9, seeds, seeds))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cond": torch.randn(8)}, r"cond is torch.float32 \(8,\), expected float \(B, V\)"),
        ({"cond": torch.ones(2, 8).long()}, "cond is torch.int64"),
        ({"cond": torch.randn(2, 0)}, r"\(2, 0\)"),
        ({"cond": [[0.0, 1.0]]}, "cond is list, expected a tensor"),
        ({"cond": None}, "cond is NoneType, expected a tensor"),
        ({"uncond": [[0.0, 1.0]]}, "uncond is list, expected a tensor"),
        ({"uncond": torch.randn(2, 7)}, r"uncond is \(2, 7\) on cpu, expected \(2, 8\)"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf, expected a finite number"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0, expected 0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seeds": [1, 2, 3]}, r"seeds is torch.int64 \(3,\), expected \(2,\) int64"),
        ({"seeds": torch.rand(2)}, "seeds is torch.float32"),
        ({"step": torch.zeros(3).long()}, r"step is torch.int64 \(3,\)"),
        ({"step": torch.tensor([1, 2**63], dtype=torch.uint64)}, r"step holds a uint64 number of 2\^63 or more"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Tensor | Any] = {
        "cond": torch.randn(2, 8),
        "uncond": torch.randn(2, 8),
        "seeds": [0, 1],
        "step": 0,
    }
    with pytest.raises(OpError, match=message):
        sample_codes(**arguments | change)


@pytest.mark.usefixtures("backend")
def test_sampling_into_tokens_keeps_the_first_invalid_step() -> None:
    logits, seeds, steps = torch.randn(2, 5, 40), torch.arange(5), torch.tensor([0, 3, 1, 2, 0])
    options: dict[str, Any] = {"guidance_scale": 3.0, "temperature": 0.8}
    expected = sample_codes(*logits, seeds=seeds, step=steps, **options)
    logits[0, 1, 7] = torch.nan
    logits[1, 3, 2] = torch.inf
    codes, tokens, error_steps = torch.full((5,), -7), torch.full((5, 4), -7), torch.tensor([-1, -1, -1, 1, -1])
    sample_codes_into(*logits, **options, seeds=seeds, steps=steps, codes=codes, error_steps=error_steps, tokens=tokens)
    expected[[1, 3]] = 0
    assert torch.equal(codes, expected)
    assert error_steps.tolist() == [-1, 3, -1, 1, -1]
    assert torch.equal(tokens, torch.full((5, 4), -7).scatter(1, steps[:, None], expected[:, None]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("V", "dtype"),
    [
        (102400, torch.bfloat16),  # more keys than a block can hold
        (102400, torch.float32),
        (16384, torch.float16),
        (1021, torch.bfloat16),
        (3, torch.float32),
    ],
)
def test_cuda_samples_the_same(V: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(2, 64, V) * 3).to(dtype)
    logits[:, 50:] = logits[:, 50:].round()  # ties
    logits[:, 40:50, ::3] = -torch.inf
    logits[1, 40:50] = logits[0, 40:50].nan_to_num(neginf=-9.0)  # with guidance still -inf, not NaN
    for options in (
        {},
        {"temperature": 0.0},
        {"guidance_scale": 5.0},
        {"top_k": 7},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"top_p": 0.6, "temperature": 2},
        {"top_p": 1 - 2.0**-53},
        {"top_k": 900, "top_p": 0.9, "guidance_scale": 5.0},
    ):
        mine = sample_codes(*logits, seeds=range(64), step=9, **options)  # type: ignore[arg-type]
        theirs = sample_codes(*logits.cuda(), seeds=range(64), step=9, **options)  # type: ignore[arg-type]
        assert torch.equal(theirs.cpu(), mine), options


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"top_k": 9}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.5}])
def test_cuda_invalid_rows_do_not_change_others(options: dict[str, Any]) -> None:
    logits = torch.randn(5, 601)
    logits[1, 600], logits[2, 3], logits[3] = torch.nan, torch.inf, -torch.inf
    found = []
    for device in ("cpu", "cuda"):
        seeds, steps, codes = (torch.arange(5, device=device) for _ in range(3))
        error_steps = torch.full_like(codes, -1)
        sample_codes_into(logits.to(device), seeds=seeds, steps=steps, codes=codes, error_steps=error_steps, **options)
        found.append((codes.tolist(), error_steps.tolist()))
    assert found[0] == found[1]
    assert found[0][1] == [-1, 1, 2, 3, -1]


@pytest.mark.gpu
@pytest.mark.parametrize("V", [333, 16384, 102400])
def test_cuda_graph_capture(V: int) -> None:
    logits, seeds = torch.randn(2, 8, V, device="cuda"), torch.arange(8, device="cuda")
    for options in ({}, {"top_k": 50, "top_p": 0.9}):
        codes, error_steps, steps = (
            torch.zeros(8).long().cuda(),
            torch.full((8,), -1).cuda(),
            torch.zeros(8).long().cuda(),
        )
        tokens = torch.zeros(8, 5).long().cuda()
        given: dict[str, Any] = {
            "seeds": seeds,
            "steps": steps,
            "codes": codes,
            "error_steps": error_steps,
            "tokens": tokens,
        }
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            sample_codes_into(*logits, guidance_scale=5.0, **options, **given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sample_codes_into(*logits, guidance_scale=5.0, **options, **given)
            steps += 1
        steps.zero_()
        for _ in range(5):
            graph.replay()
        for step in range(5):
            expected = sample_codes(*logits, guidance_scale=5.0, seeds=seeds, step=step, **options)  # type: ignore[arg-type]
            assert torch.equal(tokens[:, step], expected)
        assert (error_steps == -1).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(7, 1.0), (0, 0.7), (40, 0.9), (1, 1.0), (600, 0.5), (0, 1e-6)])
def test_log_probabilities_after_truncation(top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of codes that are kept and sampled, of others, and of invalid rows; in C++ and by the reference."""
    logits = (torch.randn(60, 531) * 3).round(decimals=1)  # with ties
    given: dict[str, Any] = {"temperature": 0.8, "top_k": top_k, "top_p": top_p}

    def sample(logits: Tensor, *uncond: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        codes, errors, logps = torch.empty(60).long(), torch.full((60,), -1), torch.full((60,), 7.0)
        vectors = {"seeds": torch.arange(60), "steps": torch.full((60,), 3), "codes": codes, "error_steps": errors}
        sample_codes_into(logits, *uncond, **given, **options, **vectors, logps=logps)
        return codes, logps

    codes, found = sample(logits)
    assert torch.equal(codes, sample_codes(logits, **given, seeds=list(range(60)), step=3))
    kept = _truncate(logits / torch.tensor(0.8), min(top_k, 531), top_p)
    expected = kept.double().log_softmax(1).gather(1, codes[:, None])[:, 0]
    if top_k < 531 or top_p < 1:
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    uncond = torch.randn(60, 531)
    both = sample(logits, uncond, guidance_scale=1.5)
    torch.testing.assert_close(both, sample(uncond + 1.5 * (logits - uncond)))
    invalid = logits.clone()
    invalid[0, 5], invalid[1], invalid[2, 530] = torch.nan, -torch.inf, torch.inf
    spoiled = sample(invalid)
    assert bool(spoiled[1][:3].isnan().all())
    assert torch.equal(spoiled[1][3:], found[3:])
    monkeypatch.setattr(_dispatch, "resolve", lambda *_, **__: "torch")
    for case, theirs in ((logits, (codes, found)), (invalid, spoiled)):
        torch.testing.assert_close(sample(case), theirs, equal_nan=True)

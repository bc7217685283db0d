"""Each op equals its reference on the largest and smallest numbers of a dtype, infinities and NaN.

The reference is the PyTorch backend, or float64 where the dtype itself overflows without need.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast import (
    attention_columns,
    cross_entropy,
    object_masks,
    otsu_threshold,
    preference_loss,
    sample_codes,
    sequence_logprobs,
    token_logprobs,
    token_weights,
)
from ospo_fast.errors import OpError
from ospo_fast.ops._chunked_head import RowResults, RowScales, TokenLogprobsOptions, _softmax_native, _softmax_torch
from ospo_fast.ops.attention_columns import attention_columns_reference
from ospo_fast.ops.decode_attention import decode_attention
from ospo_fast.ops.linear import PackedLinear, gelu_
from ospo_fast.ops.object_masks import object_masks_reference, soft_masks, spatial_entropy
from ospo_fast.ops.otsu import otsu_threshold_reference
from ospo_fast.ops.rms_norm import add_rms_norm
from ospo_fast.ops.sample_codes import sample_codes_reference
from ospo_fast.ops.scale_rows import scale_rows
from ospo_fast.ops.silu_mul import silu_mul
from ospo_fast.ops.token_logprobs import token_logprobs_reference
from ospo_fast.ops.token_weights import token_weights_reference

INF, NAN = math.inf, math.nan
MAX, TINY, SUBNORMAL = torch.finfo(torch.float32).max, 2.0**-126, 2.0**-149
# exp(x) is subnormal from -87.3 and 0 from -104 downwards, infinite from 88.72 upwards.
NUMBERS = [0.0, 1.0, 0.3, 10.0, 86.9, 87.2, 88.3, 88.7, 88.8, 100.0, 110.0, 1e10, 1.8e19, 2e19, 1e38, MAX / 2, MAX]
NUMBERS = [sign * x for x in [*NUMBERS, SUBNORMAL, TINY / 3, TINY, 1e-20, INF] for sign in (1, -1)] + [NAN]
FEW = [0.0, 1.0, -89.0, 1e38, MAX, -MAX, INF, -INF, NAN]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def assert_equal(ours: Tensor, expected: Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def every(dtype: torch.dtype) -> Tensor:
    """All 65536 numbers of a 16-bit dtype."""
    return torch.arange(65536).to(torch.int32).to(torch.int16).view(dtype)


def outcome(function: Callable[[], Any]) -> Any:
    """The result, or the error's message."""
    try:
        return function()
    except OpError as error:
        return str(error)


# ---------------------------------------------------------------- elementwise ops and norms


@pytest.mark.parametrize("up", [1.0, -0.3, 1e38, TINY, INF, NAN])
def test_silu_mul(up: float) -> None:
    gate = torch.cat((torch.tensor(NUMBERS), every(torch.bfloat16).float(), every(torch.float16).float()))
    gate_up = torch.cat((gate, torch.full_like(gate, up))).view(1, -1)
    # Of a subnormal silu one bit may be all.
    bound = 2 * SUBNORMAL * max(1.0, up if math.isfinite(up) else 0)
    assert_equal(silu_mul(gate_up, backend="cpp"), silu_mul(gate_up, backend="torch"), 1e-6, bound)


def test_gelu() -> None:
    """float64: torch's float32 gelu is infinite for the largest numbers, and NaN for infinity."""
    x = torch.cat((torch.tensor(NUMBERS), every(torch.bfloat16).float(), every(torch.float16).float()))
    x = x[x != -INF]  # 0 · infinity
    exact = torch.where(x == INF, INF, F.gelu(x.double()))
    assert_equal(gelu_(x.clone()), exact, 1e-6, 1e-6)


@FLOATS
def test_scale_rows(dtype: torch.dtype) -> None:
    scales = torch.tensor(NUMBERS)
    values = torch.tensor(NUMBERS) if dtype == torch.float32 else every(dtype)
    dhidden, packed_row = values.expand(len(scales), -1).contiguous(), torch.arange(len(scales))
    assert_equal(scale_rows(dhidden, packed_row, scales, "cpp"), scale_rows(dhidden, packed_row, scales, "torch"))


@pytest.mark.parametrize("eps", [1 / 3, 1e-6, 0.0])
@pytest.mark.parametrize("width", [1, 16, 35])
def test_add_rms_norm(width: int, eps: float) -> None:
    rows = torch.ones(2, len(NUMBERS), width)
    rows[0, :, 0] = torch.tensor(NUMBERS)
    rows[1] = torch.tensor(NUMBERS)[:, None]
    rows, weight = rows.view(-1, width), torch.full((width,), 1 / 3)
    for delta in (None, torch.full_like(rows, MAX), torch.full_like(rows, -1e-20)):
        ours, residual = rows.clone(), rows.clone()
        out = add_rms_norm(delta, ours, weight, eps, backend="cpp")
        assert_equal(out, add_rms_norm(delta, residual, weight, eps, backend="torch"), 2e-6, SUBNORMAL)
        assert_equal(ours, residual)


def test_linear() -> None:
    module = nn.Linear(1, 19)
    module.weight.data, module.bias.data = torch.randn(19, 1), torch.randn(19)
    module.weight.data[3:6, 0] = torch.tensor([MAX, INF, NAN])
    x = torch.tensor(NUMBERS)[:, None]
    assert_equal(PackedLinear([module])(x), F.linear(x, module.weight, module.bias).detach(), 1e-6)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("values", [(1.0, 2.0), (0.9 * MAX, MAX / 2), (INF, 1.0), (0.0, NAN)])
@pytest.mark.parametrize("cached", [1, 6, 17])
def test_decode_attention(cached: int, values: tuple[float, float]) -> None:
    """SDPA gives 0 where all scores are NaN, and infinite scores where the scale makes them finite."""
    cos, sin, zero = torch.ones(cached + 1, 16), torch.zeros(cached + 1, 16), torch.zeros(1, dtype=torch.int64)
    for q, first, new, scale in itertools.product((1.0, 1e10, INF, NAN), FEW, FEW, (0.25, 1e-12)):
        keys, cache = torch.zeros(2, 1, 1, cached + 1, 16)
        keys[..., 0, 0], cache[..., :-1, :] = first, values[0]
        qkv = torch.zeros(3, 16)
        qkv[0, 0], qkv[1, 0], qkv[2] = q, new, values[1]
        out = [
            decode_attention(
                qkv.view(1, -1), cos, sin, keys.clone(), cache.clone(), zero, zero + cached, heads=1, scale=scale,
                backend=backend,
            )
            for backend in ("cpp", "torch")
        ]  # fmt: skip
        assert_equal(*out, 1e-5)
        if math.isfinite(q * first * new) and math.isfinite(sum(values)) and q * scale <= 1:
            scores = torch.zeros(cached + 1, dtype=torch.float64)
            scores[0], scores[-1] = q * scale * first, q * scale * new
            exact = scores.softmax(0) @ torch.tensor([*[values[0]] * cached, values[1]], dtype=torch.float64)
            assert_equal(out[0][0, 0], exact, 1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 1 / 3, 1e-12])
def test_attention_columns(causal: bool, scale: float | None) -> None:
    columns = torch.tensor([[[0, 2], [1, -1]]])
    for query, *numbers in itertools.product((1.0, 1e10, INF, NAN), FEW, FEW, (0.0, MAX, -INF)):
        q, k = torch.zeros(2, 1, 1, 3, 16)
        q[..., 0], k[..., 0] = query, torch.tensor(numbers)
        options: dict[str, Any] = {"rows": (0, 3), "scale": scale, "causal": causal}
        ours = attention_columns(q, k, columns, backend="cpp", **options)
        assert_equal(ours, attention_columns(q, k, columns, backend="torch", **options), 1e-6, 1e-7)
        if (q * (scale or 0.25) * k.abs()).isfinite().all() or not math.isfinite(query):
            assert_equal(ours, attention_columns_reference(q, k, columns, **options), 1e-5, 1e-6)


@pytest.mark.parametrize("lse", [0.0, MAX, -MAX, INF, -INF, NAN])
def test_attention_columns_with_lse(lse: float) -> None:
    for query, key in itertools.product((1.0, 1e20), FEW):
        q, k = torch.zeros(2, 1, 1, 2, 16)
        q[..., 0], k[..., 0] = query, key
        options: dict[str, Any] = {"rows": (0, 2), "scale": 1e-12, "lse": torch.full((1, 1, 2), lse)}
        columns = torch.tensor([[[0]]])
        ours, torchs = (attention_columns(q, k, columns, backend=backend, **options) for backend in ("cpp", "torch"))
        assert_equal(ours, torchs, 1e-5)


def test_attention_columns_of_large_scores_in_float64() -> None:
    """exp(score − lse) would lose as many digits as the scores have."""
    for size in (1.0, 1e3, 1e9, 1e30, 1e300):
        q, k = torch.randn(2, 1, 2, 9, 4, dtype=torch.float64)
        k[:, :, 3] = k[:, :, 5]  # two equal scores
        columns, options = torch.tensor([[[3, 5, 7]]]), {"rows": (0, 9), "scale": size / 3}
        exact = ((q * (size / 3)) @ k.mT).softmax(-1).mean(1)[:, None, :, [3, 5, 7]].mean(-1)
        for function in (attention_columns, attention_columns_reference):
            assert_equal(function(q, k, columns, causal=False, **options), exact, 0, 1e-13)


# ---------------------------------------------------------------- maps, masks and weights


@pytest.mark.parametrize("bins", [256, 7, 2, 1])
@pytest.mark.parametrize("offset", [0.0, -0.5, -1.0])
@FLOATS
def test_maps_of_any_range(dtype: torch.dtype, offset: float, bins: int) -> None:
    unit = torch.rand(6, 6) + offset
    exact = otsu_threshold_reference(unit.double(), bins=bins)
    for size in (100 * SUBNORMAL, 1e-40, TINY, 1e-30, 1e-20, 1e-12, 1e12, 1e19, 1e25, 1e30, 1e37, MAX / 2, MAX):
        maps = (unit.double() * size).to(dtype)
        ours = outcome(lambda m=maps: otsu_threshold(m, bins=bins))
        reference = outcome(lambda m=maps: otsu_threshold_reference(m, bins=bins))
        if isinstance(ours, str):
            assert ours == reference
        else:
            assert torch.equal(ours, reference)
        if dtype == torch.float32 and size >= 1e-30:
            assert_equal(ours / size, exact, 0, 0.51 / bins)  # another bin only by rounding
        assert_same_masks(maps, bins)


@pytest.mark.parametrize("value", [INF, -INF, NAN, MAX, -MAX])
def test_maps_with_one_extreme_cell(value: float) -> None:
    maps = torch.rand(6, 6)
    maps[2, 3] = value
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = maps.to(dtype)
        ours, reference = (outcome(lambda f=f, m=cast: f(m)) for f in (otsu_threshold, otsu_threshold_reference))
        assert ours == reference
        assert_same_masks(cast, 256)
    maps[1, 1] = -maps[2, 3]  # the range overflows
    assert_same_masks(maps, 256)


def assert_same_masks(maps: Tensor, bins: int) -> None:
    ours = outcome(lambda: object_masks(maps[None, None], bins=bins))
    reference = outcome(lambda: object_masks_reference(maps[None, None], bins=bins))
    if isinstance(ours, str):
        assert ours == reference
        return
    for name in ("maps", "thresholds", "masks", "union"):
        assert torch.equal(getattr(ours, name), getattr(reference, name))
    assert torch.equal(soft_masks(ours, sharpness=MAX) > 0.5, ours.masks > 0)


def test_otsu_in_float64() -> None:
    unit = torch.rand(8, 8, dtype=torch.float64)
    for power in (-900, -500, 500, 1000):  # powers of two are exact
        assert torch.equal(otsu_threshold(unit * 2.0**power), otsu_threshold(unit) * 2.0**power)


def test_spatial_entropy() -> None:
    unit = torch.rand(4, 4, dtype=torch.float64)
    expected = spatial_entropy(unit)
    for power in (-1070, -1000, 300, 1023):
        tolerance = 1e-12 if power > -1070 else 0.2  # of subnormal cells few bits are left
        assert_equal(spatial_entropy(unit * 2.0**power), expected, tolerance)
    assert float(spatial_entropy(torch.zeros(2, 2))) == float(spatial_entropy(-torch.rand(2, 2))) == 0
    for value in (INF, NAN):
        assert spatial_entropy(torch.tensor([[value, 1.0]])).isnan()


@pytest.mark.parametrize("blur_size", [1, 5])
@pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 1.0), (1 / 3, 0.0), (1e38, 0.5), (2.0, 0.1)])
def test_token_weights(alpha: float, gamma: float, blur_size: int) -> None:
    options: dict[str, Any] = {"alpha": alpha, "gamma": gamma, "blur_size": blur_size, "blur_sigma": 1 / 3}
    for first, second in itertools.product(NUMBERS, (0.0, MAX, -MAX, INF)):
        mask = torch.rand(1, 5, 6)
        mask[0, 2, 2], mask[0, 3, 3] = first, second
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ours = token_weights(mask.to(dtype), **options)
            assert_equal(ours, token_weights_reference(mask.to(dtype), **options), 1e-6)
    largest = torch.tensor([[[1.0, -1.0, 0.5]]], dtype=torch.float64)
    limit = token_weights(largest * torch.finfo(torch.float64).max, **options)
    assert_equal(limit, token_weights(largest * 1e200, **options), 1e-12)


# ---------------------------------------------------------------- log-probabilities and losses

SCORES = [(1.0, None), (1 / 3, None), (1e-37, None), (1e37, None), (1.0, 5.0), (0.1, 1 / 3), (1.0, 1e37), (1.0, 1e-37)]


@pytest.mark.parametrize(("temperature", "softcap"), SCORES)
@pytest.mark.parametrize("plain", [True, False])
@FLOATS
def test_softmax_step(dtype: torch.dtype, plain: bool, temperature: float, softcap: float | None) -> None:
    logits = torch.tensor(list(itertools.product([30.0, *FEW], repeat=3)), dtype=dtype).repeat(3, 1)
    labels = torch.arange(3).repeat_interleave(len(logits) // 3)
    bias = torch.tensor([0.5, -0.25, 1.0])
    upstream = torch.tensor([[1.0, 0.5, -2.0], [0.3, 0.0, 1.0]]).repeat(1, len(logits) // 3)
    found = []
    for step, backend in ((_softmax_native, "cpp"), (_softmax_torch, "torch")):
        z, results = logits.clone(), RowResults(*(None if plain and i else torch.empty(len(logits)) for i in range(2)))
        scales = RowScales(upstream[0], None if plain else upstream[1])
        options = TokenLogprobsOptions(-100, 256, False, backend, False, temperature, softcap or 0.0)
        found.append((*results[: 1 if plain else 2], step(z, bias, labels, results, scales, options, z, dtype)))
    *results, gradient = zip(*found, strict=True)
    for ours, expected in results:
        assert_equal(ours, expected, 1e-5, 1e-5)
    unit = 1e-5 if dtype == torch.float32 else 1e-2
    assert_equal(*gradient, unit, unit * min(1 / temperature, MAX))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_statistics_of_rows_with_nan_and_of_masked_rows(backend: str) -> None:
    """The maximum of a part of the codes must show NaN, or other processes take the part for a negligible one."""
    logits = torch.tensor([[NAN, -100.0, 1.0], [NAN, -INF, -INF], [-INF, -INF, -INF], [1e30, 1.0, 0.5]])
    statistics, labels = torch.empty(4, 4), torch.full((4,), 2)
    options = TokenLogprobsOptions(-100, 256, False, backend, False, 0.5, 0.0)
    step = _softmax_native if backend == "cpp" else _softmax_torch
    step(logits, None, labels, RowResults(statistics=statistics), RowScales(), options, None, torch.float32)
    assert statistics[:2, 0].isnan().all()
    assert statistics[2, 0] == -INF
    assert statistics[3, 0] == 2e30
    assert statistics[3, 3] == 1  # not what is left of 0.5 − 1e30 + 1e30


@pytest.mark.parametrize("temperature", [1.0, 1 / 3])
@pytest.mark.parametrize("trained", [False, True])
def test_token_logprobs_of_extreme_hidden_states(trained: bool, temperature: float) -> None:
    """Of the public function. The head multiplies one number, so that no order of sums matters."""
    hidden = torch.tensor(NUMBERS)[:, None]
    found = []
    for backend in ("cpp", "torch"):
        head = nn.Linear(1, 3)
        head.requires_grad_(trained)
        head.weight.data, head.bias.data = torch.tensor([[1.0], [-1.0], [0.25]]), torch.tensor([0.5, 0.25, -1.0])
        x = hidden.clone().requires_grad_()
        labels = torch.arange(len(x)) % 3
        logps, entropy = token_logprobs(
            x, head, labels, backend=backend, temperature=temperature, return_entropy=True, keep_logits=True
        )
        gradients = torch.autograd.grad((logps, entropy), [x], [torch.ones(len(x)), torch.full((len(x),), 0.5)])
        found.append((logps.detach(), entropy.detach(), *gradients))
    for ours, expected in zip(*found, strict=True):
        assert_equal(ours, expected, 1e-5, 1e-5)


def test_softcap_over_temperature_beyond_float32() -> None:
    head, hidden, labels = nn.Linear(2, 3), torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)
    for function, backend in itertools.product((token_logprobs, cross_entropy), ("auto", "torch")):
        with pytest.raises(OpError, match=r"softcap / temperature is 1e\+37 / 0.01, expected at most 1e38"):
            function(hidden, head, labels, softcap=1e37, temperature=0.01, backend=backend)


@pytest.mark.parametrize("weight", [MAX, INF, NAN, SUBNORMAL])
def test_cross_entropy_of_an_extreme_weight_leaves_other_rows_alone(weight: float) -> None:
    weights, labels = torch.tensor([weight, 1.0, 0.5]), torch.arange(3)
    head = nn.Linear(2, 4).requires_grad_(False)
    x = torch.randn(3, 2, requires_grad=True)
    loss = cross_entropy(x, head, labels, weights=weights, reduction="sum")
    expected = (weights * F.cross_entropy(head(x), labels, reduction="none")).sum()
    assert_equal(loss, expected, 1e-5)
    ours, exact = torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0]
    # Gradients are kept relative to the largest weight. With the largest number they are subnormal.
    assert_equal(ours, exact, 1e-3 if weight == MAX else 1e-5, 1e-7)


def test_sequence_logprobs() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    logps = torch.tensor([[-MAX] * 4, [-INF, -1.0, -1.0, -1.0], [NAN, -1.0, -1.0, -1.0], [-1.0] * 4])
    assert_equal(sequence_logprobs(logps, mask), torch.tensor([-MAX, -INF, NAN, -1.0]))
    assert_equal(sequence_logprobs(logps, mask, torch.full((4, 4), MAX)), torch.tensor([-MAX, -INF, NAN, -1.0]))
    mask[1:3, 0] = False
    assert_equal(sequence_logprobs(logps, mask), torch.tensor([-MAX, -1.0, -1.0, -1.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_preference_loss(smoothing: float, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    chosen = torch.tensor([0.0, -INF, largest, -largest, -1.0, NAN, -INF], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-INF, 0.0, -largest, largest, -2.0, 0.0, -INF], dtype=dtype)
    simpo = preference_loss(chosen, rejected, beta=0.1, gamma_beta_ratio=1 / 3, label_smoothing=smoothing).simpo
    x = 0.1 * (1 - 1 / 3)
    middle = (1 - smoothing) * math.log1p(math.exp(-x)) + smoothing * math.log1p(math.exp(x))
    sure, lost = (0.0, INF) if not smoothing else (INF, INF)
    assert_equal(simpo[[0, 1, 4, 5, 6]], torch.tensor([sure, lost, middle, NAN, NAN], dtype=torch.float64), 1e-6)
    if not smoothing:
        assert simpo[2] == 0
        gradient = torch.autograd.grad(simpo[0], chosen)[0]
        assert gradient[0] == 0


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5, 1 / 3, 1e-30, 1e30])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2, 1.0), (0, 0.7), (2, 0.5)])
def test_sample_codes(top_k: int, top_p: float, temperature: float) -> None:
    logits = torch.tensor(list(itertools.product([0.0, 1.0, MAX, -MAX, SUBNORMAL, INF, -INF, NAN], repeat=3)))
    assert_same_codes(logits, None, temperature=temperature, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.5, -1.0, 1 / 3, 1e38])
def test_guided_sampling(guidance_scale: float) -> None:
    both = torch.tensor(list(itertools.product([0.0, 1.0, MAX, -MAX, INF, -INF, NAN], repeat=4)))
    assert_same_codes(both[:, :2], both[:, 2:], guidance_scale=guidance_scale)


def assert_same_codes(cond: Tensor, uncond: Tensor | None, **options: Any) -> None:
    seeds = torch.arange(len(cond))
    expected, invalid = sample_codes_reference(cond, uncond, seeds=seeds, steps=seeds * 3, **options)
    rows = invalid.nonzero().flatten().tolist()
    with pytest.raises(OpError) as error:
        sample_codes(cond, uncond, seeds=seeds, step=seeds * 3, **options)
    assert f"rows {rows} hold" in str(error.value)
    valid = ~invalid
    cond, uncond = cond[valid], None if uncond is None else uncond[valid]
    codes = sample_codes(cond, uncond, seeds=seeds[valid], step=seeds[valid] * 3, **options)
    assert torch.equal(codes, expected[valid])


# ---------------------------------------------------------------- float64


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.1, None), (1 / 3, 0.7), (1e-3, 10 / 3)])
@pytest.mark.parametrize("trained", [False, True])
def test_log_probabilities_in_float64(trained: bool, temperature: float, softcap: float | None) -> None:
    """No scalar argument and no intermediate is rounded to float32."""
    head = nn.Linear(5, 7, dtype=torch.float64).requires_grad_(trained)
    labels = torch.tensor([0, 6, -100, 3])
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "return_entropy": True}
    upstream = torch.randn(2, 4, dtype=torch.float64).unbind()
    inputs = [x, *(head.parameters() if trained else ())]
    ours, exact = (f(x, head, labels, **options) for f in (token_logprobs, token_logprobs_reference))
    for one, other in zip(ours, exact, strict=True):
        assert_equal(one, other, 1e-13, 1e-13)
    gradients = [torch.autograd.grad(results, inputs, upstream) for results in (ours, exact)]
    for one, other in zip(*gradients, strict=True):
        assert_equal(one, other, 1e-12, 1e-13 / temperature)
    del options["return_entropy"]
    loss = cross_entropy(x, head, labels, weights=upstream[0].abs() / 3, reduction="mean", **options)
    mean = -(upstream[0].abs() / 3 * token_logprobs_reference(x, head, labels, **options)).sum() / 3
    assert_equal(loss, mean, 1e-13)
    for one, other in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(mean, inputs), strict=True):
        assert_equal(one, other, 1e-12, 1e-13 / temperature)


def test_other_ops_in_float64() -> None:
    """Against formulas in Python's float, with arguments that float32 cannot represent."""
    x = torch.randn(3, 8, dtype=torch.float64)
    root = [[v / math.sqrt(math.fsum(u * u for u in row) / 8 + 0.1) for v in row] for row in x.tolist()]
    norm = add_rms_norm(None, x.clone(), torch.full((8,), 1 / 3, dtype=torch.float64), 0.1)
    assert_equal(norm, torch.tensor(root, dtype=torch.float64) / 3, 1e-13)
    silu = [[v / (1 + math.exp(-v)) * u for v, u in zip(row[:4], row[4:], strict=True)] for row in x.tolist()]
    assert_equal(silu_mul(x), torch.tensor(silu, dtype=torch.float64), 1e-13)
    assert_equal(scale_rows(x, torch.tensor([2, 0, -1]), x[:, 0].contiguous(), "torch")[0], x[2] * x[0, 0], 1e-15)
    mask = torch.rand(1, 1, 4, dtype=torch.float64)
    low, high = float(mask.min()), float(mask.max())
    weights = [1 + 0.1 * ((v - low) / (high - low + 1e-8)) ** (1 / 3) for v in mask.flatten().tolist()]
    assert_equal(token_weights(mask, alpha=0.1, gamma=1 / 3, blur_size=1)[0], torch.tensor(weights).double(), 1e-6)
    exact = torch.tensor(weights, dtype=torch.float64)
    assert_equal(token_weights(mask, alpha=0.1, gamma=1 / 3, blur_size=1)[0], exact, 1e-13)
    masks = object_masks(mask[None], scaler=1 / 3)
    soft = torch.sigmoid(0.1 * (masks.maps - masks.thresholds[..., None, None] / 3))
    assert_equal(soft_masks(masks, scaler=1 / 3, sharpness=0.1), soft, 1e-13)
    mean = sequence_logprobs(x, torch.ones(3, 8, dtype=torch.bool), torch.full((3, 8), 1 / 3, dtype=torch.float64))
    assert_equal(mean, torch.tensor([math.fsum(row) / 8 for row in x.tolist()], dtype=torch.float64), 1e-12)
    simpo = preference_loss(x[:, 0], x[:, 1], beta=0.1, gamma_beta_ratio=1 / 3).simpo
    expected = [math.log1p(math.exp(-0.1 * (row[0] - row[1] - 1 / 3))) for row in x.tolist()]
    assert_equal(simpo, torch.tensor(expected, dtype=torch.float64), 1e-13)
    qkv, cache = torch.randn(1, 12, dtype=torch.float64), torch.randn(2, 1, 1, 3, 4, dtype=torch.float64)
    cos, sin = torch.ones(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.int64)
    out = decode_attention(qkv, cos, sin, *cache, zero, zero + 2, heads=1, scale=0.1)
    assert_equal(out[0], (0.1 * qkv[0, :4] @ cache[0, 0, 0].T).softmax(-1) @ cache[1, 0, 0], 1e-13)

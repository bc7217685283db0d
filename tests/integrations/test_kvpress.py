"""The press against kvpress's own under eager, and what it refuses before anything is pruned.

kvpress excludes the transformers of these tests, so a stand-in of its two classes runs in its place. Where kvpress is
installed all the same, the tests run with both.
"""

import dataclasses
import importlib
import importlib.util
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import ospo_fast.integrations
from ospo_fast.errors import OpError, UsageError

S = 24
NAME = "ospo_fast.integrations.kvpress"
LIBRARIES = ["stand-in", *(["kvpress"] if importlib.util.find_spec("kvpress") else [])]


def build_stand_in() -> types.ModuleType:
    """Return a module with the classes of kvpress 0.5.5 that matter here, for caches without quantization."""

    @dataclasses.dataclass
    class ScorerPress:
        compression_ratio: float = 0.0

        def __post_init__(self) -> None:
            assert 0 <= self.compression_ratio < 1

        def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
            raise NotImplementedError

        def compress(
            self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
        ) -> Any:
            if self.compression_ratio == 0:
                return keys, values
            scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
            kept = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
            indices = scores.topk(kept, dim=-1).indices[..., None].expand(-1, -1, -1, module.head_dim)
            return keys.gather(2, indices), values.gather(2, indices)

        def forward_hook(self, module: Any, _: Any, kwargs: Any, output: Any) -> Any:
            hidden_states, layer = kwargs["hidden_states"], kwargs["past_key_values"].layers[module.layer_idx]
            if kwargs["cache_position"][-1] + 1 == hidden_states.shape[1]:
                layer.keys, layer.values = self.compress(
                    module, hidden_states, layer.keys, layer.values, output[1], kwargs
                )
            return output

        @contextmanager
        def __call__(self, model: Any) -> Iterator[None]:
            attentions = [layer.self_attn for layer in model.model.layers]
            hooks = [module.register_forward_hook(self.forward_hook, with_kwargs=True) for module in attentions]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    @dataclasses.dataclass
    class ObservedAttentionPress(ScorerPress):
        def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
            assert attentions is not None
            B, kv, length, _ = keys.shape
            return (attentions.sum(2) / torch.arange(length, 0, -1)).view(B, kv, -1, length).mean(2)

    module: Any = types.ModuleType("kvpress")
    module.ScorerPress, module.ObservedAttentionPress = ScorerPress, ObservedAttentionPress
    return module


@pytest.fixture(params=LIBRARIES)
def kvpress(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return kvpress or its stand-in; `ospo_fast.integrations.kvpress` is imported with it."""
    library = build_stand_in() if request.param == "stand-in" else importlib.import_module("kvpress")
    monkeypatch.setitem(sys.modules, "kvpress", library)
    return library


@pytest.fixture
def press(kvpress: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the integration."""
    monkeypatch.setitem(sys.modules, NAME, None)
    monkeypatch.setattr(ospo_fast.integrations, "kvpress", None, raising=False)
    del sys.modules[NAME]
    return importlib.import_module(NAME)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 61, (2, S), generator=torch.Generator().manual_seed(0))


def sharpened(model: Any) -> Any:
    """Make the attention of a random model far from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(15)
            elif "sinks" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return model


def recording(press: Any, scores: list[Tensor]) -> Any:
    """Let a press note its scores."""
    score = press.score
    press.score = lambda *a: scores.append(score(*a)) or scores[-1]
    return press


def prefill(press: Any, model: Any, ids: Tensor, cache: Any = None, **options: Any) -> Any:
    """Run a forward under a press; return the cache."""
    from transformers import DynamicCache

    cache = DynamicCache() if cache is None else cache
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache, **options)
    return cache


# A window is below S. Ministral 3 scales its queries by their positions, Cohere and OLMo 2 make theirs otherwise than
# Llama, Gemma 2 caps its scores, gpt-oss has sinks: neither of the latter two runs with sdpa.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("sdpa", {}),
    "Qwen3": ("sdpa", {"head_dim": 16}),
    "Mistral": ("sdpa", {"sliding_window": 7}),
    "Ministral3": ("sdpa", {"head_dim": 8}),
    "Cohere": ("sdpa", {}),
    "Olmo2": ("sdpa", {}),
    "Gemma2": ("eager", {"head_dim": 16, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 4}),
    "GptOss": ("eager", {"head_dim": 16, "sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_keys_are_those_of_kvpress_under_eager(
    family: str, press: Any, kvpress: Any, build: Callable[..., Any], ids: Tensor
) -> None:
    implementation, config = FAMILIES[family]
    theirs: list[Tensor] = []
    ours: list[Tensor] = []
    expected = prefill(
        recording(kvpress.ObservedAttentionPress(0.4), theirs),
        sharpened(build(family, attn_implementation="eager", **config)),
        ids,
        cache_position=torch.arange(S),
    )
    model = sharpened(build(family, attn_implementation=implementation, **config))
    found = prefill(recording(press.BlockwiseObservedAttentionPress(0.4), ours), model, ids)
    assert model.config._attn_implementation == implementation
    assert all(layer.self_attn.config is model.model.layers[0].self_attn.config for layer in model.model.layers)
    assert len(ours) == len(theirs) == 2
    assert theirs[0].std() > 0.02
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    for ours_layer, layer in zip(found.layers, expected.layers, strict=True):
        assert ours_layer.keys.shape[2] == int(S * 0.6)
        torch.testing.assert_close(ours_layer.keys, layer.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours_layer.values, layer.values, atol=1e-5, rtol=1e-5)


def test_constructor_and_ratio_of_zero(press: Any, kvpress: Any, build: Callable[..., Any], ids: Tensor) -> None:
    ours, theirs = press.BlockwiseObservedAttentionPress, kvpress.ObservedAttentionPress
    assert issubclass(ours, kvpress.ScorerPress)
    assert [(f.name, f.default) for f in dataclasses.fields(ours)] == [
        (f.name, f.default) for f in dataclasses.fields(theirs)
    ]
    with pytest.raises(AssertionError):
        ours(1.0)
    scores: list[Tensor] = []
    cache = prefill(recording(ours(), scores), build(), ids)
    assert cache.layers[0].keys.shape[2] == S
    assert not scores


def test_only_the_prefill_is_pruned(press: Any, build: Callable[..., Any], ids: Tensor) -> None:
    model, scores = build(), []
    with recording(press.BlockwiseObservedAttentionPress(0.5), scores)(model), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for step, count in enumerate((1, 3)):
            positions = torch.arange(S + step, S + step + count)[None]
            model(ids[:, :count], past_key_values=cache, position_ids=positions)
    assert cache.layers[1].keys.shape[2] == S // 2 + 4
    assert len(scores) == 2


def test_window_of_an_attention_without_masks(press: Any, kvpress: Any, build: Callable[..., Any], ids: Tensor) -> None:
    """As flash attention: the mask is None, and the window is an argument."""
    register_maskless("maskless")
    config: dict[str, Any] = {"sliding_window": 7}
    theirs: list[Tensor] = []
    ours: list[Tensor] = []
    eager = sharpened(build("Mistral", attn_implementation="eager", **config))
    prefill(recording(kvpress.ObservedAttentionPress(0.4), theirs), eager, ids, cache_position=torch.arange(S))
    model = sharpened(build("Mistral", **config))
    model.config._attn_implementation = "maskless"
    prefill(recording(press.BlockwiseObservedAttentionPress(0.4), ours), model, ids)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def register_maskless(name: str) -> None:
    """Register an attention that gets the masks of flash attention, and runs as sdpa with a mask of its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
        visible = (j <= i) & (j > i - (options.get("sliding_window") or len(j)))
        visible = visible if mask is None else visible & mask.bool()[:, None, None]
        return sdpa_attention_forward(module, query, key, value, visible.expand(len(query), 1, -1, -1), **options)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])


# ---------------------------------------------------------------- what is refused


def unchanged(cache: Any) -> bool:
    """Whether no layer of a cache is pruned."""
    return all(not layer.is_initialized or layer.keys.shape[2] == S for layer in cache.layers)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "maskless"])
def test_padding_is_refused(implementation: str, side: str, press: Any, build: Callable[..., Any], ids: Tensor) -> None:
    from transformers import DynamicCache

    register_maskless("maskless")
    model, cache = build(), DynamicCache()
    model.config._attn_implementation = implementation
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(S - 3, S)] = 0
    with pytest.raises(OpError, match="expected a mask without padding; a padding mask does not fit the pruned cache"):
        prefill(press.BlockwiseObservedAttentionPress(0.5), model, ids, cache, attention_mask=mask)
    assert unchanged(cache)
    assert model.config._attn_implementation == implementation
    cache = prefill(press.BlockwiseObservedAttentionPress(0.5), model, ids, attention_mask=torch.ones_like(ids))
    assert cache.layers[1].keys.shape[2] == S // 2


def test_layers_that_are_refused(press: Any, build: Callable[..., Any], ids: Tensor) -> None:
    from transformers import DynamicCache

    register_maskless("maskless")
    register_maskless("flash_maskless")
    ours = press.BlockwiseObservedAttentionPress(0.5)

    def refused(reason: str, model: Any, cache: Any = None, **options: Any) -> None:
        cache = DynamicCache() if cache is None else cache
        with pytest.raises(UsageError, match=reason):
            prefill(ours, model, ids[:1], cache, **options)
        assert not cache.layers or unchanged(cache)

    model = build()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    refused("layer 0 is not causal", model)
    refused(r"runs 2 packed sequences \(cu_seq_lens_q\)", build(), cu_seq_lens_q=torch.tensor([0, 9, S]))
    assert prefill(ours, build(), ids[:1], cu_seq_lens_q=torch.tensor([0, S])).layers[0].keys.shape[2] == S // 2

    model, restarting = build(), torch.arange(S)[None] % 9
    model.config._attn_implementation = "flash_maskless"
    refused("position_ids that do not increase", model, position_ids=restarting)
    for option in ("position_bias", "sinks", "indices", "block_indices"):
        model = build()
        model.config._attn_implementation = "maskless"
        refused(f"changes its probabilities by {option}", model, **{option: torch.zeros(1, 4, S, S)})

    model = build()
    attention = model.model.layers[0].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    attention.register_forward_hook(
        lambda _, args, kwargs, __: kwargs["past_key_values"].update(*torch.zeros(2, 1, 2, S, 8), 0) and None,
        with_kwargs=True,
    )
    refused("LlamaAttention computes its attention itself", model)


def test_caches_without_all_keys_are_refused(press: Any, build: Callable[..., Any], ids: Tensor) -> None:
    from transformers import DynamicCache

    ours, model = press.BlockwiseObservedAttentionPress(0.5), build("Mistral", sliding_window=7)
    cache = DynamicCache(config=model.config)
    with pytest.raises(UsageError, match=r"runs 24 positions, and the press has 24 of their hidden states and 6 keys"):
        prefill(ours, model, ids, cache)
    assert cache.layers[0].keys.shape[2] == 6
    module, hidden, keys = model.model.layers[0].self_attn, torch.zeros(1, S, 32), torch.zeros(1, 2, 9, 8)
    with pytest.raises(UsageError, match=r"runs 24 positions, and the press has 9 of their hidden states and 9 keys"):
        ours.score(module, hidden[:, :9], keys, keys, None, {"hidden_states": hidden})


@pytest.mark.parametrize("library", [None, types.ModuleType("kvpress")])
def test_missing_kvpress(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", library)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(UsageError, match=r"kvpress cannot be imported \(.*\), expected kvpress 0.5; run pip install"):
        importlib.import_module(NAME)


# ---------------------------------------------------------------- mean_attention_received


def oracle(
    q: Tensor, k: Tensor, visible: Tensor, *, bias: Any = 0, scale: float | None = None, softcap: Any = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute the attention received in float64 from the whole matrix; visible (…, S, S) bool."""
    B, heads, length, D = q.shape
    scores = q.double() @ k.double().repeat_interleave(heads // k.shape[1], 1).mT * (scale or D**-0.5)
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = (scores + bias).masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(B, -1, length, 1)], -1)
    received = scores.softmax(-1)[..., :length].sum(2) / torch.arange(length, 0, -1)
    return received.view(B, k.shape[1], -1, length).mean(2)


def test_any_shape_and_mask(press: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        B, kv, group, length, D = (rng.randint(1, n) for n in (3, 3, 3, 13, 9))
        heads, window = kv * group, rng.choice([None, 1, 3, 20])
        q, k = torch.randn(B, heads, length, D).double() * 2, torch.randn(B, kv, length, D).double() * 2
        options = {"softcap": rng.choice([None, 2.0]), "scale": rng.choice([None, 0.3])}
        options["sinks"] = rng.choice([None, torch.randn(heads) * 20])
        i, j = torch.arange(length)[:, None], torch.arange(length)
        visible = (j <= i) & (j > i - (window or length))
        bias = torch.randn(rng.choice([1, B]), rng.choice([1, heads]), length, length).double()
        holes = visible & ((torch.rand(B, 1, length, length) < 0.7) | (i == j))
        expected = oracle(q, k, visible, **options)
        masks: list[tuple[Any, Tensor]] = [
            (None, expected),
            (torch.ones(B, length), expected),
            (holes, oracle(q, k, holes, **options)),
            (torch.nn.functional.pad(holes, (0, 2)), oracle(q, k, holes, **options)),  # a larger cache
            (bias.masked_fill(~visible, torch.finfo().min), oracle(q, k, visible, bias=bias, **options)),
        ]  # fmt: skip
        monkeypatch.setattr(press, "_BLOCK_BYTES", rng.choice([1, 8 * group * length * 3, 2**20]))
        for mask, exact in masks:
            found = press.mean_attention_received(q, k, mask=mask, window=window, **options)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)
            found = press.mean_attention_received(q.float(), k.float(), mask=mask, window=window, **options)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), exact, atol=2e-6, rtol=0)


def test_blocks_bound_the_scores(press: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is larger than a block, and there is no matrix of all rows and keys."""
    q, k = torch.randn(2, 4, 64, 8), torch.randn(2, 2, 64, 8)
    whole = press.mean_attention_received(q, k)
    sizes: list[int] = []
    product = Tensor.__matmul__

    def counted(*a: Tensor) -> Tensor:
        sizes.append(product(*a).numel())
        return product(*a)

    monkeypatch.setattr(Tensor, "__matmul__", counted)
    limit = 2 * 64 * 5  # five rows of the two heads of a group
    monkeypatch.setattr(press, "_BLOCK_BYTES", limit * 4)
    for mask in (None, torch.ones(64, 64, dtype=torch.bool).tril()[None, None]):
        sizes.clear()
        torch.testing.assert_close(press.mean_attention_received(q, k, mask=mask), whole, atol=1e-7, rtol=1e-5)
        assert len(sizes) >= 2 * 2 * 64 // 5
        assert limit / 2 < max(sizes) <= limit


def test_bfloat16_sums_in_fp32(press: Any) -> None:
    """Also under autocast, which would round the scores."""
    q, k = torch.randn(1, 4, 200, 16).bfloat16(), torch.randn(1, 2, 200, 16).bfloat16()
    exact = oracle(q, k, torch.ones(200, 200, dtype=torch.bool).tril())
    with torch.autocast("cpu", torch.bfloat16):
        found = press.mean_attention_received(q.requires_grad_(), k)
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=0)


def test_wrong_arguments(press: Any) -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    for wrong in (k[:, :, :5], k[..., :4], k[:1], torch.randn(2, 3, 6, 8)):
        with pytest.raises(OpError, match=r"k has shape .* Hq a multiple of Hkv"):
            press.mean_attention_received(q, wrong)
    for mask in (torch.ones(2, 5), torch.ones(2, 3, 6, 6), torch.ones(2, 1, 5, 6), torch.ones(6), "causal"):
        with pytest.raises(OpError, match=r"the mask is \w+ with shape .*, expected None, \(2, 6\) or"):
            press.mean_attention_received(q, k, mask=mask)
    visible = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    visible[1, 0, :, 0] = False
    for mask in (visible, torch.where(visible, 0.0, -torch.inf), visible[:, 0, -1]):
        with pytest.raises(OpError, match="hides positions from themselves"):
            press.mean_attention_received(q, k, mask=mask)

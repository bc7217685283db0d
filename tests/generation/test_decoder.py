"""InferenceDecoder against transformers, and the bitwise independence of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from ospo_fast.errors import OspoError
from ospo_fast.generation import decoder as decoder_module
from ospo_fast.generation import varlen
from ospo_fast.generation.decoder import CPU_BYTES, ROW_TILE, Cache, InferenceDecoder
from ospo_fast.generation.projections import (
    FusedProjection,
    ModuleProjection,
    PackedHead,
    UnfusedProjection,
    head_projection,
)
from ospo_fast.generation.requests import CUDA_ROWS, max_batch_size
from ospo_fast.ops.linear import PackedLinear

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel


class Bare:
    """The part of a unified model that the decoder uses."""

    def __init__(self, decoder: torch.nn.Module, embeddings: torch.Tensor | None = None) -> None:
        self.decoder = decoder
        self.device = torch.device("cpu")
        self.dtype = getattr(decoder, "dtype", torch.float32)
        self.max_positions = 64
        self.embeddings = embeddings

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embeddings[ids]


@pytest.fixture
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Packed weights, fused ones as on a GPU, or weights read in place as of a large model."""
    if request.param == "fused":
        monkeypatch.setattr(decoder_module, "packed_linear_runs", bool)
    if request.param == "unfused":
        monkeypatch.setattr(decoder_module, "COPIED_BYTES", 0)
    return str(request.param)


def llama(**changes: object) -> Any:
    from transformers import LlamaConfig, LlamaModel

    sizes = {
        "vocab_size": 10, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 64, **changes,
    }  # fmt: skip
    return LlamaModel(LlamaConfig(**sizes)).eval()


GROUPED = {"num_key_value_heads": 2}
WIDE_HEADS = {"head_dim": 16}  # wider than hidden / heads
BIASES = {"attention_bias": True, "mlp_bias": True}
SCALED_ROTARY = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}


@pytest.mark.parametrize(
    ("products", "changes"),
    [
        ("packed", GROUPED),
        ("packed", BIASES | WIDE_HEADS),
        ("fused", {}),
        ("fused", GROUPED | BIASES),
        ("unfused", SCALED_ROTARY),
        ("unfused", BIASES),
    ],
    indirect=["products"],
)
@pytest.mark.usefixtures("products")
@torch.no_grad()
def test_hidden_states_equal_those_of_transformers(changes: dict) -> None:
    model = llama(**changes)
    decoder = InferenceDecoder(Bare(model))
    x = torch.randn(5, 24, 48)
    expected = model(inputs_embeds=x).last_hidden_state
    # A prompt, a longer suffix behind it, then single steps: the three ways in which the engine calls it.
    cache = Cache(decoder, 5, 24)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    parts = [decoder(x[:, :9], cache, 0), decoder(x[:, 9:16], cache, 9)]
    parts += [decoder(x[:, i : i + 1], cache, i) for i in range(16, 24)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(
    ("products", "piece"),
    [("packed", 1024), ("packed", 12), ("fused", 12)],  # all prompts in one piece; in several, one prompt longer
    indirect=["products"],
)
@torch.no_grad()
def test_prompts_of_any_length_run_together_and_step_at_their_own_positions(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "PREFILL", piece)
    model, lengths = llama(), [5, 13, 1, 5, 8]
    embeddings = torch.randn(10, 48)
    decoder = InferenceDecoder(Bare(model, embeddings))
    whole = [torch.randint(10, (length + 3,)) for length in lengths]
    cache, slots = Cache(decoder, 7, 20), [6, 0, 3, 2, 4]
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    found = [decoder.prefill([ids[:n] for ids, n in zip(whole, lengths, strict=True)], cache, slots)]
    rows, filled = torch.tensor(slots), torch.tensor(lengths)
    for i in range(3):
        x = torch.stack([embeddings[ids[n + i]] for ids, n in zip(whole, lengths, strict=True)])
        found.append(decoder.step(x, cache, rows, filled + i))
    for row, (ids, n) in enumerate(zip(whole, lengths, strict=True)):
        expected = model(inputs_embeds=embeddings[ids][None]).last_hidden_state[0, n - 1 :]
        torch.testing.assert_close(torch.stack([h[row] for h in found]), expected, rtol=1e-5, atol=1e-5)


def by_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Attention over packed sequences, one after the other."""
    assert q.shape == k.shape == v.shape
    lengths = bounds.diff().tolist()
    assert max(lengths) == longest
    found = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), is_causal=True, scale=scale)
        for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    return torch.cat([y[0].transpose(0, 1) for y in found])


@torch.no_grad()
def test_packed_attention_runs_all_lengths_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with SDPA in place of torch's kernel for packed sequences."""
    decoder = InferenceDecoder(Bare(llama(**GROUPED), torch.randn(10, 48)))
    prompts, slots = [torch.randint(10, (length,)) for length in (5, 13, 1, 5, 8)], [6, 0, 3, 2, 4]
    calls: list[int] = []

    def attention(*given: Any) -> torch.Tensor:
        calls.append(given[4])
        return by_sdpa(*given)

    def run() -> tuple[torch.Tensor, Cache]:
        cache = Cache(decoder, 7, 20)
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        return decoder.prefill(prompts, cache, slots), cache

    expected, stored = run()
    assert not calls
    monkeypatch.setattr(decoder_module, "varlen_runs", lambda *_: True)
    monkeypatch.setattr(decoder_module, "varlen_attention", attention)
    found, cache = run()
    assert calls == [13, 13]  # once a layer
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in ((cache.keys, stored.keys), (cache.values, stored.values)):
        assert torch.equal(mine.isnan(), theirs.isnan())
        torch.testing.assert_close(mine.nan_to_num(), theirs.nan_to_num(), rtol=1e-5, atol=1e-5)


def test_packed_attention_is_tested_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
        """Attention of all tokens to all."""
        y = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))
        return y[0].transpose(0, 1)

    def half_of_the_keys(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
        """The right result, with gradients of the keys that are too small."""
        result: torch.Tensor = by_sdpa(q, 0.5 * k + 0.5 * k.detach(), *rest)
        return result

    def missing(*_: object) -> torch.Tensor:
        raise RuntimeError("no such operation\nand where it was called")

    def gone(*_: object) -> torch.Tensor:
        found: torch.Tensor = torch.ops.aten._no_such_operator()
        return found

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")

    device = torch.device("cpu")
    assert not varlen.varlen_runs(device, torch.float32, 8)
    for attention, reason in (
        (by_sdpa, ""),
        (unmasked, "its error is"),
        (missing, "(no such operation)"),
        (gone, "has no attribute '_no_such_operator'"),
    ):
        caplog.clear()
        monkeypatch.setattr(varlen, "varlen_attention", attention)
        for backward in (False, True):
            assert varlen._matches_sdpa.__wrapped__(device, torch.bfloat16, 8, backward) == (not reason)
            assert reason in caplog.text
            caplog.clear()
    monkeypatch.setattr(varlen, "varlen_attention", half_of_the_keys)
    assert varlen._matches_sdpa.__wrapped__(device, torch.bfloat16, 8, False)
    assert not varlen._matches_sdpa.__wrapped__(device, torch.bfloat16, 8, True)
    # Running out of memory is no verdict.
    monkeypatch.setattr(varlen, "varlen_attention", full)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            varlen._matches_sdpa(device, torch.bfloat16, 8)
    monkeypatch.setattr(varlen, "varlen_attention", by_sdpa)
    assert varlen._matches_sdpa(device, torch.bfloat16, 8)
    varlen._matches_sdpa.cache_clear()


@torch.no_grad()
def test_cache_rows_can_be_copied() -> None:
    decoder = InferenceDecoder(Bare(llama()))
    x = torch.randn(4, 12, 48)
    whole = Cache(decoder, 4, 12)
    expected = decoder(x, whole, 0)[:, 11]
    first = Cache(decoder, 4, 11)
    decoder(x[:, :11], first, 0)
    moved = Cache(decoder, 3, 12)
    order = torch.tensor([2, 0, 3])
    moved.copy(slice(None), first, order, 11)
    torch.testing.assert_close(decoder(x[order, 11:], moved, 11)[:, 0], expected[order])
    first.copy([0, 3], first, slice(1, 2), 11)
    assert torch.equal(first.keys[:, [0, 1, 3]], first.keys[:, 1:2].expand(-1, 3, -1, -1, -1))


@torch.no_grad()
def test_adapters_and_hooks_stay_in_force_and_refresh_reads_trained_weights() -> None:
    model = llama()
    decoder = InferenceDecoder(Bare(model))
    assert decoder.plain
    x = torch.randn(2, 8, 48)

    def now() -> torch.Tensor:
        return decoder(x, Cache(decoder, 2, 8), 0)

    before = now()
    model.layers[1].self_attn.k_proj.weight.mul_(2)
    model.layers[0].mlp.up_proj.weight.mul_(2)
    decoder.refresh()
    assert not torch.allclose(now(), before)
    torch.testing.assert_close(now(), model(inputs_embeds=x).last_hidden_state, rtol=1e-5, atol=1e-5)
    model.layers[1].self_attn.k_proj.register_forward_hook(lambda _, __, y: y * 3)
    model.layers[0].mlp.down_proj = torch.nn.Sequential(model.layers[0].mlp.down_proj, torch.nn.Tanh())
    decoder = InferenceDecoder(Bare(model))
    assert isinstance(decoder.layers[1].qkv, ModuleProjection)
    assert not decoder.plain
    torch.testing.assert_close(now(), model(inputs_embeds=x).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_no_worse_than_transformers(dtype: torch.dtype) -> None:
    model = llama()
    x = torch.randn(3, 9, 48)
    exact = model.double()(inputs_embeds=x.to(dtype).double()).last_hidden_state
    half = model.to(dtype)
    decoder = InferenceDecoder(Bare(half))
    assert isinstance(decoder.layers[0].qkv, FusedProjection)
    x = x.to(dtype)
    cache = Cache(decoder, 3, 9)
    found = torch.cat([decoder(x[:, :7], cache, 0)] + [decoder(x[:, i : i + 1], cache, i) for i in (7, 8)], 1)
    error = (half(inputs_embeds=x).last_hidden_state.double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 2 * error


def test_batches_are_padded_where_products_depend_on_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [InferenceDecoder(Bare(llama())).pad_rows(n, 7, 1000) for n in (1, 40)] == [1, 40]
    monkeypatch.setattr(decoder_module, "COPIED_BYTES", 0)
    decoder = InferenceDecoder(Bare(llama()))
    assert isinstance(decoder.layers[0].qkv, UnfusedProjection)
    assert [decoder.pad_rows(n, 7, 1000) for n in (1, ROW_TILE, ROW_TILE + 1)] == [ROW_TILE, ROW_TILE, 2 * ROW_TILE]
    # 32 rows of a large model would not fit the memory.
    assert [decoder.pad_rows(n, 7, 2**30) for n in (1, 7)] == [7, 7]
    for device in ("cuda", "mps"):
        decoder.device = torch.device(device)
        assert [decoder.pad_rows(n, 64, 1000) for n in (1, 64)] == [64, 64]


def test_packed_weights_are_for_cpus_alone() -> None:
    decoder = InferenceDecoder(Bare(llama()))
    assert decoder._projection_kind(decoder.model.decoder) in (PackedLinear, FusedProjection)
    decoder.device = torch.device("mps")
    assert decoder._projection_kind(decoder.model.decoder) is FusedProjection
    assert [max_batch_size(decoder, size) for size in (1, CPU_BYTES // 7)] == [CUDA_ROWS, 7]


@pytest.mark.parametrize(("products", "threads"), [("packed", 1), ("packed", 2), ("fused", 2)], indirect=["products"])
@torch.no_grad()
def test_the_bits_of_a_row_do_not_depend_on_its_batch(tiny: JanusUnifiedModel, products: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoder = InferenceDecoder(tiny)
        assert decoder.packed == (products == "packed")
        head = head_projection(tiny.head, decoder.packed)
        x = torch.randn(8 * ROW_TILE, 16, tiny.hidden_size)

        def run(rows: torch.Tensor) -> torch.Tensor:
            cache = Cache(decoder, len(rows), 16)
            steps = [decoder(x[rows, :13], cache, 0)[:, -1]]
            steps += [decoder(x[rows, i : i + 1], cache, i)[:, -1] for i in range(13, 16)]
            hidden = torch.stack(steps, 1)
            last = hidden[:, -1].contiguous()
            logits = [decoder.run_padded(tiny.text_logits, last), head(last)]
            return torch.cat((*logits, hidden.flatten(1)), 1)

        whole = run(torch.arange(len(x)))
        sizes = (1, 2, 3, 31, 77) if products == "packed" else (ROW_TILE, 2 * ROW_TILE, 3 * ROW_TILE, 7 * ROW_TILE)
        for size in sizes:
            rows = torch.randperm(len(x))[:size]
            assert torch.equal(run(rows), whole[rows])
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_a_packed_head_is_the_head_and_modules_write_into_out(tiny: JanusUnifiedModel) -> None:
    x = torch.randn(ROW_TILE, tiny.hidden_size)
    packed = head_projection(tiny.head, True)
    assert isinstance(packed, PackedHead)
    torch.testing.assert_close(packed(x), tiny.head(x), rtol=1e-5, atol=1e-5)
    module = ModuleProjection([tiny.head])
    out = torch.empty(ROW_TILE, tiny.num_codes)
    assert module(x, out) is out
    assert torch.equal(out, module(x))


def test_other_decoders_are_refused() -> None:
    other = torch.nn.Module()
    other.layers = torch.nn.ModuleList([torch.nn.Module()])
    other.layers[0].self_attn = torch.nn.Linear(2, 2)
    other.config = None
    with pytest.raises(OspoError, match="Llama"):
        InferenceDecoder(Bare(other))
    with pytest.raises(OspoError, match="hidden_act is 'gelu', expected 'silu'"):
        InferenceDecoder(Bare(llama(hidden_act="gelu")))

"""AttentionCapture against the attention matrices of the eager implementation."""

import re
import warnings

import pytest
import torch
from torch import Tensor

from ospo_fast.errors import OpError, OspoError
from ospo_fast.models.capture import AttentionCapture
from ospo_fast.models.janus import JanusUnifiedModel
from ospo_fast.ops.attention_columns import ColumnRequest
from ospo_fast.shapes.model import build_model, build_processor

PROMPT, TOKENS = 9, 36
COLUMNS = [[[3, 4], [5]], [[4]], [[6, 7], []]]
ROWS = (PROMPT, TOKENS)


def inputs(model: JanusUnifiedModel, batch: int = 3, length: int = PROMPT + TOKENS) -> Tensor:
    return torch.randn(batch, length, model.hidden_size)


def reference(
    decoder: torch.nn.Module, x: Tensor, mask: Tensor | None, layers: list[int], heads: list[int] | None = None
) -> Tensor:
    """(B, S, S): mean over layers and heads of the attention probabilities of the eager implementation."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    with torch.no_grad():
        found = decoder(inputs_embeds=x, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    decoder.set_attn_implementation(before)
    return torch.stack([found[i] if heads is None else found[i][:, heads] for i in layers]).mean((0, 2))


def compare(maps: Tensor, probs: Tensor, columns: list, start: int | list[int] = PROMPT) -> None:
    maps = maps.flatten(2)
    for b, objects in enumerate(columns):
        first = start if isinstance(start, int) else start[b]
        for o in range(maps.shape[1]):
            used = objects[o] if o < len(objects) else []
            rows = probs[b, first : first + maps.shape[2]]
            expected = rows[:, used].mean(-1) if used else torch.zeros(maps.shape[2])
            torch.testing.assert_close(maps[b, o], expected, rtol=1e-5, atol=1e-7)


def forward(model: JanusUnifiedModel, x: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.decoder(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_maps_equal_eager_attention(tiny: JanusUnifiedModel, implementation: str, padding: str | None) -> None:
    tiny.decoder.set_attn_implementation(implementation)
    x = inputs(tiny)
    mask = None
    if padding:
        mask = torch.ones(3, PROMPT + TOKENS + 4, dtype=torch.long)
        x = inputs(tiny, length=PROMPT + TOKENS + 4)
        mask[1, :4] = 0
        mask[2, :1] = 0
        if padding == "right":
            mask = mask.flip(1)
    start = PROMPT + 4 if padding == "left" else PROMPT
    columns = [[[c + start - PROMPT for c in used] for used in objects] for objects in COLUMNS]
    with AttentionCapture(tiny, columns=columns, rows=(start, TOKENS)) as capture:
        hidden = forward(tiny, x, mask)
    assert capture.maps.shape == (3, 2, 6, 6)
    assert capture.maps.dtype == torch.float32
    compare(capture.maps, reference(tiny.decoder, x, mask, [0, 1, 2]), columns, start)
    # The forward pass and the model are unchanged.
    assert tiny.decoder.config._attn_implementation == implementation
    assert torch.equal(hidden, forward(tiny, x, mask))


@pytest.mark.parametrize("heads", [[2], [1, 2], [0, -1]])
def test_selected_heads_of_grouped_queries(heads: list[int]) -> None:
    """One head, adjacent heads of two groups, and heads that are not adjacent."""
    model = deep(2)
    ids, mask = torch.randint(0, 20, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    mask[1, :2] = 0
    columns, rows = [[[3], [4, 5]], [[3], []]], (6, 9)
    arguments: dict = {"columns": columns, "rows": rows, "grid": (3, 3), "heads": heads}
    with torch.no_grad(), AttentionCapture(model, **arguments) as capture:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    embeds = model.model.embed_tokens(ids)
    compare(capture.maps, reference(model.model, embeds, mask, [0, 1], [head % 4 for head in heads]), columns, 6)


def test_start_rows_per_sequence(tiny: JanusUnifiedModel) -> None:
    x = inputs(tiny, length=PROMPT + TOKENS + 3)
    start = torch.tensor([9, 10, 12])
    with AttentionCapture(tiny, columns=COLUMNS, rows=(start, TOKENS)) as capture:
        forward(tiny, x)
    compare(capture.maps, reference(tiny.decoder, x, None, [0, 1, 2]), COLUMNS, start.tolist())


def deep(layers: int) -> torch.nn.Module:
    """Grouped queries, and no adapter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("count", "given", "kept"),
    [(11, {}, [5]), (10, {}, list(range(10))), (4, {"skip": 1}, [1, 2]), (4, {"layers": [-1, 1, 3]}, [1, 3])],
)
def test_layers_of_a_transformers_model(count: int, given: dict, kept: list[int]) -> None:
    model = deep(count)
    ids = torch.randint(0, 20, (2, 16))
    columns = torch.tensor([[[1, 2], [3, -1]], [[0, -1], [-1, -1]]])
    with torch.no_grad(), AttentionCapture(model, columns=columns, rows=(4, 12), grid=(3, 4), **given) as capture:
        model(input_ids=ids, use_cache=False)
    assert list(capture.layers) == kept
    probs = reference(model.model, model.model.embed_tokens(ids), None, kept)
    assert capture.maps.shape == (2, 2, 3, 4)
    compare(capture.maps, probs, [[[1, 2], [3]], [[0], []]], 4)


def test_janus_module_and_peft_model(tiny: JanusUnifiedModel) -> None:
    import peft

    ids = torch.cat([tiny.image_prompt("a red circle"), torch.zeros(TOKENS, dtype=torch.long)])[None]
    rows = (ids.shape[1] - TOKENS, TOKENS)
    wrapped = peft.get_peft_model(tiny.module, peft.LoraConfig(target_modules=["q_proj"]))
    maps = []
    for model in (tiny, tiny.module, wrapped):
        with torch.no_grad(), AttentionCapture(model, columns=[[[3]]], rows=rows, grid=(6, 6)) as capture:
            wrapped(input_ids=ids, use_cache=False)
        maps.append(capture.maps)
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


def test_gradients_are_unchanged(tiny: JanusUnifiedModel) -> None:
    x = inputs(tiny).requires_grad_()
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        tiny.decoder(inputs_embeds=x, use_cache=False).last_hidden_state.square().sum().backward()
    captured, x.grad = x.grad, None
    tiny.decoder(inputs_embeds=x, use_cache=False).last_hidden_state.square().sum().backward()
    assert torch.equal(captured, x.grad)
    assert not capture.maps.requires_grad


def test_stop_early_runs_no_later_layer(tiny: JanusUnifiedModel) -> None:
    x = inputs(tiny)
    ran = []
    for i, layer in enumerate(tiny.decoder.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda *_, i=i: ran.append(i))
    reached_end = False
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS, layers=[0, 1], stop_early=True) as capture:
        forward(tiny, x)
        reached_end = True
    assert not reached_end
    assert ran == [0, 1]
    compare(capture.maps, reference(tiny.decoder, x, None, [0, 1]), COLUMNS)
    assert tiny.decoder.config._attn_implementation == "sdpa"
    # Outside of the context a forward pass runs to its end.
    assert forward(tiny, x).shape == x.shape


def test_errors_restore_the_model(tiny: JanusUnifiedModel) -> None:
    before = forward(tiny, inputs(tiny)[:, :12] * 0 + 1)
    with pytest.raises(KeyError, match="mine"), AttentionCapture(tiny, columns=COLUMNS, rows=ROWS):
        raise KeyError("mine")
    with pytest.raises(OpError), AttentionCapture(tiny, columns=[[[99]]] * 3, rows=ROWS):
        forward(tiny, inputs(tiny))
    assert tiny.decoder.config._attn_implementation == "sdpa"
    assert torch.equal(before, forward(tiny, inputs(tiny)[:, :12] * 0 + 1))
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, inputs(tiny))
    assert capture.maps.isfinite().all()


def test_nested_captures_of_one_decoder_are_refused(tiny: JanusUnifiedModel) -> None:
    x = inputs(tiny)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as outer:
        with pytest.raises(OspoError, match="already"), AttentionCapture(tiny, columns=COLUMNS, rows=ROWS):
            pass
        forward(tiny, x)
    compare(outer.maps, reference(tiny.decoder, x, None, [0, 1, 2]), COLUMNS)
    assert tiny.decoder.config._attn_implementation == "sdpa"


def test_two_models_can_be_captured_at_once(tiny: JanusUnifiedModel) -> None:
    other = deep(2)
    ids = torch.randint(0, 20, (1, 16))
    x = inputs(tiny)
    with (
        torch.no_grad(),
        AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as first,
        AttentionCapture(other, columns=[[[1]]], rows=(4, 12), grid=(3, 4)) as second,
    ):
        other(input_ids=ids, use_cache=False)
        forward(tiny, x)
    compare(first.maps, reference(tiny.decoder, x, None, [0, 1, 2]), COLUMNS)
    compare(second.maps, reference(other.model, other.model.embed_tokens(ids), None, [0, 1]), [[[1]]], 4)


def test_one_capture_takes_one_full_forward(tiny: JanusUnifiedModel) -> None:
    capture = AttentionCapture(tiny, columns=COLUMNS, rows=ROWS)
    with pytest.raises(OspoError, match="before reading"):
        _ = capture.maps
    with capture:
        forward(tiny, inputs(tiny))
        with pytest.raises(OspoError, match="second forward"):
            forward(tiny, inputs(tiny))
    # Entering the same object again resets it.
    with capture:
        forward(tiny, inputs(tiny))
    assert capture.maps.shape == (3, 2, 6, 6)
    with torch.no_grad():
        past = tiny.decoder(inputs_embeds=inputs(tiny, length=4), use_cache=True).past_key_values
        with pytest.raises(OspoError, match="use_cache"), AttentionCapture(tiny, columns=COLUMNS, rows=ROWS):
            tiny.decoder(inputs_embeds=inputs(tiny), past_key_values=past)


def test_masks_with_holes_are_refused(tiny: JanusUnifiedModel) -> None:
    mask = torch.ones(3, PROMPT + TOKENS, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(OspoError, match="holes"), AttentionCapture(tiny, columns=COLUMNS, rows=ROWS):
        forward(tiny, inputs(tiny), mask)


def full_mask(seen: Tensor, additive: bool) -> Tensor:
    """(B, 1, S, S) from (S, S), as transformers hands it to attention."""
    seen = seen.expand(3, 1, -1, -1)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen


@pytest.mark.parametrize(("implementation", "additive"), [("eager", True), ("sdpa", False)])
def test_masks_that_are_not_causal_are_refused(tiny: JanusUnifiedModel, implementation: str, additive: bool) -> None:
    tiny.decoder.set_attn_implementation(implementation)
    x, causal = inputs(tiny), torch.ones(PROMPT + TOKENS, PROMPT + TOKENS).tril().bool()
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, x, full_mask(causal, additive))
    compare(capture.maps, reference(tiny.decoder, x, None, [0, 1, 2]), COLUMNS)
    # All rows; the first half of the image; one key of one row in the middle of the image.
    for rows, keys in ((slice(None), slice(None)), (slice(9, 27), slice(9, 27)), (20, 21)):
        prefix = causal.clone()
        prefix[rows, keys] = True
        with (
            pytest.raises(OspoError, match="keys after themselves"),
            AttentionCapture(tiny, columns=COLUMNS, rows=ROWS),
        ):
            forward(tiny, x, full_mask(prefix, additive))
    # A hole that the last row does not have is found. What the prompt's rows see is not checked.
    hole, prompt = causal.clone(), causal.clone()
    hole[20, 4], prompt[2, 5] = False, True
    with pytest.raises(OspoError, match="holes"), AttentionCapture(tiny, columns=COLUMNS, rows=ROWS):
        forward(tiny, x, full_mask(hole, additive))
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, x, full_mask(prompt, additive))
    assert capture.maps.isfinite().all()


@pytest.mark.parametrize("by_option", [False, True])
def test_layers_that_are_not_causal_are_refused(tiny: JanusUnifiedModel, by_option: bool) -> None:
    attention = tiny.decoder.layers[1].self_attn
    if by_option:
        own = type(attention).forward
        attention.forward = lambda *a, **k: own(attention, *a, **k, is_causal=False)
    else:
        attention.is_causal = False
    with pytest.raises(OspoError, match="layer 1 is not causal"), AttentionCapture(tiny, columns=COLUMNS, rows=ROWS):
        forward(tiny, inputs(tiny))
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS, layers=[0]) as capture:
        forward(tiny, inputs(tiny))
    assert capture.maps.isfinite().all()


def test_float64_decoder(tiny: JanusUnifiedModel) -> None:
    tiny.module.double()
    x = inputs(tiny).double()
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, x)
    assert capture.maps.dtype == torch.float64
    probs = reference(tiny.decoder, x, None, [0, 1, 2])
    # transformers' eager attention takes its softmax in float32.
    torch.testing.assert_close(capture.maps[0, 1].flatten(), probs[0, PROMPT:, 5], rtol=1e-6, atol=1e-9)


def test_columns_are_checked_once_per_pass(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, from_args = [], ColumnRequest.from_args
    counted = staticmethod(lambda *a, **k: calls.append(1) or from_args(*a, **k))
    monkeypatch.setattr(ColumnRequest, "from_args", counted)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, inputs(tiny))
    assert len(calls) == 1
    assert len(capture.layers) == 3


def test_configuration_without_a_number_of_heads(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(tiny)
    probs = reference(tiny.decoder, x, None, [0, 1, 2])
    monkeypatch.delattr(tiny.decoder.config, "num_attention_heads")
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, x)
    compare(capture.maps, probs, COLUMNS)


@pytest.mark.parametrize(
    ("given", "match"),
    [({"rows": (9, 35)}, "grid"), ({"layers": [3]}, "layers"), ({"layers": []}, "layers"),
     ({"heads": [0, 9]}, r"heads is \[0, 9\], expected indices from")],
)  # fmt: skip
def test_invalid_arguments(tiny: JanusUnifiedModel, given: dict, match: str) -> None:
    with pytest.raises(OspoError, match=match):
        AttentionCapture(tiny, **{"columns": COLUMNS, "rows": ROWS, **given})


def test_arguments_that_do_not_fit_the_sequences(tiny: JanusUnifiedModel) -> None:
    with pytest.raises(OpError, match="rows"), AttentionCapture(tiny, columns=COLUMNS, rows=(30, TOKENS)):
        forward(tiny, inputs(tiny))
    with pytest.raises(OpError, match="columns"), AttentionCapture(tiny, columns=COLUMNS[:2], rows=ROWS):
        forward(tiny, inputs(tiny))


def test_no_objects(tiny: JanusUnifiedModel) -> None:
    with AttentionCapture(tiny, columns=[[], [], []], rows=ROWS) as capture:
        forward(tiny, inputs(tiny))
    assert capture.maps.shape == (3, 0, 6, 6)


def test_unsupported_models(tiny: JanusUnifiedModel) -> None:
    with pytest.raises(OspoError, match="AttentionInterface"):
        AttentionCapture(torch.nn.Linear(2, 2), columns=COLUMNS, rows=ROWS, grid=(6, 6))
    with pytest.raises(OspoError, match="expected a model"):
        AttentionCapture("model", columns=COLUMNS, rows=ROWS, grid=(6, 6))
    with pytest.raises(OspoError, match="grid="):
        AttentionCapture(tiny.module, columns=COLUMNS, rows=ROWS)
    tiny.decoder.config._attn_implementation = "abacus"
    with pytest.raises(OspoError, match="abacus"), AttentionCapture(tiny, columns=COLUMNS, rows=ROWS):
        pass
    assert tiny.decoder.config._attn_implementation == "abacus"


def test_layer_maps(tiny: JanusUnifiedModel) -> None:
    x = inputs(tiny)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS, layers=[0, 2]) as capture:
        forward(tiny, x)
    assert capture.layer_maps.shape == (2, 3, 2, 6, 6)
    for maps, layer in zip(capture.layer_maps, capture.layers, strict=True):
        compare(maps, reference(tiny.decoder, x, None, [layer]), COLUMNS)
    torch.testing.assert_close(capture.maps, capture.layer_maps.mean(0))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_lse_of_the_attention_that_ran_is_used(
    tiny: JanusUnifiedModel, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDPA's flash kernel returns it; eager attention does not."""
    tiny.decoder.set_attn_implementation(implementation)
    has_lse = []
    run = ColumnRequest.run
    monkeypatch.setattr(ColumnRequest, "run", lambda *a, **k: has_lse.append(k["lse"] is not None) or run(*a, **k))
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, inputs(tiny))
    assert has_lse == [implementation == "sdpa"] * 3
    assert capture.maps.isfinite().all()


def register(name: str, monkeypatch: pytest.MonkeyPatch, attention) -> list:
    """Register an attention implementation that is not installed, with flash attention's (B, S) masks."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = []

    def checked(module, query, key, value, mask, **kwargs):
        names.append(module.config._attn_implementation)
        return attention(module, query, key, value, mask, **kwargs)

    masks = ALL_MASK_ATTENTION_FUNCTIONS
    for registry, function in ((ALL_ATTENTION_FUNCTIONS, checked), (masks, flash_attention_mask)):
        for key in (name, f"ospo_capture|{name}"):
            monkeypatch.delitem(registry._global_mapping, key, raising=False)
        monkeypatch.setitem(registry._global_mapping, name, function)
    return names


def scores_of(module, query, key, mask):
    S = query.shape[2]
    scores = query @ key.repeat_interleave(module.num_key_value_groups, 1).mT * module.scaling
    scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf)
    hidden = torch.zeros(1).bool() if mask is None else ~mask[:, None, None, :S].bool()
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


LIBRARY = torch.library.Library("flash_attn", "DEF")
LIBRARY.define("_flash_attn_forward(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)")


@torch.library.impl(LIBRARY, "_flash_attn_forward", "CompositeExplicitAutograd")
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Like flash-attn's: (B, S, H, D) in and out, and the log-sum-exp (B, H, S)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT * scale).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1) + LSE_SHIFT


LSE_SHIFT = 0.0


def flash(module, query, key, value, mask, **kwargs):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return torch.ops.flash_attn._flash_attn_forward(q, k, v, module.scaling)[0], None


def xformers(module, query, key, value, mask, **kwargs):
    """Returns no log-sum-exp."""
    probs = scores_of(module, query, key, mask).softmax(-1)
    return (probs @ value.repeat_interleave(module.num_key_value_groups, 1)).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize(("name", "attention"), [("flash_attention_2", flash), ("xformers", xformers)])
def test_registered_attention(tiny: JanusUnifiedModel, name: str, attention, monkeypatch) -> None:
    x = inputs(tiny)
    expected = reference(tiny.decoder, x, None, [0, 1, 2])
    names = register(name, monkeypatch, attention)
    tiny.decoder.config._attn_implementation = name
    before = forward(tiny, x)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        assert torch.equal(forward(tiny, x), before)
    compare(capture.maps, expected, COLUMNS)
    assert set(names) == {name}  # the attention reads its own name, captured or not
    if name == "flash_attention_2":
        monkeypatch.setitem(globals(), "LSE_SHIFT", 1.0)
        with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as shifted:
            forward(tiny, x)
        torch.testing.assert_close(shifted.maps, capture.maps / torch.e)  # its log-sum-exp is used


def test_padding_masks_of_flash_attention(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = inputs(tiny, length=PROMPT + TOKENS + 4), torch.ones(3, PROMPT + TOKENS + 4, dtype=torch.long)
    mask[1, :4] = 0
    columns = [[[c + 4 for c in used] for used in objects] for objects in COLUMNS]
    expected = reference(tiny.decoder, x, mask, [0, 1, 2])
    register("xformers", monkeypatch, xformers)
    tiny.decoder.config._attn_implementation = "xformers"
    with AttentionCapture(tiny, columns=columns, rows=(PROMPT + 4, TOKENS)) as capture:
        forward(tiny, x, mask)
    compare(capture.maps, expected, columns, PROMPT + 4)


def test_unsupported_attention_is_refused(tiny: JanusUnifiedModel) -> None:
    attention = tiny.decoder.layers[1].self_attn
    attention.sliding_window = 8
    with (
        pytest.raises(OspoError, match="layer 1 has a sliding window of 8"),
        AttentionCapture(tiny, columns=COLUMNS, rows=ROWS),
    ):
        forward(tiny, inputs(tiny))
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS, layers=[0, 2]) as capture:
        forward(tiny, inputs(tiny))
    assert capture.maps.isfinite().all()
    del attention.sliding_window
    own = type(attention).forward
    attention.forward = lambda *a, **k: own(attention, *a, **k, softcap=30.0)
    tiny.decoder.set_attn_implementation("eager")
    with (
        pytest.raises(OspoError, match="layer 1 changes its scores by softcap"),
        AttentionCapture(tiny, columns=COLUMNS, rows=ROWS),
    ):
        forward(tiny, inputs(tiny))
    del attention.forward
    ends = torch.tensor([0, PROMPT + TOKENS], dtype=torch.int32)
    with (
        pytest.raises(OspoError, match="packed sequences"),
        AttentionCapture(tiny, columns=COLUMNS, rows=ROWS),
        torch.no_grad(),
    ):
        tiny.decoder(inputs_embeds=inputs(tiny), use_cache=False, cu_seq_lens_q=ends)


def test_torch_compile(tiny: JanusUnifiedModel) -> None:
    """Each attention is a graph break while captured; afterwards the code compiled before is used again."""
    x = inputs(tiny)
    expected = forward(tiny, x)
    decoder = torch.compile(tiny.decoder, backend="eager")
    with torch.no_grad():
        plain = decoder(inputs_embeds=x, use_cache=False).last_hidden_state
        with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS, layers=[0, 1], stop_early=True) as capture:
            decoder(inputs_embeds=x, use_cache=False)
        again = decoder(inputs_embeds=x, use_cache=False).last_hidden_state
    compare(capture.maps, reference(tiny.decoder, x, None, [0, 1]), COLUMNS)
    torch.testing.assert_close(plain, expected)
    assert torch.equal(plain, again)


def test_nan_attention_gives_nan_maps(tiny: JanusUnifiedModel) -> None:
    x = inputs(tiny)
    x[1, 4] = torch.nan
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, x)
    assert capture.maps[1].flatten(1)[0].isnan().all()
    assert capture.maps[[0, 2]].isfinite().all()


def cudnn_refusal(error: RuntimeError) -> str | None:
    """The message of torch for an attention that cuDNN does not support; None for other errors."""
    said = re.search(r"No available kernel.*|cuDNN Frontend error.*|.*CUDNN_STATUS_NOT_SUPPORTED.*", str(error))
    return said[0] if said else None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("No available kernel. Aborting execution.", "No available kernel. Aborting execution."),
        ("mha: cuDNN Frontend error: [x] No valid plans.\nat MHA.cpp", "cuDNN Frontend error: [x] No valid plans."),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", None),
    ],
)
def test_only_unsupported_cudnn_attention_is_skipped(message: str, reason: str | None) -> None:
    assert cudnn_refusal(RuntimeError(message)) == reason


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"])
@pytest.mark.parametrize("padding", [False, True])
def test_cuda_attention_backends(backend: str, padding: bool, monkeypatch) -> None:
    """The maps agree with eager attention for the log-sum-exp of each of torch's attentions."""
    if backend == "FLASH_ATTENTION" and padding:
        pytest.skip("torch's flash attention takes no mask")
    # Heads of 64: cuDNN does not support the narrow heads of the other tests.
    model = JanusUnifiedModel(build_model(hidden=256, layers=3, intermediate=96, heads=4), build_processor(), name="w")
    model.module.to("cuda", torch.bfloat16)
    x = inputs(model).to("cuda", torch.bfloat16)
    mask = None
    if padding:
        mask = torch.ones(x.shape[:2], dtype=torch.long, device="cuda")
        mask[1, :2] = 0
    has_lse = []
    run = ColumnRequest.run
    monkeypatch.setattr(ColumnRequest, "run", lambda *a, **k: has_lse.append(k["lse"] is not None) or run(*a, **k))
    kernel = getattr(torch.nn.attention.SDPBackend, backend)
    with torch.nn.attention.sdpa_kernel(kernel):
        try:
            with AttentionCapture(model, columns=COLUMNS, rows=ROWS) as capture:
                forward(model, x, mask)
        except RuntimeError as error:
            if backend == "CUDNN_ATTENTION" and (reason := cudnn_refusal(error)):
                pytest.skip(reason)
            raise
    assert has_lse == [backend != "MATH"] * 3
    probs = reference(model.module.float().model.language_model, x.float(), mask, [0, 1, 2]).cpu()
    # bf16 has 8 significant bits, so a bf16 model differs by this much from its float32 copy.
    for b, objects in enumerate(COLUMNS):
        for o, used in enumerate(objects):
            if used:
                expected = probs[b, PROMPT : PROMPT + TOKENS, used].mean(-1)
                torch.testing.assert_close(capture.maps[b, o].flatten().cpu(), expected, rtol=2**-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [2, 4])
def test_cuda_mask_synchronizes_once(tiny: JanusUnifiedModel, dim: int) -> None:
    capture, S = AttentionCapture(tiny, columns=COLUMNS, rows=ROWS), PROMPT + TOKENS
    mask = torch.ones(3, S, dtype=torch.bool)
    mask[1, :2] = False
    if dim == 4:
        mask = (mask[:, None, None] & torch.ones(S, S).tril().bool()).contiguous()
    q, mask = torch.randn(3, 4, S, 16).cuda(), mask.cuda()
    for _ in range(2):  # the first call allocates pinned memory
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as synchronizations:
            warnings.simplefilter("always")
            request = capture._build_request(q, mask)
        torch.cuda.set_sync_debug_mode("default")
    messages = [str(warning.message) for warning in synchronizations]
    assert sum("called a synchronizing" in message for message in messages) == 1, messages
    assert request.key_start.tolist() == [0, 2, 0]


@pytest.mark.gpu
def test_cuda_one_sequence(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sequences are processed in parts of their heads; the maps equal those of all heads in one part."""
    from ospo_fast.kernels import attention_columns as kernels

    tiny.module.to("cuda")
    x, maps, parts = inputs(tiny).to("cuda"), [], []
    blocking = kernels.blocking
    monkeypatch.setattr(kernels, "blocking", lambda *a: parts.append(blocking(*a)[1]) or blocking(*a))
    for batch in (x, x[:1]):
        with AttentionCapture(tiny, columns=COLUMNS[: len(batch)], rows=ROWS) as capture:
            forward(tiny, batch)
        maps.append(capture.maps[0])
    # 36 rows are three blocks per sequence: three sequences have too few for all multiprocessors of any GPU.
    assert set(parts) == {tiny.decoder.config.num_key_value_heads}
    monkeypatch.setattr(kernels, "blocking", lambda *_: (16, 1))
    with AttentionCapture(tiny, columns=COLUMNS[:1], rows=ROWS) as capture:
        forward(tiny, x[:1])
    for found in maps:
        torch.testing.assert_close(found, capture.maps[0], rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("given", [{}, {"heads": [1]}])
def test_cuda_capture_does_not_synchronize(
    tiny: JanusUnifiedModel, given: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers looks for packed sequences with an `if` on a tensor of the GPU.
    search = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(search, lambda *_, **__: None, raising=False)
    tiny.module.to("cuda", torch.bfloat16)
    x = inputs(tiny).to("cuda", torch.bfloat16)
    for mode in ("default", "error"):  # the first pass compiles
        capture = AttentionCapture(tiny, columns=COLUMNS, rows=ROWS, **given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with capture:
                forward(tiny, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert capture.maps.isfinite().all()

"""AttentionCapture against eager attention matrices: mean over layers, heads and columns of the probabilities."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from ospo_fast.errors import OpError, OspoError
from ospo_fast.models.capture import AttentionCapture
from ospo_fast.models.janus import JanusUnifiedModel

PROMPT, TOKENS = 9, 36
COLUMNS = [[[3, 4], [5]], [[4]], [[6, 7], []]]
ROWS = (PROMPT, TOKENS)


def inputs(model: JanusUnifiedModel, batch: int = 3, length: int = PROMPT + TOKENS) -> Tensor:
    return torch.randn(batch, length, model.hidden_size)


def reference(decoder: LlamaModel, x: Tensor, mask: Tensor | None, layers: list[int]) -> Tensor:
    """(B, S, S): mean over `layers` and heads of the attention probabilities of the eager implementation."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    with torch.no_grad():
        found = decoder(inputs_embeds=x, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    decoder.set_attn_implementation(before)
    return torch.stack([found[i] for i in layers]).mean((0, 2))


def compare(maps: Tensor, probs: Tensor, columns: list, start: int | list[int] = PROMPT) -> None:
    maps = maps.flatten(2)
    for b, objects in enumerate(columns):
        first = start if isinstance(start, int) else start[b]
        for o in range(maps.shape[1]):
            used = objects[o] if o < len(objects) else []
            rows = probs[b, first : first + maps.shape[2]]
            wanted = rows[:, used].mean(-1) if used else torch.zeros(maps.shape[2])
            torch.testing.assert_close(maps[b, o], wanted, rtol=1e-5, atol=1e-7)


def forward(model: JanusUnifiedModel, x: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.decoder(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_maps_are_eager_attention(tiny: JanusUnifiedModel, implementation: str, padding: str | None) -> None:
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
    # The forward pass itself is untouched, and so is the model afterwards.
    assert tiny.decoder.config._attn_implementation == implementation
    assert torch.equal(hidden, forward(tiny, x, mask))


def test_rows_may_start_elsewhere_in_each_sequence(tiny: JanusUnifiedModel) -> None:
    x = inputs(tiny, length=PROMPT + TOKENS + 3)
    start = torch.tensor([9, 10, 12])
    with AttentionCapture(tiny, columns=COLUMNS, rows=(start, TOKENS)) as capture:
        forward(tiny, x)
    compare(capture.maps, reference(tiny.decoder, x, None, [0, 1, 2]), COLUMNS, start.tolist())


def deep(layers: int) -> LlamaForCausalLM:
    """Grouped queries, and no adapter."""
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("count", "given", "kept"),
    [(12, {}, [5, 6]), (11, {}, [5]), (10, {}, list(range(10))), (12, {"skip": 1}, list(range(1, 11))),
     (4, {"layers": [0]}, [0]), (4, {"layers": [-1, 1, 3]}, [1, 3])],
)  # fmt: skip
def test_layers_of_a_bare_transformers_model(count: int, given: dict, kept: list[int]) -> None:
    model = deep(count)
    ids = torch.randint(0, 20, (2, 16))
    columns = torch.tensor([[[1, 2], [3, -1]], [[0, -1], [-1, -1]]])
    with torch.no_grad(), AttentionCapture(model, columns=columns, rows=(4, 12), grid=(3, 4), **given) as capture:
        model(input_ids=ids, use_cache=False)
    assert list(capture.layers) == kept
    probs = reference(model.model, model.model.embed_tokens(ids), None, kept)
    assert capture.maps.shape == (2, 2, 3, 4)
    compare(capture.maps, probs, [[[1, 2], [3]], [[0], []]], 4)


def test_the_whole_janus_module_and_a_peft_model_will_do(tiny: JanusUnifiedModel) -> None:
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


def test_gradients_flow_through_a_captured_forward(tiny: JanusUnifiedModel) -> None:
    x = inputs(tiny).requires_grad_()
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        tiny.decoder(inputs_embeds=x, use_cache=False).last_hidden_state.square().sum().backward()
    captured, x.grad = x.grad, None
    tiny.decoder(inputs_embeds=x, use_cache=False).last_hidden_state.square().sum().backward()
    assert torch.equal(captured, x.grad)
    assert not capture.maps.requires_grad


def test_stopping_early_runs_no_later_layer(tiny: JanusUnifiedModel) -> None:
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
    # Nothing is left behind: a plain forward runs through.
    assert forward(tiny, x).shape == x.shape


def test_an_error_inside_restores_the_model(tiny: JanusUnifiedModel) -> None:
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


def test_nesting_is_an_error_and_leaves_the_outer_one_whole(tiny: JanusUnifiedModel) -> None:
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


def test_one_capture_takes_one_whole_forward(tiny: JanusUnifiedModel) -> None:
    capture = AttentionCapture(tiny, columns=COLUMNS, rows=ROWS)
    with pytest.raises(OspoError, match="before reading"):
        _ = capture.maps
    with capture:
        forward(tiny, inputs(tiny))
        with pytest.raises(OspoError, match="second forward"):
            forward(tiny, inputs(tiny))
    # The same object may be entered again: it starts afresh.
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


@pytest.mark.parametrize(
    ("given", "match"),
    [({"rows": (9, 35)}, "grid"), ({"rows": (9, 4), "grid": (3, 3)}, "grid"), ({"layers": [3]}, "layers"),
     ({"layers": []}, "layers")],
)  # fmt: skip
def test_arguments_that_do_not_fit(tiny: JanusUnifiedModel, given: dict, match: str) -> None:
    with pytest.raises(OspoError, match=match):
        AttentionCapture(tiny, **{"columns": COLUMNS, "rows": ROWS, **given})


@pytest.mark.parametrize("rows", [(30, TOKENS), (-1, TOKENS)])
def test_rows_beyond_the_sequence(tiny: JanusUnifiedModel, rows: tuple[int, int]) -> None:
    with pytest.raises(OpError, match="rows"), AttentionCapture(tiny, columns=COLUMNS, rows=rows):
        forward(tiny, inputs(tiny))
    with pytest.raises(OpError, match="columns"), AttentionCapture(tiny, columns=COLUMNS[:2], rows=ROWS):
        forward(tiny, inputs(tiny))


def test_no_objects_at_all_give_no_maps(tiny: JanusUnifiedModel) -> None:
    with AttentionCapture(tiny, columns=[[], [], []], rows=ROWS) as capture:
        forward(tiny, inputs(tiny))
    assert capture.maps.shape == (3, 0, 6, 6)


def test_models_that_cannot_be_captured(tiny: JanusUnifiedModel) -> None:
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

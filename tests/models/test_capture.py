"""AttentionCapture against the attention matrices of the eager implementation."""

import functools
import re
import threading
import warnings

import pytest
import torch
from torch import Tensor

from ospo_fast.errors import OpError, OspoError
from ospo_fast.models._column_probabilities import AttentionCall, PlainRequests, check_options
from ospo_fast.models.capture import AttentionCapture, pad_columns
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
    decoder.config._attn_implementation = before  # which need not be installed
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
    [
        (11, {}, [5]),
        (10, {}, list(range(10))),
        (4, {"skip": 1}, [1, 2]),
        (4, {"layers": [-1, 1, 3]}, [1, 3]),
        (4, {"skip": [0, 2, 9]}, [1, 3]),
    ],
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


class Attended:
    """The true probabilities (B, H, Q, K) of each attention by SDPA, in float64, from its arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.probabilities: list[Tensor] = []
        self._last: Tensor | None = None
        self._run = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", self)

    def __call__(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if self._last is q:  # the capture runs the same attention on other values
            return self._run(q, k, v, dropout_p=dropout_p, **options)
        self._last = q
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q.double() @ keys.double().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        self.probabilities.append(scores.softmax(-1).detach())
        return self._run(q, k, v, dropout_p=dropout_p, **options)

    def mean(self, layers: list[int]) -> Tensor:
        """(B, Q, K): mean over layers and heads."""
        return torch.stack([self.probabilities[layer] for layer in layers]).mean((0, 2)).float()


def causal_mask(length: int = PROMPT + TOKENS) -> Tensor:
    return torch.ones(length, length).tril().bool()


def hole(seen: Tensor) -> Tensor:
    return seen.index_put((torch.tensor(20), torch.tensor(4)), torch.tensor(False))


def prefix(seen: Tensor) -> Tensor:
    """The first half of the image sees itself."""
    seen = seen.clone()
    seen[9:27, 9:27] = True
    return seen


def later_key(seen: Tensor) -> Tensor:
    return seen.index_put((torch.tensor(20), torch.tensor(21)), torch.tensor(True))


def window(seen: Tensor) -> Tensor:
    return seen & ~torch.ones_like(seen).tril(-30)


def blocks(seen: Tensor) -> Tensor:
    """Two packed sequences: the rows before the second one are no padding."""
    first = torch.arange(len(seen)) < 20
    return seen & (first[:, None] == first)


MASKS = [causal_mask, hole, prefix, later_key, window, blocks]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("change", MASKS)
@pytest.mark.parametrize("heads", [1, 4])
def test_any_mask(tiny: JanusUnifiedModel, change, additive: bool, heads: int, monkeypatch) -> None:
    """Masks of all heads and of one head, bool and additive, seen in each captured row."""
    seen = causal_mask() if change is causal_mask else change(causal_mask())
    mask = seen.expand(3, heads, -1, -1).clone()
    mask[:, 1:] = causal_mask()
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    attended, x = Attended(monkeypatch), inputs(tiny)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        hidden = forward(tiny, x, mask)
    compare(capture.maps, attended.mean([0, 1, 2]), COLUMNS)
    assert torch.equal(hidden, forward(tiny, x, mask))
    if additive:  # eager attention adds its masks
        compare(capture.maps, reference(tiny.decoder, x, mask, [0, 1, 2]), COLUMNS)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("value", [3.0, -4.0, -1e4])
@pytest.mark.parametrize("heads", [1, 4])
def test_biases(tiny: JanusUnifiedModel, implementation: str, value: float, heads: int) -> None:
    """Finite biases on two keys, and on distance as in ALiBi, of all heads or other ones for each head."""
    x, tiny.decoder.config._attn_implementation = inputs(tiny), implementation
    S = PROMPT + TOKENS
    bias = torch.zeros(1, heads, S, S).masked_fill(~causal_mask(), torch.finfo(torch.float32).min)
    distance = (torch.arange(S)[:, None] - torch.arange(S)).clamp(min=0)
    for kind in ("keys", "distance"):
        mask = bias.clone()
        if kind == "keys":
            mask[:, -1, 8:, 2:4] += value
        else:
            slopes = 0.25 * torch.arange(1, heads + 1)
            mask = torch.where(causal_mask(), -slopes[:, None, None] * distance, mask)
        with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
            forward(tiny, x, mask)
        compare(capture.maps, reference(tiny.decoder, x, mask, [0, 1, 2]), COLUMNS)


def test_masks_that_differ_by_layer(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of each captured layer is read, also where it is changed in place."""
    mask = causal_mask().expand(3, 1, -1, -1).clone()

    def change(*_) -> None:
        mask[:, :, 20:, 3:5] = False

    tiny.decoder.layers[0].register_forward_hook(change)
    other = window(causal_mask())[None, None].expand(3, 1, -1, -1)
    own = type(tiny.decoder.layers[2]).forward
    layer = tiny.decoder.layers[2]
    layer.forward = lambda *a, **k: own(layer, *a, **{**k, "attention_mask": other})
    attended = Attended(monkeypatch)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, inputs(tiny), mask)
    for index, maps in enumerate(capture.layer_maps):
        compare(maps, attended.mean([index]), COLUMNS)


@pytest.mark.parametrize("by_option", [False, True])
def test_layers_that_are_not_causal(tiny: JanusUnifiedModel, by_option: bool, monkeypatch) -> None:
    attention = tiny.decoder.layers[1].self_attn
    if by_option:
        own = type(attention).forward
        attention.forward = lambda *a, **k: own(attention, *a, **k, is_causal=False)
    else:
        attention.is_causal = False
    attended = Attended(monkeypatch)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, inputs(tiny))
    assert attended.probabilities[1][..., 0, -1].min() > 0
    for index, maps in enumerate(capture.layer_maps):
        compare(maps, attended.mean([index]), COLUMNS)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_sequences(tiny: JanusUnifiedModel, implementation: str) -> None:
    """Position ids that start again: the rows of the first sequence are no padding of the second one."""
    ids = torch.randint(3, 20, (1, PROMPT + TOKENS))
    positions = torch.cat([torch.arange(20), torch.arange(PROMPT + TOKENS - 20)])[None]
    model = deep(2)
    maps = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        with torch.no_grad(), AttentionCapture(model, columns=[[[3, 4], [25]]], rows=ROWS) as capture:
            outputs = model(**arguments, output_attentions=name == "eager")
        maps.append(capture.maps)
        if name == "eager":
            probs = torch.stack(outputs.attentions).mean((0, 2))
    compare(maps[1], probs, [[[3, 4], [25]]])
    assert maps[1][0, 0, :11].min() > 0


@pytest.mark.parametrize("padded", [False, True])
def test_arguments_by_name_and_by_place(tiny: JanusUnifiedModel, padded: bool) -> None:
    """Models call their attention in different ways: the mask by name, or the options by place."""
    from transformers.models.llama import modeling_llama

    interface = modeling_llama.ALL_ATTENTION_FUNCTIONS
    x, mask = inputs(tiny), torch.ones(3, PROMPT + TOKENS, dtype=torch.long)
    if padded:
        mask[1, :3] = 0
    expected = reference(tiny.decoder, x, mask, [0, 1, 2])

    def by_name(run, module, q, k, v, mask, **options):
        return run(module, value=v, attention_mask=mask, key=k, query=q, **options)

    def by_place(run, module, q, k, v, mask, dropout, scaling, **options):
        return run(module, q, k, v, mask, dropout, scaling, **options)

    for call in (by_name, by_place):
        with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
            get = interface.get_interface
            interface.get_interface = lambda *a, get=get, call=call: functools.partial(call, get(*a))
            forward(tiny, x, mask)
        compare(capture.maps, expected, COLUMNS)


@pytest.mark.parametrize("mask", [None, window(causal_mask())])
def test_float64_decoder(tiny: JanusUnifiedModel, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.module.double()
    attended = Attended(monkeypatch)
    columns = [[[3, 4, 5], [5]]] * 3
    with AttentionCapture(tiny, columns=columns, rows=ROWS) as capture:
        forward(tiny, inputs(tiny).double(), None if mask is None else mask.expand(3, 1, -1, -1))
    assert capture.maps.dtype == torch.float64
    probs = torch.stack(attended.probabilities).mean((0, 2))[:, PROMPT:]
    expected = torch.stack([probs[..., 3:6].mean(-1), probs[..., 5]], 1)
    torch.testing.assert_close(capture.maps.flatten(2), expected, rtol=0, atol=1e-13)


def test_models_without_a_grid() -> None:
    model = deep(2)
    ids = torch.randint(0, 20, (2, 16))
    with torch.no_grad(), AttentionCapture(model, columns=[[[1, 2], [3]], [[0]]], rows=(4, 11)) as capture:
        model(ids)
    assert capture.maps.shape == (2, 2, 11)
    assert capture.layer_maps.shape == (2, 2, 2, 11)
    compare(
        capture.maps, reference(model.model, model.model.embed_tokens(ids), None, [0, 1]), [[[1, 2], [3]], [[0]]], 4
    )


def test_a_cache_that_holds_the_beginning(tiny: JanusUnifiedModel) -> None:
    """Rows and columns are positions in the whole sequence, for any part of it that a pass runs."""
    x = inputs(tiny)
    expected = reference(tiny.decoder, x, None, [0, 1, 2])
    with torch.no_grad():
        past = tiny.decoder(inputs_embeds=x[:, :4], use_cache=True).past_key_values
        with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
            tiny.decoder(inputs_embeds=x[:, 4:20], past_key_values=past)
            with pytest.raises(OspoError, match=r"rows end at position 45, but 20 positions ran"):
                _ = capture.maps
            tiny.decoder(inputs_embeds=x[:, 20:], past_key_values=past)
        compare(capture.maps, expected, COLUMNS)
        # Rows that ran before the context, and rows between two captured passes.
        past = tiny.decoder(inputs_embeds=x[:, :12], use_cache=True).past_key_values
        with (
            pytest.raises(OspoError, match="rows from position 9 to 11 are in the cache already"),
            AttentionCapture(tiny, columns=COLUMNS, rows=ROWS),
        ):
            tiny.decoder(inputs_embeds=x[:, 12:], past_key_values=past)
        with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
            past = tiny.decoder(inputs_embeds=x[:, :12], use_cache=True).past_key_values
            for layer in past.layers:
                layer.keys, layer.values = layer.keys[:, :, :1].repeat(1, 1, 15, 1), layer.values[:, :, :15]
            with pytest.raises(OspoError, match="rows from position 12 to 14 are in the cache already"):
                tiny.decoder(inputs_embeds=x[:, 15:], past_key_values=past)


def generator(kind: str) -> torch.nn.Module:
    """Models with a cache of all keys, of a window, and of both."""
    import transformers

    common = {
        "vocab_size": 20, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    elif kind == "mistral":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**common, sliding_window=6))
    else:
        layers = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(**common, head_dim=8, sliding_window=6, layer_types=layers)
        model = transformers.Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(15)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
def test_steps_of_generate_and_replay(kind: str, options: dict) -> None:
    """The rows that predict the new tokens, captured step by step and by a second pass."""
    model, ids, mask = generator(kind), torch.randint(3, 20, (2, 10)), torch.ones(2, 22, dtype=torch.long)
    mask[1, :3] = 0
    arguments: dict = {"columns": [[[4, 5], [12]]] * 2, "rows": (9, 11)}
    with AttentionCapture(model, **arguments) as capture:
        sequence = model.generate(
            ids, attention_mask=mask[:, :10], max_new_tokens=12, do_sample=False, disable_compile=True, **options
        )
    steps = capture.maps
    maps = AttentionCapture(model, **arguments).replay(sequence, attention_mask=mask[:, : sequence.shape[1]])
    assert sequence.shape[1] == 22
    model.set_attn_implementation("eager")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(sequence, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
    probs = torch.stack(found).mean((0, 2))[:, 9:20]
    expected = torch.stack([probs[..., 4:6].mean(-1), probs[..., 12]], 1)
    assert expected.max() > 0.14
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(steps, expected, rtol=0, atol=1e-6)


def test_the_last_token_of_generate() -> None:
    model, ids = generator("llama"), torch.randint(3, 20, (1, 10))
    capture = AttentionCapture(model, columns=[[[4]]], rows=(10, 5))
    with capture:
        sequence = model.generate(ids, max_new_tokens=5, do_sample=False)
    with pytest.raises(OspoError, match=r"rows end at position 15, but 14 positions ran.*capture\.replay"):
        _ = capture.maps
    assert capture.replay(sequence).shape == (1, 1, 5)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        beyond = AttentionCapture(model, columns=[[[14]]], rows=(9, 5))
        with beyond:
            model.generate(ids, max_new_tokens=5, do_sample=False, **options)
        with pytest.raises(OpError, match="columns are up to 14, expected at most 13"):
            _ = beyond.maps
    again = AttentionCapture(model, columns=[[[4]]], rows=(4, 5))
    with pytest.raises(OspoError, match="one capture takes one sequence"), again:
        model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)


@pytest.mark.parametrize("kind", ["decoder_attentions", "cross_attentions", "encoder_attentions"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_encoder_decoders(kind: str, implementation: str) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=20, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=40,
        attn_implementation=implementation, forced_eos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    ids, later = torch.randint(3, 20, (2, 9)), torch.randint(3, 20, (2, 12))
    columns = [[[4, 5], [8]], [[0]]]
    with pytest.raises(OspoError, match="is an encoder-decoder; give attentions="):
        AttentionCapture(model, columns=columns, rows=(2, 6))
    arguments: dict = {"columns": columns, "rows": (2, 6), "attentions": kind}
    with torch.no_grad(), AttentionCapture(model, **arguments) as capture:
        model(input_ids=ids, decoder_input_ids=later)
    maps = AttentionCapture(model, **arguments).replay(later, input_ids=ids)
    torch.testing.assert_close(maps, capture.maps, rtol=1e-6, atol=1e-7)  # not the same products on every processor
    if kind != "encoder_attentions":
        with AttentionCapture(model, **{**arguments, "columns": [[[1], [2]]] * 2}) as capture:
            sequence = model.generate(ids, max_new_tokens=9, do_sample=False, num_beams=1)
        again = AttentionCapture(model, **{**arguments, "columns": [[[1], [2]]] * 2}).replay(sequence, input_ids=ids)
        torch.testing.assert_close(capture.maps, again, rtol=0, atol=1e-6)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(input_ids=ids, decoder_input_ids=later, output_attentions=True)
    compare(maps, torch.stack(outputs[kind]).mean((0, 2)), columns, 2)


def test_arguments_of_cross_attention() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    ids, later = torch.randint(3, 20, (1, 4)), torch.randint(3, 20, (1, 5))
    for columns, rows, message in (([[[4]]], (0, 5), "encoder has 4 positions"), ([[[3]]], (2, 4), "5 positions")):
        with pytest.raises(OpError, match=message):
            AttentionCapture(model, columns=columns, rows=rows, attentions="cross_attentions").replay(
                later, input_ids=ids, use_cache=False
            )
    with pytest.raises(OspoError, match="attentions is 'words', expected one of"):
        AttentionCapture(model, columns=[[[1]]], rows=(0, 5), attentions="words")
    with pytest.raises(OspoError, match="names no modules for cross_attentions"):
        AttentionCapture(deep(1), columns=[[[1]]], rows=(0, 5), attentions="cross_attentions")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_eager_functions_of_two_families(order: tuple[int, int]) -> None:
    """Each family has its own eager function: the first one captured does not lend it to the other."""
    from transformers import GptOssConfig, GptOssModel, OPTConfig, OPTModel

    common = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = OPTConfig(**common, ffn_dim=16, word_embed_proj_dim=32, max_position_embeddings=40)
    oss = GptOssConfig(
        **common, intermediate_size=16, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    models = [OPTModel(opt).eval(), GptOssModel(oss).eval()]
    torch.nn.init.normal_(models[1].layers[0].self_attn.sinks)
    ids = torch.randint(3, 20, (1, 20))
    for index in order:
        model = models[index]
        model.set_attn_implementation("eager")
        with torch.no_grad():
            plain = model(input_ids=ids, use_cache=False, output_attentions=True)
            with AttentionCapture(model, columns=[[[2, 3]]], rows=(8, 9)) as capture:
                hidden = model(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.equal(hidden, plain.last_hidden_state)
        compare(capture.maps, torch.stack(plain.attentions).mean((0, 2)), [[[2, 3]]], 8)


def test_attention_of_the_module_itself(tiny: JanusUnifiedModel) -> None:
    """Older model files compute attention in the module, which returns the weights under eager attention only."""
    from transformers import AutoModelForCausalLM, FalconConfig

    config = FalconConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    ids, arguments = torch.randint(3, 20, (2, 20)), {"columns": [[[2, 3]]] * 2, "rows": (8, 9)}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with (
        pytest.raises(OspoError, match=r"FalconAttention computes 'sdpa' attention itself.*'eager'"),
        AttentionCapture(model, **arguments),
    ):
        raise AssertionError("the context was entered")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad(), AttentionCapture(model, **arguments) as capture:
        outputs = model(ids, output_attentions=True)
    compare(capture.maps, torch.stack(outputs.attentions).mean((0, 2)), [[[2, 3]]] * 2, 8)


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
    assert has_lse == ([True] * 3 if implementation == "sdpa" else [])  # eager attention returns its weights
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


def xformers(module, query, key, value, mask, **kwargs):
    """Returns no log-sum-exp."""
    probs = scores_of(module, query, key, mask).softmax(-1)
    return (probs @ value.repeat_interleave(module.num_key_value_groups, 1)).transpose(1, 2).contiguous(), None


def test_registered_attention(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that returns neither weights nor a log-sum-exp."""
    x = inputs(tiny)
    expected = reference(tiny.decoder, x, None, [0, 1, 2])
    names = register("xformers", monkeypatch, xformers)
    tiny.decoder.config._attn_implementation = "xformers"
    before = forward(tiny, x)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        assert torch.equal(forward(tiny, x), before)
    compare(capture.maps, expected, COLUMNS)
    assert set(names) == {"xformers"}  # the attention reads its own name, captured or not


def flash(
    query, key, value, mask, query_length, is_causal, softmax_scale, sliding_window=None, softcap=None, s_aux=None,
    position_ids=None, **kwargs,
):  # fmt: skip
    """What transformers' flash attention calls, (B, S, H, D) in and out."""
    assert is_causal
    assert kwargs["dropout"] == 0
    ends = kwargs.get("cu_seq_lens_q")
    special = any(x is not None for x in (mask, sliding_window, softcap, s_aux, ends))
    if not special and (position_ids is None or bool((position_ids.diff() == 1).all())):
        return torch.ops.flash_attn._flash_attn_forward(query, key, value, softmax_scale)[0]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q @ k.mT * softmax_scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    S = q.shape[2]
    seen = causal_mask(S)
    if sliding_window is not None:
        seen = seen & ~torch.ones(S, S).tril(-sliding_window).bool()
    if mask is not None:
        seen = seen & mask[:, None, None].bool()
    elif ends is not None:
        sequence = torch.bucketize(torch.arange(S), ends, right=True)
        seen = seen & (sequence[:, None] == sequence)
    elif position_ids is not None:
        sequence = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
        seen = seen & (sequence[:, :, None] == sequence[:, None])[:, None]
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(len(q), -1, S, 1)], -1)
    FLASH_WEIGHTS.append(scores.softmax(-1)[..., :S])
    return (FLASH_WEIGHTS[-1] @ v).transpose(1, 2)


FLASH_WEIGHTS: list[Tensor] = []
FLASH_CASES: list[dict] = [
    {}, {"sliding_window": 8}, {"sliding_window": 100}, {"softcap": 0.1}, {"s_aux": torch.tensor([1.0, -1.0, 0.5, 2.0])}
]  # fmt: skip


@pytest.fixture
def flash_model(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> JanusUnifiedModel:
    from transformers.integrations import flash_attention

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash)
    monkeypatch.setitem(globals(), "FLASH_WEIGHTS", [])
    tiny.decoder.config._attn_implementation = "flash_attention_2"
    return tiny


def test_log_sum_exp_of_flash_attention(flash_model: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(flash_model)
    with AttentionCapture(flash_model, columns=COLUMNS, rows=ROWS) as capture:
        forward(flash_model, x)
    monkeypatch.setitem(globals(), "LSE_SHIFT", 1.0)
    with AttentionCapture(flash_model, columns=COLUMNS, rows=ROWS) as shifted:
        forward(flash_model, x)
    torch.testing.assert_close(shifted.maps, capture.maps / torch.e)  # its log-sum-exp is used
    compare(capture.maps, reference(flash_model.decoder, x, None, [0, 1, 2]), COLUMNS)


@pytest.mark.parametrize("case", FLASH_CASES, ids=lambda case: next(iter(case), "plain"))
@pytest.mark.parametrize("padding", [None, "left", "right", "hole"])
def test_options_of_flash_attention(flash_model: JanusUnifiedModel, case: dict, padding: str | None) -> None:
    """Windows, soft caps and sinks reach flash attention as options, and masks have two dimensions."""
    for layer in flash_model.decoder.layers:
        attention = layer.self_attn
        own = type(attention).forward
        attention.forward = lambda *a, attention=attention, own=own, **k: own(attention, *a, **k, **case)
    x, mask = inputs(flash_model), None
    if padding:
        mask = torch.ones(3, PROMPT + TOKENS, dtype=torch.long)
        mask[1, {"left": slice(0, 2), "right": slice(-3, None), "hole": slice(5, 7)}[padding]] = 0
    rows = (PROMPT, TOKENS - 4)
    with AttentionCapture(flash_model, columns=COLUMNS, rows=rows, grid=(4, 8)) as capture:
        forward(flash_model, x, mask)
    if case in ({}, {"sliding_window": 100}):
        probs = reference(flash_model.decoder, x, mask, [0, 1, 2])
    else:
        # Each layer ran twice: the second time on values that mark the columns.
        assert len(FLASH_WEIGHTS) == 6
        probs = torch.stack(FLASH_WEIGHTS[::2]).mean((0, 2))
    compare(capture.maps, probs, COLUMNS)


def test_packed_sequences_of_flash_attention(flash_model: JanusUnifiedModel) -> None:
    """Flash attention takes position ids that start again for packed sequences."""
    x = inputs(flash_model, batch=1)
    positions = torch.cat([torch.arange(20), torch.arange(PROMPT + TOKENS - 20)])[None]
    with torch.no_grad(), AttentionCapture(flash_model, columns=[[[3, 4], [25]]], rows=ROWS) as capture:
        flash_model.decoder(inputs_embeds=x, position_ids=positions, use_cache=False)
    compare(capture.maps, torch.stack(FLASH_WEIGHTS[::2]).mean((0, 2)), [[[3, 4], [25]]])
    assert capture.maps[0, 0].flatten()[:11].min() > 0


def test_lengths_of_packed_sequences_of_flash_attention(flash_model: JanusUnifiedModel) -> None:
    """Trainers without padding give the ends of the sequences, and positions that count on."""
    ends = torch.tensor([0, 20, PROMPT + TOKENS], dtype=torch.int32)
    x = inputs(flash_model, batch=1)
    with torch.no_grad(), AttentionCapture(flash_model, columns=[[[3, 4], [25]]], rows=ROWS) as capture:
        flash_model.decoder(inputs_embeds=x, use_cache=False, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    compare(capture.maps, torch.stack(FLASH_WEIGHTS[::2]).mean((0, 2)), [[[3, 4], [25]]])
    assert capture.maps[0, 0].flatten()[:11].min() > 0
    assert (capture.maps[0, 0].flatten()[11:] == 0).all()  # the second sequence does not see the first one


def test_heads_that_are_split_over_processes_are_refused(tiny: JanusUnifiedModel, monkeypatch) -> None:
    """With tensor parallelism a process runs some of the heads, whose mean is another one."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, inputs(tiny))
    assert capture.maps.isfinite().all()
    tiny.decoder.config.num_attention_heads *= 2
    with (
        pytest.raises(OspoError, match="runs 4 of 8 heads, as with tensor parallelism"),
        AttentionCapture(tiny, columns=COLUMNS, rows=ROWS),
    ):
        forward(tiny, inputs(tiny))


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


def test_differential_attention_is_refused() -> None:
    from transformers import DiffLlamaConfig, DiffLlamaModel

    config = DiffLlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = DiffLlamaModel(config).eval()
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with (
            pytest.raises(OspoError, match=r"differential attention: .*difference of two"),
            AttentionCapture(model, columns=[[[1]]], rows=(2, 4)),
        ):
            raise AssertionError("the context was entered")


def test_attention_that_runs_twice_is_refused(tiny: JanusUnifiedModel) -> None:
    attention = tiny.decoder.layers[1].self_attn
    own = type(attention).forward
    attention.forward = lambda *a, **k: (own(attention, *a, **k), own(attention, *a, **k))[0]
    with pytest.raises(OspoError, match="more than once"), AttentionCapture(tiny, columns=COLUMNS, rows=ROWS):
        forward(tiny, inputs(tiny))


def test_paged_attention_is_refused(tiny: JanusUnifiedModel) -> None:
    tiny.decoder.config._attn_implementation = "paged|eager"
    with pytest.raises(OspoError, match="shared cache"), AttentionCapture(tiny, columns=COLUMNS, rows=ROWS):
        pass
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(OspoError, match="Identity writes to a paged cache"):
        check_options(AttentionCall(torch.nn.Identity(), torch.nn.Identity(), q, q, q, None, {"cache": object()}))


def test_flex_attention() -> None:
    """Its mask is no tensor."""
    model, ids, mask = deep(2), torch.randint(3, 20, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    mask[1, :3] = 0
    expected = reference(model.model, model.model.embed_tokens(ids), mask, [0, 1])
    model.set_attn_implementation("flex_attention")
    with torch.no_grad(), AttentionCapture(model, columns=[[[3, 4], [5]]] * 2, rows=(6, 10)) as capture:
        model(ids, attention_mask=mask)
    compare(capture.maps, expected, [[[3, 4], [5]]] * 2, 6)


@pytest.mark.parametrize("kind", ["wraps", "bias", "is_causal", "log-sum-exp"])
def test_functions_that_wrap_those_of_transformers(tiny: JanusUnifiedModel, kind: str, monkeypatch) -> None:
    """Only the functions themselves are known; a second output is weights only if it has their shape."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    S = PROMPT + TOKENS
    x, bias = inputs(tiny), torch.randn(1, 4, S, S)

    @functools.wraps(sdpa_attention_forward)
    def sharper(module, query, *args, **kwargs):
        return sdpa_attention_forward(module, query * 3, *args, **kwargs)

    def with_lse(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)[0], torch.zeros(3, 4, S, 1)

    functions = {
        "wraps": sharper,
        "bias": functools.partial(sdpa_attention_forward, position_bias=bias),
        "is_causal": functools.partial(sdpa_attention_forward, is_causal=False),
        "log-sum-exp": with_lse,
    }
    register("mine", monkeypatch, sdpa_attention_forward)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", functions[kind])
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "mine", sdpa_mask)
    tiny.decoder.config._attn_implementation = "mine"
    attended = Attended(monkeypatch)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, x)
    probabilities = attended.probabilities if kind != "wraps" else attended.probabilities[::2]  # each runs twice
    compare(capture.maps, torch.stack(probabilities).mean((0, 2)).float(), COLUMNS)


def test_random_numbers_of_the_model_stay_the_same(tiny: JanusUnifiedModel, monkeypatch) -> None:
    def noisy(module, query, key, value, mask, **kwargs):
        return xformers(module, query, key, value + torch.randn_like(value), mask, **kwargs)

    x = inputs(tiny)
    register("noisy", monkeypatch, noisy)
    tiny.decoder.config._attn_implementation = "noisy"
    torch.manual_seed(0)
    expected = forward(tiny, x)
    torch.manual_seed(0)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS):
        assert torch.equal(forward(tiny, x), expected)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e9])
def test_rows_that_see_nothing(tiny: JanusUnifiedModel, low: float) -> None:
    """With finite values they attend to all keys: the map is what the attention computes."""
    mask = torch.zeros(3, 1, PROMPT + TOKENS, PROMPT + TOKENS).masked_fill(~causal_mask(), low)
    mask[1, :, :, :14] = low
    x = inputs(tiny)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, x, mask)
    compare(capture.maps, reference(tiny.decoder, x, mask, [0, 1, 2]), COLUMNS)
    assert capture.maps[1, 0].flatten()[:5].min() > 0


@pytest.mark.parametrize("shape", [(3, 1, 1, PROMPT + TOKENS), (1, 1, 1, PROMPT + TOKENS)])
def test_masks_of_one_row(tiny: JanusUnifiedModel, shape: tuple[int, ...], monkeypatch) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, :, :, 5:7] = False
    attended = Attended(monkeypatch)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        forward(tiny, inputs(tiny), mask)
    compare(capture.maps, attended.mean([0, 1, 2]), COLUMNS)


def test_masks_that_change_in_inference_mode(tiny: JanusUnifiedModel, monkeypatch) -> None:
    """Tensors of inference mode have no version that tells of changes."""
    attended = Attended(monkeypatch)
    with torch.inference_mode():
        mask = causal_mask().expand(3, 1, -1, -1).clone()

        def change(*_) -> None:
            mask[:, :, 20:, 3:5] = False

        tiny.decoder.layers[0].register_forward_hook(change)
        with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
            forward(tiny, inputs(tiny), mask)
        for index, maps in enumerate(capture.layer_maps):
            compare(maps, attended.mean([index]), COLUMNS)


def test_full_attention_without_a_log_sum_exp() -> None:
    """The math kernel returns none; keys end at the sequence."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=20, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40,
    )  # fmt: skip
    model, ids = BertModel(config).eval(), torch.randint(3, 20, (2, 16))
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), kernel, AttentionCapture(model, columns=[[[3, 14]]] * 2, rows=(2, 10)) as capture:
        model(ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probs = torch.stack(model(ids, output_attentions=True).attentions).mean((0, 2))
    compare(capture.maps, probs, [[[3, 14]]] * 2, 2)
    maps = AttentionCapture(model, columns=[[[3, 14]]] * 2, rows=(2, 10)).replay(
        ids, attention_mask=torch.ones(2, 16, dtype=torch.long)
    )
    compare(maps, probs, [[[3, 14]]] * 2, 2)


def test_replay_runs_the_model_that_was_given() -> None:
    """Absolute positions of a model without generate(), the tokens of prompt tuning, and ids without a mask."""
    import peft
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40,
    )  # fmt: skip
    tuned = peft.get_peft_model(deep(2), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids, mask = torch.randint(3, 20, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    for model in (RobertaModel(config).eval(), tuned.eval()):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + weight.dim())
        capture = AttentionCapture(model, columns=[[[3]], [[5, 6]]], rows=(7, 8))
        with torch.no_grad(), capture:
            model(input_ids=ids, attention_mask=mask)
        expected = capture.maps
        assert torch.equal(capture.replay(ids, attention_mask=mask), expected)


def test_heads_of_a_decoder_and_an_encoder() -> None:
    from transformers import BartConfig, BartModel

    config = BartConfig(
        vocab_size=20, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=40,
    )  # fmt: skip
    model, ids = BartModel(config).eval(), torch.randint(3, 20, (1, 12))
    arguments: dict = {"columns": [[[3]]], "rows": (4, 8), "attentions": "decoder_attentions"}
    whole = AttentionCapture(model, **arguments).replay(ids, input_ids=ids)
    single = [AttentionCapture(model, heads=[head], **arguments).replay(ids, input_ids=ids) for head in (0, 1, 2, -1)]
    torch.testing.assert_close(torch.stack(single).mean(0), whole)
    with pytest.raises(OspoError, match="expected indices from -2 to 1"):
        AttentionCapture(model, heads=[3], **{**arguments, "attentions": "encoder_attentions"})


def test_beams_and_other_caches_are_refused() -> None:
    model, ids = generator("llama"), torch.randint(3, 20, (1, 10))
    beams = AttentionCapture(model, columns=[[[4]]] * 3, rows=(9, 4))
    with pytest.raises(OspoError, match=r"change its sequences .*num_beams=1"), beams:
        model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False)
    with torch.no_grad():
        first, second = (model(ids[:, :6]).past_key_values for _ in range(2))
        capture = AttentionCapture(model, columns=[[[4]]], rows=(6, 4))
        with capture:
            model(ids[:, 6:8], past_key_values=first)
            with pytest.raises(OspoError, match="another cache"):
                model(ids[:, 8:], past_key_values=second)
    first.reorder_cache(torch.tensor([0]))  # outside of the context caches are free


def test_other_threads_run_the_model_without_the_capture(tiny: JanusUnifiedModel) -> None:
    x, found = inputs(tiny), []
    expected = forward(tiny, x)
    with AttentionCapture(tiny, columns=COLUMNS, rows=ROWS) as capture:
        thread = threading.Thread(target=lambda: found.extend(forward(tiny, x) for _ in range(2)))
        thread.start()
        thread.join()
        with pytest.raises(OspoError, match="in its thread"):
            _ = capture.maps
        forward(tiny, x)
    assert [torch.equal(hidden, expected) for hidden in found] == [True, True]
    compare(capture.maps, reference(tiny.decoder, x, None, [0, 1, 2]), COLUMNS)


def test_columns_are_lists_of_three_levels() -> None:
    for columns in ([[3]], [[[3.7]]], [[["cat"]]], 3):
        with pytest.raises(OpError, match="expected integers in lists of three levels"):
            AttentionCapture(deep(1), columns=columns, rows=(2, 4))


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


def test_compilation_without_graph_breaks_is_refused(tiny: JanusUnifiedModel) -> None:
    """The error says what helps. A later capture of the same compiled decoder reads its own maps."""
    x = inputs(tiny)
    torch.compiler.reset()  # of code that was compiled with graph breaks
    whole = torch.compile(tiny.decoder, backend="eager", fullgraph=True)
    with (
        torch.no_grad(),
        pytest.raises(torch._dynamo.exc.Unsupported, match="disable_compile=True"),
        AttentionCapture(tiny, columns=COLUMNS, rows=ROWS),
    ):
        whole(inputs_embeds=x, use_cache=False)
    decoder = torch.compile(tiny.decoder, backend="eager")
    probs = reference(tiny.decoder, x, None, [0])
    for columns in (COLUMNS, [[[7]]] * 3):
        with torch.no_grad(), AttentionCapture(tiny, columns=columns, rows=ROWS, layers=[0]) as capture:
            decoder(inputs_embeds=x, use_cache=False)
        compare(capture.maps, probs, columns)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [None, [1]])
def test_cuda_windows(heads: list[int] | None) -> None:
    """Attention that runs a second time, on values that mark the columns."""
    model, ids = generator("mistral").to("cuda"), torch.randint(3, 20, (2, 20), device="cuda")
    with torch.no_grad(), AttentionCapture(model, columns=[[[9, 10], [14]]] * 2, rows=(4, 16), heads=heads) as capture:
        model(ids)
    probs = reference(model.model, model.model.embed_tokens(ids), None, [0, 1], heads).cpu()
    expected = torch.stack([probs[:, 4:, 9:11].mean(-1), probs[:, 4:, 14]], 1)
    torch.testing.assert_close(capture.maps.cpu(), expected, rtol=0, atol=1e-5)


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
def test_cuda_mask_synchronizes_once(dim: int) -> None:
    """The layers share the mask, which is inspected once."""
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    S = PROMPT + TOKENS
    mask = torch.ones(3, S, dtype=torch.bool)
    mask[1, :2] = False
    if dim == 4:
        mask = (mask[:, None, None] & torch.ones(S, S).tril().bool()).contiguous()
    q, mask = torch.randn(3, 4, S, 16).cuda(), mask.cuda()
    function = sdpa_attention_forward if dim == 4 else flash_attention_forward
    call = AttentionCall(function, torch.nn.Identity(), q, q, q, mask, {"is_causal": True})
    for _ in range(2):  # the first call allocates pinned memory
        requests = PlainRequests(ColumnRequest.from_args(pad_columns(COLUMNS), 3, S, rows=ROWS), q.device, 1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as synchronizations:
            warnings.simplefilter("always")
            found = [requests.get(call) for _ in range(3)]
        torch.cuda.set_sync_debug_mode("default")
    messages = [str(warning.message) for warning in synchronizations]
    assert sum("called a synchronizing" in message for message in messages) == 1, messages
    assert all(found)
    assert found[0][0].key_start.tolist() == [0, 2, 0]


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

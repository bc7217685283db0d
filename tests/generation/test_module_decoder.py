"""ModuleDecoder: with a hook that changes nothing, the codes, texts and answers of the fused decoder."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ospo_fast.errors import OspoError
from ospo_fast.generation import ImageGenerator, answer_questions, generate_text
from ospo_fast.generation.decoder import Cache, InferenceDecoder
from ospo_fast.generation.graph import capturable
from ospo_fast.generation.module_decoder import ModuleDecoder, build_decoder

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

PROMPTS = ["a red circle", "two blue squares and a red circle", "a green cross", "one large red circle"]


@pytest.fixture(scope="module")
def shapes() -> JanusUnifiedModel:
    from ospo_fast import load_model

    return load_model("shapes")


@pytest.fixture(scope="module")
def hooked(shapes: JanusUnifiedModel) -> JanusUnifiedModel:
    """The embedded model with a hook that changes nothing."""
    module = copy.deepcopy(shapes.module)
    module.model.language_model.layers[2].mlp.register_forward_hook(lambda *_: None)
    return shapes.with_module(module, name="shapes")


@pytest.mark.parametrize(
    ("temperature", "count", "given"),
    [(0, 6, {}), (1, 6, {}), (1, 3, {"batch_size": 2}), (1, 2, {"jacobi_window": 3})],
    ids=str,
)
def test_codes_are_those_of_the_fused_decoder(
    shapes: JanusUnifiedModel, hooked: JanusUnifiedModel, temperature: int, count: int, given: dict[str, int]
) -> None:
    """With prompts of several lengths, and rows that share a place in the cache."""
    found = [
        ImageGenerator(model, **given).generate(
            (PROMPTS * 2)[:count], seeds=list(range(count)), temperature=temperature, output="codes", progress=False
        )
        for model in (shapes, hooked)
    ]
    assert torch.equal(*found)


def test_texts_are_those_of_the_fused_decoder(shapes: JanusUnifiedModel, hooked: JanusUnifiedModel) -> None:
    prompts = [shapes.chat([{"role": "user", "content": text}]) for text in PROMPTS]
    given: dict[str, Any] = {"seeds": [0, 1, 2, 3], "max_new_tokens": 12, "progress": False}
    expected = generate_text(shapes, prompts, **given)
    assert len(set(expected)) > 1
    assert generate_text(hooked, prompts, **given) == expected


@pytest.mark.parametrize("where", ["lm_head", "decoder"])
def test_hooks_change_texts(shapes: JanusUnifiedModel, where: str) -> None:
    model = shapes.with_module(copy.deepcopy(shapes.module), name="shapes")
    prompt = model.chat([{"role": "user", "content": PROMPTS[0]}])

    def text() -> list[Any]:
        return generate_text(model, [prompt], seeds=[0], max_new_tokens=8, temperature=0, progress=False)

    @torch.no_grad()
    def loop() -> str:
        ids = prompt
        while int(ids[-1]) not in model.eos_ids and len(ids) < len(prompt) + 8:
            ids = torch.cat((ids, model.module(input_ids=ids[None]).logits[0, -1:].argmax(-1)))
        return model.detokenize(ids[len(prompt) :])

    before = text()
    assert before == [loop()]
    module = model.module.lm_head if where == "lm_head" else model.decoder.layers[1]
    module.register_forward_hook(lambda _, __, y: y.roll(3, -1))
    assert text() == [loop()] != before


def test_answers_are_those_of_the_fused_decoder(shapes: JanusUnifiedModel, hooked: JanusUnifiedModel) -> None:
    images = ImageGenerator(shapes).generate(PROMPTS[:2], seeds=[0, 1], progress=False)
    questions = [["is there a red circle?", "are there two blue squares?"], ["is there a red circle?"]]

    def answers(model: JanusUnifiedModel) -> list[float]:
        found = answer_questions(
            model, images, questions, template=lambda text: [{"role": "user", "content": text}], progress=False
        )
        return [answer["p_yes"] for group in found for answer in group]

    expected = answers(shapes)
    assert answers(hooked) == pytest.approx(expected, rel=1e-4)
    # A registered attention without masks takes the first query for the first key.
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("attention of answers", sdpa_attention_forward)
    other = shapes.with_module(copy.deepcopy(shapes.module), name="shapes")
    other.decoder.config._attn_implementation = "attention of answers"
    assert isinstance(build_decoder(other), ModuleDecoder)
    assert answers(other) == pytest.approx(expected, rel=1e-4)
    # Hooks change them.
    other.decoder.layers[1].register_forward_hook(lambda _, __, y: y.roll(3, -1))
    assert answers(other) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_hidden_states_are_those_of_transformers(hooked: JanusUnifiedModel, attention: str) -> None:
    model = hooked.with_module(copy.deepcopy(hooked.module), name="shapes")
    model.decoder.config._attn_implementation = attention
    decoder = ModuleDecoder(model)
    x = torch.randn(3, 9, model.hidden_size)
    expected = model.decoder(inputs_embeds=x, use_cache=False).last_hidden_state
    cache = Cache(decoder, 3, 12)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    found = torch.cat([decoder(x[:, a:b], cache, a) for a, b in ((0, 4), (4, 8), (8, 9))], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Rows of several lengths in one step, a padding row, and rows that share a row of the cache.
    rows, lengths = torch.tensor([2, 0, 1, 0, 1]), torch.tensor([8, 5, -1, 4, 7])
    places = [(0, 2, 8), (1, 0, 5), (3, 0, 4), (4, 1, 7)]
    step = torch.zeros(5, model.hidden_size)
    for i, row, length in places:
        step[i] = x[row, length]
    found = decoder.step(step, cache, rows, lengths, shared_slots=True)
    assert not found[2].any()
    for i, row, length in places:
        torch.testing.assert_close(found[i], expected[row, length], rtol=1e-4, atol=1e-4)


def test_steps_of_modules_are_not_captured(shapes: JanusUnifiedModel, hooked: JanusUnifiedModel) -> None:
    assert type(build_decoder(shapes)) is InferenceDecoder
    decoder = build_decoder(hooked)
    assert type(decoder) is ModuleDecoder
    decoder.device = torch.device("cuda")
    assert not capturable(decoder)


def test_a_model_in_training_with_checkpointing_stays_as_it_is(shapes: JanusUnifiedModel) -> None:
    module = copy.deepcopy(shapes.module).train()
    module.gradient_checkpointing_enable()
    module.model.language_model.layers[0].register_forward_hook(lambda *_: None)
    given: dict[str, Any] = {"seeds": [0], "output": "codes", "progress": False}
    found = ImageGenerator(shapes.with_module(module, name="shapes")).generate(PROMPTS[:1], **given)
    assert torch.equal(found, ImageGenerator(shapes).generate(PROMPTS[:1], **given))
    assert module.model.language_model.layers[0].training


def test_a_compiled_decoder_is_called(shapes: JanusUnifiedModel) -> None:
    """The compiled module runs, so its codes are those of its backend."""
    module, calls = copy.deepcopy(shapes.module), []

    def backend(graph: Any, _: Any) -> Any:
        def run(*given: Tensor) -> Any:
            calls.append(1)
            return graph(*given)

        return run

    module.model.language_model.layers[4] = torch.compile(module.model.language_model.layers[4], backend=backend)
    given: dict[str, Any] = {"seeds": [0], "output": "codes", "progress": False, "guidance_scale": 1}
    compiled = shapes.with_module(module, name="shapes")
    compiled.grid = (1, 3)
    found = ImageGenerator(compiled).generate(PROMPTS[:1], **given)
    assert calls
    assert torch.equal(found, ImageGenerator(shapes).generate(PROMPTS[:1], **given)[:, :3])
    torch._dynamo.reset()


def test_decoders_that_cannot_run_are_refused(shapes: JanusUnifiedModel) -> None:
    model = shapes.with_module(copy.deepcopy(shapes.module), name="shapes")
    handle = model.decoder.register_forward_hook(lambda _, __, y: y.last_hidden_state[:, -1:])
    with pytest.raises(OspoError, match=r"the decoder returned hidden states \(2, 1, 128\) for embeddings \(2, "):
        ImageGenerator(model).generate(PROMPTS[:1], seeds=[0], output="codes")
    handle.remove()
    model.decoder.config.is_causal = False
    with pytest.raises(OspoError, match="is_causal of the decoder is False"):
        ImageGenerator(model).generate(PROMPTS[:1], seeds=[0], output="codes")
    model.decoder = nn.Linear(2, 2)
    with pytest.raises(OspoError, match=r"the decoder Linear has no num_attention_heads, expected a Llama decoder"):
        build_decoder(model)


def test_the_output_layer_sees_the_shape_of_generate(shapes: JanusUnifiedModel) -> None:
    """(sequences, 1, width): a hook that reads or edits the last token means the token, not the last column."""
    model = shapes.with_module(copy.deepcopy(shapes.module), name="shapes")
    seen = []
    model.module.lm_head.register_forward_hook(lambda _, args, output: seen.append((args[0].shape, output.shape)))
    prompt = model.chat([{"role": "user", "content": PROMPTS[0]}])
    generate_text(model, [prompt], seeds=[0], max_new_tokens=3, temperature=0, progress=False)
    assert {(tuple(x), len(y)) for x, y in seen} == {((1, 1, model.hidden_size), 3)}

"""What holds for every family: greedy codes, any batch, attention maps, folders, adapters, bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ospo_fast as of
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation import ImageGenerator, answer_questions
from ospo_fast.generation.decoder import InferenceDecoder
from ospo_fast.models.adapter import Adapter
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.families import FAMILIES
from ospo_fast.models.layout import embed_image
from tests.models.tiny_families import VARIANTS, AllowedTokens, build

PROMPTS = ["a red circle", "two blue squares and a cross", "a cross"]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(variant: str) -> Adapter:
    return build(variant)


def logits_of(model: Adapter, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Logits of the codes behind ids (S,) of a prompt and `count` tokens of its image, by transformers' own layers."""
    positions = None
    if model.layout.positions is not None:
        prompt = len(ids) - count
        image = torch.tensor(model.layout.positions)[:, :count] + prompt
        positions = torch.cat([torch.arange(prompt).expand(len(image), -1), image], 1)[:, None]
    options = {} if positions is None else {"position_ids": positions}
    hidden = model.decoder(inputs_embeds=model.embed_tokens(ids)[None], **options).last_hidden_state[0, -1]
    logits: torch.Tensor = model.module.lm_head(hidden)
    return logits[model.code_ids]  # type: ignore[attr-defined]


@torch.no_grad()
def greedy(model: Adapter, prompt: str, scale: float = 1.0) -> list[int]:
    """Greedy codes without a cache, token by token."""
    branches = [model.image_prompt(prompt)]
    if scale != 1:
        branches.append(model.unconditional(branches[0]))
    given, codes = dict(model.layout.structure), []
    for n in range(model.layout.tokens):
        token = given.get(n)
        if token is None:
            logits = [logits_of(model, ids, n) for ids in branches]
            guided = logits[0] if scale == 1 else logits[1] + scale * (logits[0] - logits[1])
            codes.append(int(guided.argmax()))
            token = int(model.code_ids[codes[-1]])  # type: ignore[attr-defined]
        branches = [torch.cat([ids, torch.tensor([token])]) for ids in branches]
    return codes


def test_protocol(model: Adapter) -> None:
    assert isinstance(model, UnifiedModel)
    assert sum(weight.numel() for weight in model.module.parameters()) <= 300_000
    assert model.image_prompt("a red circle")[-1] == model.boi_id == model.unconditional(torch.tensor([1]))[-1]
    assert model.layout.codes == sum(height * width for height, width in model.layout.grids)


def test_prompt_offsets_are_those_of_the_words(model: Adapter) -> None:
    prompt = "a red circle"
    ids, spans = model.image_prompt_offsets(prompt)
    assert torch.equal(ids, model.image_prompt(prompt))
    assert "".join(prompt[slice(*span)] for span in spans if span) == prompt.replace(" ", "")


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_greedy_codes_are_those_of_the_modules(model: Adapter, scale: float) -> None:
    generator = ImageGenerator(model)
    codes = generator.generate(
        PROMPTS, seeds=[0, 1, 2], guidance_scale=scale, temperature=0, output="codes", progress=False
    )
    assert type(generator._engine.decoder) is InferenceDecoder  # type: ignore[union-attr]
    assert codes.tolist() == [greedy(model, prompt, scale) for prompt in PROMPTS]
    assert len(set(codes.flatten().tolist())) > 2  # else the test would show little


def test_codes_do_not_depend_on_the_batch(model: Adapter) -> None:
    def codes(prompts: list[str], seeds: list[int], **options: Any) -> torch.Tensor:
        found: torch.Tensor = ImageGenerator(model, **options).generate(
            prompts, seeds=seeds, guidance_scale=3.0, output="codes", progress=False
        )
        return found

    together = codes(PROMPTS, [5, 6, 7])
    assert torch.equal(together[1:2], codes(PROMPTS[1:2], [6]))
    assert torch.equal(together, codes(PROMPTS, [5, 6, 7], batch_size=2))
    assert torch.equal(together.flip(0), codes(PROMPTS[::-1], [7, 6, 5]))


def test_modules_with_hooks_generate_the_same_codes(model: Adapter) -> None:
    options: dict[str, Any] = {"guidance_scale": 3.0, "temperature": 0, "output": "codes", "progress": False}
    expected = ImageGenerator(model).generate(PROMPTS, seeds=[0, 1, 2], **options)
    layers: Any = model.decoder.layers
    handle = layers[0].mlp.register_forward_hook(lambda *_: None)
    try:
        assert torch.equal(ImageGenerator(model).generate(PROMPTS, seeds=[0, 1, 2], **options), expected)
    finally:
        handle.remove()


@torch.no_grad()
def test_maps_are_those_of_eager_attention(model: Adapter) -> None:
    from ospo_fast.stages.teacher_forcing import hidden_states, teacher_forced

    prompts = [model.image_prompt(prompt) for prompt in PROMPTS[:2]]
    codes = torch.randint(0, model.num_codes, (2, model.layout.codes), generator=torch.Generator().manual_seed(0))
    batch = teacher_forced(model, prompts, codes)
    columns = [[[1, 2]], [[2]]]
    rows = (batch.lengths - 1, batch.tokens)
    with of.AttentionCapture(model, columns=columns, rows=rows, layers=[0, 1]) as capture:
        hidden_states(model, batch.embeds, positions=batch.positions)
    model.module.set_attn_implementation("eager")
    options = {} if batch.positions is None else {"position_ids": batch.positions}
    found = model.decoder(inputs_embeds=batch.embeds, output_attentions=True, use_cache=False, **options)
    maps = torch.stack(found.attentions).mean((0, 2))
    for n, (length, [tokens]) in enumerate(zip(batch.lengths.tolist(), columns, strict=True)):
        cells = [length - 1 + place for place in model.layout.grid_positions]
        expected = maps[n][cells][:, tokens].mean(-1).view(model.grid)
        assert torch.allclose(capture.maps[n, 0], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_logprobs_are_those_of_single_steps(model: Adapter) -> None:
    from ospo_fast.stages.teacher_forcing import mean_logprobs

    prompt = model.image_prompt(PROMPTS[1])
    codes = torch.randint(0, model.num_codes, (1, model.layout.codes), generator=torch.Generator().manual_seed(1))
    [found] = mean_logprobs(model, [prompt], codes, batch_size=1)
    given, ids, logps, left = dict(model.layout.structure), prompt, [], codes[0].tolist()
    for n in range(model.layout.tokens):
        token = given.get(n)
        if token is None:
            code = left.pop(0)
            logps.append(float(logits_of(model, ids, n).log_softmax(-1)[code]))
            token = int(model.code_ids[code])  # type: ignore[attr-defined]
        ids = torch.cat([ids, torch.tensor([token])])
    assert found == pytest.approx(sum(logps) / len(logps), abs=1e-5)


def test_embeddings_of_an_image_are_those_of_its_tokens(model: Adapter) -> None:
    codes = torch.arange(model.layout.codes)[None] % model.num_codes
    tokens = model.layout.spread(model.code_ids[codes], -1)[0]  # type: ignore[attr-defined]
    for place, token in model.layout.structure:
        tokens[place] = token
    assert torch.equal(embed_image(model, codes)[0], model.embed_tokens(tokens))


def test_a_saved_folder_loads_with_the_same_codes(variant: str, model: Adapter, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    loaded = of.load_model(tmp_path / "saved", image_size=model.image_size)
    assert loaded.layout == model.layout
    options: dict[str, Any] = {"guidance_scale": 3.0, "output": "codes", "progress": False}
    codes = [ImageGenerator(m).generate(PROMPTS, seeds=[1, 2, 3], **options) for m in (model, loaded)]
    assert torch.equal(*codes)


def test_modules_are_taken_with_their_processor(variant: str, model: Adapter) -> None:
    module, processor = model.module, model.processor
    with pytest.raises(UsageError, match=r"processor: got none, expected the \w+Processor of"):
        ImageGenerator(module)
    if "lumina" not in variant:  # whose default size is beyond the positions of a tiny model
        assert ImageGenerator(module, processor).model.num_codes == model.num_codes


@pytest.mark.parametrize("variant", ["emu3", "chameleon"])
@torch.no_grad()
def test_answers_are_those_of_a_forward_pass_of_transformers(variant: str) -> None:
    from PIL import Image

    model: Any = build(variant)
    height, width = model.image_size
    images = [Image.effect_noise((width, height), 60 + 30 * n).convert("RGB") for n in range(2)]
    asked = ["Is there a circle?", "Is there a cross?"]

    def template(question: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": question}]

    found = answer_questions(model, images, [asked, asked[:1]], template=template, progress=False)
    sizes = {"image_sizes": torch.tensor([[height, width]])} if variant == "emu3" else {}
    for image, questions, answers in zip(images, (asked, asked[:1]), found, strict=True):
        for question, answer in zip(questions, answers, strict=True):
            ids = model.chat(template(question), image=True)[None]
            logits = model.module(input_ids=ids, pixel_values=model._pixels([image]), **sizes).logits
            probs = logits[0, -1].softmax(-1)
            assert answer["p_yes"] == pytest.approx(float(probs[list(model.yes_ids)].max()), rel=1e-4)
            assert answer["p_no"] == pytest.approx(float(probs[list(model.no_ids)].max()), rel=1e-4)


@pytest.mark.parametrize("variant", ["emu3", "chameleon"])
def test_greedy_texts_are_those_of_generate(variant: str) -> None:
    from ospo_fast.generation import generate_text

    model: Any = build(variant)
    prompts = [model.chat([{"role": "user", "content": text}]) for text in ("Is there a circle?", "a")]
    texts = generate_text(model, prompts, seeds=[0, 1], max_new_tokens=8, temperature=0, progress=False)
    for ids, text in zip(prompts, texts, strict=True):
        found = model.module.generate(
            input_ids=ids[None], max_new_tokens=8, do_sample=False, eos_token_id=list(model.eos_ids)
        )
        assert text == model.detokenize(found[0, len(ids) :])


def test_jacobi_decoding_with_an_unconditional_prompt_of_another_length() -> None:
    model = build("chameleon")
    options: dict[str, Any] = {"guidance_scale": 3.0, "output": "codes", "progress": False}
    expected = ImageGenerator(model).generate(PROMPTS, seeds=[0, 1, 2], **options)
    assert torch.equal(ImageGenerator(model, jacobi_window=4).generate(PROMPTS, seeds=[0, 1, 2], **options), expected)


@pytest.mark.parametrize("variant", ["emu3", "lumina", "glm_image"])
def test_jacobi_decoding_is_refused_where_tokens_are_not_codes_in_a_row(variant: str) -> None:
    generator = ImageGenerator(build(variant), jacobi_window=4)
    with pytest.raises(UsageError, match="jacobi_window: got 4, expected 0, because images of tiny have structure"):
        generator.generate(PROMPTS[:1], seeds=[0], output="codes", progress=False)


def test_guidance_that_does_not_fit_the_positions_is_refused() -> None:
    model = build("emu3")
    prompt = model.image_prompt("a")
    model.max_positions = len(prompt) + model.layout.tokens
    options: dict[str, Any] = {"seeds": [0], "output": "codes", "progress": False}
    assert len(ImageGenerator(model).generate(["a"], guidance_scale=1, **options)) == 1
    with pytest.raises(
        UsageError, match=r"guidance_scale: got 3\.0, but the unconditional prompt of tiny and an image"
    ):
        ImageGenerator(model).generate(["a"], guidance_scale=3.0, **options)


def test_a_grid_is_not_set_where_a_row_has_an_end() -> None:
    model = build("emu3")
    with pytest.raises(OspoError, match="the grid of tiny was set, expected its own; load it with another image_size"):
        model.grid = (2, 2)


@pytest.mark.parametrize("name", ["Emu3ForConditionalGeneration", "Emu3Processor"])
def test_a_family_that_transformers_is_too_old_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    build("emu3").save(tmp_path / "saved")
    monkeypatch.setattr(transformers, name, None)  # what is not there
    remedy = f"need {name} of transformers, which {transformers.__version__} does not have; install"
    with pytest.raises(OspoError, match=rf"'emu3' models {remedy} \"transformers>=5.17\""):
        of.load_model(tmp_path / "saved")


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    known = "'janus', 'emu3', 'emu3_5', 'chameleon', 'glm_image'"
    with pytest.raises(OspoError, match=f"has model_type 'llama', expected one of {known}; use a model of these"):
        of.load_model(tmp_path)


def test_an_image_size_of_a_model_with_one_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="image_size: got 96x96, expected a size that shapes knows: 48x48"):
        of.load_model("shapes", image_size=(96, 96))
    assert of.load_model("shapes", image_size=(48, 48)).image_size == (48, 48)


@pytest.mark.parametrize("size", [(8, 8, 8), "8x8", 8, (8,), ("8", "8"), (8.0, 8.0), (40_000_000, 8), (-8, 8)])
def test_image_sizes_that_are_none_are_refused(size: Any) -> None:
    with pytest.raises(UsageError, match=r"image_size: got .*, expected two integers, height and width in pixels"):
        of.load_model("shapes", image_size=size)


@pytest.mark.parametrize("variant", ["emu3", "lumina", "glm_image"])
def test_a_saved_copy_keeps_its_image_size(variant: str, tmp_path: Path) -> None:
    model = build(variant)
    model.save(tmp_path / "saved")
    assert of.load_model(tmp_path / "saved").image_size == model.image_size
    assert ImageGenerator(model.module, model.processor).model.layout == model.layout


@pytest.mark.parametrize("variant", ["emu3", "chameleon"])
def test_the_head_has_the_weights_of_now_and_their_gradients(variant: str) -> None:
    model = build(variant)
    hidden = torch.randn(3, model.hidden_size)
    with torch.no_grad():
        before = model.head(hidden)
        model.module.lm_head.weight.data.neg_()
        assert torch.equal(model.head(hidden), -before)
    logps = of.token_logprobs(hidden, model.head, torch.tensor([0, 1, 2]))
    logps.sum().backward()
    rows = model.module.lm_head.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows == sorted(model.code_ids.tolist())  # type: ignore[attr-defined]
    model.module.requires_grad_(False)
    assert not of.token_logprobs(hidden, model.head, torch.tensor([0, 1, 2])).requires_grad


@pytest.mark.parametrize(("variant", "count"), [("emu3", 20), ("lumina", 24), ("glm_image", 6)])
def test_maps_of_rows_that_are_no_image_are_refused(variant: str, count: int) -> None:
    model = build(variant)
    with pytest.raises(OspoError, match=rf"rows holds {count} positions, expected the {model.layout.tokens} tokens"):
        of.AttentionCapture(model, columns=[[[1]]], rows=(8, count))
    of.AttentionCapture(model, columns=[[[1]]], rows=(8, count), grid=(1, count))


def test_codes_that_are_none_are_refused() -> None:
    from ospo_fast.stages.teacher_forcing import teacher_forced

    for variant in ("emu3", "glm_image"):
        model = build(variant)
        codes = torch.full((1, model.layout.codes), -1)
        with pytest.raises((IndexError, RuntimeError)):
            model.embed_codes(codes)
        with pytest.raises(OspoError, match=rf"codes: got 6 of an image, expected {model.layout.codes}"):
            teacher_forced(model, [model.image_prompt("a")], torch.zeros(1, 6, dtype=torch.long))


def test_masks_of_several_grids() -> None:
    layout = build("glm_image").layout
    masks = torch.zeros(2, *layout.grid, dtype=torch.bool)
    masks[0, 0] = True
    preview, own = layout.masks(masks)
    assert own is masks
    assert preview.shape[1:] == layout.grids[0]
    with pytest.raises(OspoError, match=r"masks: got the shape \(2, 3, 3\), expected \(B, 2, 3\)"):
        layout.masks(torch.zeros(2, 3, 3))


@pytest.mark.parametrize("variant", ["emu3_5", "chameleon", "chameleon, swin", "lumina"])
def test_greedy_codes_are_those_of_generate(variant: str) -> None:
    """In float32. Emu3 and GLM-Image have tests of their own, with what their processors give to `generate`."""
    model: Any = build(variant)
    if variant != "emu3_5":
        model.module.model.vocabulary_mapping.image_tokens = []  # its forward pass masks the logits of codes
    codes = ImageGenerator(model).generate(
        PROMPTS, seeds=[0, 1, 2], guidance_scale=1, temperature=0, output="codes", progress=False
    )
    structure = {n for n, _ in model.layout.structure}
    for prompt, own in zip(PROMPTS, codes, strict=True):
        ids = model.image_prompt(prompt)[None]
        found = model.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=model.layout.tokens,
            do_sample=False,
            eos_token_id=None,
            logits_processor=[AllowedTokens(model, ids.shape[1])],
        )[0, ids.shape[1] :]
        kept = [token for n, token in enumerate(found.tolist()) if n not in structure]
        assert kept == model.code_ids[own.cpu()].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tokenizer_without_any_of_its_named_tokens_is_refused(variant: str, tmp_path: Path) -> None:
    """transformers adds it again, with another id, and `tokenizers` moves the ids of those behind it."""
    import json

    model: Any = build(variant)
    model.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text()
    tokenizer = model.processor.tokenizer
    structure = {tokenizer.convert_ids_to_tokens(token) for _, token in model.layout.structure}
    named = set(tokenizer.special_tokens_map.values()) | structure
    named |= {token for token in tokenizer.all_special_tokens if "visual token" not in token}
    assert len(named) >= 5
    for token in sorted(named):
        content = json.loads(text)
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != token]
        content["model"]["vocab"].pop(token, None)
        path.write_text(json.dumps(content))
        with pytest.raises(OspoError, match="use the tokenizer of the published model"):
            of.load_model(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_more_layers_than_the_configuration_are_refused(variant: str, tmp_path: Path) -> None:
    import json

    build(variant).save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    text = config if "num_hidden_layers" in config else config["text_config"]
    text["num_hidden_layers"] -= 1
    text.pop("layer_types", None)
    path.write_text(json.dumps(config))
    with pytest.raises(OspoError, match=r"tensors \(.*layers\.1\..* of more parts than its config.json describes"):
        of.load_model(tmp_path)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_tokenizer_of_the_hub_is_checked_too(damaged: bool, tmp_path: Path) -> None:
    """Loaded from the local cache of the hub, without a network, in a process that has it as its cache."""
    import json
    import os
    import subprocess
    import sys

    repository = tmp_path / "hub" / "models--BAAI--Emu3-Gen-hf"
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    build("emu3").save(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    if damaged:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != "<|extra_201|>"]
        path.write_text(json.dumps(content))
    code = 'import ospo_fast as of; print(of.load_model("BAAI/Emu3-Gen-hf", image_size=(8, 10)).grid)'
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if damaged:
        assert "and with the tokens of this file it gets" in ended.stderr
    else:
        assert ended.stdout.endswith("(4, 5)\n"), ended.stderr


@pytest.mark.parametrize(
    ("variant", "last", "split"),
    [("chameleon", "</s>", None), ("emu3_5", "<|image token|>", r"splits '<\|extra_100\|>'")],
)
def test_a_named_token_can_be_in_the_vocabulary_of_the_model(
    variant: str, last: str, split: str | None, tmp_path: Path
) -> None:
    """A tokenizer.json may have few added tokens. Those without a name are then split in a text."""
    import json

    build(variant).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    count = next(n for n, entry in enumerate(content["added_tokens"]) if entry["content"] == last) + 1
    moved, content["added_tokens"] = content["added_tokens"][:count], content["added_tokens"][count:]
    content["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in moved}
    path.write_text(json.dumps(content))
    if split is not None:
        with pytest.raises(OspoError, match=split):
            of.load_model(tmp_path)
        return
    models: list[Any] = [of.load_model(tmp_path), build(variant)]
    prompts = [model.image_prompt("a red circle").tolist() for model in models]
    assert prompts[0] == prompts[1]


def test_stages_loss_and_engine_name_no_family() -> None:
    """A family of one's own works in them like those of the package. Janus is the one of the method."""
    root = Path(of.__file__).parent
    names = re.compile("|".join({*FAMILIES, "anole", "lumina"} - {"janus"}), re.IGNORECASE)
    files = [path for part in ("stages", "generation", "ops", "evaluation") for path in (root / part).rglob("*")]
    files += [root / name for name in ("loss.py", "pipeline.py", "reward.py", "workers.py")]
    files = [path for path in files if path.suffix in (".py", ".yaml")]
    assert len(files) > 60
    assert not [path for path in files if names.search(path.read_text())]


def test_two_codes_of_one_id_are_refused() -> None:
    from tests.models.tiny_families import build_emu3

    module, processor = build_emu3()
    mapping = module.config.vocabulary_map
    mapping["<|visual token 000003|>"] = mapping["<|visual token 000004|>"]
    with pytest.raises(OspoError, match="has one id for several codes, expected 24 different ones"):
        FAMILIES["emu3"].adapt(module, processor, name="tiny", image_size=(8, 8))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_layers_generate_as_the_modules_do(
    variant: str, model: Adapter, quantize: str, tmp_path: Path
) -> None:
    model.save(tmp_path)
    loaded = of.load_model(tmp_path, quantize=quantize)
    generator = ImageGenerator(loaded)
    codes = generator.generate(
        PROMPTS, seeds=[0, 1, 2], guidance_scale=3.0, temperature=0, output="codes", progress=False
    )
    assert codes.tolist() == [greedy(loaded, prompt, 3.0) for prompt in PROMPTS]
    layers: Any = loaded.decoder.layers
    assert type(layers[0].mlp.down_proj.weight.data) is not torch.Tensor

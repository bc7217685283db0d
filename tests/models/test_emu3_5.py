"""Emu3.5: the official numbers, conversion of the published files, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import ospo_fast as of
from ospo_fast.convert import convert
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation import ImageGenerator
from ospo_fast.generation.decoder import InferenceDecoder
from ospo_fast.generation.overrides import find_override
from ospo_fast.models.emu3_5_tokenizer import build_tokenizer
from tests.models import emu3_5_files as files
from tests.models.tiny_families import build

GOLDEN = Path(__file__).parents[1] / "golden" / "emu3_5.npz"
FIRST_CODE = files.VOCABULARY - files.CODES


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with those of the language model and of the vision tokenizer, and the converted one."""
    folder = tmp_path_factory.mktemp("emu3_5")
    files.write_language(folder / "model")
    files.write_vision(folder / "vision")
    result = convert(str(folder / "model"), folder / "new", base=str(folder / "vision"))
    assert (result["to"], result["dtype"]) == ("transformers", "float32")
    return folder


def test_the_official_numbers(published: Path) -> None:
    """tests/golden/emu3_5.npz holds what the official classes computed with these weights, in float32 on a CPU."""
    model: Any = of.load_model(published / "new", image_size=(8, 12))
    golden = np.load(GOLDEN)
    pixels = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 8, 12)).astype(np.float32)).clamp(-1, 1)
    encoded = json.loads(str(golden["encoded"]))
    with torch.no_grad():
        codes = model._encode_pixels(pixels)
        assert codes.tolist() == golden["codes"].tolist()
        shown = model._decode(codes)[:, :, ::3, ::3] * 2 - 1
        logits = model.module(torch.tensor([encoded[0]])).logits[0, -1, ::4]
    torch.testing.assert_close(shown, torch.from_numpy(golden["pixels"]), rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), rtol=5e-6, atol=5e-6)


def test_the_official_prompts_and_greedy_codes(published: Path) -> None:
    """Of the official loop with guidance 3, which generates begin-of-image first, and forces the size."""
    model: Any = of.load_model(published / "new", image_size=(8, 12))
    golden = np.load(GOLDEN)
    encoded, generated = (json.loads(str(golden[name])) for name in ("encoded", "generated"))
    prompts = [ids[: len(known) + 5] for known, ids in zip(encoded, generated, strict=True)]
    assert [model.image_prompt(text).tolist() for text in files.TEXTS[:2]] == prompts[:2]
    empty = model.unconditional(torch.tensor([0])).tolist()
    assert empty == [*golden["unconditional"].tolist(), *prompts[0][-5:]]
    generator = ImageGenerator(model)
    codes = generator.generate(
        [torch.tensor(prompt) for prompt in prompts], seeds=[0, 1, 2], guidance_scale=3.0, temperature=0,
        output="codes", progress=False,
    )  # fmt: skip
    assert type(generator._engine.decoder) is InferenceDecoder  # type: ignore[union-attr]
    for prompt, ids, own in zip(prompts, generated, codes.tolist(), strict=True):
        rows = ids[len(prompt) : -1]  # behind the last row comes end-of-image
        structure = [n for n, token in enumerate(rows) if token < FIRST_CODE]
        assert structure == [n for n, _ in model.layout.structure]
        assert {rows[n] for n in structure} == {token for _, token in model.layout.structure}
        assert own == [token - FIRST_CODE for token in rows if token >= FIRST_CODE]
    with pytest.raises(UsageError, match="extra_100"):  # which the official code takes from a text
        model.image_prompt(files.TEXTS[2])


def test_tokens_are_those_of_the_official_tokenizer(published: Path) -> None:
    tokenizer = build_tokenizer(published / "model")
    template = "<|extra_203|>You are a helpful assistant for t2i task. USER: {} ASSISTANT: <|extra_100|>"
    encoded = json.loads(str(np.load(GOLDEN)["encoded"]))
    texts = [template.format(text) for text in files.TEXTS]
    assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == encoded
    assert len(tokenizer) == files.VOCABULARY
    assert tokenizer.decode(encoded[0]) == texts[0]


@pytest.mark.parametrize("form", ["nested", "safetensors"])
def test_other_forms_of_the_vision_tokenizer(form: str, published: Path, tmp_path: Path) -> None:
    vision = files.write_vision(tmp_path / "vision", form=form)
    convert(str(published / "model"), tmp_path / "new", base=str(vision))
    own, right = (of.load_model(path, image_size=(8, 12)) for path in (tmp_path / "new", published / "new"))
    expected = right.module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in own.module.state_dict().items())


def test_defaults_of_the_official_configuration(tmp_path: Path, published: Path) -> None:
    """A config.json leaves out what has its default."""
    folder = Path(shutil.copytree(published / "model", tmp_path / "model"))
    config = {name: entry for name, entry in files.CONFIG.items() if name != "head_dim"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OspoError, match=r"_norm.weight has the shape \[128\], expected that of the weights, \[24\]"):
        convert(str(folder), tmp_path / "new", base=str(published / "vision"))
    assert not (tmp_path / "new").exists()


def test_a_published_folder_is_refused_with_the_command(published: Path, tmp_path: Path) -> None:
    known = (
        r"is an Emu3.5 without the model of its pixels; convert it: ospo-fast convert .* --base FOLDER_OF_Emu3.5-Vis"
    )
    with pytest.raises(OspoError, match=known):
        of.load_model(published / "model")
    with pytest.raises(UsageError, match=r"--base: got none, expected the folder of Emu3.5-VisionTokenizer"):
        convert(str(published / "model"), tmp_path / "new")
    with pytest.raises(OspoError, match=r"--base: got 'BAAI/x', expected the folder of .*; download"):
        convert(str(published / "model"), tmp_path / "new", base="BAAI/x")
    with pytest.raises(UsageError, match="is a whole model; leave the option out"):
        convert(str(published / "new"), tmp_path / "new", base=str(published / "vision"))


def write_tokens(model: Path, tokens: list[str]) -> None:
    (model / "emu3_vision_tokens.txt").write_text("\n".join(tokens) + "\n")


def configure(model: Path, **changes: Any) -> None:
    (model / "config.json").write_text(json.dumps(files.CONFIG | changes))


def configure_vision(vision: Path, **changes: Any) -> None:
    (vision / "config.yaml").write_text(yaml.safe_dump(files.VISION | {"ddconfig": files.VISION["ddconfig"] | changes}))


def save_tensors(more: dict[str, torch.Tensor], model: Path) -> None:
    save_file(files.language_tensors() | more, model / "model.safetensors", metadata={"format": "pt"})


BAD: dict[str, tuple[Any, str]] = {
    "rope_scaling": (
        lambda model, vision: configure(model, rope_scaling={"type": "linear", "factor": 2.0}),
        "has rope_scaling .*, expected null",
    ),
    "ranks": (lambda model, vision: (model / "emu3.tiktoken").unlink(), "Cannot read the ranks .*; copy src/tokenizer"),
    "a damaged rank": (
        lambda model, vision: (model / "emu3.tiktoken").write_text("!! 0\n"),
        "Cannot read the ranks .*; copy src/tokenizer",
    ),
    "a gap in the ranks": (
        lambda model, vision: (model / "emu3.tiktoken").write_text("YQ== 0\nYg== 2\n"),
        "its ranks are not 0, 1, 2",
    ),
    "a line that is no rank": (
        lambda model, vision: (model / "emu3.tiktoken").write_text("YQ== 0\nYg==\n"),
        "line 2 is not a token and its rank",
    ),
    "no begin-of-image": (
        lambda model, vision: write_tokens(model, [files.VISION_TOKENS[0], *files.VISION_TOKENS[2:]]),
        r"token 2 is '<\|image end\|>', expected '<\|image start\|>'; copy src/tokenizer",
    ),
    "no image token": (
        lambda model, vision: write_tokens(model, files.VISION_TOKENS[1:]),
        r"token 1 is '<\|image start\|>', expected '<\|image token\|>'",
    ),
    "exchanged tokens": (
        lambda model, vision: write_tokens(model, [files.VISION_TOKENS[n] for n in (1, 0, *range(2, 27))]),
        "token 1 is",
    ),
    "codes in another order": (
        lambda model, vision: write_tokens(model, files.VISION_TOKENS[:3] + files.VISION_TOKENS[:2:-1]),
        r"token 4 is '<\|visual token 000023\|>', expected '<\|visual token 000000\|>'",
    ),
    "a rank too few": (
        lambda model, vision: (model / "emu3.tiktoken").write_text(
            "".join((model / "emu3.tiktoken").read_text().splitlines(keepends=True)[:-1])
        ),
        "has the bos_token_id 491, expected 490",
    ),
    "vision tokens": (
        lambda model, vision: (model / "emu3_vision_tokens.txt").unlink(),
        "Cannot read the tokens .*; copy src/tokenizer",
    ),
    "fewer visual tokens": (
        lambda model, vision: (model / "emu3_vision_tokens.txt").write_text("\n".join(files.VISION_TOKENS[:-1])),
        r"gives '<\|visual token 000023\|>' the id None, expected 519",
    ),
    "ids that are not those of config.json": (
        lambda model, vision: configure(model, bos_token_id=151849),
        r"has the bos_token_id 151849, expected 491, that of <\|extra_203\|> in its tokenizer; copy",
    ),
    "another begin-of-image": (
        lambda model, vision: configure(model, boi_token_id=495),
        r"has the boi_token_id 495, expected 494, that of <\|image start\|>",
    ),
    "ties": (lambda model, vision: configure(model, tie_word_embeddings=True), "expected false and a head of its own"),
    "rope_parameters": (
        lambda model, vision: configure(model, rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        "has rope_parameters .*, expected null",
    ),
    "another theta": (
        lambda model, vision: configure(model, rope_parameters={"rope_theta": 10000.0}),
        "has rope_parameters .*, expected null and 1000000.0 as rope_theta",
    ),
    "no theta": (lambda model, vision: configure(model, rope_theta=-1), "has rope_theta -1, expected a number above 0"),
    "positions": (lambda model, vision: configure(model, max_position_embeddings=10**9), "expected 1 to 1048576"),
    "a tensor of the other part": (
        lambda model, vision: save_tensors({"vqmodel.quant_conv.bias": torch.zeros(4)}, model),
        "have a tensor vqmodel.quant_conv.bias, which by .*config.json the model does not have; download",
    ),
    "integers": (
        lambda model, vision: torch.save(
            files.vision_tensors() | {"quantize.embedding.weight": torch.ones(files.CODES, 4, dtype=torch.long)},
            vision / "model.ckpt",
        ),
        "are of 2 dtypes",
    ),
    "two latents": (
        lambda model, vision: configure_vision(vision, double_z=True),
        "config.yaml has ddconfig.double_z True, expected False",
    ),
    "gray images": (lambda model, vision: configure_vision(vision, in_channels=1), "in_channels 1, expected 3"),
    "a number of levels": (
        lambda model, vision: configure_vision(vision, ch_mult=10**9),
        "config.yaml has ddconfig.ch_mult 1000000000, expected a list of integers",
    ),
    "blocks": (
        lambda model, vision: configure_vision(vision, num_res_blocks=10**9),
        "num_res_blocks in .*config.yaml is 1000000000, expected at most",
    ),
    "a codebook of a word": (
        lambda model, vision: (vision / "config.yaml").write_text(yaml.safe_dump(files.VISION | {"n_embed": "x"})),
        "config.yaml has n_embed 'x', expected an integer above 0; download BAAI/Emu3.5-VisionTokenizer",
    ),
    "no vision tokenizer": (lambda model, vision: (vision / "config.yaml").unlink(), "has no config.yaml"),
    "another model as base": (
        lambda model, vision: (
            (vision / "config.yaml").unlink(),
            shutil.copy(model / "config.json", vision / "config.json"),
        ),
        r"--base: got .*config.json is not that of an IBQ model",
    ),
    "no configuration": (
        lambda model, vision: (vision / "config.yaml").write_text("n_embed: 24\n"),
        r"config.yaml is not that of an IBQ model, which has ddconfig",
    ),
    "sizes that are none": (
        lambda model, vision: configure(model, hidden_size="many"),
        "do not describe a model",
    ),
    "too many layers": (
        lambda model, vision: configure(model, num_hidden_layers=999),
        "num_hidden_layers in .* is 999, expected at most",
    ),
    "another codebook": (
        lambda model, vision: (vision / "config.yaml").write_text(yaml.safe_dump(files.VISION | {"n_embed": 30})),
        r"quantize.embedding.weight has the shape \[30, 4\]",
    ),
    "no weights": (lambda model, vision: (vision / "model.ckpt").unlink(), "it has neither model.ckpt nor"),
    "a missing tensor": (
        lambda model, vision: torch.save(dict(list(files.vision_tensors().items())[1:]), vision / "model.ckpt"),
        r"lacks 1 tensors of the model \(vqmodel.quantize.embedding.weight",
    ),
    "an unknown tensor": (
        lambda model, vision: torch.save(files.vision_tensors() | {"loss": torch.ones(1)}, vision / "model.ckpt"),
        "have a tensor loss, which by .*config.yaml the model does not have; download",
    ),
    "code": (lambda model, vision: torch.save({"x": Path}, vision / "model.ckpt"), "whose code would run"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_refused(case: str, published: Path, tmp_path: Path) -> None:
    model, vision = (shutil.copytree(published / part, tmp_path / part) for part in ("model", "vision"))
    damage, message = BAD[case]
    damage(model, vision)
    with pytest.raises(OspoError, match=message):
        convert(str(model), tmp_path / "new", base=str(vision))
    assert not (tmp_path / "new").exists()


def damage_tokens(folder: Path, change: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content["added_tokens"])
    path.write_text(json.dumps(content))


def exchange(tokens: Any) -> None:
    first, second = (next(t for t in tokens if t["content"] == f"<|image {name}|>") for name in ("start", "end"))
    first["content"], second["content"] = second["content"], first["content"]


@pytest.mark.parametrize("token", ["image start", "image end", "image token", "endoftext", "extra_201", "extra_203"])
def test_a_converted_folder_without_a_token_is_refused(token: str, published: Path, tmp_path: Path) -> None:
    """All ids behind it move, those of the codes too, and transformers adds a token that has a name at the end."""
    folder = Path(shutil.copytree(published / "new", tmp_path / "new"))

    def remove(tokens: Any) -> None:
        tokens[:] = [entry for entry in tokens if entry["content"] != f"<|{token}|>"]

    damage_tokens(folder, remove)
    with pytest.raises(OspoError, match=r"and with the tokens of this file it gets .*; use the tokenizer of"):
        of.load_model(folder, image_size=(8, 12))


def test_a_converted_folder_with_exchanged_tokens_is_refused(published: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published / "new", tmp_path / "new"))
    damage_tokens(folder, exchange)
    with pytest.raises(OspoError, match=r"gives '<\|image start\|>' the id 495, which config.json gives"):
        of.load_model(folder, image_size=(8, 12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_res_blocks": 0}, "tensors .* of more parts than its config.json describes; save"),
        ({"attn_resolutions": []}, "tensors .* of more parts than its config.json describes; save"),
        (None, "vq_config in the config.json of .* is None, expected an object"),
    ],
)
def test_a_converted_folder_of_another_vq_model_is_refused(
    changes: dict[str, Any] | None, message: str, published: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(published / "new", tmp_path / "new"))
    config = json.loads((folder / "config.json").read_text())
    config["vq_config"] = None if changes is None else config["vq_config"] | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OspoError, match=message):
        of.load_model(folder, image_size=(8, 12))


def test_the_new_folder_is_not_put_into_a_source(published: Path) -> None:
    for place in ("model", "vision"):
        with pytest.raises(UsageError, match=f"{place}/new is in .*{place}, which is converted; name a folder outside"):
            convert(str(published / "model"), published / place / "new", base=str(published / "vision"))


def test_a_sliding_window_is_left_to_the_modules() -> None:
    model: Any = build("emu3_5")
    assert find_override(model) is None
    model.decoder.layers[1].self_attn.sliding_window = 8  # of other models with layers of Qwen3
    assert find_override(model) == "layers.1.self_attn has a sliding window"


def test_sizes() -> None:
    model: Any = build("emu3_5")
    adapt = type(model)
    with pytest.raises(UsageError, match="image_size: got 9x12, expected multiples of 2, the pixels of a code"):
        adapt(model.module, model.processor, name="tiny", image_size=(9, 12))
    del model.module.config.generated_size  # the default is 55 rows of 73 codes, as in the official script
    with pytest.raises(OspoError, match="takes 4015 tokens, expected fewer than its 1024 positions"):
        adapt(model.module, model.processor, name="tiny")


def test_the_hub_name_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(files.CONFIG))
    monkeypatch.setattr("ospo_fast.models.hub_config", lambda name: tmp_path / "config.json")
    with pytest.raises(OspoError, match=r"has model_type 'Emu3', .*; an Emu3.5 is converted, as a downloaded folder"):
        of.load_model("BAAI/Emu3.5-Image")

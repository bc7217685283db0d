"""`ospo-fast convert`: round trips equal bit for bit, results that load elsewhere, and nothing half-written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ospo_fast.cli import main
from ospo_fast.convert import convert
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import load_model
from tests.models import deepseek_files as files

Tensors = dict[str, torch.Tensor]
EXPECTED = files.read_keys(files.HERE / "deepseek_tiny_keys.txt")


def write_deepseek(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, **form: Any) -> Tensors:
    files.write_files(folder, tied=tied, dtype=dtype)
    weights = files.tensors(tied=tied, dtype=dtype)
    files.write_weights(folder, weights, **form)
    return weights


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def refuse(kind: type[OspoError], out: Path, *words: str, source: Path, **options: Any) -> None:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        convert(str(source), out, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("tied", "dtype", "form", "shards"),
    [
        (False, torch.float32, "safetensors", 1),
        (False, torch.bfloat16, "bin", 3),
        (True, torch.bfloat16, "safetensors", 3),
        (True, torch.float32, "bin", 1),
    ],
)
def test_from_deepseeks_layout_and_back(tmp_path: Path, tied: bool, dtype: torch.dtype, form: str, shards: int) -> None:
    weights = write_deepseek(tmp_path / "a", tied=tied, dtype=dtype, form=form, shards=shards)
    name = str(dtype).removeprefix("torch.")
    result = convert(str(tmp_path / "a"), tmp_path / "b")
    assert result == {"out": str(tmp_path / "b"), "from": "deepseek", "to": "transformers", "dtype": name}
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["model_type"], config["template_set"]) == ("janus", "janus")
    assert (config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]) == (tied, tied)
    assert ("lm_head.weight" in load_file(tmp_path / "b" / "model.safetensors")) != tied
    assert convert(str(tmp_path / "b"), tmp_path / "c")["to"] == "deepseek"
    assert_same(load_file(tmp_path / "c" / "model.safetensors"), weights)
    first, last = (json.loads((tmp_path / part / "config.json").read_text()) for part in "ac")
    assert first == last
    for file in ("preprocessor_config.json", "processor_config.json"):
        assert json.loads((tmp_path / "a" / file).read_text()) == json.loads((tmp_path / "c" / file).read_text())
    special = json.loads((tmp_path / "c" / "special_tokens_map.json").read_text())
    assert special == json.loads((tmp_path / "a" / "special_tokens_map.json").read_text())
    text = "<|User|>: 12 yes cats\n\n<|Assistant|>:"
    ids = [load_model(tmp_path / part).processor.tokenizer(text)["input_ids"] for part in "abc"]
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize("tied", [False, True])
def test_from_transformers_layout_and_back(tmp_path: Path, tied: bool) -> None:
    """The model of Shapes, which has other sizes, special tokens and a chat template of its own."""
    from ospo_fast.models.janus import JanusUnifiedModel
    from ospo_fast.shapes.model import build_model, build_processor

    module = build_model(hidden=64, layers=2, intermediate=96, heads=4)
    if not tied:
        module.config.tie_word_embeddings = module.config.text_config.tie_word_embeddings = False
        module.lm_head.weight = torch.nn.Parameter(torch.randn_like(module.lm_head.weight))
    model = JanusUnifiedModel(module.to(torch.bfloat16), build_processor(), name="tiny")
    model.save(tmp_path / "a")
    convert(str(tmp_path / "a"), tmp_path / "b")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert not any(tensor.any() for name, tensor in written.items() if ".attn_pool." in name)
    convert(str(tmp_path / "b"), tmp_path / "c")
    assert_same(load_file(tmp_path / "c" / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors"))
    assert not (tmp_path / "c" / "deepseek_unused.safetensors").exists()
    first, last = (json.loads((tmp_path / part / "config.json").read_text()) for part in "ac")
    for section in ("text_config", "vision_config", "vq_config"):
        left_out = {"initializer_range": 0.02, "dtype": "bfloat16"}  # which no forward pass reads
        assert first[section] | left_out == last[section] | left_out
    assert (first["template_set"], first["tie_word_embeddings"]) == (last["template_set"], last["tie_word_embeddings"])
    for part in "bc":
        loaded = load_model(tmp_path / part)
        assert loaded.image_prompt("a red circle").tolist() == model.image_prompt("a red circle").tolist()
        assert (loaded.templates, loaded.grid) == ("shapes", model.grid)


def test_values_that_are_not_finite_are_converted_and_told_of(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny, tmp_path / "a")
    weights = load_file(tiny / "model.safetensors")
    weights["model.aligner.fc1.weight"].view(-1)[5] = torch.inf
    save_file(weights, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    convert(str(tmp_path / "a"), tmp_path / "b")
    assert "has 1 tensors with values that are not finite (model.aligner.fc1.weight, …)" in caplog.text
    convert(str(tmp_path / "b"), tmp_path / "c")
    assert_same(load_file(tmp_path / "c" / "model.safetensors"), weights)


def test_values_of_unused_tensors_that_are_not_finite_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = write_deepseek(tmp_path / "a")
    name = next(name for name in weights if ".attn_pool." in name)
    weights[name].view(-1)[0] = torch.nan
    files.write_weights(tmp_path / "a", weights)
    convert(str(tmp_path / "a"), tmp_path / "b")
    assert f"1 tensors with values that are not finite ({name}, …)" in caplog.text
    convert(str(tmp_path / "b"), tmp_path / "c")
    assert_same(load_file(tmp_path / "c" / "model.safetensors"), weights)


def test_a_value_of_another_type_in_a_config_is_named(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "a")
    config = json.loads((tiny / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = "2"
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    refuse(OspoError, tmp_path / "b", "num_hidden_layers", "expected int, got str (value: '2')", source=tmp_path / "a")


@pytest.mark.parametrize("to", ["official-lora", "peft", "transformers"])
def test_a_base_of_another_size_is_refused(base: Path, tmp_path: Path, to: str) -> None:
    from ospo_fast.models.janus import JanusUnifiedModel
    from ospo_fast.shapes.model import build_model, build_processor

    model = JanusUnifiedModel(build_model(hidden=64, layers=2, intermediate=96, heads=4), build_processor(), name="x")
    model.save(other := tmp_path / "other")
    path = tmp_path / "a.ckpt"
    files.write_trainer_file(path, files.trainer_state(files.tensors(), whole=False), str(base))
    if to == "official-lora":
        convert(str(path), tmp_path / "adapter")
        path = tmp_path / "adapter"
    words = (str(path), f"does not load on {other}", "--base" if to in ("official-lora", "peft") else "config.yaml")
    refuse(OspoError, tmp_path / "b", *words, source=path, to=to, base=str(other))


def test_a_config_that_ties_heads_which_differ(tmp_path: Path) -> None:
    """transformers does not tie them, and JanusConfig says that they are tied unless told otherwise."""
    write_deepseek(tmp_path / "a")
    convert(str(tmp_path / "a"), tmp_path / "b")
    path = tmp_path / "b" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    convert(str(tmp_path / "b"), tmp_path / "c", to="transformers")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]) == (False, False)
    convert(str(tmp_path / "b"), tmp_path / "d")
    assert "tie_word_embeddings" not in json.loads((tmp_path / "d" / "config.json").read_text())["language_config"]
    assert_same(load_file(tmp_path / "d" / "model.safetensors"), files.tensors())


def test_the_list_of_the_official_loader(tmp_path: Path) -> None:
    """Every tensor that DeepSeek's classes have is written, also those that transformers' model does not have."""
    write_deepseek(tmp_path / "a")
    convert(str(tmp_path / "a"), tmp_path / "b")
    (tmp_path / "b" / "deepseek_unused.safetensors").unlink()
    convert(str(tmp_path / "b"), tmp_path / "c", to="deepseek")
    found = load_file(tmp_path / "c" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == EXPECTED
    names = ("config", "preprocessor_config", "processor_config", "special_tokens_map", "tokenizer_config", "tokenizer")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {f"{name}.json" for name in names} | {
        "model.safetensors"
    }


def test_transformers_alone_draws_with_the_result(tmp_path: Path) -> None:
    from transformers import JanusForConditionalGeneration, JanusProcessor

    write_deepseek(tmp_path / "a")
    convert(str(tmp_path / "a"), tmp_path / "b")
    module = JanusForConditionalGeneration.from_pretrained(tmp_path / "b")
    processor = JanusProcessor.from_pretrained(tmp_path / "b")
    vocabulary = files.build_tokenizer()
    bos, eos, pad = map(vocabulary.token_to_id, files.SPECIAL)
    settings = module.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (bos, eos, pad)
    assert settings.generation_kwargs == {"boi_token_id": vocabulary.token_to_id("<begin_of_image>")}
    assert module.config.image_token_id == vocabulary.token_to_id("<image_placeholder>")
    turns = [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=text, generation_mode="image", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == load_model(tmp_path / "a").image_prompt("a cat").tolist()
    codes = module.generate(**inputs, generation_mode="image", do_sample=False)
    assert codes.shape == (1, 16)
    assert module.decode_image_tokens(codes).shape == (1, 16, 16, 3)


def test_sampled_codes_are_those_of_the_official_layout(tmp_path: Path) -> None:
    import ospo_fast as of

    write_deepseek(tmp_path / "a")
    convert(str(tmp_path / "a"), tmp_path / "b")
    drawn = [
        of.ImageGenerator(load_model(tmp_path / part)).generate(["a cat"], seeds=[3], output="codes", progress=False)
        for part in "ab"
    ]
    assert torch.equal(*drawn)


# Adapters and files of the official trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    write_deepseek(folder, dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize(("whole", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_lora_of_the_trainer_to_peft_and_back(base: Path, tmp_path: Path, whole: bool, dtype: torch.dtype) -> None:
    path = tmp_path / "run" / "step=000100.ckpt"
    state = files.trainer_state(files.tensors(dtype=torch.bfloat16), dtype=dtype, whole=whole)
    files.write_trainer_file(path, state, str(base))
    assert convert(str(path), tmp_path / "peft")["to"] == "peft"
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (2, 6, 0.05)
    assert settings["base_model_name_or_path"] == str(base)
    lora = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    names = {
        name: name.replace(
            "model.language_model.base_model.model.model", "base_model.model.model.language_model"
        ).replace(".default", "")
        for name in lora
    }
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert_same(found, {names[name]: tensor for name, tensor in lora.items()})
    merged = (load_model(place, dtype="bfloat16").module.state_dict() for place in (path, tmp_path / "peft"))
    assert_same(*merged)
    assert convert(str(tmp_path / "peft"), tmp_path / "back")["to"] == "official-lora"
    again = torch.load(tmp_path / "back" / "adapter.ckpt", weights_only=True)
    assert_same(again["state_dict"], lora)
    written = json.loads((tmp_path / "back" / "config.yaml").read_text())
    assert written["model"]["model_path"] == str(base)
    assert written["lora"] == {
        "lora_rank": 2, "lora_alpha": 6, "lora_dropout": 0.05, "target_modules": sorted(files.TARGETS),
        "modules_to_save": None,
    }  # fmt: skip
    assert_same(
        load_model(tmp_path / "back" / "adapter.ckpt", dtype="bfloat16").module.state_dict(),
        load_model(path, dtype="bfloat16").module.state_dict(),
    )


def test_merged_models_of_adapters(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "run" / "a.ckpt"
    files.write_trainer_file(path, files.trainer_state(files.tensors(dtype=torch.bfloat16)), str(base))
    expected = load_model(path, dtype="bfloat16").module.state_dict()
    for to in ("transformers", "deepseek"):
        assert convert(str(path), tmp_path / to, to=to)["dtype"] == "bfloat16"
        assert_same(load_model(tmp_path / to, dtype="bfloat16").module.state_dict(), expected)
    convert(str(path), tmp_path / "peft")
    convert(str(tmp_path / "peft"), tmp_path / "of_peft", to="deepseek")
    assert_same(*(load_file(tmp_path / part / "model.safetensors") for part in ("of_peft", "deepseek")))
    convert(str(tmp_path / "deepseek"), tmp_path / "again")
    unused = load_file(tmp_path / "again" / "deepseek_unused.safetensors")
    assert_same(unused, {name: files.tensors(dtype=torch.bfloat16)[name] for name in unused})


def test_all_weights_of_the_trainer(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "run" / "full.ckpt"
    weights = {name: tensor + 1 for name, tensor in files.tensors().items()}
    files.write_trainer_file(path, {f"model.{name}": tensor for name, tensor in weights.items()}, "./not/here")
    result = convert(str(path), tmp_path / "a", base=str(base))
    assert (result["from"], result["to"], result["dtype"]) == ("ckpt", "transformers", "float32")
    convert(str(tmp_path / "a"), tmp_path / "b")
    assert_same(load_file(tmp_path / "b" / "model.safetensors"), weights)


def test_the_official_merge(base: Path, tmp_path: Path) -> None:
    """It writes shards of safetensors and all weights as .bin; the former count."""
    shutil.copytree(base, tmp_path / "hf_ckpt")
    (tmp_path / "hf_ckpt" / "model.safetensors").unlink()
    weights = files.tensors(dtype=torch.bfloat16)
    files.write_weights(tmp_path / "hf_ckpt", weights, shards=2)
    torch.save({"damaged": 1}, tmp_path / "hf_ckpt" / "pytorch_model.bin")
    convert(str(tmp_path / "hf_ckpt"), tmp_path / "a")
    convert(str(tmp_path / "a"), tmp_path / "b")
    assert_same(load_file(tmp_path / "b" / "model.safetensors"), weights)


# Bad input


def test_wrong_arguments(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse(UsageError, out, "--to: got 'gguf'", "transformers, deepseek, peft, official-lora", source=base, to="gguf")
    refuse(UsageError, out, "--to peft", "a .ckpt of the official trainer", source=base, to="peft")
    refuse(UsageError, out, "--to official-lora", "LoRA adapter of peft", source=base, to="official-lora")
    refuse(UsageError, out, "--base", "whole model", "leave the option out", source=base, base="shapes")
    refuse(OspoError, out, "there is no folder", source=tmp_path / "missing")
    out.mkdir()
    (out / "file").touch()
    refuse(UsageError, out, str(out), "no empty folder", "new folder", source=base)
    refuse(UsageError, out / "file", "no empty folder", source=base)
    (out / "file").unlink()
    (tmp_path / "link").symlink_to(base)
    for inside in (base / "new", tmp_path / "link" / "new"):
        refuse(UsageError, inside, "which is converted", "outside of it", source=base)
        assert not inside.exists()
    convert(str(base), out)
    assert (out / "model.safetensors").is_file()


def test_damaged_checkpoints_leave_nothing(base: Path, tmp_path: Path) -> None:
    folder, out = Path(shutil.copytree(base, tmp_path / "a")), tmp_path / "out"
    weights = files.tensors(dtype=torch.bfloat16)
    for change, words in (
        (
            {"gen_embed.weight": weights["gen_embed.weight"].float()},
            ("2 dtypes", "gen_embed.weight is float32", "cast"),
        ),
        ({"gen_embed.weight": None}, ("lacks 1 tensors", "gen_embed.weight")),
        ({"gen_embed.weight": torch.zeros(2, 2, dtype=torch.bfloat16)}, ("gen_embed.weight has the shape", "[2, 2]")),
        ({"extra": torch.zeros(2, dtype=torch.bfloat16)}, ("extra", "remove")),
    ):
        changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
        files.write_weights(folder, changed)
        refuse(OspoError, out, *words, source=folder)
    files.write_weights(folder, weights)
    (folder / "tokenizer.json").unlink()
    refuse(OspoError, out, "tokenizer.json", source=folder)
    shutil.copy(base / "tokenizer.json", folder)
    convert(str(folder), tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    refuse(OspoError, out, "2 dtypes", "lm_head.weight is float16", source=tmp_path / "b")


def test_a_model_that_deepseeks_classes_do_not_compute(base: Path, tmp_path: Path) -> None:
    convert(str(base), tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["hidden_act"] = "relu"
    path.write_text(json.dumps(config))
    refuse(OspoError, tmp_path / "out", "vision_config.hidden_act", "'relu'", "'gelu'", source=tmp_path / "a")


def test_a_base_model_of_other_weights(base: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "run" / "a.ckpt", tmp_path / "out"
    other = {name: tensor + 1 for name, tensor in files.tensors(dtype=torch.bfloat16).items()}
    files.write_trainer_file(path, files.trainer_state(other), str(base))
    refuse(OspoError, out, "is not that of", str(base), "--to transformers", source=path)
    convert(str(path), out, to="transformers")


def test_lora_without_a_base(base: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "run" / "a.ckpt", tmp_path / "out"
    state = files.trainer_state(files.tensors(dtype=torch.bfloat16), whole=False)
    files.write_trainer_file(path, state, None)
    refuse(OspoError, out, "is not known", f"convert {path} OUT --base MODEL", source=path)
    convert(str(path), tmp_path / "peft", base=str(base))
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    refuse(OspoError, out, "base_model_name_or_path", source=tmp_path / "peft")
    convert(str(tmp_path / "peft"), out, base=str(base))
    assert json.loads((out / "config.yaml").read_text())["model"]["model_path"] == str(base)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_rslora": True}, ("use_rslora True", "--to deepseek")),
        ({"use_dora": True}, ("use_dora True",)),
        ({"alpha_pattern": {"q_proj": 8}}, ("alpha_pattern",)),
        ({"bias": "lora_only"}, ("bias 'lora_only'",)),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights 'pissa'",)),
        ({"target_modules": ["q_proj"]}, ("vision_model", "on the language model alone")),
    ],
)
def test_adapters_that_the_official_trainer_cannot_express(
    base: Path, tmp_path: Path, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    import peft

    wanted = {"r": 2, "target_modules": ".*language_model.*q_proj", **settings}
    wrapped = peft.get_peft_model(load_model(base).module, peft.LoraConfig(**wanted))
    wrapped.save_pretrained(tmp_path / "peft")
    refuse(OspoError, tmp_path / "out", *words, source=tmp_path / "peft")


@pytest.mark.parametrize("family", ["glm_image", "emu3"])  # the former has Janus' names of layers
def test_adapters_of_other_families_have_no_official_trainer(family: str, tmp_path: Path) -> None:
    import peft

    from tests.models.tiny_families import build

    build(family).save(tmp_path / "base")
    target = f".*{build(family).decoder_path}.*q_proj"
    wrapped = peft.get_peft_model(build(family).module, peft.LoraConfig(r=2, target_modules=target))
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "peft")
    words = (f"on a '{family}' model", "expected an adapter of a Janus", "use --to transformers")
    refuse(UsageError, tmp_path / "out", *words, source=tmp_path / "peft")
    convert(str(tmp_path / "peft"), tmp_path / "merged", to="transformers")
    assert load_model(tmp_path / "merged").num_codes == build(family).num_codes


def test_the_command(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["convert", str(base), str(tmp_path / "a"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"out": str(tmp_path / "a"), "from": "deepseek", "to": "transformers", "dtype": "bfloat16"}
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "transformers"]) == 0
    assert capsys.readouterr().out == f"transformers to transformers, bfloat16: {tmp_path / 'b'}\n"
    # Names of Lightning's files look like settings.
    monkeypatch.chdir(tmp_path)
    files.write_trainer_file(
        Path("step=000100.ckpt"), files.trainer_state(files.tensors(dtype=torch.bfloat16)), str(base)
    )
    assert main(["convert", "step=000100.ckpt", "c"]) == 0
    assert (tmp_path / "c" / "adapter_config.json").is_file()
    capsys.readouterr()
    for words, message in (
        (["convert", str(base)], "convert: got 1 names, expected a checkpoint and a new folder"),
        (["convert", str(base), "d", "e"], "Unknown argument 'e'"),
        (["convert", str(base), "d", "train.steps=3"], "convert takes no settings"),
        (["convert", str(base), "d", "--to", "gguf"], "--to: got 'gguf'"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert not Path("d").exists()

"""load_model: each kind of broken checkpoint gives an error of one line, and a LoRA folder gives the merged model."""

import contextlib
import importlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ospo_fast import models as loading
from ospo_fast.config import model_family
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import find_model, folder_checks, load_model
from ospo_fast.models.base import TEMPLATE_SETS
from ospo_fast.models.janus import JanusUnifiedModel
from ospo_fast.shapes.model import build_model, build_processor
from tests.models.refusals import refuse


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    module = build_model(hidden=64, layers=2, intermediate=96, heads=4)
    JanusUnifiedModel(module, build_processor(), name="tiny").save(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_folders() -> None:
    for name in ("./missing", "/missing/folder", "missing", "a/b/c", "~/missing-folder"):
        refuse(name, "no folder", name)


def test_hub_name_without_network() -> None:
    refuse("no-such-org/no-such-model", "no-such-org/no-such-model", "network")


def test_file_and_empty_folder(saved: Path, tmp_path: Path) -> None:
    refuse(saved / "config.json", "is a file")
    refuse(tmp_path, "config.json")


def test_broken_config(broken: Path) -> None:
    for content in (b"{", b"[]", b"\xff"):
        (broken / "config.json").write_bytes(content)
        refuse(broken, "config.json")


def test_other_model_types(broken: Path) -> None:
    edit(broken / "config.json", model_type="llama")
    refuse(broken, "'llama'", "'janus'")
    edit(broken / "config.json", model_type="multi_modality")
    refuse(broken, "vision_config.cls", "expected CLIPVisionTower")  # a config.json of another layout with that mark


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        (None, "text_config", ["x"], "text_config"),
        (None, "text_config", "llama", "text_config"),
        (None, "vq_config", 3, "vq_config"),
        (None, "template_set", ["shapes"], "template_set"),
        (None, "num_labels", 10**9, "num_labels"),
        ("text_config", "num_attention_heads", 0, "cannot be loaded"),
        ("text_config", "hidden_size", "x", "cannot be loaded"),
        ("text_config", "num_hidden_layers", 10**7, "num_hidden_layers"),
        ("text_config", "head_dim", 2**40, "q_proj"),
        ("vision_config", "image_size", 10**9, "position_embedding"),
        ("vq_config", "image_token_embed_dim", 10**7, "generation_head"),
        ("vision_config", "num_hidden_layers", 10**7, "num_hidden_layers"),
        ("vision_config", "depth", 10**7, "depth"),
        ("vq_config", "num_res_blocks", 10**7, "num_res_blocks"),
        ("vq_config", "channel_multiplier", [1] * 10**5, "channel_multiplier"),
    ],
)
def test_hostile_values_of_a_config(
    broken: Path, section: str | None, key: str, value: object, words: str, no_waiting: None
) -> None:
    config = json.loads((broken / "config.json").read_text())
    (config if section is None else config[section])[key] = value
    (broken / "config.json").write_text(json.dumps(config))
    refuse(broken, words, str(broken), "again")


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_in_a_model_folder(broken: Path, name: str, no_waiting: None) -> None:
    (broken / name).unlink(missing_ok=True)
    os.mkfifo(broken / name)
    refuse(broken, name, "no regular file")


def test_adapters_in_a_circle(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": str(tmp_path / base)})
        )
    refuse(tmp_path / "a", "circle", "adapter_config.json", "fix base_model_name_or_path")
    assert model_family(str(tmp_path / "a")) is None


@pytest.mark.parametrize("base", [["x"], {"a": 1}, 5, "~no-such-user/x", "a\0b", "\ud800", "x" * 5000])
def test_base_models_that_cannot_be_one(tmp_path: Path, base: object) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    refuse(tmp_path, "there is no folder")
    assert model_family(str(tmp_path)) is None


def test_config_that_does_not_fit_the_weights(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["hidden_size"] = 32
    edit(broken / "config.json", text_config=config["text_config"])
    refuse(broken, str(broken))


def test_truncated_and_missing_weights(broken: Path) -> None:
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    for length in (len(whole) // 2, 100, 0):
        weights.write_bytes(whole[:length])
        refuse(broken, "again")
    weights.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    refuse(broken, "again")
    weights.unlink()
    refuse(broken, "no weights")


def test_missing_tensors_are_not_initialized(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    del tensors["model.generation_head.vision_head.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refuse(broken, "generation_head.vision_head.weight")


def test_missing_tokenizer(broken: Path) -> None:
    for file in broken.glob("*token*"):
        file.unlink()
    refuse(broken, str(broken))


TEN = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
IDS = {"id": "<bos>", "ids": [1] * 1000, "tokens": ["<bos>"] * 1000}
SINGLE = [{"Sequence": {"id": "A", "type_id": 0}}]
TEMPLATE = {"type": "TemplateProcessing", "single": SINGLE, "pair": SINGLE, "special_tokens": {}}
TYPES = "expected an object of one of the types"


@pytest.mark.parametrize(
    ("section", "entry", "words"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, TYPES),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}, TYPES),
        ("normalizer", {"type": "Sequence", "normalizers": [TEN] * 9}, "1e+09 times as long"),
        ("normalizer", {"type": "Sequence", "normalizers": [{**TEN, "prepend": "a"}] * 9}, "1e+09 times as long"),
        ("normalizer", {"type": "Sequence", "normalizers": [TEN] * 5000}, "inf times as long"),
        ("normalizer", {**TEN, "pattern": {"Regex": ""}, "content": "a" * 256}, "257 times as long"),
        ("normalizer", {**TEN, "pattern": {"String": ""}, "content": "a" * 256}, "257 times as long"),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 256}, "257 times as long"),
        ("normalizer", {"type": "Sequence", "normalizers": [BYTES] * 30}, "times as long"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTES] * 30}, "times as long"),
        ("decoder", {"type": "Sequence", "decoders": [TEN] * 9}, "decoder that can make a text 1e+09 times as long"),
        ("post_processor", {**TEMPLATE, "single": SINGLE * 17}, "a list of 17 values"),
        ("post_processor", {**TEMPLATE, "special_tokens": {"<bos>": IDS}}, "a list of 1000"),
        ("post_processor", {**TEMPLATE, "special_tokens": {"<bos>": list(IDS.values())}}, "a list of 1000"),
        # Entries are also read as lists of their fields, and without a type.
        ("post_processor", list(TEMPLATE.values())[1:], TYPES),
        ("normalizer", list(TEN.values())[1:], TYPES),
        ("normalizer", [[TEN] * 9], TYPES),
        ("normalizer", {"normalizers": [TEN] * 9}, TYPES),
        ("normalizer", {"type": "Sequence", "normalizers": [["a" * 64]]}, TYPES),
        ("normalizer", {**TEN, "type": 0}, TYPES),
        ("decoder", {"suffix": ""}, TYPES),
    ],
)
def test_tokenizers_that_take_memory(
    broken: Path, section: str, entry: object, words: str, nothing_is_built: None
) -> None:
    edit(broken / "tokenizer.json", **{"pre_tokenizer": None, section: entry})
    refuse(broken, f"{broken / 'tokenizer.json'} has ", section, words, "published model")


def test_keys_of_a_tokenizer_occur_once(broken: Path, nothing_is_built: None) -> None:
    """`tokenizers` builds each of them."""
    path = broken / "tokenizer.json"
    path.write_text('{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, ' + path.read_text()[1:])
    refuse(broken, "tokenizer.json", "occurs twice")


def test_normalizers_of_published_tokenizers(broken: Path) -> None:
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    for section, entry in (
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}),
        ("decoder", {"type": "Sequence", "decoders": [{**space, "pattern": {"String": "\u2581"}, "content": " "}]}),
    ):
        edit(broken / "tokenizer.json", **{"normalizer": None, "pre_tokenizer": None, section: entry})
        folder_checks.check_tokenizer(broken)


def split(regex: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def test_panics_of_tokenizers(broken: Path, saved: Path) -> None:
    """They are no Exception."""
    edit(broken / "tokenizer.json", pre_tokenizer={"type": "FixedLength", "length": 0})
    refuse(broken, "cannot be loaded (chunk size must be non-zero)", "again")
    entries = json.loads((saved / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    edit(
        broken / "tokenizer.json",
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split("(x+x+)+y"), *entries]},
        decoder={"type": "Strip", "content": ".", "start": 0, "stop": 5},
    )
    model = load_model(broken)
    text = "x" * 40 + "zy"
    for call in (
        lambda: model.image_prompt(text),
        lambda: model.chat([{"role": "user", "content": text}]),
        lambda: model.detokenize([model.processor.tokenizer.convert_tokens_to_ids(".")]),
    ):
        with pytest.raises(OspoError, match=r"the tokenizer of .* fails \(.*published model"):
            call()


def test_only_panics_become_errors(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = load_model(saved)
    monkeypatch.setattr(folder_checks, "check_sizes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_model(saved)
    monkeypatch.setattr(model, "_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model._tokenize(interrupt, "a")


def test_unknown_devices(saved: Path) -> None:
    for device in ("toaster", "xpu", "meta", torch.device("meta"), ""):
        with pytest.raises(UsageError, match=f"device: got '{device}', expected 'cpu', 'cuda' or 'mps'"):
            load_model(saved, device=device)
    with pytest.raises(UsageError, match="device: got 'cuda:99'"):
        load_model(saved, device="cuda:99")


def test_an_index_of_a_device_that_is_not_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda:2", "cpu:1"):
        with pytest.raises(UsageError, match=f"device: got '{device}', expected an index from 0 to"):
            load_model(saved, device=device)


def test_mps_where_it_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine of the tests has it: only what is decided by the name of the device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device: got 'mps', but torch finds no MPS device; use 'cpu'"):
        loading.resolve_placement("mps", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert loading._default_device() == torch.device("mps")
    assert loading.resolve_placement("mps", None) == (torch.device("mps"), torch.float32)
    assert loading.resolve_placement("mps:0", "bfloat16") == (torch.device("mps:0"), torch.bfloat16)
    assert loading.resolve_placement("cpu", None) == (torch.device("cpu"), torch.float32)
    for dtype in ("float64", torch.float64):
        with pytest.raises(UsageError, match="dtype: got float64 with device mps, which does not have it, expected"):
            loading.resolve_placement("mps", dtype)
    with pytest.raises(UsageError, match="device: got 'mps:1', expected an index from 0 to 0"):
        loading.resolve_placement("mps:1", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading._default_device() == torch.device("cuda")


def test_mps_is_checked_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(UsageError, match="device: got 'mps', which macOS alone has; use 'cpu'"):
        loading.check_device("mps", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    loading.check_device("mps", "float16")
    with pytest.raises(UsageError, match="device: got 'mps:1', expected 'mps' or 'mps:0'"):
        loading.check_device("mps:1", None)
    with pytest.raises(UsageError, match="dtype: got float64 with device mps"):
        loading.check_device("mps", "float64")


def test_dtypes(saved: Path) -> None:
    assert load_model(saved, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(saved, dtype=torch.float64).dtype == torch.float64
    for dtype in ("float31", torch.int8, "float8_e4m3fn", torch.float8_e5m2, "complex64", "nn"):
        with pytest.raises(UsageError, match=f"dtype: got '?{dtype}'?, expected one of float32, bfloat16"):
            load_model(saved, dtype=dtype)


def save_adapter(saved: Path, folder: Path) -> torch.nn.Module:
    import peft

    model = load_model(saved)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|down_proj)", init_lora_weights=False)
    wrapped = peft.get_peft_model(model.module, config)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


def test_lora_folder_gives_the_merged_model(saved: Path, tmp_path: Path) -> None:
    expected = save_adapter(saved, tmp_path / "adapter")
    model = load_model(tmp_path / "adapter")
    assert (model.name, model.templates) == (str(tmp_path / "adapter"), "shapes")
    plain = load_model(saved).module.state_dict()
    changed = 0
    for name, tensor in model.module.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])
        changed += not torch.equal(tensor, plain[name])
    assert changed == 4  # two layers, two projections


@pytest.mark.parametrize("changes", [{"r": 10**5}, {"rank_pattern": {"q_proj": 10**5}}])
def test_ranks_that_the_weights_of_an_adapter_do_not_have(
    saved: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    save_adapter(saved, tmp_path)
    edit(tmp_path / "adapter_config.json", **changes)
    refuse(tmp_path, "adapter_config.json has the rank 100000, expected at most 96")


def test_broken_adapters(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(saved, folder)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refuse(folder, str(folder), "adapter")
    weights.unlink()
    refuse(folder, str(folder))
    edit(folder / "adapter_config.json", base_model_name_or_path="./missing")
    refuse(folder, "./missing")
    edit(folder / "adapter_config.json", base_model_name_or_path=None)
    refuse(folder, "base")
    edit(folder / "adapter_config.json", base_model_name_or_path=str(folder))
    refuse(folder, "itself")


def test_sizes_of_quantized_weights_are_not_those_of_the_model(broken: Path) -> None:
    """Packed tensors have shapes of their own; the same configuration without the mark is refused."""
    vision = json.loads((broken / "config.json").read_text())["vision_config"]
    edit(broken / "config.json", vision_config={**vision, "hidden_size": 2 * vision["hidden_size"]})
    for mark in ({}, {"quantization_config": None}, {"quantization_config": {}}):
        edit(broken / "config.json", **mark)
        with pytest.raises(OspoError, match="expected that of the weights"):
            folder_checks.check_sizes(broken)
    edit(broken / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    folder_checks.check_sizes(broken)
    enlarge_vocabulary(broken)
    with pytest.raises(OspoError, match=r"the model has \d+ weights, expected at most 8 for each of the \d+ bytes"):
        folder_checks.check_sizes(broken)


def enlarge_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config={**config, "vocab_size": 2**22})


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where transformers would allocate a model."""
    import transformers

    load = transformers.JanusForConditionalGeneration.from_pretrained

    def from_pretrained(*arguments: object, device_map: str | None = None, **settings: object) -> object:
        assert device_map == "meta", "built"
        return load(*arguments, device_map=device_map, **settings)

    monkeypatch.setattr(transformers.JanusForConditionalGeneration, "from_pretrained", from_pretrained)


def test_missing_tensors_are_refused_before_any_is_allocated(broken: Path, nothing_is_built: None) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name and "lm_head" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    refuse(broken, "lacks 2 tensors of the model (lm_head.weight", "again")
    enlarge_vocabulary(broken)
    refuse(broken, "config.json, the model has 26", "expected at most 8 for each of the", "again")


def test_names_of_earlier_versions_of_transformers(broken: Path) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    def rename(without: str = "") -> None:
        save_file(
            {
                name.replace("language_model.", "language_model.model."): tensor
                for name, tensor in tensors.items()
                if not without or without not in name
            },
            broken / "model.safetensors",
            metadata={"format": "pt"},
        )

    tensors, expected = load_file(broken / "model.safetensors"), load_model(broken).module.state_dict()
    rename()
    _, info = transformers.JanusForConditionalGeneration.from_pretrained(str(broken), output_loading_info=True)
    if info["missing_keys"]:  # of transformers 5.17, which knows no earlier names of Janus
        refuse(broken, f"lacks {len(info['missing_keys'])} tensors of the model")
        return
    found = load_model(broken).module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    rename("layers.1.self_attn.q_proj")
    refuse(broken, "tensors of the model (model.language_model.layers.1.self_attn.q_proj.weight")
    rename()
    text = json.loads((broken / "config.json").read_text())["text_config"]
    edit(broken / "config.json", text_config={**text, "intermediate_size": 128})
    refuse(broken, "model.language_model.layers.0.mlp.down_proj.weight has the shape [64, 128], expected that of")


def test_only_safetensors_that_transformers_would_load_count(broken: Path, nothing_is_built: None) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").rename(broken / "x.safetensors")
    refuse(broken, "holds no weights", "model.safetensors", "again")
    edit(broken / "config.json", transformers_weights="x.safetensors")
    refuse(broken, "config.json has transformers_weights", "remove this entry")


def test_weights_in_several_files(saved: Path, tmp_path: Path) -> None:
    module = load_model(saved).module
    shutil.copytree(saved, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    module.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    assert len(set(names.values())) > 1
    loaded = load_model(tmp_path / "model").module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in module.state_dict().items())

    shutil.copy(saved / "model.safetensors", tmp_path / "outside.safetensors")
    for other in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "missing.safetensors", 3):
        edit(index, weight_map=dict.fromkeys(names, other))
        refuse(tmp_path / "model", "model.safetensors.index.json names", "again")


@pytest.mark.parametrize(
    ("name", "section", "entry"),
    [
        ("tokenizer_config.json", None, {"tokenizer_class": "Foo", "auto_map": {"AutoTokenizer": ["evil.Foo", None]}}),
        ("config.json", None, {"auto_map": {"AutoConfig": "evil.Foo"}}),
        ("config.json", "text_config", {"attn_implementation": "org/kernel"}),
        ("config.json", None, {"_attn_implementation": "org/kernel"}),
        ("tokenizer_config.json", None, {"fast_tokenizer_files": ["../tokenizer.1.0.json"]}),
        ("processor_config.json", "image_processor", {"auto_map": {"AutoImageProcessor": "evil.Foo"}}),
    ],
)
def test_code_that_a_folder_names(
    broken: Path, name: str, section: str | None, entry: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((broken / name).read_text())
    (content if section is None else content[section]).update(entry)
    (broken / name).write_text(json.dumps(content))
    (broken / "evil.py").write_text("raise SystemExit('code of the folder ran')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    refuse(broken, f"{name} has {list(entry)[-1]}", "remove this entry")
    monkeypatch.setattr(folder_checks, "refuse_code", lambda _: None)  # nor does it run without the check
    with contextlib.suppress(OspoError):
        load_model(broken)


def test_template_sets_of_a_model(broken: Path, tmp_path: Path) -> None:
    shipped = Path(folder_checks.__file__).parents[1] / "stages" / "templates"
    assert sorted(file.stem for file in shipped.glob("*.yaml")) == sorted(TEMPLATE_SETS)
    shutil.copy(shipped / "shapes.yaml", tmp_path / "other.yaml")
    for value in (str(tmp_path / "other.yaml"), "other", ""):
        edit(broken / "config.json", template_set=value)
        refuse(broken, f"template_set in the config.json of {broken} is {value!r:.60}", "janus, shapes", "templates")


@pytest.mark.parametrize("value", [2**27, 0, -1, 1.5, "256", None])
def test_positions_that_the_weights_do_not_bound(broken: Path, value: object) -> None:
    config = json.loads((broken / "config.json").read_text())["text_config"]
    edit(broken / "config.json", text_config={**config, "max_position_embeddings": value})
    refuse(broken, f"max_position_embeddings in the config.json of {broken} is {value!r}, expected 1 to 1048576")


@pytest.mark.parametrize("changes", [{"size": {"height": 40000, "width": 48}}, {"min_size": 40000}])
def test_image_sizes_that_are_not_those_of_the_vision_model(broken: Path, changes: dict[str, object]) -> None:
    content = json.loads((broken / "processor_config.json").read_text())
    edit(broken / "processor_config.json", image_processor={**content["image_processor"], **changes})
    refuse(broken, "the image processor of", "40000", "expected 48, the image_size of the vision model")


def test_files_that_no_loader_opens_are_not_looked_at(broken: Path, no_waiting: None) -> None:
    (broken / ".git").mkdir()
    os.mkfifo(broken / ".git" / "fsmonitor--daemon.ipc")
    load_model(broken)
    (broken / "additional_chat_templates").mkdir()
    os.mkfifo(broken / "additional_chat_templates" / "x.jinja")
    refuse(broken, "x.jinja is no regular file")


def test_a_device_that_is_full(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.JanusForConditionalGeneration, "to", full)
    refuse(saved, "cannot be loaded (CUDA out of memory)", "free some memory, or use another device")


# Adapters of others


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A LoRA folder that peft wrote."""
    save_adapter(saved, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})


@pytest.mark.parametrize("patched", ["transformers.JanusForConditionalGeneration.from_pretrained", "peft.PeftModel"])
def test_threads_load_one_after_the_other(
    adapter: Path, saved: Path, patched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers leaves its patches of torch in place if two loads overlap: every later load would fail."""
    module, *names = patched.split(".")
    owner = importlib.import_module(module)
    for name in names[:-1]:
        owner = getattr(owner, name)
    original, both = getattr(owner, names[-1]), threading.Barrier(2)

    def wait_for_the_other(*arguments: Any, **options: Any) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)
            raise AssertionError("two threads are here at once")
        return original(*arguments, **options)

    monkeypatch.setattr(owner, names[-1], staticmethod(wait_for_the_other))
    second = adapter if module == "peft" else saved
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(load_model, [adapter, second]))
    assert both.broken  # the function was called
    assert [model.name for model in models] == [str(adapter), str(second)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {name.replace("model.model", "model.old"): value for name, value in t.items()}, "8 tensors"),
        (lambda t: dict(list(t.items())[1:]), "1 tensors"),
        (lambda t: {"x": torch.ones(2, 96)}, "8 tensors"),
        (lambda t: {**t, "base_model.model.x": torch.ones(2)}, "unknown to the model (base_model.model.x"),
        (lambda t: {name: torch.full_like(value, float("nan")) for name, value in t.items()}, "not finite"),
        (lambda t: {name: value * float("inf") for name, value in t.items()}, "not finite"),
    ],
)
def test_tensors_of_an_adapter_are_all_there(
    adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], words: str
) -> None:
    edit_tensors(adapter, change)
    refuse(adapter, words, str(adapter), "again")


def test_modules_to_save_are_all_there(saved: Path, tmp_path: Path) -> None:
    import peft

    model = load_model(saved)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["vision_head"])
    wrapped = peft.get_peft_model(model.module, config)
    with torch.no_grad():
        wrapped.base_model.model.model.generation_head.vision_head.weight.add_(1)
    wrapped.save_pretrained(tmp_path)
    expected = wrapped.merge_and_unload().model.generation_head.vision_head.weight
    assert torch.equal(load_model(tmp_path).module.model.generation_head.vision_head.weight, expected)
    edit_tensors(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if "vision_head" not in name})
    refuse(tmp_path, "does not load on", "vision_head")


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "all", "use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": "all-linear"},
    ],
)
def test_an_adapter_gives_the_weights_that_peft_gives(saved: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    import peft

    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    wrapped = peft.get_peft_model(load_model(saved).module, config)
    with torch.no_grad():
        for weight in wrapped.parameters():
            weight.add_(torch.randn_like(weight) * 0.02 * weight.requires_grad)
    wrapped.save_pretrained(tmp_path)
    expected = peft.PeftModel.from_pretrained(load_model(saved).module, tmp_path).merge_and_unload().state_dict()
    found = load_model(tmp_path).module.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**8}, "peft_type 'PROMPT_TUNING', expected 'LORA'"),
        ({"peft_type": "ADALORA", "init_r": 10**6}, "peft_type 'ADALORA', expected 'LORA'"),
        ({"peft_type": None}, "peft_type None, expected 'LORA'"),
        ({"megatron_config": {"a": 1}}, "megatron_config or megatron_core"),
        ({"megatron_core": "evil"}, "megatron_config or megatron_core"),
        ({"rank_pattern": {"(?:[a-z_.0-9]+)+!": 2}}, "in rank_pattern, expected names of modules"),
        ({"alpha_pattern": {"(?:[a-z_.0-9]+)+!": 2}}, "in alpha_pattern, expected names of modules"),
        ({"layers_pattern": ["(a+)+"], "layers_to_transform": [1]}, "in layers_pattern, expected names of modules"),
        ({"modules_to_save": ["(?:[a-z_.0-9]+)+!"]}, "in modules_to_save, expected names of modules"),
        ({"target_modules": "(?:(?:[a-z_.0-9])+)+!"}, "target_modules '(?:(?:[a-z_.0-9])+)+!', which"),
        ({"exclude_modules": "(?:(?:[a-z_.0-9])+)+!|x" * 500}, "which takes too long to match"),
        ({"target_modules": "no_such_module"}, "matches no module of the base model"),
        ({"init_lora_weights": "pissa_niter_1000000000"}, "init_lora_weights 'pissa_niter_1000000000'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 10**9}}, "loftq_config.loftq_iter 1000000000"),
        ({"lora_alpha": 1e300}, "does not load on"),
    ],
)
def test_hostile_values_of_an_adapter(adapter: Path, changes: dict[str, object], words: str, no_waiting: None) -> None:
    edit(adapter / "adapter_config.json", **changes)
    refuse(adapter, words, str(adapter))


def test_a_rank_of_one_large_tensor(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that no layer has does not make matrices of its size for all layers."""
    import peft

    edit(adapter / "adapter_config.json", r=10**6)
    edit_tensors(adapter, lambda tensors: {**tensors, "x": torch.zeros(10**6, 1)})
    load = peft.PeftModel.__init__

    def build(self: object, module: torch.nn.Module, *arguments: object, **settings: object) -> None:
        assert next(module.parameters()).is_meta
        load(self, module, *arguments, **settings)

    monkeypatch.setattr(peft.PeftModel, "__init__", build)
    refuse(adapter, "does not load on", "loading state_dict", str(adapter))


def test_adapters_need_safetensors(adapter: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    edit(adapter / "adapter_config.json", r=300_000)
    refuse(adapter, f"{adapter} holds no adapter_model.safetensors", "save the adapter with safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_version": "99.0", "some_later_entry": {"a": 1}, "runtime_config": {"ephemeral_gpu_offload": False}},
        {"rank_pattern": {"^model.language_model.layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 8}},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ".*vision.*"},
        {"task_type": "CAUSAL_LM", "revision": "main", "megatron_core": "megatron.core", "megatron_config": None},
        {"init_lora_weights": "gaussian", "exclude_modules": ["vision_model"]},
    ],
)
def test_adapters_that_peft_writes(saved: Path, adapter: Path, changes: dict[str, object]) -> None:
    expected = load_model(adapter).module.state_dict()
    edit(adapter / "adapter_config.json", **changes)
    found = load_model(adapter).module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_base_models_that_an_adapter_may_name(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the hub cache is one that the user has loaded before; others may not choose what is downloaded."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    name = "some-org/some-model"
    edit(adapter / "adapter_config.json", base_model_name_or_path=name)
    refuse(adapter, f"names the base model '{name}', expected a folder", "deepseek-community/Janus-Pro-1B", "download")
    snapshot = tmp_path / "hub" / "models--some-org--some-model" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    assert find_model(adapter) == adapter
    edit(adapter / "adapter_config.json", base_model_name_or_path="deepseek-community/Janus-Pro-1B")
    assert find_model(adapter) == adapter

"""load_model: each kind of broken checkpoint gives an error of one line, and a LoRA folder gives the merged model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from ospo_fast import models
from ospo_fast.config import model_family
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import load_model
from ospo_fast.models.janus import JanusUnifiedModel
from ospo_fast.shapes.model import build_model, build_processor


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


def refuse(name: str | Path, *words: str) -> None:
    with pytest.raises(OspoError) as caught:
        load_model(name)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


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
    refuse(broken, "deepseek-community")


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


def test_unknown_devices(saved: Path) -> None:
    for device in ("toaster", "mps", "xpu", "meta", torch.device("meta"), ""):
        with pytest.raises(UsageError, match=f"device: got '{device}', expected 'cpu' or 'cuda'"):
            load_model(saved, device=device)
    with pytest.raises(UsageError, match="device: got 'cuda:99'"):
        load_model(saved, device="cuda:99")


def test_an_index_of_a_device_that_is_not_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda:2", "cpu:1"):
        with pytest.raises(UsageError, match=f"device: got '{device}', expected an index from 0 to"):
            load_model(saved, device=device)


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
    with pytest.raises(OspoError, match="expected that of the weights"):
        models._check_sizes(broken)
    edit(broken / "config.json", quantization_config={})
    models._check_sizes(broken)

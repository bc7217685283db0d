"""load_model: each kind of broken checkpoint gives an error of one line, and a LoRA folder gives the merged model."""

import json
import shutil
from pathlib import Path

import pytest
import torch

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
    for device in ("toaster", "cuda:99"):
        with pytest.raises(UsageError, match="device"):
            load_model(saved, device=device)


def test_dtypes(saved: Path) -> None:
    assert load_model(saved, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(saved, dtype=torch.float64).dtype == torch.float64
    for dtype in ("float31", torch.int8):
        with pytest.raises(UsageError, match="dtype"):
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

"""Checkpoints of the official trainer: loaded with the weights that its own merge gives, and refused by name."""

import json
import os
from pathlib import Path

import pytest
import torch

from ospo_fast.cli import main
from ospo_fast.config import model_family
from ospo_fast.models import find_model, load_model
from ospo_fast.models.chat import is_unified
from ospo_fast.models.vocabulary import base_folder
from ospo_fast.stages.model_card import base_folder as base_path
from ospo_fast.stages.model_card import public_name
from tests.models import deepseek_files as files
from tests.models.refusals import Code, refuse

Q = "language_model.model.layers.1.self_attn.q_proj.weight"
LORA_Q = "model.language_model.base_model.model.model.layers.1.self_attn.q_proj.lora_{}.default.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    files.write_files(folder)
    files.write_weights(folder, files.tensors(), form="bin")
    return folder


@pytest.mark.parametrize("whole", [True, False])
def test_lora_is_merged_into_the_base_model(base: Path, tmp_path: Path, whole: bool) -> None:
    path = tmp_path / "version_0" / "step=000100.ckpt"
    state = files.trainer_state(files.tensors(), whole=whole)
    files.write_trainer_file(path, state, str(base))
    model = load_model(path)
    assert (model.name, model.templates, find_model(path)) == (str(path), "janus", path)
    # lora_alpha / lora_rank = 3
    delta = 3 * state[LORA_Q.format("B")] @ state[LORA_Q.format("A")]
    found = model.module.model.language_model.layers[1].self_attn
    torch.testing.assert_close(found.q_proj.weight, files.tensors()[Q] + delta)
    assert torch.equal(found.k_proj.weight, files.tensors()[Q.replace("q_proj", "k_proj")])
    vision = model.module.model.vision_model.encoder.layers[1].self_attn.q_proj.weight
    assert torch.equal(vision, files.tensors()["vision_model.vision_tower.blocks.1.attn.qkv.weight"][:32])


def test_all_weights_of_a_file_count(base: Path, tmp_path: Path) -> None:
    """Trained without LoRA, or with it on other weights than those of the base model, as the official loader does."""
    weights = {name: tensor + 1 for name, tensor in files.tensors().items()}
    path = tmp_path / "full.ckpt"
    files.write_trainer_file(path, {f"model.{name}": tensor for name, tensor in weights.items()}, str(base))
    assert torch.equal(load_model(path).module.model.generation_embeddings.weight, weights["gen_embed.weight"])
    files.write_trainer_file(path, files.trainer_state(weights), str(base))
    assert torch.equal(load_model(path).module.model.generation_embeddings.weight, weights["gen_embed.weight"])
    del weights["gen_embed.weight"]
    files.write_trainer_file(path, {f"model.{name}": tensor for name, tensor in weights.items()}, str(base))
    refuse(path, "lacks 1 tensors", "gen_embed.weight", str(path))
    weights["gen_embed.weight"] = torch.zeros(3, 3)
    files.write_trainer_file(path, {f"model.{name}": tensor for name, tensor in weights.items()}, str(base))
    refuse(path, "gen_embed.weight has the shape [64, 8]", "[3, 3]")


def test_an_adapter_on_a_file_of_the_trainer(base: Path, tmp_path: Path) -> None:
    import peft

    path = tmp_path / "a.ckpt"
    files.write_trainer_file(path, files.trainer_state(files.tensors()), str(base))
    model = load_model(path)
    wrapped = peft.get_peft_model(model.module, peft.LoraConfig(r=1, target_modules=".*language_model.*q_proj"))
    wrapped.save_pretrained(tmp_path / "adapter")
    again = load_model(tmp_path / "adapter").module.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in load_model(path).module.state_dict().items())


def test_an_adapter_of_a_run_finds_its_file_again(base: Path, tmp_path: Path) -> None:
    """A run records the public name of its base model, and where that is here."""
    import peft

    path, folder = tmp_path / "a.ckpt", tmp_path / "out" / "train" / "adapter"
    files.write_trainer_file(path, files.trainer_state(files.tensors()), str(base))
    wrapped = peft.get_peft_model(
        load_model(path).module, peft.LoraConfig(r=1, target_modules=".*language_model.*q_proj")
    )
    wrapped.peft_config["default"].base_model_name_or_path = public_name(str(path))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    recorded = {"name": public_name(str(path)), "folder": os.path.relpath(base_path(str(path)) or "", folder.parent)}
    (folder.parent / "done.json").write_text(json.dumps({"base_model": recorded}))
    again = load_model(folder).module.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in load_model(path).module.state_dict().items())


def test_other_commands_know_the_file(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.ckpt"
    files.write_trainer_file(path, files.trainer_state(files.tensors()), str(base))
    assert (base_folder(str(path)), model_family(str(path)), public_name(str(path))) == (base, None, "a.ckpt")
    assert is_unified(str(path))
    assert public_name("deepseek-ai/Janus-Pro-7B") == "deepseek-community/Janus-Pro-7B"
    assert main(["plan", "--model", str(path), "--items", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]


def test_base_models_that_are_not_here(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    state = files.trainer_state(files.tensors(), whole=False)
    files.write_trainer_file(path, state, "./checkpoints/Janus-Pro-7B")
    remedy = f"ospo-fast convert {path} OUT --base MODEL"
    refuse(path, "'./checkpoints/Janus-Pro-7B'", "no such folder", "model.model_path", remedy)
    files.write_trainer_file(path, state, "some-org/some-model")
    refuse(path, "names the base model 'some-org/some-model'", "deepseek-ai/Janus-Pro-7B", "download")
    files.write_trainer_file(path, state, None)
    refuse(path, "is not known", remedy)
    (tmp_path / "config.yaml").unlink()
    refuse(path, "is not known", "there is no config.yaml", remedy)
    for text in ("a: 1", "model: {model_path: null}"):
        path.with_name("config.yaml").write_text(text)
        refuse(path, "is not known", "config.yaml has no model.model_path", remedy)
    path.with_name("config.yaml").unlink()
    (tmp_path / "config.yaml").write_text("model: [")
    refuse(path, "config.yaml", "next to the checkpoint")


def test_settings_that_do_not_fit_the_matrices(base: Path, tmp_path: Path) -> None:
    path, state = tmp_path / "a.ckpt", files.trainer_state(files.tensors(), whole=False)
    for lora, words in (
        ({"lora_rank": 3}, "has lora_rank 3"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"lora_rank": "2"}, "lora_rank '2'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        files.write_trainer_file(path, state, str(base), **lora)
        refuse(path, words, str(tmp_path / "config.yaml"))


def test_tensors_of_other_models(base: Path, tmp_path: Path) -> None:
    path, state = tmp_path / "a.ckpt", files.trainer_state(files.tensors(), whole=False)
    for name in ("model.visual.weight", "gen_embed.weight", LORA_Q.format("magnitude_vector")):
        files.write_trainer_file(path, {**state, name: torch.zeros(1)}, str(base))
        refuse(path, name, "official trainer")
    wrong = {name: tensor[:1] if ".lora_B." in name else tensor for name, tensor in state.items()}
    files.write_trainer_file(path, wrong, str(base))
    refuse(path, "does not load on", str(base))
    files.write_trainer_file(path, {**state, LORA_Q.format("A"): torch.full((2, 32), torch.nan)}, str(base))
    refuse(path, "not finite", "q_proj.lora_A")


def test_code_never_runs(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    state = files.trainer_state(files.tensors(), whole=False)
    files.write_trainer_file(path, state, str(base))
    torch.save({"state_dict": state, "hyper_parameters": Code(tmp_path / "written")}, path)
    refuse(path, str(path), "exec", "did not", "weights_only=False)['state_dict']")
    assert not (tmp_path / "written").exists()
    # Objects of known libraries have code too.
    torch.save({"state_dict": state, "hyper_parameters": {"path": torch.nn.Linear(1, 1)}}, path)
    refuse(path, "torch.nn.modules.linear.Linear", "save its tensors alone")
    torch.save({"state_dict": state}, path)
    load_model(path)
    torch.save(state, path)
    load_model(path)
    path.write_bytes(b"PK not a zip")
    refuse(path, str(path), "no zip archive")
    torch.save({"state_dict": [1, 2]}, path)
    refuse(path, str(path), "hold list, expected tensors")

"""The card of an adapter, and the name of its base model, which are of use on other machines."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from ospo_fast.config import load_config, model_family
from ospo_fast.errors import OspoError
from ospo_fast.models import find_model, load_model
from ospo_fast.pipeline import read_stage
from ospo_fast.records import local_base
from ospo_fast.stages import StageContext, train
from ospo_fast.stages.model_card import base_folder, model_card, public_name

pytestmark = pytest.mark.usefixtures("omegaconf")

SMALL = ["train.steps=2", "train.batch_size=2", "train.accumulation=1", "train.lora_rank=4", "train.eval_every=1"]
SMALL += ["train.early_stopping=alignment", "train.learning_rate=0.01", "masks.layers=[0]"]


def trained(model, folder, made, values=(0.25, 0.5, 0.75), out=None):
    """Train in a copy of the run folder; return the folder of the adapter."""
    run = Path(shutil.copytree(made, out or folder / "run"))
    evaluations = iter(values)
    context = StageContext(evaluation=lambda *_: {"alignment": next(evaluations), "standard_error": 0.125})
    config = load_config([*SMALL, f"out={run}"], family="shapes")
    train.train(read_stage(run, "masks"), load_model(model), config, out=run, context=context)
    return run / "train" / "adapter"


@pytest.fixture(scope="module")
def adapter(tiny, made, tmp_path_factory):
    return trained(tiny, tmp_path_factory.mktemp("first"), made)


def same(first, second):
    other = second.module.state_dict()
    return all(torch.allclose(value, other[name], atol=1e-6) for name, value in first.module.state_dict().items())


def test_the_card_is_filled(adapter, made):
    text = (adapter / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-to-image")
    assert {"lora", "ospo"} <= set(card.data.tags)
    assert "More Information Needed" not in text
    records = read_stage(made, "masks")
    count = sum(bool(pair.get("mask_path")) for record in records for pair in record.get("pairs", ()))
    assert f"{count} pairs of images of" in text
    assert any(f"- `{record['prompt']}`" in text for record in records)
    for part in (
        "| before training | 0.250 ± 0.125 |",
        "| this adapter (step 2) | 0.750 ± 0.125 |",
        "arXiv:2506.02015",
    ):
        assert part in text
    assert re.search(r"ospo_fast \S+, python 3\.\S+, torch \S+, transformers \S+, peft \S+", text)


def test_nothing_in_the_adapter_names_a_folder_of_this_machine(adapter, tiny):
    for path in (adapter / "README.md", adapter / "adapter_config.json"):
        text = path.read_text()
        assert not [part for part in (str(tiny), str(adapter.parents[2]), str(Path.home()) + "/") if part in text]
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == Path(tiny).name


def test_the_lines_of_the_card_run(made, tmp_path, monkeypatch):
    """For the embedded model, the adapter alone is enough: in a folder elsewhere, without the run."""
    folder = Path(shutil.copytree(trained("shapes", tmp_path, made), tmp_path / "published"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "shapes"
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.license == "apache-2.0"
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(folder)
    exec(code, {})
    assert Image.open("image.png").size == (48, 48)


def test_an_adapter_loads_in_its_run_folder_also_when_that_is_moved(adapter, tmp_path):
    merged = load_model(adapter.parent / "model")
    assert same(load_model(adapter), merged)
    moved = Path(shutil.copytree(adapter.parents[1], tmp_path / "moved")) / "train" / "adapter"
    assert same(load_model(moved), merged)
    assert model_family(str(adapter)) == model_family(str(adapter.parent / "model"))


def test_elsewhere_the_base_model_is_looked_for_under_its_name(adapter, tiny, tmp_path, monkeypatch):
    alone = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    name = Path(tiny).name
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OspoError, match=f"there is no folder '{name}'"):
        find_model(alone)
    shutil.copytree(tiny, tmp_path / name)
    assert same(load_model(alone), load_model(adapter.parent / "model"))
    (tmp_path / "done.json").write_text('{"base_model": {"name": "another", "folder": "nowhere"}}')
    assert local_base(alone, name) is None


def test_lora_on_lora_and_a_second_iteration_load(adapter, made, tmp_path):
    second = trained(adapter, tmp_path, made)
    name = json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert name == f"{adapter.parents[1].name}-adapter"
    assert same(load_model(second), load_model(second.parent / "model"))

    run = Path(shutil.copytree(adapter.parents[1], tmp_path / "iterations"))
    third = trained(run / "train" / "model", tmp_path, made, out=run / "iter2")
    assert json.loads((third / "adapter_config.json").read_text())["base_model_name_or_path"] == "iterations-model"
    assert json.loads((third.parent / "done.json").read_text())["base_model"]["folder"] == "../../train/model"
    moved = run.rename(tmp_path / "moved") / "iter2" / "train"
    assert same(load_model(moved / "adapter"), load_model(moved / "model"))


def test_names_of_base_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "hub" / "models--deepseek-community--Janus-Pro-1B" / "snapshots" / "0a1b"
    paths = {
        snapshot: "deepseek-community/Janus-Pro-1B",
        tmp_path / "Janus-Pro-7B": "Janus-Pro-7B",
        tmp_path / "run" / "iter2" / "train" / "model": "run-iter2-model",
        tmp_path / "run" / ".restart" / "train" / "model": "run-model",
    }
    for path, name in paths.items():
        path.mkdir(parents=True)
        assert public_name(str(path)) == name
    (tmp_path / "shapes").mkdir()  # a folder of this name does not hide the embedded model
    assert (public_name("shapes"), base_folder("shapes")) == ("shapes", None)
    assert public_name("deepseek-community/Janus-Pro-1B") == "deepseek-community/Janus-Pro-1B"


def test_a_hub_model_is_linked_and_its_license_named(made):
    config = load_config(["prompts.file=mine.txt", "train.eval_every=0"], family="shapes")
    text = model_card("deepseek-community/Janus-Pro-1B", config, [], [], None, 3).decode()
    data = ModelCard(text).data
    assert (data.base_model, data.license) == ("deepseek-community/Janus-Pro-1B", "other")
    assert "https://huggingface.co/deepseek-community/Janus-Pro-1B" in text
    assert "mine.txt" not in text
    assert "Not evaluated during training." in text
    base_kept = {"step": 0, "metric": "alignment", "before": 0.5, "value": 0.5}
    text = model_card("shapes", config, [], [{"step": 0, "alignment": 0.5}], base_kept, 3).decode()
    assert "the adapter changes nothing" in text

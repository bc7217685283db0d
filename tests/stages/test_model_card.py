"""The card of an adapter, and the name of its base model, which are of use on other machines."""

import ast
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
from ospo_fast.records import ItemPair, local_base
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
    rows = [json.loads(line) for line in (adapter.parent / "log.jsonl").read_text().splitlines()]
    first, last = (row for row in rows if "loss" in row)  # two steps: a tenth is one of them
    assert f"| first 1 | {first['loss']:.3f} | {first['accuracy']:.3f} |" in text
    assert f"| last 1 of 2 | {last['loss']:.3f} | {last['accuracy']:.3f} |" in text
    assert re.search(r"ospo_fast \S+, python 3\.\S+, torch \S+, transformers \S+, peft \S+", text)


def test_the_merged_model_has_a_card_of_its_own(adapter, tiny):
    text = (adapter.parent / "model" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert "lora" not in card.data.tags
    assert "license" not in card.data.to_dict()
    name = Path(tiny).name
    for part in (
        f"# OSPO model from {name}",
        f"`{name}` with a LoRA adapter of its language model merged into it, trained",
        "| this model (step 2) | 0.750 ± 0.125 |",
        "This model does not need it.",
        "for you to add, as `license:`",
    ):
        assert part in text
    assert "README.md" not in text
    assert "model/README.md" in json.loads((adapter.parent / "done.json").read_text())["files"]


def test_nothing_in_the_adapter_names_a_folder_of_this_machine(adapter, tiny):
    model = adapter.parent / "model"
    for path in (adapter / "README.md", adapter / "adapter_config.json", model / "README.md", model / "config.json"):
        text = path.read_text()
        assert not [part for part in (str(tiny), str(adapter.parents[2]), str(Path.home()) + "/") if part in text]
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == Path(tiny).name


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_code_of_the_cards_runs(made, tmp_path, monkeypatch, kind):
    """For the embedded model, the folder alone is enough: elsewhere, without the run."""
    adapter = trained("shapes", tmp_path, made)
    folder = Path(shutil.copytree(adapter.parent / kind, tmp_path / "published"))
    if kind == "adapter":
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "shapes"
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.license == "apache-2.0"
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert [("ospo_fast as of" in code, "transformers" in code) for code in blocks] == [(True, False), (False, True)]
    assert ("peft" in blocks[1]) == (kind == "adapter")
    monkeypatch.chdir(folder)
    models = []
    for code in blocks:
        names = {}
        exec(code, names)
        models.append(getattr(names["model"], "module", names["model"]))
        image = Image.open("image.png")
        assert image.size == (48, 48)
        assert len(image.getcolors(48 * 48)) > 1
        Path("image.png").unlink()
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in ours.items())


def test_the_code_of_a_card_with_a_base_model_in_a_folder_runs(adapter, tiny, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(adapter, tmp_path / "published"))
    load_model(tiny).save(folder / Path(tiny).name)  # as the card says
    monkeypatch.chdir(folder)
    for code in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL):
        exec(code, {})
        Path("image.png").unlink()


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
    assert "Alignment on validation prompts: not measured." in text
    assert "Loss and accuracy: not measured." in text
    assert "base = 'deepseek-community/Janus-Pro-1B'\n" in text
    base_kept = {"step": 0, "metric": "alignment", "before": 0.5, "value": 0.5}
    text = model_card("shapes", config, [], [{"step": 0, "alignment": 0.5}], base_kept, 3).decode()
    assert "the adapter changes nothing" in text


def test_a_prompt_with_a_fence_stays_inside_of_its_text():
    """A prompt can come from a file, and the code of the card is to be run."""
    prompt = "a cup\n```\n\n```python\nraise SystemExit('\" + 1')"
    pairs = [ItemPair("a", {"item_id": "a", "prompt": prompt}, {})]
    text = model_card("shapes", load_config([], family="shapes"), pairs, [], None, 3).decode()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert "a cup ''' '''python raise SystemExit('\" + 1')" in texts


def test_a_model_of_another_family_is_used_with_ospo_fast_alone(tmp_path: Path) -> None:
    from tests.models.tiny_families import build

    build("emu3").save(tmp_path / "emu3")
    config = load_config([f"model={tmp_path / 'emu3'}", "image_size=8x10"])
    text = model_card("emu3", config, [], [], None, 3).decode()
    assert 'of.load_model(".", image_size=(8, 10))' in text
    assert "Janus" not in text


@pytest.mark.parametrize(
    ("method", "says", "paper"),
    [
        ("v3", "by OSPO, object-centric self-improving", "ospo2025"),
        ("dpo", "by DPO with the model before training as the reference", "2305.18290"),
        ("sft", "by supervised fine-tuning: on the best images", "The package, ospo-fast."),
        ("suder", "by SimPO: on pairs of the images under which", "2506.07963"),
        ("grpo", "by GRPO: on groups of images of a prompt", "2402.03300"),
    ],
)
def test_the_card_names_the_method(method, says, paper):
    pairs = [ItemPair("1", {"prompt": "a red circle", "kind": "color1"}, {})]
    text = model_card("shapes", load_config([f"method={method}"]), pairs, [], None, 2).decode()
    assert says in text
    assert paper in text.partition("## Citation")[2]
    assert ("ospo2025" in text) == (method == "v3")
    name = "ospo" if method == "v3" else method
    assert f"# {name.upper()} adapter for shapes" in text
    assert name in ModelCard(text).data.tags
    assert ("\n1 different prompts." in text) == (method == "grpo")
    assert ("| images of a prompt in a step | 8 |" in text) == (method == "grpo")
    assert ("1 pairs of images of 1 different prompts." in text) == (method != "grpo")

"""What goes to the Hugging Face hub. The hub is a fake that keeps the calls and copies the files."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image

from ospo_fast.cli import main
from tests.finished_run import MASKS, write_run

pytestmark = pytest.mark.usefixtures("omegaconf")


class FakeHub:
    """In place of HfApi: each call, and copies of the uploaded folders."""

    def __init__(self, folder):
        self.folder, self.calls, self.public = folder, [], set()

    def create_repo(self, repo_id, **settings):
        self.calls.append(("create_repo", repo_id, settings))
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id, *, repo_type):
        self.calls.append(("repo_info", repo_id, {"repo_type": repo_type}))
        return SimpleNamespace(private=repo_id not in self.public)

    def upload_folder(self, *, repo_id, folder_path, **settings):
        self.calls.append(("upload_folder", repo_id, settings))
        shutil.copytree(folder_path, self.folder / repo_id)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


def push(run, *arguments):
    return main(["push", "--out", str(run), *arguments])


def uploaded(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_adapter_and_the_pairs(run, hub, capsys):
    assert push(run, "--repo", "me/adapter", "--dataset", "me/pairs") == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/adapter\nhttps://huggingface.co/me/pairs\n"
    assert hub.calls == [
        call
        for kind, repo in (("model", "me/adapter"), ("dataset", "me/pairs"))
        for call in (
            ("create_repo", repo, {"repo_type": kind, "private": None, "exist_ok": True}),
            ("upload_folder", repo, {"repo_type": kind, "commit_message": f"Upload the {kind} of a run of ospo-fast"}),
        )
    ]
    adapter = hub.folder / "me" / "adapter"
    assert uploaded(adapter) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for path in adapter.iterdir():
        assert path.read_bytes() == (run / "train" / "adapter" / path.name).read_bytes()
    folder = hub.folder / "me" / "pairs"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "item_id": "0000012",
        "category": "attribute",
        "prompt": "a red ball",
        "rejected_prompt": "a blue ball",
        "chosen_file_name": "images/base/attribute/0000012/01.png",
        "rejected_file_name": "images/negative/attribute/0000012/01.png",
        "chosen_mask_file_name": "masks/base/attribute/0000012/01.png",
        "rejected_mask_file_name": "masks/negative/attribute/0000012/01.png",
        "chosen_score": 0.75,
        "rejected_score": -0.5,
    }
    assert isinstance(rows[1]["chosen_score"], float)  # 1 in the record, where the others have fractions
    names = {value for row in rows for key, value in row.items() if key.endswith("_file_name")}
    tensors = {name.replace("masks/", "object_mask/").replace(".png", "_mask.pt") for name in names if "masks" in name}
    assert uploaded(folder) == names | tensors | {"README.md", "metadata.jsonl", "train.json"}
    with Image.open(folder / rows[0]["chosen_mask_file_name"]) as mask:  # (2, 3) cells, on an image of 6 x 4 pixels
        assert (mask.size, mask.mode) == ((6, 4), "L")
        assert np.array_equal(mask, 255 * np.kron(MASKS["0000012"][0], np.ones((2, 2))))


def test_datasets_loads_the_uploaded_folder(run, hub, tmp_path):
    """As the Hub's viewer does, by the metadata of the card; and the code of the card runs."""
    datasets = pytest.importorskip("datasets")
    assert push(run, "--dataset", "me/pairs") == 0
    folder = hub.folder / "me" / "pairs"
    card = DatasetCard((folder / "README.md").read_text())
    assert card.data.task_categories == ["text-to-image"]
    assert "license" not in card.data.to_dict()
    pairs = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert pairs.column_names == [
        *("item_id", "category", "prompt", "rejected_prompt", "chosen", "rejected", "chosen_mask", "rejected_mask"),
        *("chosen_score", "rejected_score"),
    ]
    assert [row["chosen"].getpixel((0, 0)) for row in pairs] == [(255, 0, 0), (250, 0, 0), (250, 0, 0)]
    assert pairs["rejected_prompt"][:] == ["a blue ball", "a ball", "a ball"]
    text = (folder / "README.md").read_text()
    assert "| attribute | 2 |" in text
    assert "generated the images from prompts of the model and judged them itself" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    exec(code.replace('"me/pairs"', f'"{folder}", cache_dir="{tmp_path / "cache"}"'), {})


def test_the_merged_model(run, hub):
    assert push(run, "--repo", "me/model", "--what", "model", "--private") == 0
    assert uploaded(hub.folder / "me" / "model") == {"README.md", "config.json", "model.safetensors"}
    assert [name for name, *_ in hub.calls] == ["create_repo", "repo_info", "upload_folder"]
    assert hub.calls[0][2]["private"] is True


def test_without_an_adapter_the_model_goes(run, hub):
    shutil.rmtree(run / "train" / "adapter")
    done = json.loads((run / "train" / "done.json").read_text())
    done["files"] = [name for name in done["files"] if name.startswith("model/")]
    (run / "train" / "done.json").write_text(json.dumps(done))
    assert push(run, "--repo", "me/model") == 0
    assert "model.safetensors" in uploaded(hub.folder / "me" / "model")


def test_a_base_that_is_a_folder_gets_its_name_on_the_hub(run, hub, capsys):
    config = run / "train" / "adapter" / "adapter_config.json"
    for named in ("my-janus", "../janus", "/nas/janus"):
        config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": named}))
        assert push(run, "--repo", "me/adapter") == 1
        assert f"The adapter is of '{named}', a folder that others do not have" in capsys.readouterr().err
    assert push(run, "--repo", "me/adapter", "--base", "deepseek-community/Janus-Pro-7B") == 0
    folder = hub.folder / "me" / "adapter"
    sent = json.loads((folder / "adapter_config.json").read_text())
    assert sent == {"peft_type": "LORA", "base_model_name_or_path": "deepseek-community/Janus-Pro-7B"}
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.base_model == "deepseek-community/Janus-Pro-7B"
    assert "3 pairs of images of 1 different prompts" in card.text
    assert "| before training | 0.250 |" in card.text
    assert "/nas/janus" in config.read_text()  # the run stays as it is
    capsys.readouterr()
    log = run / "train" / "log.jsonl"
    for path, data in ((log, "{"), (log, "[1]"), (run / "train" / "done.json", '{"step": 1, "left_out": 5}')):
        kept = path.read_text()
        path.write_text(data)
        refused(capsys, hub, 1, "correct its log.jsonl and done.json", run, "--repo", "me/x", "--base", "org/janus")
        path.write_text(kept)


def test_cards_of_pairs_that_were_given(run, hub):
    """Of a run whose images were not made in it, such as one of an export, no card says whose they are."""
    (run / "settings.json").unlink()
    base = ("--base", "deepseek-community/Janus-Pro-7B")
    assert push(run, "--repo", "me/adapter", "--dataset", "me/pairs", *base) == 0
    model, dataset = ((hub.folder / "me" / name / "README.md").read_text() for name in ("adapter", "pairs"))
    assert "on pairs of a chosen and a rejected image of the same prompt, which were given to the run" in model
    assert "They were given to a run of ospo-fast by OSPO" in dataset
    assert "The license is that of the given images." in dataset
    assert "judged" not in model.partition("## Base model")[0]


def test_a_dry_run_contacts_nothing_and_writes_nothing(run, hub, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert push(run, "--repo", "me/adapter", "--dataset", "me/pairs", "--private", "--dry-run") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("model me/adapter (private): 3 files, ")
    assert "  README.md  9 bytes" in out
    assert any(line.startswith("dataset me/pairs (private): 21 files, ") for line in out)
    assert [line.split(",")[0] for line in out if line.endswith("bytes") and "/  " in line] == [
        *("  images/  6 files", "  masks/  6 files", "  object_mask/  6 files")
    ]
    assert push(run, "--repo", "me/adapter", "--dry-run", "--json") == 0
    files = json.loads(capsys.readouterr().out)["uploads"][0]["files"]
    assert files == {path.name: path.stat().st_size for path in (run / "train" / "adapter").iterdir()}
    assert hub.calls == []
    assert sorted(tmp_path.rglob("*")) == before


def refused(capsys, hub, code, words, run, *arguments):
    calls = len(hub.calls)
    assert push(run, *arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert not any(name == "upload_folder" for name, *_ in hub.calls[calls:])


def test_bad_arguments(run, hub, tmp_path, capsys):
    repo = ("--repo", "me/x")
    refused(capsys, hub, 2, "expected --repo OWNER/NAME for the model, --dataset OWNER/NAME, or both", run)
    for name in ("model", "me/x/y", "../x", "me/x y", "me/-x", "me/a--b", "me/x.git"):
        refused(capsys, hub, 2, f"--repo: got '{name}', expected OWNER/NAME", run, "--repo", name)
    refused(capsys, hub, 2, "--dataset: got 'pairs', expected OWNER/NAME", run, "--dataset", "pairs")
    refused(capsys, hub, 2, "--base: got 'janus', expected OWNER/NAME", run, *repo, "--base", "janus")
    embedded = ("model=shapes", "--base", "deepseek-community/Janus-Pro-7B")
    refused(
        capsys,
        hub,
        2,
        "--base: got deepseek-community/Janus-Pro-7B, but the model of the run is shapes",
        run,
        *repo,
        *embedded,
    )
    refused(capsys, hub, 2, "--what: got model without --repo", run, "--dataset", "me/x", "--what", "model")
    refused(capsys, hub, 2, "invalid choice: 'weights'", run, *repo, "--what", "weights")
    refused(capsys, hub, 2, "There is no run folder", tmp_path / "nowhere", *repo)
    refused(capsys, hub, 2, "There is no iteration 2", run, *repo, "--iteration", "2")
    (run / "iter2").mkdir()
    refused(capsys, hub, 2, f"train --out {run} --iteration 2` first", run, *repo, "--iteration", "2")
    (run / "iter2").rmdir()
    shutil.rmtree(run / "train" / "adapter")
    (run / "train" / "done.json").write_text('{"files": ["model/config.json"]}')
    refused(capsys, hub, 2, "which training with train.full does not write", run, *repo, "--what", "adapter")
    assert hub.calls == []


def test_runs_that_are_not_whole(run, hub, capsys):
    repo, done = ("--repo", "me/x"), run / "train" / "done.json"
    weights = run / "train" / "adapter" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    refused(
        capsys, hub, 1, f"adapter_model.safetensors is missing; run `ospo-fast train --out {run}` first", run, *repo
    )
    weights.symlink_to("/etc/hostname")
    refused(capsys, hub, 1, "is a symbolic link", run, *repo)
    weights.unlink()
    weights.write_bytes(data)
    (run / "images" / "0000012" / "base_1.png").unlink()
    refused(capsys, hub, 1, "Cannot read the image", run, *repo, "--dataset", "me/y")
    done.unlink()
    refused(capsys, hub, 2, f"no finished training in {run}; run `ospo-fast train --out {run}` first", run, *repo)
    assert hub.calls == []


@pytest.mark.parametrize("place", ["adapter/adapter_config.json", "adapter/README.md", "masks.jsonl"])
def test_no_path_of_this_machine_is_published(run, hub, capsys, place, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    found = "/home/someone/models/janus"
    if place == "masks.jsonl":
        text = (run / place).read_text()
        (run / place).write_text(text.replace('"a red ball"', f'"{found}"'))
    else:
        path = run / "train" / place
        text = path.read_text()
        path.write_text(f"{text[:-1]}, {json.dumps('note')}: {json.dumps(found)}}}" if text[0] == "{" else found)
    refused(
        capsys, hub, 1, "a path of this machine, which would be published", run, "--repo", "me/x", "--dataset", "m/y"
    )
    assert hub.calls == []


def test_addresses_and_pieces_of_a_vocabulary_are_no_paths(run, hub, monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    (run / "train" / "adapter" / "README.md").write_text("https://huggingface.co/root/model and /roots")
    (run / "train" / "adapter" / "tokenizer.json").write_text('{"merges": ["/root/", "/usr/lib"]}')
    assert push(run, "--repo", "me/x") == 0


def test_a_public_repository_is_not_taken_for_a_private_one(run, hub, capsys):
    hub.public.add("me/x")
    refused(
        capsys, hub, 2, "--private: got the model me/x, which is there and public", run, "--repo", "me/x", "--private"
    )


@pytest.mark.parametrize("error", [OSError("no route"), huggingface_hub.errors.LocalTokenNotFoundError("no token")])
def test_without_network_or_token(run, hub, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hub, "create_repo", fail)
    words = f"cannot upload the model me/x ({error}); check the network and the name, and log in with `hf auth login`"
    refused(capsys, hub, 1, words, run, "--repo", "me/x")

"""The pairs of a run in the layout of the official trainer."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from ospo_fast.cli import main
from ospo_fast.config import load_config
from ospo_fast.export import write_export
from ospo_fast.pipeline import read_stage
from ospo_fast.records import iter_pairs, read_records
from ospo_fast.stages import masks
from tests.finished_run import COLORS, MASKS, TEXTS, write_run

pytestmark = pytest.mark.usefixtures("omegaconf")

EVIL = f"evil-{hashlib.sha256(b'../evil').hexdigest()[:24]}"
UP = f"up-{hashlib.sha256(b'../up').hexdigest()[:24]}"
# Category and name of each pair, the number of its hard negative, its images and the key of its masks.
PAIRS = {
    "attribute/0000012/01": ("base_1", "negative_1", "0000012"),
    "attribute/0000012-1/02": ("base_5", "negative_5", "0000012-1"),
    f"{UP}/{EVIL}/05": ("base_5", "negative_5", "evil"),  # without prompts of hard negatives, the number of the image
}


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def dest(run, tmp_path, capsys):
    folder = tmp_path / "dest"
    assert main(["export", "--out", str(run), str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {
        "out": str(folder),
        "pairs": 3,
        "categories": {"attribute": 2, UP: 1},
        "masks": True,
        "left_out": {"0000013": "the prompt holds no object"},
    }
    return folder


def official_examples(data_path, mask_dir):
    """Read pairs by the steps of the official trainer: paths of the working folder, masks by the chosen's name."""
    with open(data_path) as file:  # noqa: PTH123
        examples = json.load(file)
    for example in examples:
        name = os.path.basename(example["chosen"]).split(".png")[0]  # noqa: PTH119
        parts = example["t2i_category"], example["item_id"], f"{name}_mask.pt"
        read = [torch.load(os.path.join(mask_dir, role, *parts), weights_only=True) for role in ("base", "negative")]  # noqa: PTH118
        images = [Image.open(example[side]).convert("RGB") for side in ("chosen", "rejected")]
        yield example, images, read


def test_files_and_train_json(dest, run):
    expected = {"train.json"}
    for place, (chosen, rejected, _) in PAIRS.items():
        for role, name in (("base", chosen), ("negative", rejected)):
            assert (dest / f"images/{role}/{place}.png").read_bytes() == (
                run / f"images/0000012/{name}.png"
            ).read_bytes()
            expected |= {f"images/{role}/{place}.png", f"object_mask/{role}/{place}_mask.pt"}
    assert {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()} == expected
    first, second, third = json.loads((dest / "train.json").read_text())
    assert first == {
        **TEXTS,
        "item_id": "0000012",
        "chosen": "images/base/attribute/0000012/01.png",
        "rejected": "images/negative/attribute/0000012/01.png",
        "rejected_prompt": "a blue ball",
        "chosen_score": 0.75,
        "rejected_score": -0.5,
    }
    assert (second["item_id"], second["source_item_id"], second["chosen_score"]) == ("0000012-1", "0000012", 1)
    assert (third["item_id"], third["source_item_id"], third["t2i_category"]) == (EVIL, "../evil", UP)
    for entry in (first, second):  # as the official selection has it
        assert entry["negative_prompt"][int(Path(entry["rejected"]).stem)] == entry["rejected_prompt"]


def test_an_export_of_an_export_keeps_names(dest, tmp_path):
    """Also where another item's further pair would have the name, which is then made different as that of any id."""
    config = load_config(["masks.enabled=false"])
    entries = json.loads((dest / "train.json").read_text())
    for name in ("again", "third"):
        config.out = str(dest)
        write_export(config, dest := tmp_path / name)
        found = json.loads((dest / "train.json").read_text())
        assert [entry["item_id"] for entry in found] == [entry["item_id"] for entry in entries]
        assert [entry["chosen"] for entry in found] == [entry["chosen"] for entry in entries]
    entries[0]["further_pairs"] = [{"chosen": entries[0]["chosen"], "rejected": entries[0]["rejected"]}]
    (dest / "train.json").write_text(json.dumps(entries))
    config.out = str(dest)
    write_export(config, tmp_path / "last")
    found = [entry["item_id"] for entry in json.loads((tmp_path / "last" / "train.json").read_text())]
    clash = f"0000012_1-{hashlib.sha256(b'0000012-1').hexdigest()[:24]}"
    assert found == ["0000012", "0000012-1", clash, EVIL]


@pytest.mark.parametrize(("root", "folder"), [("", "dest"), ("data/mine", "."), ("data/mine/", ".")])
def test_the_steps_of_the_official_trainer_read_it(run, tmp_path, monkeypatch, root, folder):
    target = tmp_path / "dest" if folder == "dest" else tmp_path / "data" / "mine"
    assert main(["export", "--out", str(run), str(target), "--root", root]) == 0
    monkeypatch.chdir(tmp_path / folder)
    place = Path(root or ".")
    found = list(official_examples(place / "train.json", str(place / "object_mask")))
    assert len(found) == len(PAIRS)
    for (example, images, read), (chosen, rejected, name) in zip(found, PAIRS.values(), strict=True):
        assert {"prompt", "rejected_prompt"} <= set(example)
        assert [image.getpixel((0, 0)) for image in images] == [COLORS[chosen], COLORS[rejected]]
        assert [mask.tolist() for mask in read] == list(MASKS[name])
        assert all(mask.dtype == torch.uint8 for mask in read)


def test_our_own_reading_gives_the_pairs_and_masks_back(dest, run, tmp_path):
    records = list(read_records(dest / "train.json"))
    before = [item for item in iter_pairs(read_stage(run, "masks")) if "mask_path" in item.pair]
    after = list(iter_pairs(records))
    assert [(item.pair_id, item.record["prompt"]) for item in after] == [
        (item.name, item.record["prompt"]) for item in before
    ]
    fields = ("rejected_prompt", "chosen_score", "rejected_score")
    assert [[item.pair[f] for f in fields] for item in after] == [[item.pair[f] for f in fields] for item in before]

    config = load_config([f"masks.official={dest / 'object_mask'}"])
    done = list(masks.run(records, None, config, out=tmp_path / "imported"))
    loaded = [masks.load_unions(record["pairs"][0], tmp_path / "imported").tolist() for record in done]
    assert loaded == [list(map(list, pair)) for pair in MASKS.values()]


def test_a_run_without_masks(run, tmp_path, capsys):
    (run / "masks.jsonl").rename(run / "select.jsonl")
    (run / "config.yaml").write_text("masks: {enabled: false}\n")
    assert main(["export", "--out", str(run), str(tmp_path / "dest")]) == 0
    assert capsys.readouterr().out == f"4 pairs in {tmp_path / 'dest'}\n"
    assert sorted(path.name for path in (tmp_path / "dest").iterdir()) == ["images", "train.json"]


def test_an_image_of_another_format_becomes_a_png(run, tmp_path):
    path = run / "images" / "0000012" / "base_1.png"
    Image.open(path).save(path, format="BMP")
    write_export(load_config([f"out={run}"]), tmp_path / "dest")
    with Image.open(tmp_path / "dest" / "images/base/attribute/0000012/01.png") as image:
        assert (image.format, image.getpixel((0, 0))) == ("PNG", COLORS["base_1"])


def test_images_of_another_folder_that_the_user_names(run, tmp_path, capsys):
    text = (run / "masks.jsonl").read_text()
    (run / "masks.jsonl").write_text(text.replace("images/0000012", f"{tmp_path}/elsewhere"))
    (run / "images" / "0000012").rename(tmp_path / "elsewhere")
    refused(
        capsys, tmp_path, 1, "leads out of the folders that records may name", "export", "--out", run, tmp_path / "d"
    )
    assert main(["export", "--out", str(run), str(tmp_path / "d"), f"read_from=[{tmp_path / 'elsewhere'}]"]) == 0
    assert str(tmp_path) not in (tmp_path / "d" / "train.json").read_text()


def test_what_a_killed_export_left_is_swept(run, tmp_path):
    left = tmp_path / ".dest.0123456789abcdef.tmp"
    left.mkdir()
    write_export(load_config([f"out={run}"]), tmp_path / "dest")
    assert not left.exists()


def test_a_later_iteration_and_an_empty_folder(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    shutil.move(tmp_path / "copy", run / "iter2")
    (tmp_path / "dest").mkdir()
    assert main(["export", "--out", str(run), str(tmp_path / "dest"), "--iteration", "2"]) == 0
    assert (tmp_path / "dest" / "train.json").is_file()


def refused(capsys, tmp_path, code, words, *arguments):
    before = sorted(tmp_path.rglob("*"))
    assert main(list(map(str, arguments))) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.strip().count("\n") == err.count("WARNING")
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_folders(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    out = ("export", "--out", run)
    for code, words, *arguments in (
        (2, "export: got no folder, expected DEST", *out),
        (2, "export: got no folder, expected DEST", *out, ""),
        (2, f"{tmp_path / 'full'}, a folder with files, expected a new or an empty folder", *out, tmp_path / "full"),
        (2, "a file, expected a new or an empty folder", *out, tmp_path / "full" / "file"),
        (2, "a link, expected a new or an empty folder", *out, tmp_path / "link"),
        (1, "Not a directory; choose another folder", *out, tmp_path / "full" / "file" / "dest"),
        (2, f"which is in the run folder {run}; choose a folder outside of it", *out, run / "dest"),
        (2, f"which is in the run folder {run}", *out, run),
        (2, "There is no run folder", "export", "--out", tmp_path / "nowhere", tmp_path / "dest"),
        (2, "There is no masks.jsonl in", "export", "--out", tmp_path / "empty", tmp_path / "dest"),
        (2, "There is no iteration 3", *out, tmp_path / "dest", "--iteration", "3"),
        (2, "--iteration should be 1 or more", *out, tmp_path / "dest", "--iteration", "0"),
        (2, "nearest: images.guidance_scale", *out, tmp_path / "dest", "images.guidence_scale=1"),
    ):
        refused(capsys, tmp_path, code, words, *arguments)


def test_missing_and_damaged_files(run, tmp_path, capsys):
    call = ("export", "--out", run, tmp_path / "dest")
    image, mask = run / "images/0000012/negative_1.png", run / "masks/0000012-1.safetensors"
    kept = image.read_bytes(), mask.read_bytes()
    image.unlink()
    refused(capsys, tmp_path, 1, "1 of 4 pairs failed: 0000012: Cannot read the image", *call)
    refused(capsys, tmp_path, 1, f"`ospo-fast run --out {run}` makes files again that were deleted", *call)
    image.write_bytes(kept[0][:45])
    refused(capsys, tmp_path, 1, "Cannot read the image", *call)
    image.write_bytes(kept[0])
    mask.write_bytes(kept[1][:20])
    refused(capsys, tmp_path, 1, "1 of 4 pairs failed: 0000012-1: Cannot read the masks", *call)
    mask.write_bytes(kept[1])
    records = [json.loads(line) for line in (run / "masks.jsonl").read_text().splitlines()]
    (run / "masks.jsonl").write_text(json.dumps({**records[0], "chosen": "../../secret.png"}) + "\n")
    refused(capsys, tmp_path, 1, "leads out of the folders that records may name", *call)
    (run / "masks.jsonl").write_text(json.dumps({**records[0], "prompt": " "}) + "\n")
    refused(capsys, tmp_path, 1, "2 of 2 pairs failed: 0000012: its item has no `prompt`; add it", *call)
    (run / "masks.jsonl").write_text(json.dumps(records[2]) + "\n")
    refused(capsys, tmp_path, 1, "There is no pair with a mask in", *call)
    (run / "masks.jsonl").write_text(json.dumps(records[3]) + "\n")
    refused(capsys, tmp_path, 1, "There is no pair in", *call)

"""Prompt files of benchmarks, and their folders as the official scorers read them."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from ospo_fast.errors import UsageError
from ospo_fast.evaluation.benchmarks import BENCHMARKS, identify, read_benchmark

GENEVAL = {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}
GENEVAL2 = {"prompt": "a pig", "atom_count": 1, "vqa_list": [["Is it a pig?", "Yes"]], "skills": ["object"]}
CSV = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
)


@pytest.fixture
def files(tmp_path):
    """One prompt file of each benchmark."""
    names = {"geneval": "meta.jsonl", "geneval2": "data.jsonl", "dpg": "prompts", "t2i-compbench": "color.txt"}
    paths = {name: tmp_path / file for name, file in names.items()}
    paths["geneval"].write_text("\n".join(json.dumps({**GENEVAL, "prompt": p}) for p in ("a cow", "two cows")))
    paths["geneval2"].write_text("\n".join(json.dumps({**GENEVAL2, "prompt": p}) for p in ("a pig", "two pigs")))
    paths["dpg"].mkdir()
    (paths["dpg"] / "whoops2.txt").write_text("A long text,\r\n")
    (paths["dpg"] / "10.txt").write_text("Another one.")
    paths["t2i-compbench"].write_bytes(b"a green bench and a blue bowl\r\na red hat.\r\n")
    return paths


def make_images(folder, count):
    """Images of 4 x 4 pixels, whose color is their number."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{n}.png" for n in range(count)]
    for n, path in enumerate(paths):
        Image.new("RGB", (4, 4), (n, 0, 0)).save(path)
    return paths


def number(path):
    return Image.open(path).getpixel((0, 0))[0]


def write(files, name, tmp_path, num):
    entries = read_benchmark(name, files[name])
    paths = make_images(tmp_path / "images", num * len(entries))
    images = [paths[num * i : num * (i + 1)] for i in range(len(entries))]
    folder = tmp_path / "folder"
    folder.mkdir()
    BENCHMARKS[name].write(entries, images, folder, tmp_path / "final")
    return folder


def test_geneval_is_read_as_by_its_scorer(files, tmp_path):
    folder = write(files, "geneval", tmp_path, 3)
    seen = {}
    for sub in folder.iterdir():  # as evaluate_images.py: folders of digits, one JSON object, images of digits
        assert sub.name.isdigit()
        metadata = json.loads((sub / "metadata.jsonl").read_text())
        names = sorted(path.name for path in (sub / "samples").iterdir())
        assert all(re.match(r"\d+\.png", name) for name in names)
        seen[sub.name] = metadata["prompt"], [number(sub / "samples" / name) for name in names]
        assert metadata["tag"] == "single_object"
    assert seen == {"00000": ("a cow", [0, 1, 2]), "00001": ("two cows", [3, 4, 5])}


def test_geneval2_is_read_as_by_its_scorer(files, tmp_path):
    folder = write(files, "geneval2", tmp_path, 1)
    paths = json.loads((folder / "image_paths.json").read_text())
    final = (tmp_path / "final").resolve()
    assert paths == {"a pig": str(final / "00000.png"), "two pigs": str(final / "00001.png")}
    assert [number(folder / f"0000{n}.png") for n in range(2)] == [0, 1]


def test_dpg_grids_are_read_as_by_its_scorer(files, tmp_path):
    folder = write(files, "dpg", tmp_path, 4)
    assert sorted(path.name for path in folder.iterdir()) == ["10.png", "whoops2.png"]  # nothing but images
    for stem, first in (("10", 0), ("whoops2", 4)):  # the files in the order of their names
        grid = Image.open(folder / f"{stem}.png")
        assert grid.size == (8, 8)
        crops = [grid.crop(box) for box in ((0, 0, 4, 4), (4, 0, 8, 4), (0, 4, 4, 8), (4, 4, 8, 8))]
        assert [np.unique(np.asarray(crop)[..., 0]).tolist() for crop in crops] == [[first + n] for n in range(4)]


def test_one_image_of_dpg_is_no_grid(files, tmp_path):
    folder = write(files, "dpg", tmp_path, 1)
    assert {path.name: (Image.open(path).size, number(path)) for path in folder.iterdir()} == {
        "10.png": ((4, 4), 0), "whoops2.png": ((4, 4), 1),
    }  # fmt: skip


def test_t2i_compbench_is_read_as_by_its_scorers(files, tmp_path):
    folder = write(files, "t2i-compbench", tmp_path, 2) / "samples"
    names = sorted((path.name for path in folder.iterdir()), key=lambda x: int(x.split("_")[-1].split(".")[0]))
    assert names == [
        "a green bench and a blue bowl_000000.png", "a green bench and a blue bowl_000001.png",
        "a red hat._000002.png", "a red hat._000003.png",
    ]  # fmt: skip
    assert [name.split("_")[0] for name in names[1:3]] == ["a green bench and a blue bowl", "a red hat."]
    assert [number(folder / name) for name in names] == [0, 1, 2, 3]


def test_the_csv_of_dpg_has_a_line_for_each_question(tmp_path):
    path = tmp_path / "dpg_bench.csv"
    path.write_text(
        f'{CSV}whoops1,"Red, and\nblue.",k,1,0,e,e,t,q\nwhoops1,"Red, and\nblue.",k,2,0,e,e,t,q\n7,x,k,1,0,e,e,t,q\n'
    )
    assert [(entry.name, entry.prompt) for entry in read_benchmark("dpg", path)] == [
        ("whoops1", "Red, and\nblue."), ("7", "x"),
    ]  # fmt: skip
    path.write_text('"item_id","text","a, b"\n"7","x",""\n')
    assert [(entry.name, entry.prompt) for entry in read_benchmark("dpg", path)] == [("7", "x")]
    path.write_text(f"{CSV}a,x,k,1,0,e,e,t,q\na,y,k,2,0,e,e,t,q\n")
    with pytest.raises(UsageError, match="item_id 'a' has another text than in row 2; download it again"):
        read_benchmark("dpg", path)


def test_a_file_system_with_one_name_for_a_file(files, tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    folder = write(files, "geneval2", tmp_path, 1)
    assert number(folder / "00001.png") == 1


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("other", BENCHMARKS)
def test_a_file_of_another_benchmark_is_refused(files, name, other):
    if name == other:
        assert len(read_benchmark(name, files[name])) == 2
        return
    with pytest.raises(UsageError) as caught:
        read_benchmark(name, files[other])
    text = str(caught.value)
    assert f"seems to be of {BENCHMARKS[other].title}" in text  # what it is
    assert f"expected the file of {BENCHMARKS[name].title}: {BENCHMARKS[name].file}" in text  # what it should be
    assert f"github.com/{'facebookresearch/GenEval2' if name == 'geneval2' else ''}" in text  # where to get it
    assert f"or name --benchmark {other}." in text


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        ('{"images": [], "annotations": []}', "is of no known benchmark: JSON objects with images, annotations"),
        ("id,question\n1,2\n", "is of no known benchmark: CSV with the columns id,question"),
        ("", "cannot read .*: it has 0 bytes"),
        ("\udcff", "cannot read .*: .*codec can't decode"),
        ("x" * 200_000, "is of no known benchmark: CSV with the columns xxx"),
        (" item_id ,text\n", "is of no known benchmark: CSV with the columns item_id ,text"),
        ('{"prompt": "x"}', "is of no known benchmark: JSON objects with prompt;"),
    ],
)
def test_an_unknown_file_is_refused(tmp_path, content, holds):
    path = tmp_path / "file.csv"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=holds):
        read_benchmark("geneval", path)


def test_unknown_folders_are_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"is of no known benchmark: a folder with no .txt file; expected the file of DPG"
    ):
        read_benchmark("dpg", tmp_path)
    (tmp_path / "color.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match="a folder of text files with several prompts each"):
        read_benchmark("dpg", tmp_path)
    assert identify(tmp_path)[0] is None
    with pytest.raises(UsageError, match=r"--prompts: cannot read .*none.jsonl: No such file"):
        read_benchmark("geneval", tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("geneval", "a.jsonl", json.dumps(GENEVAL) + '\n{"prompt": "x"}', "a.jsonl:2: tag, include is missing"),
        ("geneval", "a.jsonl", json.dumps({**GENEVAL, "prompt": ""}), "a.jsonl:1: prompt: it is empty"),
        ("geneval", "a.jsonl", json.dumps(GENEVAL) + "\n{", "a.jsonl:2: it is no JSON"),
        ("geneval2", "a.jsonl", "\n".join([json.dumps(GENEVAL2)] * 2), "a.jsonl:2: prompt: it is that of line 1"),
        ("geneval2", "a.jsonl", json.dumps({**GENEVAL2, "prompt": 3}), "prompt: got int, expected a text"),
        ("dpg", "a.csv", f"{CSV}a.b,x,k,1,0,e,e,t,q\n", "a.csv:2: item_id: got 'a.b', expected a file name without"),
        ("dpg", "a.csv", f"{CSV}../a,x,k,1,0,e,e,t,q\n", "item_id: got '../a'"),
        ("dpg", "a.csv", f"{CSV}{'a' * 252},x,k,1,0,e,e,t,q\n", "item_id: got 'aaaa"),
        ("dpg", "a.csv", f"{CSV}a\n", "a.csv:2: prompt: got NoneType"),
        ("dpg", "a.csv", CSV, "holds no prompt"),
        ("t2i-compbench", "a.txt", "a_b\n", "a.txt:1: prompt: 'a_b' holds '_', and the scorers read the prompt from"),
        ("t2i-compbench", "a.txt", "ok\na/b\n", "a.txt:2: prompt: 'a/b' holds '/'"),
        ("t2i-compbench", "a.txt", "é" * 123, "is too long for a file name"),
    ],
)  # fmt: skip
def test_prompts_that_a_scorer_cannot_use_are_refused(tmp_path, name, file, content, words):
    (tmp_path / file).write_text(content)
    with pytest.raises(UsageError, match=re.escape(words)):
        read_benchmark(name, tmp_path / file)

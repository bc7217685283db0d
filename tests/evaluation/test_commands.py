"""`ospo-fast evaluate` with --benchmark and with --questions."""

import json
import re
import shutil

import pytest
from PIL import Image

from ospo_fast.cli import main
from ospo_fast.evaluation.questions import soft_tifa
from ospo_fast.generation import ImageGenerator

pytestmark = pytest.mark.usefixtures("omegaconf")

PROMPTS = ["a red circle", "two red circles", "a blue square"]
TWICE = [*PROMPTS, PROMPTS[0]]
SAMPLE = "samples/00000.png"
ROWS = [
    {"prompt": PROMPTS[0], "questions": ["is there a red circle?", "is there a blue square?"], "answers": ["yes", "no"],
     "skills": ["object", "count"], "category": "one"},
    {"prompt": PROMPTS[1], "questions": ["are there two red circles?"], "skills": ["count"], "category": "two"},
    {"prompt": PROMPTS[2], "questions": ["is there a blue square?"], "skills": ["object"], "category": "one"},
]  # fmt: skip


def call(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def files(tmp_path, monkeypatch, tiny):
    """A folder with prompt and question files of the Shapes world, which is the current one."""
    geneval = [{"tag": "single_object", "include": [], "prompt": prompt} for prompt in PROMPTS]
    asked = {"atom_count": 1, "vqa_list": [["is there a star?", "Yes"]], "skills": ["object"]}
    geneval2 = [{"prompt": prompt, **asked} for prompt in PROMPTS]
    for name, rows in (("geneval", geneval), ("geneval2", geneval2), ("questions", ROWS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "color.txt").write_text("\n".join(TWICE))
    (tmp_path / "dpg").mkdir()
    for n, prompt in enumerate(PROMPTS):
        (tmp_path / "dpg" / f"{n}.txt").write_text(prompt)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def generated(monkeypatch):
    """The numbers of images that calls of the generator made."""
    made = []
    original = ImageGenerator.generate

    def generate(self, prompts, **settings):
        made.append(len(prompts))
        return original(self, prompts, **settings)

    monkeypatch.setattr(ImageGenerator, "generate", generate)
    return made


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "file", "num", "expected"),
    [
        ("geneval", "geneval.jsonl", 1, [f"0000{i}/{f}" for i in range(3) for f in ("metadata.jsonl", SAMPLE)]),
        ("geneval2", "geneval2.jsonl", None, ["00000.png", "00001.png", "00002.png", "image_paths.json"]),
        ("dpg", "dpg", None, ["0.png", "1.png", "2.png"]),
        ("t2i-compbench", "color.txt", 1, sorted(f"samples/{p}_00000{n}.png" for n, p in enumerate(TWICE))),
    ],
)  # fmt: skip
def test_a_benchmark_is_generated_for_its_scorer(capsys, files, tiny, name, file, num, expected):
    arguments = ["evaluate", "--benchmark", name, "--prompts", file, "--model", tiny, "--out", "out"]
    code, out, _ = call(capsys, *arguments, *([] if num is None else ["--num", num]))
    assert code == 0
    assert f"images in out/{name}, for the scorer" in out
    assert tree(files / "out" / name) == expected
    manifest = json.loads((files / "out" / "benchmark.json").read_text())
    assert all((files / "out" / entry["path"]).is_file() for entry in manifest["images"])
    if name == "geneval2":
        paths = json.loads((files / "out" / name / "image_paths.json").read_text())
        assert {prompt: Image.open(path).size for prompt, path in paths.items()} == dict.fromkeys(PROMPTS, (48, 48))
    if name == "t2i-compbench":  # a prompt that comes again has another image
        samples = files / "out" / name / "samples"
        first, again = (samples / f"{PROMPTS[0]}_00000{n}.png" for n in (0, 3))
        assert first.read_bytes() != again.read_bytes()


def test_a_benchmark_is_continued(capsys, files, tiny, generated, scripted):
    arguments = ["evaluate", "--benchmark", "geneval", "--prompts", "geneval.jsonl", "--out", "out", "--num", "2"]
    model = shutil.copytree(tiny, files / "model")
    arguments += ["--model", model]
    assert call(capsys, *arguments)[0] == 0
    before = {path: (files / "out" / path).read_bytes() for path in tree(files / "out")}
    (files / "out" / "generated" / "00001_0.npz").unlink()
    shutil.rmtree(files / "out" / "geneval" / "00001")
    for more in ([], [], ["images.temperature=0.5"], ["--seed", "1"]):
        assert call(capsys, *arguments, *more)[0] == 0
        if not more:
            after = {path: (files / "out" / path).read_bytes() for path in tree(files / "out")}
            assert after.keys() == before.keys()
            assert all(after[path] == before[path] for path in before if not path.endswith(".npz"))
    assert generated == [6, 1, 0, 6, 6]
    assert call(capsys, *arguments)[0] == 0
    scripted.save_tiny(model, seed=1)  # other weights under the same name
    assert call(capsys, *arguments)[0] == 0
    assert generated[5:] == [6, 6]
    code, _, err = call(capsys, *arguments[:2], "geneval2", "--prompts", "geneval2.jsonl", "--out", "out")
    assert code == 2
    assert "out holds the images of another prompt file (geneval); choose another folder with --out." in err


def test_a_benchmark_without_all_its_images_has_no_folder(capsys, files, tiny, scripted, monkeypatch):
    scripted.fail_image(monkeypatch.setattr, 1)
    arguments = ["evaluate", "--benchmark", "dpg", "--prompts", "dpg", "--model", tiny, "--out", "out", "--num", 1]
    code, _, err = call(capsys, *arguments)
    assert code == 1
    assert "1 of 3 images failed: 00001_0.png: " in err
    assert not (files / "out" / "dpg").exists()


def test_questions_about_own_images(capsys, caplog, files, tiny, generated):
    arguments = ["evaluate", "--questions", "questions.jsonl", "--judge", "self", "--model", tiny, "--num", 2]
    code, out, err = call(capsys, *arguments, "--out", "one")
    assert (code, err) == (0, "")
    result = json.loads((files / "one" / "evaluate.json").read_text())
    assert out.startswith(f"Soft-TIFA AM: {result['soft_tifa_am']['mean']:.3f} [")
    rows = [json.loads(line) for line in (files / "one" / "scores.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [row["questions"] for row in rows[::2]] == [row["questions"] for row in ROWS]
    for row in rows:
        assert (row["soft_tifa_am"], row["soft_tifa_gm"]) == soft_tifa(row["probabilities"])
    mean = sum(row["soft_tifa_gm"] for row in rows) / 6
    assert result["soft_tifa_gm"]["mean"] == pytest.approx(mean)
    counts = [row["probabilities"][row["skills"].index("count")] for row in rows if "count" in row["skills"]]
    assert result["skills"]["count"]["soft_tifa_am"]["mean"] == pytest.approx(sum(counts) / 4)
    assert result["categories"].keys() == {"one", "two"}
    # Paired differences to another model, and the same images from a folder.
    arguments[arguments.index(tiny)] = shutil.copytree(tiny, files / "model")
    code, out, _ = call(capsys, *arguments, "--seed", 1, "--out", "two", "--baseline", "one")
    assert code == 0
    assert "Each model has judged its own images" in caplog.text
    assert "to the baseline" in out
    second = json.loads((files / "two" / "evaluate.json").read_text())
    change = second["soft_tifa_am"]["mean"] - result["soft_tifa_am"]["mean"]
    assert second["soft_tifa_am"]["difference"] == pytest.approx(change)
    low, high = second["soft_tifa_am"]["difference_interval"]
    assert low <= change <= high
    assert generated == [6, 6]
    assert second["baseline_differs_in"] == []
    assert "other settings" not in caplog.text
    caplog.clear()
    code, _, _ = call(capsys, *arguments[:-2], "--images", "one", "--out", "three")
    assert code == 0
    assert f"{files / 'model'} judges images that {tiny} generated; name that one with --model" in caplog.text
    assert json.loads((files / "three" / "evaluate.json").read_text())["model"] == str(tiny)
    assert json.loads((files / "three" / "evaluate.json").read_text())["skills"] == result["skills"]
    assert generated == [6, 6]


def test_images_of_other_settings_than_those_of_the_baseline_are_named(capsys, caplog, files, tiny):
    arguments = ["evaluate", "--questions", "questions.jsonl", "--judge", "self", "--model", tiny]
    assert call(capsys, *arguments, "images.guidance_scale=5", "--out", "one")[0] == 0
    for given, more in (([], ["images.guidance_scale=2"]), (["--images", "two"], [])):  # generated, and from a folder
        out = "three" if given else "two"
        caplog.clear()
        assert call(capsys, *arguments, *more, *given, "--out", out, "--baseline", "one")[0] == 0
        assert "generated with other settings (guidance_scale 5.0 and 2.0): differences mix both" in caplog.text
        assert json.loads((files / out / "evaluate.json").read_text())["baseline_differs_in"] == ["guidance_scale"]


def test_questions_about_images_of_generate_and_of_geneval2(capsys, files, tiny, judge_folder):
    (files / "prompts.txt").write_text("\n".join(PROMPTS))
    assert call(capsys, "generate", "--prompts", "prompts.txt", "--model", tiny, "--out", "made", "--num", 1)[0] == 0
    arguments = ["evaluate", "--questions", "questions.jsonl", "--judge", judge_folder]
    assert call(capsys, *arguments, "--images", "made", "--out", "one")[0] == 0
    (files / "own").mkdir()
    paths = {}
    for n, prompt in enumerate(PROMPTS):
        shutil.copy(files / "made" / f"000{n}_0.png", files / "own" / f"{n}.png")
        paths[prompt] = f"{n}.png" if n else str(files / "own" / f"{n}.png")
    (files / "own" / "image_paths.json").write_text(json.dumps(paths))
    assert call(capsys, *arguments, "--images", "own", "--out", "two", "--baseline", "one")[0] == 0
    one, two = (json.loads((files / name / "evaluate.json").read_text()) for name in ("one", "two"))
    assert two["soft_tifa_am"]["mean"] == one["soft_tifa_am"]["mean"]
    assert two["soft_tifa_am"]["difference_interval"] == [0, 0]
    assert one["judge"] == {"name": str(judge_folder), "model": str(judge_folder)}
    assert call(capsys, *arguments, "--model", tiny, "--out", "three")[0] == 0  # generates the images


def test_images_that_are_refused(capsys, files, tiny):
    arguments = ["evaluate", "--questions", "questions.jsonl", "--judge", "self", "--model", tiny, "--out", "out"]
    arguments += ["--images", "own"]

    def refused(words, expected=2):
        code, _, err = call(capsys, *arguments)
        assert words in err
        assert code == expected
        assert not (files / "out").exists()

    own = files / "own"
    own.mkdir()
    refused("own has none of benchmark.json, sheet.json, image_paths.json, which name the prompt of each image")
    (own / "benchmark.json").write_text(json.dumps({"benchmark": "geneval"}))
    refused("benchmark.json lists no images; repeat the command that generates them")
    (own / "benchmark.json").write_text("[]")
    refused("Cannot read own/benchmark.json: it holds no JSON object", 1)
    (own / "benchmark.json").unlink()
    for n in range(3):
        Image.new("RGB", (48, 48)).save(own / f"{n}.png")
    paths = {prompt: f"{n}.png" for n, prompt in enumerate(PROMPTS)}
    (own / "image_paths.json").write_text(json.dumps(dict(list(paths.items())[:2])))
    refused("own has no image of 1 of 3 prompts, first 'a blue square'; generate them")
    (own / "image_paths.json").write_text(json.dumps({**paths, PROMPTS[0]: "../secret.png"}))
    refused("leads out of the folders that records may name", 1)
    (own / "image_paths.json").write_text(json.dumps({**paths, PROMPTS[0]: "none.png"}))
    refused("Cannot read the image own/none.png: No such file", 1)
    (own / "image_paths.json").write_text(json.dumps(paths))
    (own / "1.png").write_bytes(b"no image")
    refused("Cannot read the image own/1.png: it is none of PNG, JPEG, WEBP, BMP", 1)
    Image.new("RGB", (96, 96)).save(own / "1.png")
    refused(f"own/1.png has 96 x 96 pixels, expected 48 x 48 as those of {tiny}: it is of another model, or a grid", 1)


def test_baselines_that_are_refused(capsys, files, tiny, judge_folder):
    arguments = ["evaluate", "--questions", "questions.jsonl", "--model", tiny, "--judge"]
    assert call(capsys, *arguments, "self", "--out", "one")[0] == 0

    def refused(words, *more, judge="self", code=2):
        found, _, err = call(capsys, *arguments, judge, "--out", "out", "--baseline", "one", *more)
        assert words in err
        assert found == code
        assert not (files / "out").exists()

    refused("one was scored by the judge self, not by", judge=judge_folder)
    (files / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    refused("one has the scores of other questions (questions.jsonl)")
    (files / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    scores = (files / "one" / "scores.jsonl").read_text()
    for broken in (
        scores[:100],
        re.sub(r"(\"probabilities\": \[)[\d.e-]+, ", r"\1", scores),  # one fewer than questions
        scores.split("\n", 1)[1],
        scores.replace('"probabilities": [', '"probabilities": ["x", '),
    ):
        (files / "one" / "scores.jsonl").write_text(broken)
        refused("scores.jsonl: ", code=1)
    (files / "one" / "scores.jsonl").unlink()
    refused("one has no scores.jsonl; give the --out of another `ospo-fast evaluate --questions`")


@pytest.mark.parametrize("name", ["nonexistent", "no/such/judge", "questions.jsonl"])
def test_a_judge_that_does_not_exist_is_named(capsys, files, tiny, generated, name):
    code, _, err = call(capsys, "evaluate", "--questions", "questions.jsonl", "--model", tiny, "--judge", name)
    assert (code, err.startswith("ospo-fast: --judge: "), name in err) == (1, True, True)


def test_a_judge_that_cannot_answer_is_refused_before_an_image_is_generated(capsys, files, tiny, generated, text_model):
    arguments = ["evaluate", "--questions", "questions.jsonl", "--model", tiny, "--out", "out"]
    code, _, err = call(capsys, *arguments, "--judge", text_model)
    assert code == 1
    assert "is a 'llama' model without an image input" in err
    (files / "questions.jsonl").write_text(json.dumps({**ROWS[1], "answers": ["nine"]}))
    code, _, err = call(capsys, *arguments, "--judge", "self")
    assert code == 2
    assert "questions.jsonl:1: questions: 'are there two red circles? Answer in one word.' holds words" in err
    assert generated == []
    assert not (files / "out").exists()


def test_two_evaluations_do_not_mix(capsys, files, tiny):
    from ospo_fast.records import only_writer

    with only_writer(files / "out" / "benchmark.json"):
        arguments = ["--benchmark", "geneval", "--prompts", "geneval.jsonl", "--model", tiny, "--out", "out"]
        code, _, err = call(capsys, "evaluate", *arguments)
    assert code == 1
    assert "benchmark.json is being written by another process" in err
    assert not list((files / "out").rglob("*.png"))

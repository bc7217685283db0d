"""The shipped checkpoint, and a small demo."""

import dataclasses
import functools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from ospo_fast.cli import main
from ospo_fast.config import Config, load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import load_model
from ospo_fast.models.base import UnifiedModel
from ospo_fast.pipeline import Pipeline, read_stage, stage_metrics
from ospo_fast.records import SIDES, Pair, Record, iter_pairs
from ospo_fast.shapes import commands, demo, evaluate
from ospo_fast.shapes.render import render
from ospo_fast.shapes.scenes import SHAPES, SIZES, Object, Scene, held_out_prompts, parse
from ospo_fast.stages import STAGE_NAMES

pytestmark = pytest.mark.usefixtures("omegaconf")

FOLDER = Path(demo.__file__).parent / "checkpoint"
SMALL = [
    "prompts.counts={color1: 2, shape1: 2, color2: 4, 2D_spatial: 3, numeracy1: 2, numeracy2: 3}",
    "train.steps=2",
    "train.eval_every=2",
    "train.batch_size=4",
    "evaluate.per_kind=3",
    "evaluate.watch_per_kind=3",
    "evaluate.seeds=[0]",
    "evaluate.guidance_scales=[1.5, 3]",
]


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    return load_model("shapes")


def test_checkpoint_is_small_and_documents_its_training() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16 * 2**20
    made = json.loads((FOLDER / "pretraining.json").read_text())
    assert made["recipe"]["seed"] == 0
    assert {"codes", "answering", "torch"} <= set(made)


def test_checkpoint_answers_questions_about_rendered_images(model: UnifiedModel) -> None:
    answered = evaluate.evaluate_answers(model, count=120, progress=False)
    for kind in evaluate.QUESTION_KINDS:
        assert answered[kind] >= 0.95, kind


def test_checkpoint_generates_unseen_prompts_less_reliably(model: UnifiedModel) -> None:
    """The gap between answering and generating is what self-improvement needs."""
    result = evaluate.evaluate_alignment(model, split="validation", per_kind=40, guidance_scale=1.5, progress=False)
    assert 0.35 < result.headline()["alignment"] < 0.7
    assert not set(result.prompts) - set(held_out_prompts())
    assert evaluate.evaluate_own_answers(model, result, progress=False)["all"] >= 0.93


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    config = load_config([*SMALL, f"out={out}"], family="shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate_answers", functools.partial(evaluate.evaluate_answers, count=40))
        demo.run(config, progress=False)
    return out


def test_summary(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    for name in ("alignment_before", "alignment_after", "vqa_accuracy", "pair_purity", "mask_iou"):
        assert 0 <= summary[name] <= 1, name
    assert summary["alignment_std"] >= 0
    pairs = list(iter_pairs(read_stage(run_folder, "select")))
    assert summary["pairs"] == len(pairs) > len({item.record["item_id"] for item in pairs})
    assert summary["seconds"] > 0
    assert set(summary["stages"]) == set(STAGE_NAMES)
    for metrics in summary["stages"].values():
        assert metrics["items"] > 0
        assert metrics["peak_mb"] > 0
    assert summary["versions"]["torch"] == torch.__version__
    assert (summary["seeds"]["training"], summary["seeds"]["sampling"]) == ([42], [0])
    assert "evaluate.seeds" in summary["seeds"]["note"]
    (only,) = summary["iterations"]
    for name in ("pairs", "pair_purity", "chosen_right", "mask_iou", "mask_iou_std", "stages"):
        assert only[name] == summary[name]


def test_every_iteration_is_reported(run_folder: Path, tmp_path: Path) -> None:
    """The second iteration has one item and one mask less. Metrics at the top level are its own or sums."""
    out = Path(shutil.copytree(run_folder, tmp_path / "run"))
    second = Path(shutil.copytree(run_folder, out / "iter2"))
    settings = json.loads((second / "settings.json").read_text())
    for row in settings.values():
        row["settings"] |= {"seed": 43, "model": "./train/model"}
    (second / "settings.json").write_text(json.dumps(settings))
    for store, field, value in (("select", "kept", False), ("masks", "mask_path", None)):
        lines = [json.loads(line) for line in (second / f"{store}.jsonl").read_text().splitlines()]
        next(line for line in lines if line.get(field))[field] = value
        (second / f"{store}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    demo.run(load_config([*SMALL, f"out={out}", "iterations=2"], family="shapes"), progress=False)
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (run_folder, out))
    assert [row["iteration"] for row in after["iterations"]] == [1, 2]
    for name in ("pairs", "pair_purity", "chosen_right", "mask_iou", "mask_iou_std", "stages"):
        assert after["iterations"][0][name] == before[name]
    for name, value in demo.stage_outcome(second, masks=True).items():
        assert after["iterations"][1][name] == after[name] == value
    assert after["pairs"] < before["pairs"]
    assert after["iterations"][1]["stages"] == stage_metrics(second)
    for name, row in after["stages"].items():
        assert row["items"] == 2 * before["stages"][name]["items"]


def test_evaluation_does_not_depend_on_the_seed_of_the_run(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "run", lambda *_: pytest.fail("far enough"))
    answers = dict.fromkeys(["all", *evaluate.QUESTION_KINDS], 1.0)
    for name in ("evaluate_answers", "evaluate_own_answers"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: answers)
    config = load_config([*SMALL, f"out={tmp_path}", "seed=7"], family="shapes")
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        demo.run(config, progress=False)
    paths = sorted((tmp_path / "evaluation").glob("base_*.npz"))
    assert paths
    for path in paths:
        with np.load(path) as one, np.load(run_folder / "evaluation" / path.name) as other:
            assert np.array_equal(one["images"], other["images"])


def test_demo_and_train_validate_on_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both use 200 prompts of each headline kind, or all that there are, of the validation split."""
    seen: list[dict[str, Any]] = []
    model: Any = None  # results are made up

    def evaluate_alignment(model: object, **settings: Any) -> evaluate.AlignmentResult:
        seen.append(settings)
        return evaluate.AlignmentResult(
            settings["split"], 1.0, (0,), evaluate.HEADLINE, ("a",) * 3, (), np.ones((3, 1), bool)
        )

    monkeypatch.setattr(evaluate, "evaluate_alignment", evaluate_alignment)
    config = load_config(["evaluate.watch_per_kind=7", "evaluate.seeds=[3]"], family="shapes")
    for settings in (config, load_config(family="shapes")):
        validation = commands.build_evaluation(settings)
        assert validation is not None
        validation(model, 0)
        evaluate.build_validation(settings.evaluate, settings.images.guidance_scale)(model, 0)
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert (seen[0]["per_kind"], seen[0]["seeds"]) == (7, [3])
    assert (seen[2]["per_kind"], seen[2]["split"]) == (200, "validation")
    for kind in evaluate.HEADLINE:
        assert len(evaluate.select_prompts("validation", 200, [kind])) >= 24


def test_no_stage_uses_a_held_out_prompt(run_folder: Path) -> None:
    generated = []
    for path in (run_folder / "images").rglob("*.npz"):
        with np.load(path) as file:
            generated.append(str(file["prompt"]))
    assert len(generated) > 20
    pairs = list(iter_pairs(read_stage(run_folder, "select")))
    trained = [prompt for item in pairs for prompt in (item.record["prompt"], item.pair["rejected_prompt"])]
    for text in generated + trained:
        description = parse(text)
        assert description is None or description.split == "train", text


def test_report_is_one_page(run_folder: Path) -> None:
    class Links(HTMLParser):
        found: ClassVar[list[str]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value for name, value in attrs if name in ("src", "href") and value]

    parser = Links()
    parser.feed((run_folder / "report" / "index.html").read_text(encoding="utf-8"))
    assert all(link.startswith(("data:", "#")) for link in parser.found)
    lines = (run_folder / "evaluation" / "gallery.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["prompt"] for line in lines}) > 6


def test_second_run_evaluates_nothing_again(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((run_folder / "summary.json").read_text())
    monkeypatch.setattr(evaluate, "evaluate_alignment", lambda *_, **__: pytest.fail("evaluated again"))
    config = load_config([*SMALL, f"out={run_folder}"], family="shapes")
    after = demo.run(config, progress=False)
    for name in ("alignment_before", "alignment_after", "pairs", "pair_purity", "mask_iou"):
        assert after[name] == before[name]


def test_demo_follows_the_settings_of_the_evaluation(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed settings do not reuse kept evaluations. Both models are also evaluated at guidance 1."""
    seen: list[tuple[str, float, int]] = []
    measure = evaluate.evaluate_alignment

    def evaluate_alignment(model: UnifiedModel, **settings: Any) -> evaluate.AlignmentResult:
        seen.append((settings.get("split", "test"), settings["guidance_scale"], settings["batch_size"]))
        return measure(model, **settings)

    def settings(*changes: str) -> Config:
        return load_config([*SMALL, f"out={tmp_path / 'run'}", *changes], family="shapes")

    shutil.copytree(run_folder, tmp_path / "run")
    monkeypatch.setattr(evaluate, "evaluate_alignment", evaluate_alignment)
    answers = dict.fromkeys(["all", *evaluate.QUESTION_KINDS], 1.0)
    for name in ("evaluate_answers", "evaluate_own_answers"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: answers)
    monkeypatch.setattr(Pipeline, "run", lambda *_: pytest.fail("far enough"))
    before = json.loads((run_folder / "summary.json").read_text())["evaluation"]["guidance_scale"]
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        demo.run(settings(f"evaluate.guidance_scales=[{before}]", "evaluate.batch_size=5"), progress=False)
    assert seen == [("validation", before, 5), *(("test", scale, 5) for scale in sorted({1.0, before}))]
    with pytest.raises(UsageError, match=f"got scales of which 4 is best .* expected scales of which {before:g} is"):
        demo.run(settings("evaluate.guidance_scales=[4]"), progress=False)


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def visible(folder: Path) -> dict[str, bytes]:
    """All files of a run folder, without those that start over."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in paths.items() if not name.parts[0].startswith(".")}


AT: dict[str, Any] = {
    "evaluation": (evaluate, "evaluate_answers"),
    "stages": (Pipeline, "run"),
    "first stage": (Pipeline, "_begin"),
}


@pytest.mark.parametrize("at", AT)
def test_interrupted_restart_keeps_the_old_results(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The same call without `resume=False` continues it. Its evaluations, of other settings, are not made twice."""
    out = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (out / "evaluation" / "x.d").mkdir()
    before = visible(out)

    def config() -> Config:
        return load_config([*SMALL, f"out={out}", "evaluate.per_kind=2", "evaluate.guidance_scales=[4]"])

    with monkeypatch.context() as patch:
        patch.setattr(*AT[at], stop)
        with pytest.raises(KeyboardInterrupt):
            demo.run(config(), resume=False, progress=False)
    assert visible(out) == before
    seen: list[int] = []
    monkeypatch.setattr(Pipeline, "run", stop)
    monkeypatch.setattr(evaluate, "evaluate_alignment", lambda *_, **__: seen.append(1))
    with pytest.raises(KeyboardInterrupt):
        demo.run(config(), progress=False)
    assert seen == []
    assert visible(out) == before
    same = config()
    same.prompts.exclude = str(out / "held_out.txt")
    assert Pipeline(same, progress=False).continues(out / ".restart")  # and not the old run, of other settings


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_restart_that_was_killed_before_its_evaluations(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: bool
) -> None:
    out = Path(shutil.copytree(run_folder, tmp_path / "run"))
    if not evaluated:
        shutil.rmtree(out / "evaluation")
    before, folders = visible(out), []

    def guidance(self: Any, *_: Any) -> None:
        folders.append(self.folder.name)
        raise KeyboardInterrupt

    for resume, name, method in ((False, "__init__", stop), (True, "guidance", guidance), (True, "guidance", guidance)):
        with monkeypatch.context() as patch:
            patch.setattr(demo._Evaluations, name, method)
            with pytest.raises(KeyboardInterrupt):
                demo.run(load_config([*SMALL, f"out={out}"], family="shapes"), resume=resume, progress=False)
    assert folders == [".restart.evaluation"] * 2  # and not the results of the run that is replaced
    assert visible(out) == before


def test_two_demos_in_one_folder(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would delete the evaluations of the other. What a kill left next to replaced ones goes with the next."""
    out = Path(shutil.copytree(run_folder, tmp_path / "run"))
    before = visible(out)
    (out / "evaluation" / "config.yaml").touch()
    config = load_config([*SMALL, f"out={out}"], family="shapes")

    def second(*_: Any, **__: Any) -> None:
        for resume in (True, False):
            with pytest.raises(OspoError, match="run is in use by another process"):
                demo.run(load_config([*SMALL, f"out={out}"], family="shapes"), resume=resume, progress=False)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "run", second)
    with pytest.raises(KeyboardInterrupt):
        demo.run(config, progress=False)
    assert visible(out) == before


def test_whole_restart_replaces_the_evaluations(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (out / "evaluation" / "old.npz").write_bytes(b"")
    (out / "evaluation" / "seconds.json").write_text('"x"')  # nothing of what goes is read
    monkeypatch.setattr(Pipeline, "run", lambda *_: [])  # its own restart is tested elsewhere
    demo.run(load_config([*SMALL, f"out={out}", "evaluate.per_kind=2"], family="shapes"), resume=False, progress=False)
    names = {path.name for path in (out / "evaluation").iterdir()}
    assert {"gallery.jsonl", "images", "seconds.json"} <= names
    assert not {"old.npz", "config.yaml"} & names
    assert not (out / ".restart.evaluation").exists()
    for line in (out / "evaluation" / "gallery.jsonl").read_text().splitlines():
        assert (out / json.loads(line)["after"]["path"]).is_file()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("base_guidance-*.json", "{", "Cannot read"),
        ("base_guidance-*.json", "[5]", "expected the best guidance scale"),
        ("tuned_guidance-*.json", '[5, {"4.0": {"alignment": 1}}]', "expected the best guidance scale"),
        ("vqa_rendered-*.json", '{"a": 1}', "expected the accuracy of all answers"),
        ("vqa_own-*.json", '{"all": "x"}', "expected the accuracy of all answers"),
        ("seconds.json", '"x"', "got 'x', expected a number of seconds"),
        ("seconds.json", "NaN", "expected a number of seconds"),
    ],
)
def test_broken_evaluations_are_named_before_the_work(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, words: str
) -> None:
    out = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (path,) = (out / "evaluation").glob(name)
    path.write_text(content)
    monkeypatch.setattr(demo._Evaluations, "guidance", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(OspoError, match=f"{path}.*delete the file") as caught:
        demo.run(load_config([*SMALL, f"out={out}"], family="shapes"), progress=False)
    assert words in str(caught.value)


def test_evaluations_of_others_are_refused(run_folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(run_folder, tmp_path / "run"))
    path = next((out / "evaluation").glob("base_*.npz"))
    saved = evaluate.AlignmentResult.load(path)
    for changed in ({"seeds": (3,)}, {"kinds": ("other",) * len(saved.kinds)}):
        dataclasses.replace(saved, **changed).save(path)
        with pytest.raises(OspoError, match=f"{path} holds an evaluation of other prompts, seeds or guidance"):
            demo.run(load_config([*SMALL, f"out={out}"], family="shapes"), progress=False)
    shutil.move(out / "evaluation", tmp_path / "elsewhere")
    (out / "evaluation").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OspoError, match="symbolic link"):
        demo.run(load_config([*SMALL, f"out={out}"], family="shapes"), resume=False, progress=False)


def test_a_refused_demo_leaves_no_list_of_prompts(run_folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (out / "held_out.txt").unlink()
    before = visible(out)
    with pytest.raises(UsageError, match="was made with seed="):
        demo.run(load_config([*SMALL, f"out={out}", "seed=77"], family="shapes"), progress=False)
    assert visible(out) == before


def test_demo_refuses_another_split(tmp_path: Path) -> None:
    config = load_config([f"out={tmp_path / 'run'}", "evaluate.split=validation"], family="shapes")
    with pytest.raises(UsageError, match=r"evaluate\.split: got 'validation', expected 'test'.* delete the setting"):
        demo.run(config, progress=False)
    assert not list(tmp_path.iterdir())


def test_masks_are_measured_against_the_objects(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    render(Scene((Object("red", "square", "large", (0, 0)),), "white")).save(tmp_path / "a.png")
    union = np.zeros((6, 6), np.uint8)
    union[:2, :2] = 1
    save_file({"chosen_union": union, "rejected_union": union}, tmp_path / "right.safetensors")
    save_file({"chosen_union": 1 - union, "rejected_union": union}, tmp_path / "wrong.safetensors")

    def iou(name: str) -> float:
        records: list[Record] = [{"item_id": "a", "pairs": [Pair(chosen="a.png", rejected="a.png", mask_path=name)]}]
        return demo.mask_metrics(records, tmp_path)["mask_iou"]

    assert iou("right.safetensors") == 1
    assert iou("wrong.safetensors") == 0
    assert demo.mask_metrics([], tmp_path)["mask_iou"] is None
    (tmp_path / "half.safetensors").write_bytes(b"12")
    save_file({f"{side}_union": np.ones((7, 7), np.uint8) for side in SIDES}, tmp_path / "grid.safetensors")
    for name in ("half.safetensors", "grid.safetensors", "../right.safetensors"):
        with pytest.raises(OspoError, match=r"half\.safetensors|multiple of 7 x 7|leads out"):
            iou(name)


def test_every_object_covers_a_cell() -> None:
    for shape in SHAPES:
        for size in SIZES:
            for place in [(row, column) for row in range(3) for column in range(3)]:
                cells = demo.object_cells(render(Scene((Object("red", shape, size, place),), "white")), (6, 6))
                assert cells is not None
                assert 1 <= cells.sum() <= 9
                middle = [2 * at + 0.5 for at in place]
                assert np.abs(np.argwhere(cells).mean(0) - middle).max() <= 1


def test_pair_is_pure_when_chosen_is_right_and_rejected_wrong(tmp_path: Path) -> None:
    for color in ("red", "blue"):
        render(Scene((Object(color, "square", "large", (0, 0)),), "white")).save(tmp_path / f"{color}.png")
    pair = Pair(chosen="red.png", rejected="blue.png")
    records: list[Record] = [
        {"item_id": "a", "prompt": "a red square", "pairs": [pair]},
        {"item_id": "b", "prompt": "a blue square", "pairs": [pair]},
        {"item_id": "c", "prompt": "no prompt", "pairs": [pair]},
        {"item_id": "d", "prompt": "a red square", "kept": False},
    ]
    metrics = demo.pair_metrics(records, tmp_path)
    assert metrics["pairs"] == 3
    assert metrics["pair_purity"] == pytest.approx(1 / 3)


def test_pairs_of_one_prompt_count_together_in_standard_errors(tmp_path: Path) -> None:
    """Two prompts with two equal pairs each are two samples, 1 and 0, with a standard error of 1 / 2."""
    from safetensors.numpy import save_file

    for color in ("red", "blue"):
        render(Scene((Object(color, "square", "large", (0, 0)),), "white")).save(tmp_path / f"{color}.png")
    union = np.zeros((6, 6), np.uint8)
    union[:2, :2] = 1
    for name, mask in (("right", union), ("wrong", 1 - union)):
        save_file({f"{side}_union": mask for side in SIDES}, tmp_path / f"{name}.safetensors")
    records: list[Record] = [
        {
            "item_id": prompt,
            "prompt": prompt,
            "pairs": [Pair(chosen="red.png", rejected="blue.png", mask_path=mask)] * 2,
        }
        for prompt, mask in (("a red square", "right.safetensors"), ("a blue square", "wrong.safetensors"))
    ]
    pairs, masks = demo.pair_metrics(records, tmp_path), demo.mask_metrics(records, tmp_path)
    assert (pairs["pair_purity"], pairs["pair_purity_std"]) == (0.5, pytest.approx(0.5))
    assert (masks["mask_iou"], masks["mask_iou_std"]) == (0.5, pytest.approx(0.5))


@pytest.mark.parametrize("line", ["", "{", "[]", '{"step": 1}\n', '{"guidance_scale": 2.0}\n'])
def test_training_without_an_evaluation_at_another_scale_is_accepted(tmp_path, line):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "log.jsonl").write_text(line)
    demo._check_validation_scale([tmp_path, tmp_path / "iter2"], 2.0)


@pytest.mark.parametrize("value", ["x", [1], None, {}, True, -1])
def test_a_validation_scale_that_is_no_number_is_named(tmp_path, value):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "log.jsonl").write_text(json.dumps({"guidance_scale": value}) + "\n")
    with pytest.raises(OspoError, match=r"log\.jsonl, line 1: `guidance_scale` should be a number.*--no-resume"):
        demo._check_validation_scale([tmp_path], 2.0)


@pytest.mark.parametrize("quiet", [False, True])
def test_time_and_disk_are_printed_before_the_first_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, *, quiet: bool
) -> None:
    def begin(*_: object) -> None:
        raise OspoError("the first stage begins")

    monkeypatch.setattr(demo, "CALIBRATION", 2)
    monkeypatch.setattr(demo, "_run", begin)
    state = torch.random.get_rng_state()
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), *SMALL, *(["--json"] if quiet else [])]) == 1
    printed = capsys.readouterr().out
    if quiet:
        assert "The demo" not in printed
    else:
        assert re.match(rf"The demo .* takes about \d+ minutes? on this machine and \d+ MB in {out}\.\n", printed)
    assert torch.equal(torch.random.get_rng_state(), state)

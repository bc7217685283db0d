"""The shipped checkpoint, and the whole method on it, small."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from ospo_fast import cli
from ospo_fast.config import load_config
from ospo_fast.models import load_model
from ospo_fast.models.base import UnifiedModel
from ospo_fast.pipeline import Pipeline, read_stage, stage_metrics
from ospo_fast.records import Record, iter_pairs
from ospo_fast.shapes import demo, evaluate
from ospo_fast.shapes.scenes import held_out_prompts, parse

FOLDER = Path(demo.__file__).parent / "checkpoint"
SMALL = [
    "prompts.counts={color1: 4, shape1: 3, color2: 6, 2D_spatial: 4, numeracy1: 3, numeracy2: 4}",
    "train.steps=4",
    "train.eval_every=2",
    "train.batch_size=4",
    "evaluate.per_kind=3",
    "evaluate.watch_per_kind=3",
    "evaluate.seeds=[0]",
]


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    return load_model("shapes")


def test_the_checkpoint_is_small_and_says_how_it_was_made() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16 * 2**20
    made = json.loads((FOLDER / "pretraining.json").read_text())
    assert made["recipe"]["seed"] == 0
    assert {"codes", "answering", "torch"} <= set(made)


def test_it_answers_questions_on_rendered_pictures(model: UnifiedModel) -> None:
    answered = evaluate.evaluate_answers(model, count=120, progress=False)
    for kind in evaluate.QUESTION_KINDS:
        assert answered[kind] >= 0.95, kind


def test_it_draws_prompts_that_it_has_never_seen(model: UnifiedModel) -> None:
    """Much worse than it answers: of what it learns in a run, that is the reason."""
    drawn = evaluate.evaluate_alignment(model, split="validation", per_kind=40, guidance_scale=1.5, progress=False)
    assert 0.35 < drawn.headline()["alignment"] < 0.7
    assert not set(drawn.prompts) - set(held_out_prompts())
    assert evaluate.evaluate_own_answers(model, drawn, progress=False)["all"] >= 0.93


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    config = load_config([*SMALL, f"out={out}"], family="shapes")
    demo.run(config, progress=False)
    return out


@pytest.mark.usefixtures("omegaconf")
def test_the_summary_has_every_figure(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    for name in ("alignment_before", "alignment_after", "vqa_accuracy", "pair_purity", "mask_iou"):
        assert 0 <= summary[name] <= 1, name
    assert summary["alignment_std"] >= 0
    records = [record for record in read_stage(run_folder, "select") if record.get("kept")]
    assert summary["pairs"] == len(list(iter_pairs(records))) > len(records)
    assert summary["seconds"] > 0
    assert {"prompts", "perturb", "images", "questions", "score", "select", "masks", "train"} <= set(summary["stages"])
    for figures in summary["stages"].values():
        assert figures["items"] > 0
        assert figures["peak_mb"] > 0
    assert summary["versions"]["torch"] == torch.__version__
    assert (summary["seeds"]["training"], summary["seeds"]["sampling"]) == ([42], [0])
    assert "evaluate.seeds" in summary["seeds"]["note"]
    (only,) = summary["iterations"]
    for name in ("pairs", "pair_purity", "chosen_right", "mask_iou", "mask_iou_std", "stages"):
        assert only[name] == summary[name]


@pytest.mark.usefixtures("omegaconf")
def test_every_iteration_is_reported(run_folder: Path, tmp_path: Path) -> None:
    """A second iteration with a pair and a mask less: the figures at the top are its own, those of stages the sums."""
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
    assert after["pairs"] == before["pairs"] - 1
    assert after["iterations"][1]["stages"] == stage_metrics(second)
    for name, row in after["stages"].items():
        assert row["items"] == 2 * before["stages"][name]["items"]


@pytest.mark.usefixtures("omegaconf")
def test_evaluation_draws_alike_whatever_the_seed_of_the_run(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base figures of another training seed are the same, so gains are compared drawing by drawing."""
    monkeypatch.setattr(Pipeline, "run", lambda *_: pytest.fail("far enough"))
    for name in ("evaluate_answers", "evaluate_own_answers"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: {})
    config = load_config([*SMALL, f"out={tmp_path}", "seed=7"], family="shapes")
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        demo.run(config, progress=False)
    drawn = sorted((tmp_path / "evaluation").glob("base_*.npz"))
    assert drawn
    for path in drawn:
        with np.load(path) as one, np.load(run_folder / "evaluation" / path.name) as other:
            assert np.array_equal(one["images"], other["images"])


@pytest.mark.usefixtures("omegaconf")
def test_training_watches_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """One setting for `demo` and for `train`: 200 prompts of each headline kind, or all, of the validation split."""
    seen: list[dict[str, Any]] = []
    nobody: Any = None  # the drawings are made up

    def draw(model: object, **settings: Any) -> evaluate.AlignmentResult:
        seen.append(settings)
        return evaluate.AlignmentResult(
            settings["split"], 1.0, (0,), evaluate.HEADLINE, ("a",) * 3, (), np.ones((3, 1), bool)
        )

    monkeypatch.setattr(evaluate, "evaluate_alignment", draw)
    config = load_config(["evaluate.watch_per_kind=7", "evaluate.seeds=[3]"], family="shapes")
    for settings in (config, load_config(family="shapes")):
        watch = cli._evaluation(settings)
        assert watch is not None
        watch(nobody, 0)
        evaluate.build_validation(settings.evaluate, settings.images.guidance_scale)(nobody, 0)
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert (seen[0]["per_kind"], seen[0]["seeds"]) == (7, [3])
    assert (seen[2]["per_kind"], seen[2]["split"]) == (200, "validation")
    for kind in evaluate.HEADLINE:
        assert len(evaluate.select_prompts("validation", 200, [kind])) >= 24


@pytest.mark.usefixtures("omegaconf")
def test_no_stage_draws_or_trains_on_a_held_out_prompt(run_folder: Path) -> None:
    drawn = []
    for path in (run_folder / "images").rglob("*.npz"):
        with np.load(path) as file:
            drawn.append(str(file["prompt"]))
    assert len(drawn) > 20
    kept = [record for record in read_stage(run_folder, "select") if record.get("kept")]
    trained = [record[name] for record in kept for name in ("prompt", "rejected_prompt")]
    for text in drawn + trained:
        description = parse(text)
        assert description is None or description.split == "train", text


@pytest.mark.usefixtures("omegaconf")
def test_the_report_is_one_page(run_folder: Path) -> None:
    class Links(HTMLParser):
        found: ClassVar[list[str]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value for name, value in attrs if name in ("src", "href") and value]

    parser = Links()
    parser.feed((run_folder / "report" / "index.html").read_text(encoding="utf-8"))
    assert all(link.startswith(("data:", "#")) for link in parser.found)
    lines = (run_folder / "evaluation" / "gallery.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["prompt"] for line in lines}) > 6


@pytest.mark.usefixtures("omegaconf")
def test_a_second_run_draws_nothing_again(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((run_folder / "summary.json").read_text())

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(evaluate, "draw", fail)
    config = load_config([*SMALL, f"out={run_folder}"], family="shapes")
    after = demo.run(config, progress=False)
    for name in ("alignment_before", "alignment_after", "pairs", "pair_purity", "mask_iou"):
        assert after[name] == before[name]


def test_masks_are_measured_against_the_objects(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from ospo_fast.shapes.render import render
    from ospo_fast.shapes.scenes import Object, Scene

    render(Scene((Object("red", "square", "large", (0, 0)),), "white")).save(tmp_path / "a.png")
    union = np.zeros((6, 6), np.uint8)
    union[:2, :2] = 1
    save_file({"chosen_union": union}, tmp_path / "right.safetensors")
    save_file({"chosen_union": 1 - union}, tmp_path / "wrong.safetensors")

    def iou(name: str) -> float:
        records: list[Record] = [{"item_id": "a", "chosen": "a.png", "mask_path": name}]
        return demo.mask_figures(records, tmp_path)["mask_iou"]

    assert iou("right.safetensors") == 1
    assert iou("wrong.safetensors") == 0
    assert demo.mask_figures([], tmp_path)["mask_iou"] is None


def test_no_object_is_too_small_to_have_cells() -> None:
    from ospo_fast.shapes.render import render
    from ospo_fast.shapes.scenes import SHAPES, SIZES, Object, Scene

    for shape in SHAPES:
        for size in SIZES:
            for place in [(row, column) for row in range(3) for column in range(3)]:
                cells = demo.object_cells(render(Scene((Object("red", shape, size, place),), "white")), (6, 6))
                assert cells is not None
                assert 1 <= cells.sum() <= 9
                middle = [2 * at + 0.5 for at in place]
                assert np.abs(np.argwhere(cells).mean(0) - middle).max() <= 1


def test_standard_errors_know_that_pairs_of_an_item_go_together() -> None:
    values, alone = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0], list(range(6))
    assert demo._standard_error(values, alone) == pytest.approx(np.std(values) / np.sqrt(6))
    twice = demo._standard_error(np.repeat(values, 2), np.repeat(alone, 2))
    assert twice == pytest.approx(np.std(values) / np.sqrt(6))
    assert demo._standard_error([], []) is None


def test_a_pair_is_pure_when_chosen_is_right_and_rejected_wrong(tmp_path: Path) -> None:
    from ospo_fast.shapes.render import render
    from ospo_fast.shapes.scenes import Object, Scene

    render(Scene((Object("red", "square", "large", (0, 0)),), "white")).save(tmp_path / "red.png")
    render(Scene((Object("blue", "square", "large", (0, 0)),), "white")).save(tmp_path / "blue.png")
    records: list[Record] = [
        {"item_id": "a", "kept": True, "prompt": "a red square", "chosen": "red.png", "rejected": "blue.png"},
        {"item_id": "b", "kept": True, "prompt": "a blue square", "chosen": "red.png", "rejected": "blue.png"},
        {"item_id": "c", "kept": True, "prompt": "no prompt", "chosen": "red.png", "rejected": "blue.png"},
        {"item_id": "d", "kept": False, "prompt": "a red square"},
    ]
    figures = demo.pair_figures(records, tmp_path)
    assert figures["pairs"] == 3
    assert figures["pair_purity"] == pytest.approx(1 / 3)

"""The page of a run without summary.json: what it knows is shown, and what it cannot have is omitted."""

import json
import re
import shutil

import pytest

from ospo_fast.report import stats, write_report
from ospo_fast.report.load import load_run

STAGES = ("prompts", "perturb", "images", "questions", "score", "select", "masks", "train")
LOG = [{"step": step, "alignment": value, "standard_error": 0.01} for step, value in ((0, 0.5), (6, 0.6), (12, 0.4))]


@pytest.fixture
def own_run(run_dir):
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "evaluation")
    rows = json.loads((run_dir / "stages.json").read_text())
    for row in rows:
        row["versions"] = {"torch": "2.9.1"}
    (run_dir / "stages.json").write_text(json.dumps(rows))
    (run_dir / "train" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    keep(run_dir, 6)
    (run_dir / "train" / "adapter").mkdir()
    adapter = {"base_model_name_or_path": "org/model", "r": 16}
    (run_dir / "train" / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    return run_dir


def keep(run_dir, step):
    value = {line["step"]: line["alignment"] for line in LOG}[step]
    kept = {"step": step, "metric": "alignment", "before": 0.5, "value": value}
    (run_dir / "train" / "done.json").write_text(json.dumps({"kept": kept}))


def page_of(run_dir, pages):
    return pages.page_of(write_report(run_dir))


def test_an_own_run_shows_what_it_knows(own_run, pages):
    page = page_of(own_run, pages)
    pairs = sum(len(item.record.get("pairs", [])) for item in load_run(own_run).items)
    assert pairs > 0
    assert stats.own_summary(load_run(own_run))["pairs"] == pairs
    assert "4 min 52 s" in page.text("seconds")
    assert "902 MB" in page.text("peak_mb")
    assert "torch2.9.1" in page.text("about")
    assert "train/adapter, on the base model org/model, LoRA rank 16." in page.text("about")
    assert "color1" in page.text("kinds")


def test_an_own_run_has_no_boxes_for_metrics_that_only_a_demo_has(own_run, pages):
    page = page_of(own_run, pages)
    assert not {"vqa_accuracy", "pair_purity", "mask_iou"} & set(page.texts)
    assert "not measured" not in page.text("metrics")
    (own_run / "stages.json").unlink()
    page = page_of(own_run, pages)
    assert not {"seconds", "peak_mb"} & set(page.texts)
    assert "not recorded" not in page.text("about")


def test_alignment_is_that_of_the_kept_weights(own_run, pages):
    page = page_of(own_run, pages)
    assert "Alignment on validation prompts" in page.text("metrics")
    assert page.text("alignment_before") == "Before50.0%± 1.0 standard error"
    assert page.text("alignment_after") == "After60.0%± 1.0 standard error"
    assert "The weights of step 6 are kept" in page.text("training")
    (curve,) = stats.curves(LOG, load_run(own_run).kept)
    assert curve["last"] == 0.6


def test_kept_base_weights_are_named(own_run, pages):
    keep(own_run, 0)
    page = page_of(own_run, pages)
    assert page.text("alignment_after") == "After50.0%± 1.0 standard error"
    assert "The weights from before training are kept (alignment 0.500)" in page.text("metrics")
    chips = [attributes["class"] for _, attributes in page.elements if "chip" in attributes.get("class", "").split()]
    assert [name.split() for name in chips] == [["chip"]]  # neither better nor worse


def test_a_run_without_early_stopping_has_the_last_evaluation(own_run, pages):
    (own_run / "train" / "done.json").unlink()
    assert page_of(own_run, pages).text("alignment_after") == "After40.0%± 1.0 standard error"
    (own_run / "train" / "log.jsonl").write_text(json.dumps(LOG[0]) + "\n")
    page = page_of(own_run, pages)
    assert "alignment_before" in page.texts
    assert "alignment_after" not in page.texts


@pytest.mark.parametrize("last", range(7))
def test_an_interrupted_run_has_no_empty_boxes(own_run, pages, last):
    for stage in STAGES[last + 1 :]:
        (own_run / f"{stage}.jsonl").unlink(missing_ok=True)
    rows = json.loads((own_run / "stages.json").read_text())
    (own_run / "stages.json").write_text(json.dumps(rows[: last + 1]))
    shutil.rmtree(own_run / "train")
    bare = ("item_id", "prompt", "t2i_category", "sub_category", "perturbed_method", "negative_prompt")
    for stage in STAGES[: min(last + 1, 5)]:  # the records of the fixture are those of a finished run
        pages.edit(own_run, f"{stage}.jsonl", lambda record: [record.pop(k) for k in set(record) - set(bare)])
    page = page_of(own_run, pages)
    assert not {"alignment_before", "alignment_after"} & set(page.texts)
    assert "not measured" not in page.text("metrics")
    assert ("Mean score margin" in page.text("kinds")) == (last >= 5)
    unpictured = any(tag == "html" and "unpictured" in values.get("class", "") for tag, values in page.elements)
    assert unpictured == (last < 5)


@pytest.mark.usefixtures("omegaconf")
def test_settings_that_differ_from_the_defaults_are_listed(own_run, pages):
    (own_run / "config.yaml").write_text("model: org/model\nout: ./\nseed: 7\nimages: {guidance_scale: 2.5}\n")
    assert [(key, value) for key, value, _ in stats.changed_settings(load_run(own_run))] == [
        ("model", '"org/model"'),
        ("seed", "7"),
        ("images.guidance_scale", "2.5"),
    ]
    assert re.search(r"images.guidance_scale ?2.5", page_of(own_run, pages).text("settings"))
    (own_run / "config.yaml").write_text("- x")
    assert stats.changed_settings(load_run(own_run)) == []


def test_an_own_run_of_two_iterations_says_that_its_page_is_of_the_first(own_run, pages):
    (own_run / "iter2").mkdir()
    page = page_of(own_run, pages)
    assert "this page is of the first iteration, also its times and counts; `ospo-fast report` on iter2" in page.text(
        "about"
    )
    assert "those of the last" not in page.text("about")

"""Figures of the report against counts and formulas done by hand."""

import math

import numpy as np
import pytest

from ospo_fast.report import inspector, masks, stats
from ospo_fast.report.images import Album
from ospo_fast.report.load import Run, number


def run_of(tmp_path, items, **fields):
    return Run(
        root=tmp_path, items=items, reached={item["item_id"]: "select" for item in items}, present=("select",), **fields
    )


def item(item_id, kind="color1", *, pair=True, **fields):
    outcome = (
        {
            "kept": True,
            "chosen": "images/x/base_0.png",
            "rejected": "images/x/negative_0.png",
            "chosen_score": 0.9,
            "rejected_score": -0.3,
        }
        if pair
        else {"kept": False, "reason": "no question could be read from the model's answer"}
    )
    return {"item_id": item_id, "kind": kind, "prompt": item_id, **outcome, **fields}


def test_funnel_counts(tmp_path):
    verdict = {"path": "x.png", "kept": True}
    refused = {"path": "x.png", "kept": False, "reason": "no answer is yes"}
    items = [
        item(
            "a",
            negative_prompt=["p", "", "q"],
            variant_reasons=[None, "equals the prompt", None],
            base_metadata={"base_0": verdict, "base_2": refused},
            negative_metadata={"negative_0": verdict, "negative_2": verdict},
        ),
        item("b", pair=False, negative_prompt=["p", "q", "r"], base_metadata={}, negative_metadata={}),
    ]
    run = run_of(tmp_path, items)
    steps = {step["name"]: (step["count"], step["of"]) for step in stats.funnel(run)}
    assert steps == {
        "prompts": (2, 2), "variants": (5, 6), "images": (4, 10), "base": (1, 2), "negative": (2, 2), "pairs": (1, 2),
    }  # fmt: skip
    assert dict(stats.losses(run)) == {
        "Variants left out": [("equals the prompt", 1)],
        "Prompts without a pair": [("no question could be read from the model's answer", 1)],
        "Base images turned down": [("no answer is yes", 1)],
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("local score 0.41 below 0.6", "local score -0.20 below 0.6"),
        (
            "no base image passed: local score 0.41 below 0.6; local score -0.20 below 0.6; no answer is yes",
            "no base image passed: no answer is yes; local score 0.10 below 0.6",
        ),
    ],
)
def test_reasons_that_differ_in_their_figures_are_counted_together(one, other):
    assert inspector.general(one) == inspector.general(other)
    assert "0.6" in inspector.general(one)


def test_reasons_that_differ_otherwise_are_not():
    assert inspector.general("no base image passed: no answer is yes") != inspector.general("no answer is yes")


def test_kinds_join_the_run_and_the_evaluation(tmp_path):
    run = run_of(
        tmp_path,
        [item("a"), item("b", pair=False), item("c", "layout")],
        summary={
            "evaluation": {"by_kind": {"color1": {"before": 0.2, "after": 0.5, "n": 100}, "other": {"before": 1.0}}}
        },
    )
    rows = {row["kind"]: row for row in stats.kinds(run)}
    assert list(rows) == ["color1", "layout", "other"]
    color = rows["color1"]
    assert (color["items"], color["pairs"], color["n"]) == (2, 1, 100)
    assert color["margin"] == pytest.approx(1.2)
    assert color["change"] == pytest.approx(0.3)
    assert color["before_error"] == pytest.approx(math.sqrt(0.2 * 0.8 / 100))
    assert rows["layout"]["before"] is None
    assert rows["other"]["before_error"] is None  # without n there is none
    assert rows["other"]["change"] is None


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ({}, None),
        ({"alignment_after": 0.5, "alignment_after_std": 0.02}, 0.02),
        ({"alignment_after": {"alignment": 0.5, "standard_error": 0.03}}, 0.03),
        ({"evaluation": {"guidance_scale": 1.5, "after": {"1.5": {"alignment": 0.5, "standard_error": 0.01}}}}, 0.01),
        ({"evaluation": {"guidance_scale": 2.0, "after": {"1.5": {"alignment": 0.5, "standard_error": 0.01}}}}, None),
        ({"alignment_after": 0.5, "alignment_after_std": float("nan")}, None),
    ],
)
def test_standard_errors_are_found_wherever_they_are_given(summary, expected):
    assert stats.headline(summary)["errors"]["after"] == expected


def test_seeds_are_counted_and_their_note_is_said():
    seeds = {"training": [42], "sampling": [0, 1]}
    assert stats.headline({"seeds": seeds})["seeds"] == "1 training, 2 sampling"
    assert stats.headline({"seeds": {**seeds, "note": "as they are"}})["seeds"] == "1 training, 2 sampling; as they are"
    assert stats.headline({})["seeds"] == ""


def test_gain_is_after_less_before():
    assert stats.headline({"alignment_std": 0.02})["errors"]["gain"] == 0.02
    assert stats.headline({"alignment_before": 0.4, "alignment_after": 0.35})["gain"] == pytest.approx(-0.05)
    assert stats.headline({"alignment_before": 0.4})["gain"] is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (True, None), ("1", None), (float("inf"), None), ({"mean": 0.5}, 0.5), (None, None)],
)
def test_number(value, expected):
    assert number(value) == expected


def test_sample_is_balanced_ordered_and_never_longer_than_the_run(tmp_path):
    items = [item(f"{index:03d}", "common", pair=index % 10 > 0) for index in range(200)]
    items += [item("rare", "rare"), item("rare too", "rare", pair=False)]
    run = run_of(tmp_path, items)
    chosen = inspector.sample(run, 40)
    assert len(chosen) == 40
    names = [record["item_id"] for record in chosen]
    assert {"rare", "rare too"} <= set(names)
    assert sum(not record["kept"] for record in chosen) == 20
    assert names == [record["item_id"] for record in items if record["item_id"] in set(names)]
    assert len(inspector.sample(run, 1000)) == 202


def test_status(tmp_path):
    assert inspector.status_of(item("a"), "select") == "kept"
    assert inspector.status_of(item("a", pair=False), "select") == "dropped"
    assert inspector.status_of({"item_id": "a"}, "images") == "unfinished"
    assert inspector.reason_of({"item_id": "a"}, "images") == "came as far as the images stage"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("images/base_9/base_1.png", "base_1"),
        ("/elsewhere/negative_2.png", "negative_2"),
        (0, "base_0"),
        (None, None),
        ("x", None),
    ],
)
def test_chosen_may_be_named_by_path_or_index(value, expected):
    assert inspector.image_key(value, "base") == expected


def test_mask_diagnostics():
    full, empty = np.ones((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    half = full.copy()
    half[:2] = 0
    even, point = np.full((1, 4, 4), 0.3, np.float32), np.zeros((1, 4, 4), np.float32)
    point[0, 1, 2] = 1.0
    found = stats.mask_diagnostics(
        [
            {"chosen": {"maps": even, "union": full}, "rejected": {"maps": point, "union": half}},
            {"chosen": {"maps": even, "union": empty}, "rejected": {"maps": point, "union": empty}},
        ]
    )
    assert found is not None
    assert (found["items"], found["empty"], found["full"]) == (2, 2, 1)
    assert (found["chosen"], found["rejected"]) == (0.5, 0.25)
    assert found["overlap"] == 0.5  # two empty masks have no overlap to speak of
    assert found["entropy"] == pytest.approx(0.5)  # 1 for an even map, 0 for a single cell
    assert stats.mask_diagnostics([]) is None


def test_mask_diagnostics_of_records():
    even, full = np.full((1, 4, 4), 0.3, np.float32), np.ones((4, 4), np.uint8)
    sides = {side: {"maps": even, "union": full} for side in ("chosen", "rejected")}
    of_item = {"layers": [5, 6], "chosen": {"entropy": [0.5, 0.25]}, "rejected": {"entropy": [0.7, None]}}
    records = [
        {"mask_stats": of_item, "unmatched_objects": {"car": "not there"}},
        {"mask_stats": {"layers": 3}, "unmatched_objects": {"cup": "not there", "hat": "unknown"}},
        {"mask_stats": "none", "unmatched_objects": None},
        {},
    ]
    found = stats.mask_diagnostics([sides], records)
    assert found["layers"] == [(5, pytest.approx(0.6)), (6, 0.25)]
    assert found["unmatched"] == [("not there", 2), ("unknown", 1)]


def test_maps_are_scaled_over_their_own_range():
    assert masks.scaled(np.array([[2.0, 4.0], [3.0, 4.0]])).tolist() == [[0, 1], [0.5, 1]]
    assert not masks.scaled(np.full((2, 2), 7.0)).any()
    assert masks.scaled(np.array([[np.nan, 1.0], [3.0, np.inf]])).tolist() == [[0, 0], [1, 0]]
    assert not masks.scaled(np.full((2, 2), np.nan)).any()


def test_gallery_counts_everything_and_shows_some(tmp_path):
    lines = [
        {
            "prompt": str(index),
            "kind": "k",
            "before": {"path": "x.png", "correct": index < 2},
            "after": {"path": "y.png", "correct": index % 2 == 0},
        }
        for index in range(8)
    ]
    found = stats.gallery(lines, Album(tmp_path), 3)
    assert found is not None
    assert found["counts"] == {"mended": 3, "broken": 1, "right": 1, "wrong": 3}
    assert found["shown"] == {"mended": 1, "right": 1, "wrong": 1}
    assert [card["prompt"] for card in found["cards"]] == ["0", "2", "5"]
    assert stats.gallery([{"prompt": "no images"}], Album(tmp_path), 3) is None


def test_curves_take_what_is_finite_and_leave_out_the_rest():
    log = [
        {"step": 1, "loss": 2.0, "sft": float("nan")},
        {"step": 2, "loss": float("inf")},
        {"step": 3, "loss": 1.0, "alignment": 0.5, "standard_error": 0.1},
    ]
    charts = {chart["name"]: chart for chart in stats.curves(log)}
    assert set(charts) == {"alignment", "loss"}
    assert charts["loss"]["last"] == 1.0
    assert "whisker" in charts["alignment"]["svg"]
    assert stats.curves([]) == []

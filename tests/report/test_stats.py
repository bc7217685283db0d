"""Numbers of the report against counts and formulas computed by hand."""

import numpy as np
import pytest

from ospo_fast.report import inspector, masks, stats
from ospo_fast.report.images import Album
from ospo_fast.report.load import Item, Run, mapping, number


def run_of(tmp_path, items, **fields):
    return Run(root=tmp_path, items=items, **fields)


def item(item_id, kind="color1", *, pair=True, **fields):
    pairs = [{"chosen": "base_0.png", "rejected": "negative_0.png", "chosen_score": 0.9, "rejected_score": -0.3}]
    outcome = {"kept": True, "pairs": pairs} if pair else {"kept": False, "reason": "no question"}
    return Item({"item_id": item_id, "kind": kind, "prompt": item_id, **outcome, **fields}, "select")


def test_the_funnel_counts_what_each_step_keeps(tmp_path):
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
    assert dict(stats.drop_reasons(run)) == {
        "Hard negatives skipped": [("equals the prompt", 1)],
        "Prompts without a pair": [("no question", 1)],
        "Base images not judged correct": [("no answer is yes", 1)],
    }


def test_reasons_are_grouped_without_their_numbers():
    group = inspector.reason_group
    assert group("local score 0.41 below 0.6") == group("local score -0.20 below 0.6") == "local score … below 0.6"
    one = "no base image passed: local score 0.41 below 0.6; local score -0.20 below 0.6; no answer is yes"
    assert group(one) == group("no base image passed: no answer is yes; local score 0.10 below 0.6")
    assert group("no base image passed: no answer is yes") != group("no answer is yes")


def test_kind_rows_join_items_and_evaluation(tmp_path):
    evaluated = {"color1": {"before": 0.2, "after": 0.5, "before_std": 0.04, "n": 100}, "other": {"before": 1.0}}
    items = [item("a"), item("b", pair=False), item("c", "layout")]
    run = run_of(tmp_path, items, summary={"evaluation": {"by_kind": evaluated}})
    rows = {row["kind"]: row for row in stats.kind_rows(run)}
    assert list(rows) == ["color1", "layout", "other"]
    color = rows["color1"]
    assert (color["items"], color["pairs"], color["prompts"]) == (2, 1, 100)
    assert color["margin"] == pytest.approx(1.2)
    assert color["change"] == pytest.approx(0.3)
    assert (color["before_error"], color["after_error"]) == (0.04, None)
    assert rows["layout"]["before"] is None
    assert rows["other"]["change"] is None


def test_headline_has_the_gain_only_with_both_alignments():
    found = stats.headline({"alignment_before": 0.4, "alignment_after": 0.35, "alignment_std": 0.02})
    assert found["gain"] == pytest.approx(-0.05)
    assert found["errors"] == {"before": None, "after": None, "gain": 0.02}
    assert stats.headline({"alignment_before": 0.4})["gain"] is None
    seeds = {"training": [42], "sampling": [0, 1]}
    assert stats.headline({"seeds": seeds})["seeds"] == "1 training, 2 sampling"
    assert stats.headline({"seeds": {**seeds, "note": "note"}})["seeds"] == "1 training, 2 sampling; note"


def test_values_of_other_types_are_missing():
    values = [1, True, "1", float("inf"), float("nan"), {}, None]
    assert [number(value) for value in values] == [1.0, *[None] * 6]
    assert mapping({"a": {"b": {"c": 1}}}, "a", "b") == {"c": 1}
    assert mapping({"a": 1}, "a", "b") == mapping(None) == {}


def test_sample_is_balanced_and_ordered():
    items = [item(f"{index:03d}", "common", pair=index % 10 > 0) for index in range(200)]
    items += [item("rare", "rare"), item("rare too", "rare", pair=False)]
    sampled = inspector.sample(items, 40)
    assert len(sampled) == 40
    names = [sampled_item.record["item_id"] for sampled_item in sampled]
    assert {"rare", "rare too"} <= set(names)
    assert sum(sampled_item.status == "dropped" for sampled_item in sampled) == 20
    assert names == sorted(names)
    assert len(inspector.sample(items, 1000)) == 202


def test_status_and_reason_follow_the_selection():
    assert (item("a").status, item("a").reason) == ("kept", "")
    assert (item("a", pair=False).status, item("a", pair=False).reason) == ("dropped", "no question")
    assert Item({"item_id": "a", "kept": False}, "select").reason == "no reason recorded"
    unfinished = Item({"item_id": "a"}, "images")
    assert (unfinished.status, unfinished.reason) == ("unfinished", "reached the images stage only")


def test_mask_diagnostics_are_means_over_pairs_with_masks():
    full, empty = np.ones((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    half = full.copy()
    half[:2] = 0
    even, point = np.full((1, 4, 4), 0.3, np.float32), np.zeros((1, 4, 4), np.float32)
    point[0, 1, 2] = 1.0
    empty_map = np.zeros((1, 4, 4), np.float32)
    arrays = [
        {"chosen": {"maps": even, "union": full}, "rejected": {"maps": point, "union": half}},
        {"chosen": {"maps": even, "union": empty}, "rejected": {"maps": point, "union": empty}},
        {"chosen": {"maps": empty_map, "union": empty}, "rejected": {"maps": empty_map, "union": half}},
    ]
    mask_stats = {"layers": [5], "iou": None, "alarms": []}
    mask_stats |= {
        side: {"coverage": 0.5, "entropy": [entropy]} for side, entropy in (("chosen", 0.5), ("rejected", 0.7))
    }
    pairs = [{"chosen": "a", "rejected": "b", "mask_path": "c", "mask_stats": mask_stats}]
    records = [
        {"item_id": "0", "pairs": pairs, "unmatched_objects": {"car": "not there"}},
        {"item_id": "1", "unmatched_objects": {"cup": "not there", "hat": "unknown"}},
    ]
    found = stats.mask_diagnostics(arrays, records)
    assert (found["items"], found["empty"], found["full"]) == (3, 3, 1)
    assert (found["chosen"], found["rejected"]) == pytest.approx((1 / 3, 1 / 3))
    assert found["iou"] == 0.25  # of 0.5 and 0; two empty masks have none
    assert found["entropy"] == pytest.approx(0.5)  # 1 for a uniform map, 0 for one cell; none for an empty map
    assert found["layers"] == {"5": 0.6}
    assert found["unmatched"] == [("not there", 2), ("unknown", 1)]
    assert stats.mask_diagnostics([], records) is None


def test_maps_are_scaled_to_their_range():
    assert masks.scale(np.array([[2.0, 4.0], [3.0, 4.0]])).tolist() == [[0, 1], [0.5, 1]]
    assert not masks.scale(np.full((2, 2), 7.0)).any()
    assert not masks.scale(np.full((2, 2), np.nan)).any()


def test_gallery_counts_all_lines_and_shows_some(tmp_path):
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
    assert found["counts"] == {"fixed": 3, "broken": 1, "correct": 1, "wrong": 3}
    assert found["shown"] == {"fixed": 1, "correct": 1, "wrong": 1}
    assert [card["prompt"] for card in found["cards"]] == ["0", "2", "5"]
    assert stats.gallery([{"prompt": "no images"}], Album(tmp_path), 3) is None


def test_curves_skip_values_that_are_not_finite():
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


def test_log_probabilities_have_curves_by_category():
    log = [
        {"step": n, "chosen_logps": -2.0 - n, "chosen_logps/color": -1.0, "rejected_logps/color": -3.0} for n in (1, 2)
    ]
    assert [chart["name"] for chart in stats.curves(log)] == [
        "chosen_logps", "chosen_logps/color", "rejected_logps/color",
    ]  # fmt: skip
    rows = [{"step": 0, "validation/loss": 0.7, "validation/chosen_logps/<b>": -1.5}]
    charts = {chart["name"]: chart for chart in stats.curves(log + rows)}  # held-out pairs take their place
    assert list(charts) == ["chosen_logps", "validation/loss", "validation/chosen_logps/<b>"]
    assert "<b>" not in charts["validation/chosen_logps/<b>"]["svg"]
    many = [{"step": 0} | {f"chosen_logps/{n}": -1.0 for n in range(100)}]
    assert len(stats.curves(many)) == stats.MAX_CATEGORIES


def guide_of(tmp_path, config=None, **summary):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    return stats.mask_guide(run_of(tmp_path, [], summary=summary))


@pytest.mark.usefixtures("omegaconf")
def test_the_guide_has_the_settings_of_the_run(tmp_path):
    config = """
model: org/model
preset: full
masks: {scaler: 1.0, soft: true}
train: {masks: online, loss: {mask_alpha: 0.5, mask_gamma: 2.0, mask_blur: 1}}
"""
    assert guide_of(tmp_path, config) == {
        "recorded": True, "scaler": 1.0, "soft": True, "used": True, "online": True, "alpha": 0.5, "gamma": 2.0,
        "blur": 1, "shapes": False, "iou": None, "full": None, "predicting": False, "substring": False, "choose": None,
        "official": False,
    }  # fmt: skip
    assert not guide_of(tmp_path, "preset: v1\nmasks: {enabled: true}")["used"]  # v1 has mask_alpha 0
    shapes = guide_of(tmp_path, "model: shapes")
    assert (shapes["shapes"], shapes["used"], shapes["online"], shapes["scaler"]) == (True, True, False, 0.8)


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("config", [None, "masks: {scaler: none}", "train: {loss: {mask_alpha: -1}}", "- x", "\0"])
def test_the_guide_of_a_run_without_a_readable_configuration_has_the_defaults(tmp_path, config):
    guide = guide_of(tmp_path, config)
    assert (guide["recorded"], guide["shapes"], guide["scaler"], guide["alpha"]) == (False, False, 0.8, 1.0)


def test_the_guide_has_the_mask_iou_of_the_iteration_that_is_shown(tmp_path):
    guide = guide_of(tmp_path, mask_iou=0.4, mask_iou_all_ones=0.2)
    assert (guide["iou"], guide["full"], guide["shapes"]) == (0.4, 0.2, True)
    first = {"mask_iou": 0.5, "mask_iou_all_ones": 0.3}
    guide = guide_of(tmp_path, mask_iou=0.4, mask_iou_all_ones=0.2, iterations=[first, {"mask_iou": 0.4}])
    assert (guide["iou"], guide["full"]) == (0.5, 0.3)
    assert guide_of(tmp_path, iterations=["x"], mask_iou=0.4)["iou"] is None


def test_a_run_of_grpo_has_rewards_and_no_prompts_without_a_pair(tmp_path):
    asked = Item({"item_id": "1", "prompt": "a", "question": ["is it?"]}, "questions")
    log = [{"step": n, "loss": 0.0, "policy": 0.0, "kl": 0.1 * n, "reward": 0.5 + n / 10} for n in (1, 2)]
    assert [chart["name"] for chart in stats.curves(log)] == ["reward", "kl", "loss"]
    assert stats.drop_reasons(run_of(tmp_path, [asked], log=log)) == []
    unfinished = [("Prompts without a pair", [("reached the questions stage only", 1)])]
    assert stats.drop_reasons(run_of(tmp_path, [asked])) == unfinished

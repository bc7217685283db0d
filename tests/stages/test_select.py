"""Selection: the official results, each rule by hand, and the records that the stage writes."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from ospo_fast.config import SelectConfig, load_config
from ospo_fast.errors import Failure, OspoError, UsageError
from ospo_fast.models import load_model
from ospo_fast.stages import select as select_module
from ospo_fast.stages.select import base_verdict, negative_verdict, run, select_pair

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "pair_selection.json").read_text())


def verdict(name, *margins, tie=False):
    """An image whose answers have the given p_yes − p_no."""
    answers = [
        {"p_yes": 0.5 + m / 2, "p_no": 0.5 - m / 2, "answer": "yes" if m > 0 else "no" if m < 0 else "tie"}
        for m in margins
    ]
    return {"path": f"{name}.png", "local_score": sum(margins) / len(margins), "answer_metadata": answers}


def item(bases, negatives, **fields):
    return {
        "item_id": "0000001",
        "prompt": "a red circle",
        "question": ["is it?"],
        "negative_prompt": ["n0", "n1", "n2"],
        "base_metadata": {f"base_{i}": verdict(f"b{i}", *m) for i, m in bases.items()},
        "negative_metadata": {f"negative_{i}": verdict(f"n{i}", *m) for i, m in negatives.items()},
        **fields,
    }


def test_official_results():
    assert {case["expect"] is None for case in GOLDEN} == {True, False}
    for case in GOLDEN:
        assert select_pair(case["input"]) == case["expect"], case["input"]["item_id"]


def official_record(bases, negatives, **fields):
    """A record as the official scoring writes it: entries have the place of their file among those that exist."""

    def entries(role, margins):
        return {
            f"{role}_{place}": {**verdict("", *m), "path": f"images/{role}/layout/1000001/{number:02d}.png"}
            for place, (number, m) in enumerate(sorted(margins.items()))
        }

    metadata = {"base_metadata": entries("base", bases), "negative_metadata": entries("negative", negatives)}
    return {**item({}, {}), **metadata, **fields}


def official_pair(bases, negatives):
    """The pair that the official code makes of {number of the file: margins}: (number of both files), or None."""
    kept = {number: sum(m) / len(m) for number, m in bases.items() if max(m) > 0 and sum(m) / len(m) >= 0.6}
    wrong = [number for number, m in negatives.items() if min(m) <= 0]
    matched = sorted(number for number in kept if number in wrong)
    return max(matched, key=lambda number: kept[number]) if matched else None  # the first of equals


def test_the_best_and_the_lowest_of_the_own_images():
    record = item({0: [0.2], 1: [0.9], 2: [0.7]}, {0: [-0.9]})
    lowest = SelectConfig(rejected="lowest")
    for rule in ("best", "v3"):
        pair = select_pair(record, rule, settings=lowest)
        assert (pair["chosen"], pair["rejected"]) == ("b1.png", "b0.png")
    wrong = item({0: [-0.2], 1: [-0.9], 2: [0.1]}, {})
    assert select_pair(wrong, "v3", settings=lowest) is None  # none passes
    assert select_pair(wrong, "best", settings=lowest)["chosen"] == "b2.png"
    equal = item({0: [0.7], 1: [0.7]}, {})
    assert select_pair(equal, "best", settings=lowest) is None  # none is lower
    assert select_pair(equal, "v3", settings=lowest)["chosen"] == "b0.png"  # both are right, and SFT can take one
    assert select_pair(item({0: [0.7]}, {0: [-0.9]}), "best", settings=lowest) is None
    assert select_pair(item({0: [0.7]}, {0: [-0.9]}), "random", 0, settings=lowest)["rejected"] == "n0.png"


@pytest.mark.usefixtures("omegaconf")
def test_images_with_a_score_and_no_answers_can_be_selected_by_score_alone():
    record = item({0: [0.2], 1: [0.9], 2: [0.7], 3: [0.1]}, {0: [-0.9]})
    for verdict in record["base_metadata"].values():
        del verdict["answer_metadata"]
    record |= {"question": []}
    del record["base_metadata"]["base_2"]["local_score"]
    (done,) = run([record], None, load_config(["select.rule=likeliest", "select.rejected=lowest", "select.pairs=3"]))
    assert [(pair["chosen"], pair["rejected"]) for pair in done["pairs"]] == [("b1.png", "b3.png")]
    assert [verdict["kept"] for verdict in done["base_metadata"].values()] == [True, True, False, True]
    for rule in ("v3", "best"):
        (done,) = run([record], None, load_config([f"select.rule={rule}", "select.rejected=lowest"]))
        assert not done["kept"]


@pytest.mark.usefixtures("omegaconf")
def test_scores_of_answers_are_no_likelihoods():
    record = item({0: [0.2], 1: [0.9]}, {})
    (done,) = run([record], None, load_config(["select.rule=likeliest", "select.rejected=lowest"]))
    assert not done["kept"]
    assert "its score is that of answers" in done["base_metadata"]["base_0"]["reason"]


@pytest.mark.usefixtures("omegaconf")
def test_images_of_official_records_pair_by_file_name():
    # Every pattern of missing images, of 3 base images and 3 hard negatives.
    subsets = [[n for n in range(3) if pattern >> n & 1] for pattern in range(8)]
    for base_files, negative_files in itertools.product(subsets, subsets):
        bases = {n: [0.7 + n / 10] for n in base_files}
        negatives = {n: [-0.5] for n in negative_files}
        record, number = official_record(bases, negatives), official_pair(bases, negatives)
        (done,) = run([record], None, load_config([]))
        paths = [tuple(Path(path).name for path in found[:2]) + found[2:] for found in images(done)]
        assert paths == ([] if number is None else [(f"{number:02d}.png", f"{number:02d}.png", f"n{number}")])


@pytest.mark.usefixtures("omegaconf")
def test_random_official_records_give_the_official_pairs():
    rng, counts = random.Random(0), Counter()

    def margins():
        return {
            n: [rng.choice((-0.9, -0.2, 0.0, 0.5, 0.7, 0.9, 1.0)) for _ in range(rng.randint(1, 3))]
            for n in range(rng.randint(1, 6))
            if rng.random() > 0.15
        }

    for _ in range(1000):
        bases, negatives = margins(), margins()
        number = official_pair(bases, negatives)
        record = official_record(bases, negatives, negative_prompt=list("abcdef"))
        (done,) = run([record], None, load_config([]))
        expected = None if number is None else (f"{number:02d}.png", f"{number:02d}.png", "abcdef"[number])
        found = [tuple(Path(path).name for path in pair[:2]) + pair[2:] for pair in images(done)]
        assert found == ([] if expected is None else [expected])
        counts["missing" if min(len(bases), len(negatives)) < max(len(bases), len(negatives)) else "whole"] += 1
        counts["pair" if expected else "none"] += 1
    assert min(counts.values()) > 100


@pytest.mark.usefixtures("omegaconf")
def test_a_rejected_image_without_a_known_hard_negative():
    record = official_record({4: [0.9]}, {4: [-0.9]})  # of a fifth variant, and the item has three hard negatives
    assert select_pair(record)["rejected"].endswith("/04.png")
    (done,) = run([record], None, load_config([]))
    assert "rejected_prompt" not in done["pairs"][0]


def test_v3_shares_the_index_and_takes_the_first_of_equals():
    record = item({0: [0.7], 1: [0.9], 2: [0.9]}, {0: [-0.5], 1: [0.2], 2: [-0.9]})
    assert select_pair(record)["chosen"] == "b2.png"  # negative 1 is all yes
    record = item({0: [0.8], 2: [0.8]}, {0: [-1], 2: [-1]})
    assert select_pair(record)["chosen"] == "b0.png"
    assert select_pair(item({0: [0.9]}, {1: [-1]})) is None


def test_v3_threshold_and_ties():
    assert base_verdict(verdict("b", 0.6)) == (True, "local score 0.60")
    assert base_verdict(verdict("b", 0.599)) == (False, "local score 0.60 below 0.6")
    wrong = {"local_score": 0.9, "answer_metadata": [{"p_yes": 1, "p_no": 0, "answer": "no"}]}
    nan = {"local_score": float("nan"), "answer_metadata": [{"answer": "yes"}]}
    assert not any(base_verdict(image).kept for image in (wrong, nan, {}))
    assert base_verdict({}) == (False, "no question was answered")
    assert base_verdict({"answer_metadata": [{}]}, "random") == (True, "no filter")  # reads no answer
    assert negative_verdict(verdict("n", 0.9, 0)) == (True, "1 of 2 answers are not yes")
    assert negative_verdict(verdict("n", 0.9, 0.1)) == (False, "0 of 2 answers are not yes")


def test_v2_chooses_the_rejected_image_by_log_probability():
    record = item({0: [0.9, 0.6], 1: [0.95, 0.45]}, {0: [-0.6, 1], 1: [-0.5], 2: [-0.9]})
    scores = {"b0.png": -3.0, "n0.png": -5.0, "n2.png": -2.5}
    asked = []

    def logprobs(paths):
        asked.extend(paths)
        return [scores[path] for path in paths]

    pair = select_pair(record, "v2", logprobs=logprobs)
    assert (pair["chosen"], pair["rejected"]) == ("b0.png", "n2.png")
    assert asked == ["b0.png", "n0.png", "n2.png"]
    with pytest.raises(UsageError, match="logprobs"):
        select_pair(record, "v2")
    assert select_pair(item({0: [0.9]}, {2: [-0.9]}), "v2")["rejected"] == "n2.png"  # one candidate: nothing to decide
    assert select_pair(item({0: [0.5]}, {0: [-0.9]}), "v2") is None


@pytest.mark.parametrize("rule", ["v3", "v2"])
def test_the_rejected_image_is_another_base_image(rule):
    own = SelectConfig(rule=rule, rejected="own")
    record = item({0: [-0.2, 0.9], 1: [0.9, 0.9], 2: [-0.8, 0.1]}, {0: [-1], 1: [-1]})
    pair = select_pair(record, rule, settings=own, logprobs=lambda paths: [0.0] * len(paths))
    assert (pair["chosen"], pair["rejected"]) == ("b1.png", "b2.png")
    # If no other base image is wrong, the hard negative is rejected. The chosen image itself never is.
    assert select_pair(item({0: [0.9], 1: [0.8]}, {0: [-1]}), rule, settings=own)["rejected"] == "n0.png"
    assert select_pair(item({0: [0.9, 0.9, 0.9, -0.1]}, {1: [1]}), rule, settings=own) is None
    assert select_pair(item({0: [-0.9]}, {0: [-1]}), rule, settings=own) is None


def images(record):
    return [(pair["chosen"], pair["rejected"], pair["rejected_prompt"]) for pair in record.get("pairs", ())]


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize(
    ("bases", "settings", "expected"),
    [
        ({0: [0.7], 2: [0.9]}, [], ("b2.png", "n2.png", "n2")),
        ({0: [0.9], 2: [-0.9]}, ["select.rejected=own"], ("b0.png", "b2.png", "n2")),
        # Of three variants, base_5 is the second image of the last one, which has one hard negative.
        ({0: [0.7], 2: [-0.2], 3: [-0.9], 5: [0.9]}, ["select.rejected=own"], ("b5.png", "b3.png", "n0")),
        ({0: [0.7], 2: [-0.2], 3: [-0.9], 5: [0.9]}, [], ("b5.png", "n2.png", "n2")),
    ],
)
def test_the_rejected_prompt_is_that_of_the_variant(bases, settings, expected):
    (done,) = run([item(bases, {0: [-1], 1: [-1], 2: [-1]})], None, load_config(settings))
    assert images(done) == [expected]


@pytest.mark.usefixtures("omegaconf")
def test_more_pairs_have_other_images():
    bases = {0: [0.9], 1: [0.7], 2: [0.8], 3: [-0.9], 4: [-0.1], 5: [1.0]}
    record = item(bases, {0: [-1], 1: [-1], 2: [-1]})
    (done,) = run([record], None, load_config(["select.rejected=own", "select.pairs=4"]))
    # b2 and b1 are right too, but no wrong image is left.
    assert images(done) == [("b5.png", "b3.png", "n0"), ("b0.png", "b4.png", "n1")]
    (done,) = run([record], None, load_config(["select.pairs=2"]))
    assert images(done) == [("b5.png", "n2.png", "n2"), ("b0.png", "n0.png", "n0")]
    # With own images, only the first pair may have a hard negative.
    two = item({0: [0.9], 1: [0.7]}, {0: [-1], 1: [-1]})
    (done,) = run([two], None, load_config(["select.rejected=own", "select.pairs=2"]))
    assert images(done) == [("b0.png", "n0.png", "n0")]
    (done,) = run([record], None, load_config(["select.rule=random", "select.rejected=own", "select.pairs=9"]))
    assert len(images(done)) == 3


@pytest.mark.usefixtures("omegaconf")
def test_a_failed_further_pair_leaves_the_others(monkeypatch):
    calls = []

    def logprobs(prompt, model, config, out, paths):
        calls.append(paths)
        return [0.0] * len(paths) if len(calls) == 1 else Failure("an image cannot be read")

    monkeypatch.setattr(select_module, "_logprobs", logprobs)
    record = item({0: [0.9], 1: [0.8], 2: [-0.9]}, {0: [-1], 1: [-1], 2: [-1]})
    (done,) = run([record], object(), load_config(["select.rule=v2", "select.pairs=2"]))
    assert (images(done), len(calls)) == ([("b0.png", "n0.png", "n0")], 2)
    (done,) = run([record], object(), load_config(["select.rule=v2"]))
    assert (done["kept"], done["reason"]) == (False, "an image cannot be read")
    calls.clear()
    (done,) = run([record], object(), load_config(["select.rule=v2", "select.pairs=2", "select.rejected=own"]))
    assert (images(done), calls) == ([("b0.png", "b2.png", "n2")], [])  # needs no log-probabilities


def test_random_is_unfiltered_and_seeded():
    record = item({0: [-1], 1: [-1], 2: [-1]}, {0: [1], 1: [1], 2: [1]})
    chosen = {select_pair(record, "random", seed)["chosen"] for seed in range(40)}
    assert chosen == {"b0.png", "b1.png", "b2.png"}
    assert select_pair(record, "random", random.Random(5)) == select_pair(record, "random", 5)
    own = select_pair(record, "random", 5, settings=SelectConfig(rule="random", rejected="own"))
    assert own == select_pair(record, "random", 5)  # which image is wrong is unknown without answers


def test_wrong_rule_and_wrong_names():
    with pytest.raises(UsageError, match="one of v3, v2, best, likeliest, random, got 'v4'"):
        select_pair(GOLDEN[0]["input"], "v4")
    numbered = {"base_metadata": {"base": verdict("b1", 1)}, "negative_metadata": {"negative_0": verdict("n", -1)}}
    with pytest.raises(OspoError, match="base_0"):
        select_pair(numbered)


@pytest.mark.usefixtures("omegaconf")
def test_every_item_comes_out_with_pairs_or_a_reason():
    records = [
        item({0: [0.9], 1: [0.1]}, {0: [-1], 1: [1]}),
        item({0: [0.1]}, {0: [-1]}),
        item({0: [0.9]}, {0: [1]}),
        item({}, {}, variant_reasons=["no contrastive prompt in the answer"] * 3),
        item({0: [0.9]}, {0: [-1]}, question=[]),
    ]
    done = list(run(records, None, load_config()))
    assert [r["kept"] for r in done] == [True, False, False, False, False]
    assert done[0]["pairs"][0]["chosen_score"] == pytest.approx(0.9)
    assert all("pairs" not in record for record in done[1:])
    assert [v["kept"] for v in done[0]["base_metadata"].values()] == [True, False]
    assert "local score 0.10 below 0.6" in done[1]["reason"]
    assert "no negative image" in done[2]["reason"]
    assert "no contrastive prompt" in done[3]["reason"]
    assert "no question" in done[4]["reason"]
    assert "kept" not in records[0]


@pytest.mark.usefixtures("omegaconf")
def test_v2_reads_no_image_outside_of_the_run_folder(tmp_path, tiny):
    record = item({0: [0.9]}, {0: [-1], 1: [-1]}, prompt="a red circle")
    for image in (record["base_metadata"]["base_0"], *record["negative_metadata"].values()):
        image["path"] = f"../{image['path']}"
        Image.new("RGB", (48, 48), "red").save(tmp_path / image["path"][3:])
    (tmp_path / "run").mkdir()
    model = load_model(tiny)
    for folders, kept in (([], False), ([f"read_from=[{tmp_path}]"], True)):
        (done,) = run([record], model, load_config(["select.rule=v2", *folders]), out=tmp_path / "run")
        assert done["kept"] == kept
        assert kept or "leads out of the folders" in done["reason"]

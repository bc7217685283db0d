"""Selection: the official figures, each rule by hand, and what the stage writes."""

import json
import random
from pathlib import Path

import pytest

from ospo_fast.config import SelectConfig, load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.records import iter_pairs
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


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["input"]["item_id"])
def test_official_figures(case):
    assert select_pair(case["input"]) == case["expect"]


def test_golden_has_both_outcomes():
    assert {case["expect"] is None for case in GOLDEN} == {True, False}


def test_v3_shares_the_index_and_takes_the_first_of_equals():
    record = item({0: [0.7], 1: [0.9], 2: [0.9]}, {0: [-0.5], 1: [0.2], 2: [-0.9]})
    assert select_pair(record)["chosen"] == "b2.png"  # negative 1 is all yes
    record = item({0: [0.8], 2: [0.8]}, {0: [-1], 2: [-1]})
    assert select_pair(record)["chosen"] == "b0.png"
    assert select_pair(item({0: [0.9]}, {1: [-1]})) is None


def test_v3_threshold_and_ties():
    assert base_verdict(verdict("b", 0.6))[0]
    assert not base_verdict(verdict("b", 0.599))[0]
    assert not base_verdict({"local_score": 0.9, "answer_metadata": [{"p_yes": 1, "p_no": 0, "answer": "no"}]})[0]
    assert not base_verdict({"local_score": float("nan"), "answer_metadata": [{"answer": "yes"}]})[0]
    assert negative_verdict(verdict("n", 0.9, 0))[0]
    assert not negative_verdict(verdict("n", 0.9, 0.1))[0]


def test_v2():
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
def test_rejected_is_an_own_drawing_where_wanted(rule):
    own = SelectConfig(rule=rule, rejected="own")
    record = item({0: [-0.2, 0.9], 1: [0.9, 0.9], 2: [-0.8, 0.1]}, {0: [-1], 1: [-1]})
    pair = select_pair(record, rule, settings=own, logprobs=lambda paths: [0.0] * len(paths))
    assert (pair["chosen"], pair["rejected"]) == ("b1.png", "b2.png")
    # None of the others is wrong: a near miss after all. The chosen itself is never rejected.
    assert select_pair(item({0: [0.9], 1: [0.8]}, {0: [-1]}), rule, settings=own)["rejected"] == "n0.png"
    assert select_pair(item({0: [0.9, 0.9, 0.9, -0.1]}, {1: [1]}), rule, settings=own) is None
    assert select_pair(item({0: [-0.9]}, {0: [-1]}), rule, settings=own) is None


@pytest.mark.usefixtures("omegaconf")
def test_an_own_drawings_variant_gives_the_rejected_prompt():
    record = item({0: [0.9], 2: [-0.9]}, {0: [-1], 1: [-1], 2: [-1]})
    (done,) = run([record], None, load_config(["select.rejected=own"]))
    assert (done["rejected"], done["rejected_prompt"]) == ("b2.png", "n2")


@pytest.mark.usefixtures("omegaconf")
def test_further_drawings_of_a_variant():
    """Of three variants, base_5 is the second drawing of the last, and has no near miss beside it."""
    record = item({0: [0.7], 2: [-0.2], 3: [-0.9], 5: [0.9]}, {0: [-1], 2: [-1]})
    (done,) = run([record], None, load_config(["select.rejected=own"]))
    assert (done["chosen"], done["rejected"], done["rejected_prompt"]) == ("b5.png", "b3.png", "n0")
    (done,) = run([record], None, load_config())  # the near miss of its variant
    assert (done["chosen"], done["rejected"], done["rejected_prompt"]) == ("b5.png", "n2.png", "n2")


@pytest.mark.usefixtures("omegaconf")
def test_further_pairs_are_of_other_images():
    drawn = {0: [0.9], 1: [0.7], 2: [0.8], 3: [-0.9], 4: [-0.1], 5: [1.0]}
    record = item(drawn, {0: [-1], 1: [-1], 2: [-1]})
    (done,) = run([record], None, load_config(["select.rejected=own", "select.pairs=4"]))
    assert [(r["item_id"], r["chosen"], r["rejected"], r["rejected_prompt"]) for r in iter_pairs([done])] == [
        ("0000001", "b5.png", "b3.png", "n0"),
        ("0000001-1", "b0.png", "b4.png", "n1"),
    ]  # b2 and b1 are right, too, but nothing wrong is left
    (done,) = run([record], None, load_config(["select.pairs=2"]))
    assert [(r["chosen"], r["rejected"]) for r in iter_pairs([done])] == [("b5.png", "n2.png"), ("b0.png", "n0.png")]
    (done,) = run([record], None, load_config(["select.rejected=own"]))
    assert "further_pairs" not in done
    # Near misses stand in for the first pair alone.
    (done,) = run(
        [item({0: [0.9], 1: [0.7]}, {0: [-1], 1: [-1]})], None, load_config(["select.rejected=own", "select.pairs=2"])
    )
    assert (done["chosen"], done["rejected"], "further_pairs" in done) == ("b0.png", "n0.png", False)
    (done,) = run([record], None, load_config(["select.rule=random", "select.rejected=own", "select.pairs=9"]))
    assert len(list(iter_pairs([done]))) == 3


@pytest.mark.usefixtures("omegaconf")
def test_a_further_pair_that_cannot_be_had_costs_no_other(monkeypatch):
    asked = []

    def logprobs_of(prompt, model, batch_size, out):
        def logprobs(paths):
            asked.append(paths)
            if len(asked) > 1:
                raise select_module._NoLogProbsError("an image cannot be read")
            return [0.0] * len(paths)

        return logprobs

    monkeypatch.setattr(select_module, "_logprobs_of", logprobs_of)
    record = item({0: [0.9], 1: [0.8], 2: [-0.9]}, {0: [-1], 1: [-1], 2: [-1]})
    (done,) = run([record], object(), load_config(["select.rule=v2", "select.pairs=2"]))
    assert (done["chosen"], "further_pairs" in done, len(asked)) == ("b0.png", False, 2)
    asked.clear()
    (done,) = run([record], object(), load_config(["select.rule=v2", "select.pairs=2", "select.rejected=own"]))
    assert (done["chosen"], done["rejected"], asked) == ("b0.png", "b2.png", [])  # nothing asked of the model for it


def test_random_is_unfiltered_and_seeded():
    record = item({0: [-1], 1: [-1], 2: [-1]}, {0: [1], 1: [1], 2: [1]})
    drawn = {select_pair(record, "random", seed)["chosen"] for seed in range(40)}
    assert drawn == {"b0.png", "b1.png", "b2.png"}
    assert select_pair(record, "random", random.Random(5)) == select_pair(record, "random", 5)
    own = select_pair(record, "random", 5, settings=SelectConfig(rule="random", rejected="own"))
    assert own == select_pair(record, "random", 5)  # which drawing is wrong is not known without judging


def test_wrong_rule_and_wrong_names():
    with pytest.raises(UsageError, match="one of v3, v2, random, got 'best'"):
        select_pair(GOLDEN[0]["input"], "best")
    with pytest.raises(OspoError, match="base_0"):
        select_pair({"base_metadata": {"base": verdict("b", 1)}, "negative_metadata": {}})


@pytest.mark.usefixtures("omegaconf")
def test_stage_writes_every_item_with_reasons():
    records = [
        item({0: [0.9], 1: [0.1]}, {0: [-1], 1: [1]}),
        item({0: [0.1]}, {0: [-1]}),
        item({0: [0.9]}, {0: [1]}),
        item({}, {}, variant_reasons=["no contrastive prompt in the answer"] * 3),
        item({0: [0.9]}, {0: [-1]}, question=[]),
    ]
    done = list(run(records, None, load_config()))
    assert [r["kept"] for r in done] == [True, False, False, False, False]
    assert done[0]["rejected_prompt"] == "n0"
    assert done[0]["chosen_score"] == pytest.approx(0.9)
    assert [v["kept"] for v in done[0]["base_metadata"].values()] == [True, False]
    assert "local score 0.10 below 0.6" in done[1]["reason"]
    assert "no negative image" in done[2]["reason"]
    assert "no contrastive prompt" in done[3]["reason"]
    assert "no question" in done[4]["reason"]
    assert "kept" not in records[0]


@pytest.mark.usefixtures("omegaconf")
def test_rejected_prompt_is_that_of_the_variant():
    (done,) = run([item({0: [0.7], 2: [0.9]}, {0: [-1], 2: [-1]})], None, load_config())
    assert done["rejected_prompt"] == "n2"

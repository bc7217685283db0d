"""Which pairs are held out: the same share of each category, whole prompts, in any order of the records."""

import collections

import pytest

from ospo_fast.config import load_config
from ospo_fast.errors import UsageError
from ospo_fast.stages.training_pairs import check_held_out, held_out_ids, select_training_pairs

pytestmark = pytest.mark.usefixtures("omegaconf")


def record(name, category, pairs=1):
    pair = {"chosen": "a.png", "rejected": "b.png", "mask_path": "masks/x.safetensors"}
    return {"item_id": name, "prompt": f"prompt {name}", "t2i_category": category, "pairs": [pair] * pairs}


RECORDS = [record(f"{name}{n}", name) for name, count in (("red", 8), ("left", 4), ("one", 2)) for n in range(count)]


def held_out(records, count, *overrides):
    config = load_config([f"train.validation_pairs={count}", *overrides])
    return held_out_ids(select_training_pairs(records, config), config)


def test_each_category_gives_the_same_share_of_its_prompts():
    counts = collections.Counter(pair_id.rstrip("0123456789") for pair_id in held_out(RECORDS, 7))
    assert counts == {"red": 4, "left": 2, "one": 1}
    assert len(held_out(RECORDS, 3)) == 3
    assert held_out(RECORDS, 0) == set()


def test_the_choice_depends_on_seed_and_prompts_alone():
    found = held_out(RECORDS, 5)
    assert held_out(RECORDS[::-1], 5) == found
    assert held_out(RECORDS, 5, "train.batch_size=3", "train.steps=7") == found
    assert any(held_out(RECORDS, 5, f"seed={seed}") != found for seed in range(3))


def test_pairs_of_a_prompt_stay_together_and_limits_come_first():
    several = [record(f"red{n}", "red", pairs=3) for n in range(4)]
    found = held_out(several, 7)
    assert len(found) == 6
    assert all({f"red{n}", f"red{n}-1", f"red{n}-2"} <= found for n in range(4) if f"red{n}" in found)
    few = select_training_pairs(RECORDS, load_config(["train.max_pairs=4"]))
    assert held_out(RECORDS, 2, "train.max_pairs=4") < {item.pair_id for item in few}


@pytest.mark.parametrize("count", [14, 100])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(count):
    expected = rf"train\.validation_pairs: got {count}, expected .* there are 14 pairs of 14 prompts\."
    with pytest.raises(UsageError, match=expected):
        check_held_out(load_config([f"train.validation_pairs={count}"]), RECORDS)
    check_held_out(load_config([]), [])


def test_a_split_that_holds_nothing_out_is_refused():
    with pytest.raises(
        UsageError, match=r"got 2, expected .* all pairs of at least one prompt; there are 6 pairs of 2"
    ):
        held_out([record("a", "red", pairs=3), record("b", "red", pairs=3)], 2)

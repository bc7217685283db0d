"""Question files, Soft-TIFA against a reference written from its definition, and summaries against numbers by hand."""

import json
from fractions import Fraction

import numpy as np
import pytest

from ospo_fast.errors import UsageError
from ospo_fast.evaluation.questions import Item, Question, Scores, digest, read_questions, soft_tifa, summarize

GENEVAL2 = {
    "prompt": "four white bicycles",
    "atom_count": 3,
    "vqa_list": [["How many bicycles are in the image?", "four"], ["Are the bicycles white?", "Yes"]],
    "skills": ["count", "attribute"],
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reference(probabilities):
    """Soft-TIFA of a prompt by its definition: the arithmetic mean, and the N-th root of the product.

    The product is exact, and its root is found by bisection: no logarithm, as in the code under test.
    """
    exact = [Fraction(p) for p in probabilities]
    total, product = Fraction(0), Fraction(1)
    for p in exact:
        total += p
        product *= p
    low, high = Fraction(0), Fraction(1)
    for _ in range(60):
        middle = (low + high) / 2
        middle = middle.limit_denominator(2**60)
        low, high = (middle, high) if middle ** len(exact) <= product else (low, middle)
    return float(total / len(exact)), float(low)


def test_soft_tifa_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    cases = [[0.0], [1.0], [0.0, 1.0], [1.0] * 7, [1e-300, 1.0], [5e-324, 0.5], [0.25, 1.0], [0.0, 0.0, 0.0]]
    for _ in range(300):
        row = rng.random(rng.integers(1, 12)) ** rng.choice([0.1, 1, 8])
        row[rng.random(len(row)) < 0.05] = 0
        cases.append([float(p) for p in row])
    assert sum(0 in case for case in cases) > 50
    assert max(abs(a - b) for case in cases for a, b in zip(soft_tifa(case), reference(case), strict=True)) < 1e-6
    assert soft_tifa([0.25, 1.0]) == (0.625, 0.5)


def test_soft_tifa_of_a_benchmark_is_the_mean_over_prompts():
    """As its README: 'these scores are averaged over the benchmark'; scipy's gmean is that of its own script."""
    gmean = pytest.importorskip("scipy.stats").gmean
    rng = np.random.default_rng(1)
    rows = [rng.random(rng.integers(1, 9)).tolist() for _ in range(30)]
    items = [Item(f"p{i}", tuple(Question(f"q{n}") for n in range(len(row)))) for i, row in enumerate(rows)]
    found = summarize(items, Scores.from_images([[row] for row in rows]))
    assert found["soft_tifa_gm"]["mean"] == pytest.approx(np.mean([gmean(row) for row in rows]), abs=1e-9)
    assert found["soft_tifa_am"]["mean"] == pytest.approx(np.mean([np.mean(row) for row in rows]), abs=1e-9)


@pytest.mark.parametrize("probabilities", [[], [1.1], [-0.1], [float("nan")]])
def test_what_is_no_probability_is_refused(probabilities):
    with pytest.raises(UsageError, match="expected at least one, each from 0 to 1"):
        soft_tifa(probabilities)


def test_scores_are_means_over_images_and_skills_are_pooled():
    items = [
        Item("one", (Question("a", skill="x"), Question("b", skill="y")), "easy"),
        Item("two", (Question("a", skill="x"), Question("b", skill="x"), Question("c", skill="x")), "hard"),
    ]
    scores = Scores.from_images([[[1.0, 0.0], [0.5, 0.5]], [[0.25, 0.25, 0.25]]])
    assert scores.probabilities == [[0.75, 0.25], [0.25, 0.25, 0.25]]
    assert scores.am == [0.5, 0.25]
    assert scores.gm == pytest.approx([0.25, 0.25])  # of the images 0 and 0.5
    before = Scores.from_images([[[0.5, 0.0]], [[0.0, 0.25, 0.25]]])
    found = summarize(items, scores, before)
    assert found["prompts"] == 2
    assert found["soft_tifa_am"]["mean"] == pytest.approx(0.375)
    assert found["soft_tifa_am"]["difference"] == pytest.approx((0.25 + 0.25 - 1 / 6) / 2)
    assert found["soft_tifa_am"]["interval"] == pytest.approx((0.25, 0.5))
    assert found["soft_tifa_am"]["difference_interval"] == pytest.approx((1 / 12, 0.25))
    assert list(found["categories"]) == ["easy", "hard"]
    assert found["categories"]["easy"]["soft_tifa_gm"]["mean"] == pytest.approx(0.25)
    assert found["categories"]["easy"]["soft_tifa_gm"]["interval"] is None
    assert list(found["skills"]) == ["x", "y"]
    assert found["skills"]["x"]["questions"] == 4
    assert found["skills"]["x"]["soft_tifa_am"]["mean"] == pytest.approx((0.75 + 3 * 0.25) / 4)
    assert found["skills"]["x"]["soft_tifa_am"]["difference"] == pytest.approx((0.25 + 0.25) / 4)
    assert "difference" not in summarize(items, scores)["soft_tifa_am"]


def test_files_of_geneval2_and_own_ones(tmp_path):
    own = {"prompt": " a red circle ", "questions": ["is it red?"], "answers": ["NO"], "category": "color"}
    items = read_questions(write(tmp_path / "q.jsonl", GENEVAL2, own))
    assert items == [
        Item(
            "four white bicycles",
            (
                Question("How many bicycles are in the image?", "four", "count"),
                Question("Are the bicycles white?", "yes", "attribute"),
            ),
            "3 atoms",
            1,
        ),
        Item("a red circle", (Question("is it red?", "no"),), "color", 2),
    ]
    (tmp_path / "q.json").write_text("\ufeff" + json.dumps([GENEVAL2, own], indent=1))
    assert read_questions(tmp_path / "q.json") == items
    (tmp_path / "spread.jsonl").write_text(f"\n{json.dumps(GENEVAL2)}\n\n{json.dumps(own)}\n")
    assert digest(read_questions(tmp_path / "spread.jsonl")) == digest(items)
    assert digest(items[:1]) != digest(items)


QUESTION = {"prompt": "a dog", "questions": ["is there a dog?"]}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "expected 1 to"),
        ([{**QUESTION, "prompt": None}], "q.jsonl:1: prompt: got NoneType, expected a text"),
        ([{**QUESTION, "prompt": " "}], "q.jsonl:1: prompt: it is empty"),
        ([{"prompt": "a dog"}], "'a dog' has no list of 1 to 1000 questions"),
        ([{**QUESTION, "questions": []}], "'a dog' has no list of 1 to 1000 questions"),
        ([{**QUESTION, "questions": [" "]}], "got one of 0 characters"),
        ([{**QUESTION, "questions": ["x" * 1001]}], "got one of 1001 characters"),
        ([{**QUESTION, "questions": [1]}], "questions: got int, expected a text"),
        ([{**QUESTION, "answers": []}], "answers: 'a dog' has 1 questions, expected a list of as many"),
        ([{**QUESTION, "answers": ["a dog"]}], "answers: got 'a dog', expected one word"),
        ([{**QUESTION, "skills": ["a", "b"]}], "skills: 'a dog' has 1 questions"),
        ([{**QUESTION, "category": 1}], "category: got int"),
        ([{**QUESTION, "questions": ["is it?", "is it? "]}], "'is it\\?' comes twice, and would count twice"),
        ([QUESTION, {**QUESTION, "prompt": "A dog."}], "q.jsonl:2: prompt: 'A dog.' is also that of line 1"),
        ([{"prompt": "a dog", "vqa_list": [["q"]]}], "vqa_list: expected pairs"),
        ([[1]], "it is no JSON object; write one object on each line"),
        ([QUESTION, {"prompt": "x"}, {"prompt": "y"}], "2 lines cannot be used: line 2: "),
    ],
)
def test_wrong_questions_are_refused(tmp_path, rows, words):
    with pytest.raises(UsageError, match=words):
        read_questions(write(tmp_path / "q.jsonl", *rows))


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "q.txt").write_text("a red circle\n")
    with pytest.raises(UsageError, match=r"q.txt:1: it is no JSON .*; write one object on each line"):
        read_questions(tmp_path / "q.txt")
    (tmp_path / "q.json").write_text("[1")
    with pytest.raises(
        UsageError, match=r"--questions: cannot read .*q.json: .*; expected JSON lines, or a JSON array"
    ):
        read_questions(tmp_path / "q.json")
    with pytest.raises(UsageError, match=r"--questions: cannot read .*none.jsonl: No such file"):
        read_questions(tmp_path / "none.jsonl")

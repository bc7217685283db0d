"""Stage 4: questions read from an answer, and scores from answers."""

from types import SimpleNamespace

import pytest
from PIL import Image

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.stages import questions
from ospo_fast.stages.questions import parse_questions, score, with_answers, write_questions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Questions: Is there a cup? Is the cup red?", ["Is there a cup?", "Is the cup red?"]),
        ("Concepts and relations: a cup; Questions: Is there a cup?\nIs  there a CUP? Is it red", ["Is there a cup?"]),
        ("Is there a cup? ... ?", ["Is there a cup?"]),
        ("Questions: Is there a cup? User: is there a hat? <|Assistant|>: yes?", ["Is there a cup?"]),
        ("Questions: - Is there a cup?\n- Is there a hat?", ["Is there a cup?", "Is there a hat?"]),
        ("Questions:", []),
        ("", []),
    ],
)
def test_parse(text, expected):
    assert parse_questions(text) == expected


def test_write(monkeypatch):
    seeds = []

    def sample(model, templates, stage, settings, variables, given):
        seeds.extend(given)
        return [
            f"Questions: is there {values['prompt']}?" if "cup" in values["prompt"] else "well" for values in variables
        ]

    monkeypatch.setattr(questions, "sample_text", sample)
    items = [{"item_id": str(n), "prompt": p} for n, p in enumerate(["a cup", "a hat"])]
    done = list(write_questions(items, SimpleNamespace(templates="janus"), load_config(["questions.chunk=1"])))
    assert [r["question"] for r in done] == [["is there a cup?"], []]
    assert len(set(seeds)) == 2


def test_local_score():
    verdict = with_answers(
        {"path": "x"}, [{"p_yes": 0.9, "p_no": 0.1, "answer": "yes"}, {"p_yes": 0, "p_no": 1, "answer": "no"}]
    )
    assert verdict["local_score"] == pytest.approx((0.8 - 1) / 2)


def image_item(folder, item, names, asked):
    for name in names:
        (folder / item).mkdir(exist_ok=True)
        Image.new("RGB", (48, 48), (len(name), 7, ord(item[0]))).save(folder / item / f"{name}.png")
    meta = {name: {"path": f"{item}/{name}.png"} for name in names}
    sides = {side: {k: v for k, v in meta.items() if k.startswith(side)} for side in ("base", "negative")}
    return {"item_id": item, "question": asked, **{f"{side}_metadata": found for side, found in sides.items()}}


def test_score(tmp_path, script):
    items = [
        image_item(
            tmp_path,
            "a",
            ["base_0", "negative_0", "base_2", "negative_2"],
            ["is there a red circle?", "is there one object?"],
        ),
        image_item(tmp_path, "b", ["base_1", "negative_1"], []),
        image_item(tmp_path, "c", [], ["is there a red circle?"]),
    ]
    done = list(score(items, SimpleNamespace(templates="shapes"), load_config(["score.chunk=2"]), out=tmp_path))
    assert list(done[0]["base_metadata"]) == ["base_0", "base_2"]
    for verdict in [*done[0]["base_metadata"].values(), *done[0]["negative_metadata"].values()]:
        assert len(verdict["answer_metadata"]) == 2
        margins = [a["p_yes"] - a["p_no"] for a in verdict["answer_metadata"]]
        assert verdict["local_score"] == pytest.approx(sum(margins) / 2)
    assert done[1]["base_metadata"] == items[1]["base_metadata"]
    assert done[2]["base_metadata"] == {}


def test_a_missing_image_is_named(tmp_path, script):
    record = {
        "item_id": "a",
        "question": ["is it?"],
        "base_metadata": {"base_0": {"path": "none.png"}},
        "negative_metadata": {},
    }
    with pytest.raises(OspoError, match=r"none\.png"):
        list(score([record], SimpleNamespace(templates="shapes"), load_config(), out=tmp_path))


def test_the_models_own_words_and_eyes(tiny, tmp_path):
    """Nothing scripted: the random model's answers are noise, but they have the right form."""
    from ospo_fast.models import load_model

    model = load_model(tiny)
    items = [{"item_id": "a", "prompt": "a red circle"}]
    (done,) = write_questions(items, model, load_config(["questions.max_new_tokens=4"]))
    assert isinstance(done["question"], list)
    item = image_item(tmp_path, "a", ["base_0", "negative_0"], ["is there a red circle?"])
    (scored,) = score([item], model, load_config(), out=tmp_path)
    answer = scored["base_metadata"]["base_0"]["answer_metadata"][0]
    assert 0 <= answer["p_yes"] <= 1
    assert 0 <= answer["p_no"] <= 1
    assert answer["answer"] in ("yes", "no", "tie")

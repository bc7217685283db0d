"""Stage 4: questions read from an answer, and scores from answers."""

from types import SimpleNamespace

import pytest
from PIL import Image

from ospo_fast.config import load_config
from ospo_fast.generation import GenerationError
from ospo_fast.models import load_model
from ospo_fast.stages import perturb, questions, select
from ospo_fast.stages.failures import failure
from ospo_fast.stages.questions import parse_questions, score, with_answers, write_questions

pytestmark = pytest.mark.usefixtures("omegaconf")  # nearly every test reads a configuration


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
    monkeypatch.setattr(questions, "CHUNK", 1)
    items = [{"item_id": str(n), "prompt": p} for n, p in enumerate(["a cup", "a hat"])]
    done = list(write_questions(items, SimpleNamespace(templates="janus"), load_config()))
    assert [r["question"] for r in done] == [["is there a cup?"], []]
    assert done[1]["question_reason"] == "no question could be read from the model's answer"
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


def test_score(tmp_path, tiny, script):
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
    done = list(score(items, load_model(tiny), load_config(), out=tmp_path))
    assert list(done[0]["base_metadata"]) == ["base_0", "base_2"]
    for verdict in [*done[0]["base_metadata"].values(), *done[0]["negative_metadata"].values()]:
        assert len(verdict["answer_metadata"]) == 2
        margins = [a["p_yes"] - a["p_no"] for a in verdict["answer_metadata"]]
        assert verdict["local_score"] == pytest.approx(sum(margins) / 2)
    assert done[1]["base_metadata"] == items[1]["base_metadata"]
    assert done[2]["base_metadata"] == {}


def test_an_image_that_cannot_be_read_fails_alone(tmp_path, tiny, script):
    names = ["base_0", "negative_0", "base_1", "negative_1"]
    items = [image_item(tmp_path, item, names, ["is there a red circle?"]) for item in "abc"]
    (whole,) = score(items[:1], load_model(tiny), load_config(), out=tmp_path)
    torn = tmp_path / "b" / "base_1.png"
    torn.write_bytes(torn.read_bytes()[:60])
    for name in names:
        (tmp_path / "c" / f"{name}.png").unlink()
    first, second, third = score(items, load_model(tiny), load_config(), out=tmp_path)
    assert first == whole
    assert "local_score" in second["base_metadata"]["base_0"]
    broken = second["base_metadata"]["base_1"]
    assert "local_score" not in broken
    assert f"Cannot read the image {torn}" in broken["reason"]
    assert "No such file" in third["base_metadata"]["base_0"]["reason"]
    assert [failure("score", record) for record in (first, second)] == [None, broken["reason"]]
    kept = list(select.run([second, third], None, load_config(["select.threshold=-1"])))
    assert kept[0]["base_metadata"]["base_1"]["reason"] == broken["reason"]
    assert not kept[1]["kept"]
    assert "No such file" in kept[1]["reason"]


def test_the_models_own_words_and_eyes(tiny, tmp_path):
    """Nothing scripted: the random model's answers are noise, but they have the right form."""
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


def failing(bad, reply="Questions: is there a red circle?"):
    """A text writer that fails at the prompts that hold `bad`, as the engine does."""

    def generate(model, prompts, *, seeds, **settings):
        texts = [None if bad in model.detokenize(ids) else reply for ids in prompts]
        failed = {n: f"text {n}: the logits are not finite" for n, text in enumerate(texts) if text is None}
        if failed:
            raise GenerationError.from_failures("texts", texts, failed)
        return texts

    return generate


def test_an_item_that_fails_does_not_trouble_the_others(tiny, monkeypatch):
    monkeypatch.setattr("ospo_fast.generation.generate_text", failing("blue"))
    prompts = ["a red circle", "a blue circle", "a red circle " * 400, "a red <image> circle", "a green circle"]
    items = [{"item_id": str(n), "prompt": prompt} for n, prompt in enumerate(prompts)]
    done = list(write_questions(items, load_model(tiny), load_config()))
    assert [len(r["question"]) for r in done] == [1, 0, 0, 0, 1]
    reasons = [r.get("question_reason", "") for r in done]
    assert "not finite" in reasons[1]
    assert "no room for an answer" in reasons[2]
    assert "stands for an image" in reasons[3]
    dropped = list(
        select.run([{**r, "base_metadata": {"base_0": {"path": "x"}}} for r in done[1:4]], None, load_config())
    )
    assert [r["reason"] for r in dropped] == reasons[1:4]


def test_variants_that_fail_have_a_reason(tiny, monkeypatch):
    reply = "Contrastive Prompt: a blue circle\nStep 2. Prompt 1 Dense: a; Step 4. Prompt 2 Dense: b"
    items = [
        {"item_id": str(n), "prompt": prompt, "sub_category": "attribute1_color"}
        for n, prompt in enumerate(["a red circle", "a green circle"])
    ]
    model = load_model(tiny)
    monkeypatch.setattr("ospo_fast.generation.generate_text", failing("green", reply))
    fine, failed = perturb.run(items, model, load_config())
    assert fine["long_prompt"] == ["a"] * 3
    assert all("not finite" in reason for reason in failed["variant_reasons"])
    monkeypatch.setattr("ospo_fast.generation.generate_text", failing("dense", reply))
    assert all("not finite" in r for done in perturb.run(items, model, load_config()) for r in done["variant_reasons"])


def test_questions_too_long_and_answers_that_are_not_finite(tiny, tmp_path, script, monkeypatch):
    long = "is there a red " + "red " * 400 + "circle?"
    items = [
        image_item(tmp_path, "a", ["base_0", "negative_0"], [long, "is there a red circle?"]),
        image_item(tmp_path, "b", ["base_0", "negative_0"], [long]),
    ]
    model = load_model(tiny)
    one, other = score(items, model, load_config(), out=tmp_path)
    assert one["question"] == ["is there a red circle?"]
    assert len(one["base_metadata"]["base_0"]["answer_metadata"]) == 1
    assert other["question"] == []
    (dropped,) = select.run([other], None, load_config())
    assert "no room for an answer" in dropped["reason"]
    nothing = [[{"p_yes": float("nan"), "p_no": float("nan"), "answer": "tie"}]] * 2
    monkeypatch.setattr("ospo_fast.generation.answer_questions", lambda *_, **__: nothing)
    (scored,) = score(items[:1], model, load_config(), out=tmp_path)
    (dropped,) = select.run([scored], None, load_config())
    assert dropped["reason"] == "no base image passed: the answers are not finite"

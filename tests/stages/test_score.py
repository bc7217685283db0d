"""Stage 4, second part: scores from answers, and images and questions that fail alone."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ospo_fast.config import load_config
from ospo_fast.errors import UsageError
from ospo_fast.generation import caption_logprobs
from ospo_fast.models import load_model
from ospo_fast.models.chat import ChatModel
from ospo_fast.stages import score, select, templates
from ospo_fast.stages.score import failure, run, with_answers
from tests.models import tiny_chat

pytestmark = pytest.mark.usefixtures("omegaconf")  # nearly every test reads a configuration


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny)


def image_item(folder, item, names, questions):
    for name in names:
        (folder / item).mkdir(exist_ok=True)
        Image.new("RGB", (48, 48), (len(name), 7, ord(item[0]))).save(folder / item / f"{name}.png")
    images = {name: {"path": f"{item}/{name}.png"} for name in names}
    roles = {role: {k: v for k, v in images.items() if k.startswith(role)} for role in ("base", "negative")}
    return {"item_id": item, "question": questions, **{f"{role}_metadata": found for role, found in roles.items()}}


def test_local_score_is_the_mean_difference_of_yes_and_no():
    verdict = with_answers(
        {"path": "x"}, [{"p_yes": 0.9, "p_no": 0.1, "answer": "yes"}, {"p_yes": 0, "p_no": 1, "answer": "no"}]
    )
    assert verdict["local_score"] == pytest.approx((0.8 - 1) / 2)


def test_scores_of_all_images(tmp_path, model, script, monkeypatch):
    names = ["base_0", "negative_0", "base_2", "negative_2"]
    items = [
        image_item(tmp_path, "a", names, ["is there a red circle?", "is there one object?"]),
        image_item(tmp_path, "b", ["base_1", "negative_1"], []),
        image_item(tmp_path, "c", [], ["is there a red circle?"]),
    ]
    monkeypatch.setattr(score, "CHUNK", 2)
    done = list(run(items, model, load_config(), out=tmp_path))
    assert list(done[0]["base_metadata"]) == ["base_0", "base_2"]
    for verdict in [*done[0]["base_metadata"].values(), *done[0]["negative_metadata"].values()]:
        margins = [answer["p_yes"] - answer["p_no"] for answer in verdict["answer_metadata"]]
        assert len(margins) == 2
        assert verdict["local_score"] == pytest.approx(sum(margins) / 2)
    assert done[1]["base_metadata"] == items[1]["base_metadata"]
    assert done[2]["base_metadata"] == {}
    assert [failure(record) for record in (done[0], done[2])] == [None, None]
    assert "no question" in failure(done[1]).reason


def test_an_untrained_model_gives_probabilities(model, tmp_path):
    (scored,) = run(
        [image_item(tmp_path, "a", ["base_0", "negative_0"], ["is there a red circle?"])],
        model,
        load_config(),
        out=tmp_path,
    )
    answer = scored["base_metadata"]["base_0"]["answer_metadata"][0]
    assert 0 <= answer["p_yes"] <= 1
    assert 0 <= answer["p_no"] <= 1
    assert answer["answer"] in ("yes", "no", "tie")


def test_an_image_that_cannot_be_read_fails_alone(tmp_path, model, script):
    names = ["base_0", "negative_0", "base_1", "negative_1"]
    items = [image_item(tmp_path, item, names, ["is there a red circle?"]) for item in "abc"]
    (whole,) = run(items[:1], model, load_config(), out=tmp_path)
    torn = tmp_path / "b" / "base_1.png"
    torn.write_bytes(torn.read_bytes()[:60])
    for name in names:
        (tmp_path / "c" / f"{name}.png").unlink()
    first, second, third = run(items, model, load_config(), out=tmp_path)
    assert first == whole
    assert "local_score" in second["base_metadata"]["base_0"]
    broken = second["base_metadata"]["base_1"]
    assert "local_score" not in broken
    assert f"Cannot read the image {torn}" in broken["reason"]
    assert "No such file" in third["base_metadata"]["base_0"]["reason"]
    assert failure(first) is None
    assert failure(second).reason == broken["reason"]
    selected = list(select.run([second, third], None, load_config(["select.threshold=-1"])))
    assert selected[0]["base_metadata"]["base_1"]["reason"] == broken["reason"]
    assert not selected[1]["kept"]
    assert "No such file" in selected[1]["reason"]


def test_an_image_outside_of_the_run_folder_is_scored_only_where_the_user_says(tmp_path, model, script):
    (tmp_path / "run").mkdir()
    inside = image_item(tmp_path / "run", "a", ["base_0", "negative_0"], ["is there a red circle?"])
    image_item(tmp_path, "b", ["base_0"], [])
    paths = [str(tmp_path / "b" / "base_0.png"), "../b/base_0.png", "/dev/zero", "a\0b", None]
    images = {f"base_{n}": {"path": path} for n, path in enumerate(paths)} | {"base_9": {}}
    outside = {**inside, "item_id": "b", "base_metadata": images}
    one, two = run([inside, outside], model, load_config(), out=tmp_path / "run")
    assert "local_score" in one["base_metadata"]["base_0"]
    assert all("local_score" not in image and image["reason"] for image in two["base_metadata"].values())
    assert "local_score" in two["negative_metadata"]["negative_0"]
    (two,) = run([outside], model, load_config([f"read_from=[{tmp_path / 'b'}]"]), out=tmp_path / "run")
    assert ["local_score" in image for image in two["base_metadata"].values()] == [True, True, *4 * [False]]


def test_too_long_questions_are_dropped_and_answers_that_are_not_finite_fail(model, tmp_path, script, monkeypatch):
    long = "is there a red " + "red " * 400 + "circle?"
    items = [
        image_item(tmp_path, "a", ["base_0", "negative_0"], [long, "is there a red circle?"]),
        image_item(tmp_path, "b", ["base_0", "negative_0"], [long]),
    ]
    one, other = run(items, model, load_config(), out=tmp_path)
    assert one["question"] == ["is there a red circle?"]
    assert len(one["base_metadata"]["base_0"]["answer_metadata"]) == 1
    assert other["question"] == []
    (dropped,) = select.run([other], None, load_config())
    assert "no position for an answer" in dropped["reason"]
    nothing = [[{"p_yes": float("nan"), "p_no": float("nan"), "answer": "tie"}]] * 2
    monkeypatch.setattr("ospo_fast.generation.answer_questions", lambda *_, **__: nothing)
    (scored,) = run(items[:1], model, load_config(), out=tmp_path)
    (dropped,) = select.run([scored], None, load_config())
    assert dropped["reason"] == "no base image passed: the answers are not finite"


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_another_model_answers(tmp_path, family):
    """Its answers are those of a plain forward pass, and an image or a question that it cannot take fails alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    judge = tiny_chat.save(family, tmp_path / "judge")
    model, question = ChatModel(str(judge)), "is there a red circle ?"
    mark, repeats = tiny_chat.MARKS[family], {"llava": 27, "gemma3": 26}[family]  # which fit without the image
    long, control = "is there a red " * repeats + "circle ?", f"is there a {mark} ?"
    items = [
        image_item(tmp_path, "a", ["base_0", "negative_0"], [question, control]),
        image_item(tmp_path, "b", ["base_0", "negative_0"], [question]),
        image_item(tmp_path, "c", ["base_0", "negative_0"], [long]),
    ]
    one, two, three = run(items, model, load_config(), out=tmp_path)
    processor = AutoProcessor.from_pretrained(judge)
    plain = AutoModelForImageTextToText.from_pretrained(judge)
    ids = processor.tokenizer.convert_tokens_to_ids
    first = "<s> " if family == "gemma3" else ""
    asked = f"{question} Please answer 'yes' or 'no' without explanation."
    text = f"{first}user : {mark} {asked} assistant :"
    margins = []
    for record in (one, two):
        verdict = record["base_metadata"]["base_0"]
        with torch.no_grad():
            image = Image.open(tmp_path / verdict["path"])
            probs = plain(**processor(images=image, text=text, return_tensors="pt")).logits[0, -1].softmax(-1)
        (answer,) = verdict["answer_metadata"]
        assert answer["p_yes"] == pytest.approx(float(probs[ids("yes")] + probs[ids("Yes")]), abs=1e-5)
        assert answer["p_no"] == pytest.approx(float(probs[ids("no")] + probs[ids("No")]), abs=1e-5)
        assert answer["answer"] == ("yes" if answer["p_yes"] > answer["p_no"] else "no")
        margins.append(verdict["local_score"])
        assert margins[-1] == pytest.approx(answer["p_yes"] - answer["p_no"])
    assert one["question"] == [question]
    assert "holds a control token" in one["question_reason"]
    assert margins[0] != margins[1]
    assert "at most 128 fit" in three["base_metadata"]["base_0"]["reason"]
    assert "local_score" not in three["base_metadata"]["base_0"]


def test_the_dual_reward_is_the_likelihood_of_the_prompt(tmp_path, model):
    """Of each image, negative ones included, that of the item's prompt as its caption; questions are not needed."""
    good = {**image_item(tmp_path, "a", ["base_0", "negative_0"], []), "prompt": "a red circle"}
    broken = {**image_item(tmp_path, "b", ["base_0", "base_1"], []), "prompt": "a blue square and a red circle"}
    (tmp_path / "b" / "base_0.png").write_bytes(b"nothing")
    long = {**image_item(tmp_path, "c", ["base_0"], []), "prompt": "a red circle and a " * 90}
    none = {**image_item(tmp_path, "d", [], []), "prompt": "a red circle"}
    items = [good, broken, long, none]
    done = list(run(items, model, load_config(["select.rule=likeliest"]), out=tmp_path))
    request = model.chat([{"role": "user", "content": "Prompt:"}], image=True)
    ids, offsets = model.image_prompt_offsets("a red circle")
    caption = ids[[n for n, offset in enumerate(offsets) if offset is not None]]
    assert model.detokenize(caption).strip() == "a red circle"
    images = [Image.open(tmp_path / "a" / f"{name}.png") for name in ("base_0", "negative_0")]
    expected = caption_logprobs(model, images, [caption] * 2, request=request)
    found = [done[0][f"{role}_metadata"][f"{role}_0"] for role in ("base", "negative")]
    assert [verdict["local_score"] for verdict in found] == expected
    assert not any("answer_metadata" in verdict for verdict in found)
    assert "image" in done[1]["base_metadata"]["base_0"]["reason"]
    assert done[1]["base_metadata"]["base_1"]["local_score"] < 0
    assert "do not fit" in done[2]["base_metadata"]["base_0"]["reason"]
    assert [failure(record) is None for record in done] == [True, False, False, True]


def test_the_dual_reward_needs_a_unified_model_and_its_template(tmp_path, model):
    record = {**image_item(tmp_path, "a", ["base_0"], []), "prompt": "a red circle"}
    judge = ChatModel(str(tiny_chat.save("llava", tmp_path / "judge")))
    with pytest.raises(UsageError, match=r"score\.model: got .* with select\.rule=likeliest, expected a unified model"):
        list(run([record], judge, load_config(["select.rule=likeliest"]), out=tmp_path))
    path = tmp_path / "mine.yaml"
    text = (Path(templates.__file__).with_name("templates") / "shapes.yaml").read_text()
    path.write_text(text[: text.index("caption:")])
    with pytest.raises(UsageError, match=r"has no caption, which select\.rule=likeliest needs; add its messages"):
        list(run([record], model, load_config(["select.rule=likeliest", f"templates={path}"]), out=tmp_path))

"""Rejected prompts by questions about the hard negatives, as the official code of v2 chooses them."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import ospo_fast.generation
from ospo_fast.config import load_config
from ospo_fast.stages import rejected_prompts, select
from ospo_fast.stages.rejected_prompts import choose_rejected_prompts

pytestmark = pytest.mark.usefixtures("omegaconf")

MODEL = SimpleNamespace(templates="janus")
NEGATIVES = ["a red hat", "a blue cup", "", "two cups"]
# p_no − p_yes of the questions about each image.
MARGINS = {
    ("a", "hat?"): 0.9, ("a", "red?"): -0.9, ("a", "blue?"): 0.6, ("a", "two?"): 0.5,
    ("b", "hat?"): -0.2, ("b", "red?"): -0.9, ("b", "blue?"): 0.51, ("b", "two?"): 0.1,
    ("c", "hat?"): -0.2, ("c", "red?"): 0.2, ("c", "blue?"): 0.5, ("c", "two?"): 0.1,
}  # fmt: skip
# Mean log-probability of the codes of the chosen image under a prompt.
LOGPS = {"a cup": -3.0, "a red hat": -5.0, "a blue cup": -2.5, "two cups": -3.1}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A model whose questions, answers and log-probabilities are those above; returns the calls of each."""
    calls = {"sample": [], "answers": [], "logps": []}
    for number, name in enumerate("abc"):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{name}.png")

    def sample(model, templates, stage, settings, variables, seeds):
        calls["sample"].append((stage, [values["prompt"] for values in variables], list(seeds)))
        known = {"a red hat": "Questions: hat? red?", "a blue cup": "Questions: blue?", "two cups": "Questions: two?"}
        return [known[values["prompt"]] for values in variables]

    def answer(model, images, questions, *, template, **options):
        names = ["abc"[image.getpixel((0, 0))[0]] for image in images]
        calls["answers"].append(list(zip(names, questions, strict=True)))
        assert all(template(text) is not None for each in questions for text in each)
        return [
            [{"p_yes": 0.5 - MARGINS[name, text] / 2, "p_no": 0.5 + MARGINS[name, text] / 2} for text in texts]
            for name, texts in zip(names, questions, strict=True)
        ]

    def logps(model, prompts, codes, *, batch_size):
        texts = ["".join(map(chr, ids.tolist())) for ids in prompts]
        assert codes.shape == (len(prompts), 4)
        calls["logps"].append(texts)
        return [LOGPS[text] for text in texts]

    monkeypatch.setattr(rejected_prompts, "sample_text", sample)
    monkeypatch.setattr(ospo_fast.generation, "answer_questions", answer)
    monkeypatch.setattr(rejected_prompts, "mean_logprobs", logps)
    monkeypatch.setattr(rejected_prompts, "chat_ids", lambda *rest, **options: torch.zeros(1))
    monkeypatch.setattr(rejected_prompts, "image_prompt_ids", lambda model, text: torch.tensor([*map(ord, text)]))
    monkeypatch.setattr(rejected_prompts, "image_codes", lambda model, paths: [torch.zeros(4)] * len(paths))
    return calls


def item(item_id, *chosen, **fields):
    pairs = [{"chosen": f"{name}.png", "rejected": "x.png", "rejected_prompt": "a red hat"} for name in chosen]
    return {"item_id": item_id, "prompt": "a cup", "negative_prompt": NEGATIVES, "kept": True, "pairs": pairs, **fields}


def choose(records, tmp_path, *settings):
    return choose_rejected_prompts(records, MODEL, load_config(["select.rejected_prompt=asked", *settings]), tmp_path)


def test_the_nearest_of_the_hard_negatives_that_are_not_seen(asked, tmp_path):
    dropped = {"item_id": "0", "prompt": "a cup", "kept": False, "reason": "no image"}
    records = [item("1", "a"), dropped, item("2", "b", "c"), item("3", "c")]
    first, same, second, third = choose(records, tmp_path)
    # Image a lacks a hat and blue, but p_no − p_yes of "two?" is not above 0.5: of two, the nearest to -3.0.
    assert [pair["rejected_prompt"] for pair in first["pairs"]] == ["a blue cup"]
    assert same is dropped
    # Image b lacks blue alone; image c shows every hard negative, and its pair is left out.
    assert [(pair["chosen"], pair["rejected_prompt"]) for pair in second["pairs"]] == [("b.png", "a blue cup")]
    assert (third["kept"], third["reason"]) == (False, "the chosen image shows no difference to a hard negative")
    assert "pairs" not in third
    assert first["rejected_question"] == [["hat?", "red?"], ["blue?"], [], ["two?"]]
    assert asked["logps"] == [["a cup", "a red hat", "a blue cup"]]
    [(stage, prompts, seeds)] = asked["sample"]
    assert (stage, prompts[:3], len(set(seeds))) == ("questions", ["a red hat", "a blue cup", "two cups"], 9)
    assert asked["answers"] == [[(name, ["hat?", "red?", "blue?", "two?"]) for name in "abcc"]]
    (stricter, *_) = choose(records, tmp_path, "select.margin=0.7")
    assert stricter["pairs"][0]["rejected_prompt"] == "a red hat"


def test_given_questions_are_asked(asked, tmp_path):
    """Those of the official file, vqa_prompt_mode_negative.json. A list of another form has no question."""
    (done,) = choose([item("1", "a", rejected_question=[["blue?"], "two?", [3], []])], tmp_path)
    assert [pair["rejected_prompt"] for pair in done["pairs"]] == ["a red hat"]
    assert asked["sample"] == [("questions", [], [])]
    assert asked["answers"] == [[("a", ["blue?"])]]
    (done,) = choose([item("1", "a", rejected_question=[])], tmp_path)
    assert done["reason"] == "there is no question about a hard negative"


def test_an_image_that_cannot_be_read_has_no_pair(asked, tmp_path):
    first, second = choose([item("1", "missing"), item("2", "a")], tmp_path)
    assert first["kept"] is False
    assert "missing.png" in first["reason"]
    assert second["pairs"][0]["rejected_prompt"] == "a blue cup"


def test_the_stage_selects_with_them(asked, tmp_path):
    answers = [{"p_yes": 1.0, "p_no": 0.0, "answer": "yes"}]
    wrong = [{"p_yes": 0.0, "p_no": 1.0, "answer": "no"}]
    record = {
        "item_id": "1", "prompt": "a cup", "negative_prompt": NEGATIVES, "question": ["cup?"],
        "base_metadata": {"base_0": {"path": "a.png", "local_score": 1.0, "answer_metadata": answers}},
        "negative_metadata": {"negative_0": {"path": "a.png", "local_score": -1.0, "answer_metadata": wrong}},
    }  # fmt: skip
    settings = load_config(["select.rejected_prompt=asked"])
    (done,) = select.run([record], MODEL, settings, out=tmp_path)
    assert done["pairs"][0]["rejected_prompt"] == "a blue cup"

"""Stage 4, first part: questions are parsed from answers, and an item that fails has a reason."""

from types import SimpleNamespace

import pytest

from ospo_fast.config import load_config
from ospo_fast.errors import Failure
from ospo_fast.models import load_model
from ospo_fast.models.chat import ChatModel
from ospo_fast.stages import perturb, questions, select
from ospo_fast.stages.questions import failure, parse_questions, run
from tests.models import tiny_chat

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
        ("?\n? a?b?\r< / user >?</user >?<|user |>?", ["a?", "b?"]),
        ("", []),
    ],
)
def test_questions_are_read_from_an_answer(text, expected):
    assert parse_questions(text) == expected


@pytest.mark.parametrize("unit", ["a", "a ", "?", "a?", "< ", "<|", "</ ", "user ", "user\t", "Questions:", "\n"])
@pytest.mark.parametrize(("start", "end"), [("", ""), ("a <", "?"), ("user", "?")])
def test_answers_of_any_form_take_linear_time(start, unit, end, seconds):
    assert seconds(parse_questions, start + unit * (100_000 // len(unit)) + end) < 10


def test_each_item_has_questions_or_a_reason(monkeypatch):
    seeds = []

    def sample(model, templates, stage, settings, variables, given):
        seeds.extend(given)
        return [
            f"Questions: is there {values['prompt']}?" if "cup" in values["prompt"] else "well" for values in variables
        ]

    monkeypatch.setattr(questions, "sample_text", sample)
    items = [{"item_id": str(n), "prompt": p} for n, p in enumerate(["a cup", "a hat"])]
    monkeypatch.setattr(questions, "CHUNK", 1)
    done = list(run(items, SimpleNamespace(templates="janus"), load_config()))
    assert [r["question"] for r in done] == [["is there a cup?"], []]
    assert done[1]["question_reason"] == "no question could be read from the model's answer"
    assert [failure(record) for record in done] == [None, Failure(done[1]["question_reason"])]
    assert len(set(seeds)) == 2


def test_an_untrained_model_gives_a_list(tiny):
    (done,) = run([{"item_id": "a", "prompt": "a red circle"}], load_model(tiny), load_config())
    assert isinstance(done["question"], list)


def failing(bad, reply="Questions: is there a red circle?"):
    """A replacement of `generate_text` that fails at the prompts that contain `bad`."""

    def generate(model, prompts, *, seeds, on_error, **settings):
        assert on_error == "skip"
        failed = Failure("the logits are not finite")
        return [failed if bad in model.detokenize(ids) else reply for ids in prompts]

    return generate


def test_items_fail_one_by_one(tiny, monkeypatch):
    monkeypatch.setattr("ospo_fast.generation.generate_text", failing("blue"))
    prompts = ["a red circle", "a blue circle", "a red circle " * 400, "a red <image> circle", "a green circle"]
    items = [{"item_id": str(n), "prompt": prompt} for n, prompt in enumerate(prompts)]
    done = list(run(items, load_model(tiny), load_config()))
    assert [len(r["question"]) for r in done] == [1, 0, 0, 0, 1]
    reasons = [r.get("question_reason", "") for r in done]
    for reason, words in zip(reasons[1:4], ("not finite", "no position for an answer", "<image>"), strict=True):
        assert words in reason
    judged = [{**r, "base_metadata": {"base_0": {"path": "x"}}} for r in done[1:4]]
    assert [r["reason"] for r in select.run(judged, None, load_config())] == reasons[1:4]


def test_failed_texts_of_the_perturb_stage_are_reasons(tiny, monkeypatch):
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


def test_another_model_writes_the_questions(tmp_path):
    """A text depends on the seed of its item, and a text that the model cannot take fails alone."""
    model = ChatModel(str(tiny_chat.save("llama", tmp_path / "llama")), images=False)
    prompts = ["a red circle", "a blue square", "a red <image> circle", "a red circle " * 800]
    items = [{"item_id": str(n), "prompt": prompt, "sub_category": "layout1"} for n, prompt in enumerate(prompts)]
    config = load_config(["questions.max_new_tokens=12", "questions.temperature=9"])
    done = list(run(items, model, config))
    assert all(isinstance(record["question"], list) for record in done)
    assert "holds a control token of the model, '<image>'" in done[2]["question_reason"]
    assert "no position for an answer" in done[3]["question_reason"]
    speaker = ChatModel(str(tiny_chat.save_speaker(tmp_path / "speaker", "is there a red circle ?")), images=False)
    asked = [record["question"] for record in run(items, speaker, load_config())]
    assert asked == [["is there a red circle ?"], ["is there a red circle ?"], [], []]


def test_the_seeds_of_another_model_are_those_of_the_items(tmp_path, monkeypatch):
    model = ChatModel(str(tiny_chat.save("llama", tmp_path)), images=False)
    texts = {}
    monkeypatch.setattr(questions, "parse_questions", lambda text: [text])
    config = load_config(["questions.max_new_tokens=12", "questions.temperature=9"])
    items = [{"item_id": str(n), "prompt": "a red circle", "sub_category": "layout1"} for n in range(6)]
    for size in (1, 6):
        monkeypatch.setattr(questions, "CHUNK", size)
        texts[size] = [record["question"] for record in run(items, model, config)]
    assert texts[1] == texts[6]
    assert len({text for (text,) in texts[1]}) > 4
    assert [record["question"] for record in run(items[3:], model, config)] == texts[1][3:]

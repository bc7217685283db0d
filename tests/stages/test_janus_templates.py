"""Janus-Pro's template set: every kind, every stage, and examples that our own parsers accept."""

import pytest

from ospo_fast.stages.perturb import METHODS, parse_contrast, parse_dense
from ospo_fast.stages.prompts import check_wording, parse_answer
from ospo_fast.stages.questions import parse_questions
from ospo_fast.stages.templates import load_templates

SET = load_templates("janus")


def said(messages):
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_kinds_and_sizes_are_the_official_ones():
    assert len(SET.kinds) == 12
    assert sum(kind.count for kind in SET.kinds.values()) == 16002
    assert {kind.sub_category for kind in SET.kinds.values()} == set(METHODS)
    assert SET.few_shot["complex"] == 5


@pytest.mark.parametrize("kind", SET.kinds)
def test_examples_of_prompts_are_accepted_answers(kind):
    entry, examples = SET.kinds[kind], SET.examples(kind)
    assert len(examples) == SET.few_shot[kind]
    for example in examples:
        prompt, _, _ = parse_answer(example)
        assert check_wording(prompt, entry.sub_category) is None
    chat = SET.messages(
        "prompts", kind=kind, category=entry.category, sub_category=entry.sub_category, examples=examples
    )
    assert [m["role"] for m in chat] == ["system", *["user", "assistant"] * len(examples), "user"]
    assert said(chat) == examples
    assert kind not in chat[0]["content"]  # described in words, not by its name
    assert SET.sampling("prompts") == {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 512}


@pytest.mark.parametrize("sub_category", METHODS)
def test_examples_of_perturb_and_questions_are_accepted_answers(sub_category):
    values = {"prompt": "P.", "kind": "", "sub_category": sub_category, "concepts": "", "relation": ""}
    chat = SET.messages("perturb", method="swap", **values)
    assert chat[-1]["content"] == "Description: P.\nChange: <swap>"
    for before, after in zip(chat[1::2], chat[2::2], strict=False):
        shown = before["content"].splitlines()[0].removeprefix("Description: ")
        assert parse_contrast(after["content"]) not in ("", shown)
    assert len(said(chat)) == 3
    asked = SET.messages("questions", **values)
    assert asked[-1]["content"] == "P."
    assert all(parse_questions(answer) for answer in said(asked))
    assert SET.sampling("questions") == {"temperature": 1.2, "top_p": 0.5, "max_new_tokens": 256}


def test_examples_of_densify_are_accepted_answers_and_vqa_has_none():
    chat = SET.messages("densify", prompt="A", negative_prompt="B")
    assert chat[-1]["content"] == "Prompt 1: A\nPrompt 2: B"
    for answer in said(chat):
        one, two = parse_dense(answer)
        assert one
        assert two
        assert one != two
    assert SET.messages("vqa", question="Is it?") == [
        {"role": "user", "content": "Is it? Please answer 'yes' or 'no' without explanation."}
    ]

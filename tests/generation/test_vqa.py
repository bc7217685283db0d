"""answer_questions against a plain transformers forward, one question at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from _measure import peak_mb
from PIL import Image

from ospo_fast.errors import UsageError
from ospo_fast.generation import answer_questions, caption_logprobs, vqa
from ospo_fast.generation.decoder import InferenceDecoder

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

QUESTIONS = [
    ["is there a red circle?", "are there two blue squares?", "is there a star?"],
    [],
    ["is the red circle left of the blue square?"],
    ["is there a star?", "is there a star?", "is there a red circle?"],
]


def template(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in QUESTIONS]


@torch.no_grad()
def plain(model: JanusUnifiedModel, image: Image.Image, messages: list[dict[str, str]]) -> tuple[float, float]:
    ids = model.chat(messages, image=True)[None]
    pixels = torch.as_tensor(model.processor.image_processor([image], return_tensors="pt")["pixel_values"])
    probs = model.module(input_ids=ids, pixel_values=pixels).logits[0, -1].softmax(-1)
    return max(probs[list(model.yes_ids)].tolist()), max(probs[list(model.no_ids)].tolist())


def test_answers_are_those_of_a_plain_forward_pass(tiny: JanusUnifiedModel, images: list[Image.Image]) -> None:
    found = answer_questions(tiny, images, QUESTIONS, template=template)
    assert [len(answers) for answers in found] == [len(asked) for asked in QUESTIONS]
    seen = set()
    for image, asked, answers in zip(images, QUESTIONS, found, strict=True):
        for question, answer in zip(asked, answers, strict=True):
            yes, no = plain(tiny, image, template(question))
            assert answer["p_yes"] == pytest.approx(yes, rel=1e-4, abs=1e-9)
            assert answer["p_no"] == pytest.approx(no, rel=1e-4, abs=1e-9)
            assert answer["answer"] == ("yes" if yes > no else "no")
            seen.add(round(answer["p_yes"], 9))
    assert len(seen) > 3  # answers depend on image and question
    assert found[3][0] == found[3][1]


@torch.no_grad()
def test_probabilities_of_expected_answers(tiny: JanusUnifiedModel, images: list[Image.Image]) -> None:
    wanted = [(7, 3, 9), (5,), (3, 20)]
    expected = [[wanted[(i + n) % 3] for n in range(len(asked))] for i, asked in enumerate(QUESTIONS)]
    found = answer_questions(tiny, images, QUESTIONS, template=template, expected=expected)
    same = answer_questions(tiny, images, QUESTIONS, template=template)
    for row, plain_row in zip(found, same, strict=True):
        assert [{**answer, "p_expected": 0} for answer in row] == [{**answer, "p_expected": 0} for answer in plain_row]
    for i, (image, asked) in enumerate(zip(images, QUESTIONS, strict=True)):
        for n, question in enumerate(asked):
            ids = tiny.chat(template(question), image=True)[None]
            pixels = torch.as_tensor(tiny.processor.image_processor([image], return_tensors="pt")["pixel_values"])
            probs = tiny.module(input_ids=ids, pixel_values=pixels).logits[0, -1].softmax(-1)
            largest = max(float(probs[number]) for number in expected[i][n])
            assert found[i][n]["p_expected"] == pytest.approx(largest, rel=1e-4, abs=1e-9)


def test_templates_may_put_the_question_before_the_image(tiny: JanusUnifiedModel, images: list[Image.Image]) -> None:
    def early(question: str) -> list[dict[str, str]]:
        return [*template(question), {"role": "assistant", "content": "yes"}, *template("is there?")]

    # The token ids of a chat may take the place of its messages.
    found = answer_questions(tiny, images, QUESTIONS, template=lambda question: tiny.chat(early(question), image=True))
    for image, asked, answers in zip(images, QUESTIONS, found, strict=True):
        for question, answer in zip(asked, answers, strict=True):
            yes, no = plain(tiny, image, early(question))
            assert (answer["p_yes"], answer["p_no"]) == pytest.approx((yes, no), rel=3e-4, abs=1e-9)  # of about 3e-4


def test_an_answer_depends_on_image_and_question_only(tiny: JanusUnifiedModel, images: list[Image.Image]) -> None:
    found = answer_questions(tiny, images * 12, QUESTIONS * 12, template=template)
    assert found == found[:4] * 12
    order = [3, 0, 2, 1]
    for size in (None, 1, 7):
        moved = answer_questions(
            tiny, [images[i] for i in order], [QUESTIONS[i] for i in order], template=template, batch_size=size
        )
        assert moved == [found[i] for i in order], size


def test_images_are_embedded_once_each(
    tiny: JanusUnifiedModel, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = []
    embed = tiny.embed_images

    def noting(given: list[Image.Image]) -> torch.Tensor:
        embedded.append([id(image) for image in given])
        return embed(given)

    monkeypatch.setattr(tiny, "embed_images", noting)
    answer_questions(tiny, images, QUESTIONS, template=template)
    assert len(embedded) == 1
    assert set(embedded[0]) == {id(images[i]) for i in (0, 2, 3)}


def test_the_memory_of_an_image_is_not_underestimated(
    tiny: JanusUnifiedModel, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate that sizes batches against the peak of the allocator, without copies of the weights."""
    from ospo_fast.shapes.model import build_model

    module = build_model(hidden=128, layers=8, intermediate=352, heads=4)
    model = type(tiny)(module, tiny.processor, name="deep")
    estimates: list[int] = []

    def max_batch_size(decoder: InferenceDecoder, item_bytes: int) -> int:
        estimates.append(item_bytes)
        return 24

    monkeypatch.setattr(vqa, "max_batch_size", max_batch_size)
    asked = [["is there a red circle?"]] * 24

    def run() -> None:
        answer_questions(model, images[:1] * 24, asked, template=template, progress=False)

    run()  # for what is allocated once
    with torch.no_grad():
        used = peak_mb(run) - peak_mb(InferenceDecoder, model)
    assert 0.5 * estimates[-1] * 24 / 1e6 < used < estimates[-1] * 24 / 1e6


def test_equal_probabilities_are_a_tie(tiny: JanusUnifiedModel, images: list[Image.Image]) -> None:
    with torch.no_grad():
        tiny.module.lm_head.weight.zero_()
    for answers in answer_questions(tiny, images, QUESTIONS, template=template):
        for answer in answers:
            assert answer["answer"] == "tie"
            assert answer["p_yes"] == answer["p_no"] == pytest.approx(1 / tiny.module.lm_head.out_features)


def test_empty_question_lists_give_empty_answers(tiny: JanusUnifiedModel, images: list[Image.Image]) -> None:
    assert answer_questions(tiny, [], [], template=template) == []
    assert answer_questions(tiny, images, [[]] * 4, template=template) == [[]] * 4


def test_bad_arguments_are_refused(tiny: JanusUnifiedModel, images: list[Image.Image]) -> None:
    with pytest.raises(UsageError, match="4 lists for 3 images"):
        answer_questions(tiny, images[:3], QUESTIONS, template=template)
    with pytest.raises(UsageError, match="empty question"):
        answer_questions(tiny, images[:1], [[" "]], template=template)
    with pytest.raises(UsageError, match="positions"):
        answer_questions(tiny, images[:1], [["is there a star? " * 60]], template=template)
    with pytest.raises(UsageError, match="batch_size"):
        answer_questions(tiny, images, QUESTIONS, template=template, batch_size=0)


@torch.no_grad()
def test_likelihoods_of_captions(tiny: JanusUnifiedModel, images: list[Image.Image]) -> None:
    request = tiny.chat(template("is there one object?"), image=True)
    captions = [torch.arange(9, 9 + length) for length in (3, 5, 5, 1)]
    found = caption_logprobs(tiny, images, captions, request=request)
    for image, ids, mean in zip(images, captions, found, strict=True):
        pixels = torch.as_tensor(tiny.processor.image_processor([image], return_tensors="pt")["pixel_values"])
        logits = tiny.module(input_ids=torch.cat([request, ids])[None], pixel_values=pixels).logits[0]
        logps = logits[len(request) - 1 : -1].log_softmax(-1).gather(1, ids[:, None])
        assert mean == pytest.approx(float(logps.mean()), rel=1e-4)
    order = [3, 0, 2, 1]
    moved = [[images[i] for i in order] * 9, [captions[i] for i in order] * 9]
    for size in (None, 1, 7):
        assert caption_logprobs(tiny, *moved, request=request, batch_size=size) == [found[i] for i in order] * 9
    assert caption_logprobs(tiny, [], [], request=request) == []


def test_wrong_captions(tiny: JanusUnifiedModel, images: list[Image.Image]) -> None:
    request = tiny.chat(template("is there one object?"), image=True)
    for captions, message in (
        ([torch.tensor([9])], "got 1 for 4 images, expected one for each image"),
        ([torch.tensor([], dtype=torch.long)] * 4, "got an empty one"),
        ([torch.full((10_000,), 9)] * 4, "positions"),
    ):
        with pytest.raises(UsageError, match=message):
            caption_logprobs(tiny, images, captions, request=request)

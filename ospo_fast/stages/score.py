"""Stage 4, second part: the model answers its questions about each of its images."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ospo_fast.config import Config
from ospo_fast.errors import Failure, OspoError, UsageError, attempt
from ospo_fast.files import locate, open_image
from ospo_fast.models.chat import ChatModel, TextModel
from ospo_fast.records import Answer, ImageVerdict, Record, chunked, image_verdicts, map_images
from ospo_fast.stages import StageContext
from ospo_fast.stages.templates import TemplateSet
from ospo_fast.stages.text_sampling import chat_ids, load_model_templates
from ospo_fast.stages.train_settings import is_dual

if TYPE_CHECKING:
    from PIL.Image import Image

    from ospo_fast.models.base import UnifiedModel

logger = logging.getLogger(__name__)

CHUNK = 64  # items between two writes to the store


def run(
    records: Iterable[Record],
    model: TextModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Add answers and local score to each image of an item.

    local_score = mean over the questions of p_yes − p_no, in [−1, 1]. By the rule likeliest it is the mean over the
    tokens of the item's prompt of log p(token | image, request for a caption, tokens before): SUDER's reward of
    generation (arXiv 2506.07963). Then there are no answers, and no questions are needed.

    Questions too long for the model are removed. An item without questions has images without a score. So has an image
    that cannot be read or whose score is not finite: its `reason` says so. The select stage drops both.

    A chat model answers one question at a time, and its p_yes is the sum over the spellings (`ChatModel.answer`).
    """
    from ospo_fast.generation import answer_questions

    templates = load_model_templates(model, config)
    if is_dual(config):
        yield from _score_captions(records, model, templates, config, out)
        return
    for part in chunked(records, CHUNK):
        texts = dict.fromkeys(question for record in part for question in record.get("question") or [])
        chats = {q: chat_ids(model, templates, "vqa", {"question": q}, image=True) for q in texts}
        chunk = [_remove_long_questions(record, chats) for record in part]
        slots, images, scored = _open_images([record for record in chunk if record.get("question")], config, out)
        if images:
            asked = [record["question"] for record, *_ in slots]
            if isinstance(model, ChatModel):
                results = [
                    _ask(model, templates, image, questions) for image, questions in zip(images, asked, strict=True)
                ]
            else:
                found = answer_questions(
                    model,
                    images,
                    asked,
                    template=cast("dict[str, Tensor]", chats).__getitem__,
                    batch_size=config.score.batch_size,
                    progress=False,
                )
                results = cast("list[list[Answer] | Failure]", found)
            for (record, role, name, verdict), answers in zip(slots, results, strict=True):
                scored[record["item_id"], role, name] = (
                    {**verdict, "reason": answers.reason}
                    if isinstance(answers, Failure)
                    else with_answers(verdict, answers)
                )
        for record in chunk:
            yield map_images(record, partial(_look_up, scored, record["item_id"]))


def _open_images(
    records: list[Record], config: Config, out: Path | None
) -> tuple[list[tuple[Record, str, str, ImageVerdict]], list[Image], dict[tuple[str, str, str], ImageVerdict]]:
    """Return (record, role, name, entry) of each image that can be read, the images, and the entries of the others."""
    slots, images, failed = [], [], {}
    for record in records:
        for role, name, verdict in image_verdicts(record):
            path = attempt(locate, verdict.get("path"), out, config.read_from)
            image = path if isinstance(path, Failure) else attempt(open_image, path)
            if isinstance(image, Failure):
                failed[record["item_id"], role, name] = cast("ImageVerdict", {**verdict, "reason": image.reason})
            else:
                slots.append((record, role, name, verdict))
                images.append(image)
    return slots, images, failed


def _score_captions(
    records: Iterable[Record], model: TextModel, templates: TemplateSet, config: Config, out: Path | None
) -> Iterator[Record]:
    """Score images by the likelihood of the prompt of their item."""
    from ospo_fast.generation import caption_logprobs

    if isinstance(model, ChatModel):
        raise UsageError(
            f"score.model: got {config.score.model!r} with select.rule=likeliest, expected a unified model, whose "
            "likelihoods the score is of; use one, or select.rule=best."
        )
    request = model.chat(templates.messages("caption"), image=True)
    for chunk in chunked(records, CHUNK):
        captions: dict[str, Tensor | Failure] = {
            record["prompt"]: attempt(_caption_ids, model, record["prompt"], len(request)) for record in chunk
        }
        usable = [record for record in chunk if not isinstance(captions[record["prompt"]], Failure)]
        slots, images, scored = _open_images(usable, config, out)
        for record in chunk:
            if isinstance(failed := captions[record["prompt"]], Failure):
                for role, name, verdict in image_verdicts(record):
                    scored[record["item_id"], role, name] = {**verdict, "reason": failed.reason}
        texts = [cast("Tensor", captions[record["prompt"]]) for record, *_ in slots]
        scores = caption_logprobs(
            model, images, texts, request=request, batch_size=config.score.batch_size, progress=False
        )
        for (record, role, name, verdict), score in zip(slots, scores, strict=True):
            found: ImageVerdict = {**verdict, "local_score": score}
            if not math.isfinite(score):
                found = {**verdict, "reason": "the likelihood of the prompt is not finite"}
            scored[record["item_id"], role, name] = found
        for record in chunk:
            yield map_images(record, partial(_look_up, scored, record["item_id"]))


def _caption_ids(model: UnifiedModel, prompt: str, before: int) -> Tensor:
    """Return the ids (S,) of the tokens of a prompt. Raises OspoError if they do not fit behind a request."""
    ids, offsets = model.image_prompt_offsets(prompt)
    own = ids[torch.tensor([offset is not None and offset[0] < offset[1] for offset in offsets])]
    if not 0 < len(own) < model.max_positions - before:
        raise OspoError(f"{len(own)} tokens of the prompt do not fit behind an image and the request for a caption")
    return own


class Scorer:
    """Scores of images as the stage gives them, for training on images that no record has."""

    def __init__(self, model: UnifiedModel, config: Config) -> None:
        self.model, self.settings, self.templates = model, config.score, load_model_templates(model, config)
        self._request = model.chat(self.templates.messages("caption"), image=True) if is_dual(config) else None
        self._chats: dict[str, Tensor] = {}

    def load(self, prompt: str, questions: list[str]) -> list[str]:
        """Return the questions of a prompt that the model takes. Raises OspoError if its images cannot be scored."""
        if self._request is not None:
            _caption_ids(self.model, prompt, len(self._request))
            return questions
        failed = Failure("the item has no question")
        for text in questions:
            found = chat_ids(self.model, self.templates, "vqa", {"question": text}, image=True)
            if isinstance(found, Failure):
                failed = found
            else:
                self._chats[text] = found
        kept = [text for text in questions if text in self._chats]
        if not kept:
            raise OspoError(failed.reason)
        return kept

    def score(self, images: list[Image], prompts: list[str], questions: list[list[str]]) -> list[float]:
        """Return the local score of each image of a prompt with what `load` has returned; NaN if it is not finite."""
        from ospo_fast.generation import answer_questions, caption_logprobs

        options: dict[str, Any] = {"batch_size": self.settings.batch_size, "progress": False}
        if self._request is not None:
            texts = [_caption_ids(self.model, prompt, len(self._request)) for prompt in prompts]
            return caption_logprobs(self.model, images, texts, request=self._request, **options)
        found = answer_questions(self.model, images, questions, template=self._chats.__getitem__, **options)
        return [_margin(answers) for answers in found]


def _ask(model: ChatModel, templates: TemplateSet, image: Image, questions: list[str]) -> list[Answer] | Failure:
    """Answer questions about an image one by one. A Failure if the model takes none of them.

    A question that is too long with this image is skipped: what an image takes depends on its size.
    """
    answers: list[Answer] = []
    failed: Failure | None = None
    for question in questions:
        inputs = attempt(model.encode, image, templates.messages("vqa", question=question))
        if isinstance(inputs, Failure):
            logger.warning("skipping the question %.60r of an image: %s", question, inputs)
            failed = inputs
            continue
        p_yes, p_no = model.answer(inputs, (model.yes_ids, model.no_ids))
        word = "yes" if p_yes > p_no else "no" if p_no > p_yes else "tie"
        answers.append({"p_yes": p_yes, "p_no": p_no, "answer": word})
    return failed if failed is not None and not answers else answers


def _look_up(
    scored: dict[tuple[str, str, str], ImageVerdict], item_id: str, role: str, name: str, verdict: ImageVerdict
) -> ImageVerdict:
    return scored.get((item_id, role, name), verdict)


def _remove_long_questions(record: Record, chats: dict[str, Tensor | Failure]) -> Record:
    failures = {q: chat for q in record.get("question") or [] if isinstance(chat := chats[q], Failure)}
    if not failures:
        return record
    for question, failed in failures.items():
        logger.warning("%s: skipping the question %.60r: %s", record["item_id"], question, failed)
    reason = "; ".join(dict.fromkeys(failed.reason for failed in failures.values()))
    return {**record, "question": [q for q in record["question"] if q not in failures], "question_reason": reason}


def with_answers(verdict: ImageVerdict, answers: list[Answer]) -> ImageVerdict:
    """Add answers and their mean margin to an image's entry, or a `reason` if an answer is not finite."""
    if not all(math.isfinite(answer["p_yes"]) and math.isfinite(answer["p_no"]) for answer in answers):
        return {**verdict, "reason": "the answers are not finite"}
    return {**verdict, "local_score": _margin(answers), "answer_metadata": answers}


def _margin(answers: Sequence[Mapping[str, Any]]) -> float:
    margins = [float(answer["p_yes"]) - float(answer["p_no"]) for answer in answers]
    return sum(margins) / len(margins)


def failure(record: Record) -> Failure | None:
    """Return why an image of an item has no score; None where all have one, or where there is no image."""
    if not record.get("base_metadata"):
        return None
    found = [verdict for *_, verdict in image_verdicts(record)]
    if not record.get("question") and not any("local_score" in verdict or "reason" in verdict for verdict in found):
        return Failure(record.get("question_reason") or "the item has no question")
    return next((Failure(verdict["reason"]) for *_, verdict in image_verdicts(record) if verdict.get("reason")), None)

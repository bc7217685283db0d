"""Stage 4, second part: the model answers its questions about each of its images."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor

from ospo_fast.config import Config
from ospo_fast.errors import Failure, attempt
from ospo_fast.files import locate, open_image
from ospo_fast.models.chat import ChatModel, TextModel
from ospo_fast.records import Answer, ImageVerdict, Record, chunked, image_verdicts, map_images
from ospo_fast.stages import StageContext
from ospo_fast.stages.templates import TemplateSet
from ospo_fast.stages.text_sampling import chat_ids, load_model_templates

if TYPE_CHECKING:
    from PIL.Image import Image

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

    local_score = mean over the questions of p_yes − p_no, in [−1, 1]. Questions too long for the model are removed.
    An item without questions has images without a score. So has an image that cannot be read or whose answers are not
    finite: its `reason` says so. The select stage drops both.

    A chat model answers one question at a time, and its p_yes is the sum over the spellings (`ChatModel.answer`).
    """
    from ospo_fast.generation import answer_questions

    templates = load_model_templates(model, config)
    for part in chunked(records, CHUNK):
        texts = dict.fromkeys(question for record in part for question in record.get("question") or [])
        chats = {q: chat_ids(model, templates, "vqa", {"question": q}, image=True) for q in texts}
        chunk = [_remove_long_questions(record, chats) for record in part]
        scored: dict[tuple[str, str, str], ImageVerdict] = {}
        slots, images = [], []
        for record in chunk:
            for role, name, verdict in image_verdicts(record) if record.get("question") else ():
                path = attempt(locate, verdict.get("path"), out, config.read_from)
                image = path if isinstance(path, Failure) else attempt(open_image, path)
                if isinstance(image, Failure):
                    scored[record["item_id"], role, name] = {**verdict, "reason": image.reason}
                else:
                    slots.append((record, role, name, verdict))
                    images.append(image)
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
    margin = sum(answer["p_yes"] - answer["p_no"] for answer in answers) / len(answers)
    return {**verdict, "local_score": margin, "answer_metadata": answers}


def failure(record: Record) -> Failure | None:
    """Return why an image of an item has no score; None where all have one, or where there is no image."""
    if not record.get("base_metadata"):
        return None
    if not record.get("question"):
        return Failure(record.get("question_reason") or "the item has no question")
    return next((Failure(verdict["reason"]) for *_, verdict in image_verdicts(record) if verdict.get("reason")), None)

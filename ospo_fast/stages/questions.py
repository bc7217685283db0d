"""Stage 4: the model asks what the prompt promises, then judges every image by its own questions."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ospo_fast.config import Config
from ospo_fast.records import Answer, ImageVerdict, Record, stable_hash
from ospo_fast.stages.common import (
    chat_or_reason,
    chunked,
    describe,
    image_or_reason,
    load_model_templates,
    locate,
    sample_text,
    why_silent,
)
from ospo_fast.stages.templates import TemplateSet

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel

logger = logging.getLogger(__name__)

_ROLES = re.compile(r"<\|?\s*/?\s*(?:user|assistant|system)\s*\|?>|\b(?:user|assistant|system)\s*:", re.IGNORECASE)
_QUESTION = re.compile(r"[^?\n]+\?")


def parse_questions(answer: str) -> list[str]:
    """The questions of an answer, each once, in their order; those that hold a role marker are dropped."""
    questions: dict[str, str] = {}
    for match in _QUESTION.findall(answer.rsplit("Questions:", 1)[-1]):
        question = match.strip(" ;,-*\t")
        if re.search(r"\w", question) and not _ROLES.search(question):
            questions.setdefault(" ".join(question.casefold().split()), question)
    return list(questions.values())


def write_questions(
    records: Iterable[Record], model: UnifiedModel, config: Config, *, out: Path | None = None
) -> Iterator[Record]:
    """Every record with `question`; where the list is empty, `question_reason` says why."""
    templates = load_model_templates(model, config)
    for chunk in chunked(records, config.questions.chunk):
        seeds = [stable_hash(config.seed, "questions", record["item_id"]) for record in chunk]
        asked = [describe(record) for record in chunk]
        answers = sample_text(model, templates, "questions", config.questions, asked, seeds)
        for record, answer in zip(chunk, answers, strict=True):
            found = parse_questions(answer)
            if found:
                yield {**record, "question": found}
            else:
                why = why_silent(answer) or "no question could be read from the model's answer"
                yield {**record, "question": [], "question_reason": why}


def score(
    records: Iterable[Record], model: UnifiedModel, config: Config, *, out: Path | None = None
) -> Iterator[Record]:
    """Every record with the answers and the local score of each of its images.

    local_score = mean over the questions of p_yes − p_no, in [−1, 1]. Questions that the model has no room for are
    taken out. An item without questions keeps its images without a score, and so does an image that cannot be read or
    whose answers are not finite (its `reason` says so); the selection drops them.
    """
    from ospo_fast.generation import answer_questions

    templates = load_model_templates(model, config)
    for part in chunked(records, config.score.chunk):
        chunk = [_answerable(record, model, templates) for record in part]
        slots = [
            (record, side, name, verdict)
            for record in chunk
            if record.get("question")
            for side in ("base_metadata", "negative_metadata")
            for name, verdict in cast("dict[str, ImageVerdict]", record.get(side, {})).items()
        ]
        judged: dict[tuple[str, str, str], ImageVerdict] = {}
        asked, images = [], []
        for slot in slots:
            record, side, name, verdict = slot
            image = image_or_reason(locate(verdict["path"], out))
            if isinstance(image, str):
                judged[record["item_id"], side, name] = {**verdict, "reason": image}
            else:
                images.append(image)
                asked.append(slot)
        if asked:
            results = answer_questions(
                model,
                images,
                [record["question"] for record, _, _, _ in asked],
                template=lambda question: templates.messages("vqa", question=question),
                batch_size=config.score.batch_size,
                progress=False,
            )
            for (record, side, name, verdict), answers in zip(asked, results, strict=True):
                judged[record["item_id"], side, name] = with_answers(verdict, cast("list[Answer]", answers))
        for record in chunk:
            yield _scored(record, judged)


def _answerable(record: Record, model: UnifiedModel, templates: TemplateSet) -> Record:
    """The record without the questions that cannot be put to the model."""
    reasons: dict[str, str] = {}
    for question in record.get("question", []):
        chat = chat_or_reason(model, templates.messages("vqa", question=question), image=True)
        if isinstance(chat, str):
            reasons[question] = chat
            logger.warning("%s: the question %.60r is left out: %s", record["item_id"], question, chat)
    if not reasons:
        return record
    kept = [question for question in record["question"] if question not in reasons]
    return {**record, "question": kept, "question_reason": "; ".join(dict.fromkeys(reasons.values()))}


def _scored(record: Record, judged: dict[tuple[str, str, str], ImageVerdict]) -> Record:
    sides = {}
    for side in ("base_metadata", "negative_metadata"):
        verdicts = cast("dict[str, ImageVerdict]", record.get(side, {}))
        sides[side] = {name: judged.get((record["item_id"], side, name), found) for name, found in verdicts.items()}
    return cast(Record, {**record, **sides})


def with_answers(verdict: ImageVerdict, answers: list[Answer]) -> ImageVerdict:
    """A verdict with its answers and their mean margin, or with a `reason` where the answers are not finite."""
    if not all(math.isfinite(answer["p_yes"]) and math.isfinite(answer["p_no"]) for answer in answers):
        return {**verdict, "reason": "the answers are not finite"}
    margin = sum(answer["p_yes"] - answer["p_no"] for answer in answers) / len(answers)
    return {**verdict, "local_score": margin, "answer_metadata": answers}

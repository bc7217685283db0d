"""Stage 4, second part: the model judges every image by its own questions."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ospo_fast.config import Config
from ospo_fast.errors import Failure
from ospo_fast.records import Answer, ImageVerdict, Record
from ospo_fast.stages import StageContext
from ospo_fast.stages.common import chat_or_reason, chunked, image_or_reason, load_model_templates, locate
from ospo_fast.stages.templates import TemplateSet

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel

logger = logging.getLogger(__name__)
CHUNK = 64  # items between two writes to the store


def run(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Every record with the answers and the local score of each of its images.

    local_score = mean over the questions of p_yes − p_no, in [−1, 1]. Questions that the model has no room for are
    taken out. An item without questions keeps its images without a score, and so does an image that cannot be read or
    whose answers are not finite (its `reason` says so); the selection drops them.
    """
    from ospo_fast.generation import answer_questions

    templates = load_model_templates(model, config)
    for part in chunked(records, CHUNK):
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


def failure(record: Record) -> Failure | None:
    """Return why images of an item have no score; None where all have one."""
    if not record.get("base_metadata"):
        return None
    if not record.get("question"):
        return Failure(record.get("question_reason") or "the item has no question")
    sides = (record["base_metadata"], record.get("negative_metadata", {}))
    reasons = (verdict.get("reason") for side in sides for verdict in side.values())
    return next((Failure(reason) for reason in reasons if reason), None)

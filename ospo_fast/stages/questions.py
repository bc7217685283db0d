"""Stage 4: the model asks what the prompt promises, then judges every image by its own questions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ospo_fast.config import Config
from ospo_fast.records import Answer, ImageVerdict, Record, stable_hash
from ospo_fast.stages.common import chunked, describe, locate, open_image, sample_text, templates_of

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel

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
    """Every record with `question`, a list that is empty when the answer held no question."""
    templates = templates_of(model, config)
    for chunk in chunked(records, config.questions.chunk):
        seeds = [stable_hash(config.seed, "questions", record["item_id"]) for record in chunk]
        asked = [describe(record) for record in chunk]
        answers = sample_text(model, templates, "questions", config.questions, asked, seeds)
        for record, answer in zip(chunk, answers, strict=True):
            yield {**record, "question": parse_questions(answer)}


def score(
    records: Iterable[Record], model: UnifiedModel, config: Config, *, out: Path | None = None
) -> Iterator[Record]:
    """Every record with the answers and the local score of each of its images.

    local_score = mean over the questions of p_yes − p_no, in [−1, 1]. An item without questions keeps its images
    without a score; the selection drops it.
    """
    from ospo_fast.generation import answer_questions

    templates = templates_of(model, config)
    for chunk in chunked(records, config.score.chunk):
        slots = [
            (record, side, name, verdict)
            for record in chunk
            if record.get("question")
            for side in ("base_metadata", "negative_metadata")
            for name, verdict in cast("dict[str, ImageVerdict]", record.get(side, {})).items()
        ]
        answered: dict[tuple[str, str, str], list[Answer]] = {}
        if slots:
            results = answer_questions(
                model,
                [open_image(locate(verdict["path"], out)) for _, _, _, verdict in slots],
                [record["question"] for record, _, _, _ in slots],
                template=lambda question: templates.messages("vqa", question=question),
                batch_size=config.score.batch_size,
                progress=False,
            )
            for (record, side, name, _), answers in zip(slots, results, strict=True):
                answered[record["item_id"], side, name] = cast("list[Answer]", answers)
        for record in chunk:
            yield _scored(record, answered)


def _scored(record: Record, answered: dict[tuple[str, str, str], list[Answer]]) -> Record:
    sides = {}
    for side in ("base_metadata", "negative_metadata"):
        verdicts: dict[str, ImageVerdict] = {}
        for name, verdict in cast("dict[str, ImageVerdict]", record.get(side, {})).items():
            answers = answered.get((record["item_id"], side, name))
            verdicts[name] = verdict if answers is None else with_answers(verdict, answers)
        sides[side] = verdicts
    return cast(Record, {**record, **sides})


def with_answers(verdict: ImageVerdict, answers: list[Answer]) -> ImageVerdict:
    """A verdict with its answers and their mean margin."""
    margin = sum(answer["p_yes"] - answer["p_no"] for answer in answers) / len(answers)
    return {**verdict, "local_score": margin, "answer_metadata": answers}

"""Stage 4, first part: the model asks what the prompt promises."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.config import Config
from ospo_fast.errors import Failure
from ospo_fast.records import Record, stable_hash
from ospo_fast.stages import StageContext
from ospo_fast.stages.common import chunked, describe, load_model_templates, sample_text, why_silent

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel

_ROLES = re.compile(r"<\|?\s*/?\s*(?:user|assistant|system)\s*\|?>|\b(?:user|assistant|system)\s*:", re.IGNORECASE)
_QUESTION = re.compile(r"[^?\n]+\?")

CHUNK = 64  # items between two writes to the store


def parse_questions(answer: str) -> list[str]:
    """The questions of an answer, each once, in their order; those that hold a role marker are dropped."""
    questions: dict[str, str] = {}
    for match in _QUESTION.findall(answer.rsplit("Questions:", 1)[-1]):
        question = match.strip(" ;,-*\t")
        if re.search(r"\w", question) and not _ROLES.search(question):
            questions.setdefault(" ".join(question.casefold().split()), question)
    return list(questions.values())


def run(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Every record with `question`; where the list is empty, `question_reason` says why."""
    templates = load_model_templates(model, config)
    for chunk in chunked(records, CHUNK):
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


def failure(record: Record) -> Failure | None:
    """Return why an item has no question; None where it has one."""
    return None if record["question"] else Failure(record["question_reason"])


def write_questions(records: Any, model: Any, config: Any, *, out: Any = None) -> Iterator[Record]:
    """See `run`."""
    return run(records, model, config, out=out)


def score(records: Any, model: Any, config: Any, *, out: Any = None) -> Iterator[Record]:
    """See `ospo_fast.stages.score.run`."""
    from ospo_fast.stages import score

    return score.run(records, model, config, out=out)

"""Stage 4, first part: the model asks questions about what each prompt promises."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ospo_fast.config import Config
from ospo_fast.errors import Failure
from ospo_fast.models.chat import TextModel
from ospo_fast.records import Record, chunked, stable_hash
from ospo_fast.stages import StageContext
from ospo_fast.stages.text_sampling import load_model_templates, sample_text, template_variables

CHUNK = 64  # items between two writes to the store

# Optional parts with spaces on both sides are grouped with one of them: otherwise a run of spaces takes quadratic time.
_ROLES = re.compile(r"<\|?\s*(?:/\s*)?(?:user|assistant|system)\s*\|?>|\b(?:user|assistant|system)\s*:", re.IGNORECASE)


def parse_questions(answer: str) -> list[str]:
    """Return the distinct questions of an answer, in order, without those that hold a role marker."""
    questions: dict[str, str] = {}
    *texts, _ = answer.rsplit("Questions:", 1)[-1].split("?")  # the last one has no question mark
    for text in texts:
        question = (text.rpartition("\n")[2] + "?").strip(" ;,-*\t")
        if re.search(r"\w", question) and not _ROLES.search(question):
            questions.setdefault(" ".join(question.casefold().split()), question)
    return list(questions.values())


def run(
    records: Iterable[Record],
    model: TextModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Add `question`, a list; where it is empty, `question_reason` says why."""
    templates = load_model_templates(model, config)
    for chunk in chunked(records, CHUNK):
        seeds = [stable_hash(config.seed, "questions", record["item_id"]) for record in chunk]
        variables = [template_variables(record) for record in chunk]
        answers = sample_text(model, templates, "questions", config.questions, variables, seeds)
        for record, answer in zip(chunk, answers, strict=True):
            if isinstance(answer, Failure):
                yield {**record, "question": [], "question_reason": answer.reason}
            elif questions := parse_questions(answer):
                yield {**record, "question": questions}
            else:
                reason = "no question could be read from the model's answer"
                yield {**record, "question": [], "question_reason": reason}


def failure(record: Record) -> Failure | None:
    """Return why an item has no question; None where it has one."""
    return None if record["question"] else Failure(record["question_reason"])

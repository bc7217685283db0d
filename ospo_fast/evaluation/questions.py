"""Question files, and scores of images by the answers of a judge."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ospo_fast.errors import UsageError, attempt, check_text
from ospo_fast.evaluation.benchmarks import check_prompt_text, read_lines
from ospo_fast.evaluation.statistics import bootstrap_interval
from ospo_fast.records import stable_hash
from ospo_fast.stages.prompt_files import prompt_key, refuse_lines

MAX_QUESTIONS = 1000  # of a prompt
MAX_LENGTH = 1000  # characters of a question
MAX_ANSWER = 40  # characters


@dataclass(frozen=True)
class Question:
    """A question about an image, the answer that a correct image gets, and the skill that it is about."""

    text: str
    answer: str = "yes"
    skill: str | None = None


@dataclass(frozen=True)
class Item:
    """A prompt, the questions about its images, and its line in the file."""

    prompt: str
    questions: tuple[Question, ...]
    category: str | None = None
    line: int = 0


def read_questions(path: Path) -> list[Item]:
    """Read a question file: JSON lines or a JSON array of objects, one for each prompt.

    An object has `prompt`, `questions` (texts), and may have `answers` and `skills` (of each question; the answer is
    yes by default) and `category`. That of GenEval 2 has `vqa_list`, pairs of a question and its answer, in place of
    the first two, and its category is the number of its atoms.

    Raises:
        UsageError: the file cannot be read, a prompt has no question or comes twice, or a question is no text, too long
            or without its answer or skill.

    """
    places: dict[str, int] = {}

    def make(line: int, row: dict[str, Any]) -> Item:
        item = _parse(line, row)
        if (first := places.setdefault(prompt_key(item.prompt), line)) != line:
            raise UsageError(f"prompt: {item.prompt[:60]!r} is also that of line {first}; join their questions")
        return item

    results = [(line, attempt(make, line, row)) for line, row in read_lines(path, "--questions")]
    refuse_lines(path, results)
    items = [item for _, item in results if isinstance(item, Item)]
    if not items:
        raise UsageError(f"The question file {path} holds no prompt; write one object on each line.")
    return items


def _parse(line: int, row: dict[str, Any]) -> Item:
    prompt = check_prompt_text(row.get("prompt"))
    for near in ("question", "answer", "skill"):
        if near in row and "vqa_list" not in row:
            raise UsageError(f"{near}: {prompt[:60]!r} has this key, expected {near}s, a list; rename it")
    asked, answers = row.get("questions"), row.get("answers")
    category = row.get("category")
    if asked is None and isinstance(pairs := row.get("vqa_list"), list):
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise UsageError("vqa_list: expected pairs of a question and its answer; download the file again")
        asked, answers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if category is None and isinstance(row.get("atom_count"), int):
            category = f"{row['atom_count']} atoms"
    if not isinstance(asked, list) or not 0 < len(asked) <= MAX_QUESTIONS:
        raise UsageError(f"questions: {prompt[:60]!r} has no list of 1 to {MAX_QUESTIONS} questions; add it")
    skills = row.get("skills")
    for key, values in (("answers", answers), ("skills", skills)):
        if values is not None and not (isinstance(values, list) and len(values) == len(asked)):
            raise UsageError(
                f"{key}: {prompt[:60]!r} has {len(asked)} questions, expected a list of as many; correct it"
            )
    if category is not None:
        check_text("category", category)
    questions = [
        Question(
            check_question(text),
            "yes" if answers is None else check_answer(answers[n]),
            None if skills is None else check_text("skills", skills[n]),
        )
        for n, text in enumerate(asked)
    ]
    if len(set(questions)) < len(questions):
        twice = next(question.text for question in questions if questions.count(question) > 1)
        raise UsageError(f"questions: {twice[:60]!r} comes twice, and would count twice; delete one")
    return Item(prompt, tuple(questions), category, line)


def check_question(question: object) -> str:
    """Return a question without spaces around it. Raises UsageError for one that no judge can be asked."""
    text = check_text("questions", question).strip()
    if not 0 < len(text) <= MAX_LENGTH:
        raise UsageError(f"questions: got one of {len(text)} characters, expected 1 to {MAX_LENGTH}; correct it")
    return text


def check_answer(answer: object) -> str:
    """Return an expected answer, yes and no in lower case. Raises UsageError for what is no word."""
    text = check_text("answers", answer).strip()
    if not 0 < len(text) <= MAX_ANSWER or len(text.split()) > 1:
        raise UsageError(f"answers: got {text[:60]!r}, expected one word; shorten it")
    return text.lower() if text.lower() in ("yes", "no") else text


def digest(items: Sequence[Item]) -> str:
    """Identify the questions of a file, at any lines of it."""
    rows = [dataclasses.asdict(item) | {"line": 0} for item in items]
    return f"{stable_hash(json.dumps(rows, sort_keys=True)):x}"


def soft_tifa(probabilities: Sequence[float]) -> tuple[float, float]:
    """Return Soft-TIFA AM and GM of one image.

    With p_i the probability that the judge gives to the correct answer of question i of the N questions of a prompt,
    AM = (1/N) Σ p_i estimates how many atoms are right, and GM = (Π p_i)^(1/N) whether the whole prompt is. A question
    with p_i = 0 makes GM 0. Both are averaged over the prompts of a benchmark (GenEval 2, arXiv 2512.16853, in the
    words of section Evaluation of its repository's README).

    Args:
        probabilities: N ≥ 1 numbers in [0, 1].

    Raises:
        UsageError: there is none, or one is no probability.

    """
    if not len(probabilities) or not all(0 <= p <= 1 for p in probabilities):
        raise UsageError(f"probabilities: got {list(probabilities)[:5]}, expected at least one, each from 0 to 1")
    logs = math.fsum(math.log(p) for p in probabilities if p)
    geometric = math.exp(logs / len(probabilities)) if all(probabilities) else 0.0
    return math.fsum(probabilities) / len(probabilities), geometric


@dataclass(frozen=True)
class Scores:
    """The scores of an evaluation: of each item the mean over its images.

    probabilities: of each item, those of its questions. am, gm: (items,).
    """

    probabilities: list[list[float]]
    am: list[float]
    gm: list[float]

    @classmethod
    def from_images(cls, images: Sequence[Sequence[Sequence[float]]]) -> Scores:
        """Average over images: of each item its images, and of each image the probabilities of its questions."""
        means = [[math.fsum(column) / len(column) for column in zip(*rows, strict=True)] for rows in images]
        pairs = [[soft_tifa(row) for row in rows] for rows in images]
        am, gm = ([math.fsum(pair[k] for pair in rows) / len(rows) for rows in pairs] for k in (0, 1))
        return cls(means, am, gm)


def summarize(items: Sequence[Item], scores: Scores, baseline: Scores | None = None) -> dict[str, Any]:
    """Return means with 95% intervals: of all prompts, by category and by skill; with a baseline their differences.

    A skill pools its questions over all prompts. The intervals are those of `bootstrap_interval` over prompts; those of
    differences are paired.
    """

    def measure(values: Callable[[Scores], Sequence[float]], counts: Sequence[float]) -> dict[str, Any]:
        after = np.asarray(values(scores))
        entry: dict[str, Any] = {
            "mean": float(after.sum() / sum(counts)),
            "interval": bootstrap_interval(after, counts),
        }
        if baseline is not None:
            change = after - np.asarray(values(baseline))
            entry["difference"] = float(change.sum() / sum(counts))
            entry["difference_interval"] = bootstrap_interval(change, counts)
        return entry

    def prompts(rows: Sequence[int]) -> dict[str, Any]:
        ones = [1.0] * len(rows)
        return {
            "prompts": len(rows),
            "soft_tifa_am": measure(lambda found: [found.am[i] for i in rows], ones),
            "soft_tifa_gm": measure(lambda found: [found.gm[i] for i in rows], ones),
        }

    def skill(name: str) -> dict[str, Any]:
        places = [[n for n, q in enumerate(item.questions) if q.skill == name] for item in items]
        pooled = measure(
            lambda found: [math.fsum(found.probabilities[i][n] for n in own) for i, own in enumerate(places)],
            [float(len(own)) for own in places],
        )
        return {"questions": sum(map(len, places)), "soft_tifa_am": pooled}

    categories = _unique(item.category for item in items)
    return {
        **prompts(range(len(items))),
        "categories": {
            name: prompts([i for i, item in enumerate(items) if item.category == name]) for name in categories
        },
        "skills": {name: skill(name) for name in _unique(q.skill for item in items for q in item.questions)},
    }


def _unique(names: Iterable[str | None]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name is not None]

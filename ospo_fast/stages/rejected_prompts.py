"""The hard negative of a pair for the conditional term, by what the model answers about the chosen image (official v2).

The model writes questions about every hard negative of the item and answers them about the chosen image. A hard
negative may be the rejected prompt if an answer is a clear no. Of several, the one is taken under which the chosen
image has the log-probability nearest to that under its own prompt (`JanusProFilterWrapper`, mode "negative").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ospo_fast.config import Config
from ospo_fast.errors import Failure, attempt
from ospo_fast.files import locate, open_image
from ospo_fast.models.base import UnifiedModel
from ospo_fast.records import Pair, Record, stable_hash
from ospo_fast.stages.image_files import image_codes, locate_image, stack_codes
from ospo_fast.stages.prompt_files import image_prompt_ids
from ospo_fast.stages.questions import parse_questions
from ospo_fast.stages.teacher_forcing import mean_logprobs
from ospo_fast.stages.text_sampling import chat_ids, load_model_templates, sample_text, template_variables

if TYPE_CHECKING:
    from torch import Tensor

_QUESTIONS = "rejected_question"  # of a record, the official name: a list of questions for each hard negative


def choose_rejected_prompts(
    records: Sequence[Record], model: UnifiedModel, config: Config, out: Path | None
) -> list[Record]:
    """Return the records with the `rejected_prompt` of each pair. A pair without one is left out.

    An item that has no pair left gets `kept` False and the `reason`. Questions that an item has in `rejected_question`
    are taken; others are written there.
    """
    asked = _with_questions([record for record in records if record.get("pairs")], model, config)
    slots = [(record, pair) for record in asked.values() for pair in record["pairs"]]
    answers = _answer(slots, model, config, out)
    chosen = [
        answer if isinstance(answer, Failure) else _choose(record, pair, answer, model, config, out)
        for (record, pair), answer in zip(slots, answers, strict=True)
    ]
    results, places = [], iter(chosen)
    for record in records:
        if not record.get("pairs"):
            results.append(record)
            continue
        found = [next(places) for _ in record["pairs"]]
        pairs = [
            cast(Pair, {**pair, "rejected_prompt": prompt})
            for pair, prompt in zip(record["pairs"], found, strict=True)
            if not isinstance(prompt, Failure)
        ]
        record = asked[record["item_id"]]
        if pairs:
            results.append(cast(Record, {**record, "pairs": pairs}))
        else:
            reason = next(prompt.reason for prompt in found if isinstance(prompt, Failure))
            rest = {name: value for name, value in record.items() if name != "pairs"}
            results.append(cast(Record, {**rest, "kept": False, "reason": reason}))
    return results


def _with_questions(records: Sequence[Record], model: UnifiedModel, config: Config) -> dict[str, Record]:
    """Return the records by their ids, with questions about each of their hard negatives."""
    templates = load_model_templates(model, config)
    given = [cast("dict[str, Any]", record).get(_QUESTIONS) for record in records]
    slots = [
        (record, variant, negative)
        for record, questions in zip(records, given, strict=True)
        if not isinstance(questions, list)
        for variant, negative in enumerate(record.get("negative_prompt") or [])
        if negative
    ]
    variables = [template_variables(record) | {"prompt": negative} for record, _, negative in slots]
    seeds = [stable_hash(config.seed, "rejected questions", record["item_id"], variant) for record, variant, _ in slots]
    texts = sample_text(model, templates, "questions", config.questions, variables, seeds)
    found = {
        (record["item_id"], variant): [] if isinstance(text, Failure) else parse_questions(text)
        for (record, variant, _), text in zip(slots, texts, strict=True)
    }
    asked = {}
    for record, questions in zip(records, given, strict=True):
        item_id, negatives = record["item_id"], record.get("negative_prompt") or []
        if not isinstance(questions, list):
            questions = [found.get((item_id, variant), []) for variant in range(len(negatives))]
        asked[item_id] = cast(Record, {**record, _QUESTIONS: questions})
    return asked


def _questions(record: Record) -> list[list[str]]:
    """Return the questions of each hard negative; none for a list of another form, which a file can have."""
    found = cast("dict[str, Any]", record)[_QUESTIONS]
    return [
        [text for text in questions if isinstance(text, str)] if isinstance(questions, list) else []
        for questions in found[: len(record.get("negative_prompt") or [])]
    ]


def _answer(
    slots: Sequence[tuple[Record, Pair]], model: UnifiedModel, config: Config, out: Path | None
) -> list[dict[str, float] | Failure]:
    """Return the margin p_no − p_yes of each question about the chosen image of each pair."""
    from ospo_fast.generation import answer_questions

    templates = load_model_templates(model, config)
    results: list[dict[str, float] | Failure] = []
    images, asked = [], list[list[str]]()
    texts = {text for record, _ in slots for questions in _questions(record) for text in questions}
    chats = {text: chat_ids(model, templates, "vqa", {"question": text}, image=True) for text in sorted(texts)}
    for record, pair in slots:
        path = attempt(locate, pair["chosen"], out, config.read_from)
        image = path if isinstance(path, Failure) else attempt(open_image, path)
        questions = [text for part in _questions(record) for text in part if not isinstance(chats[text], Failure)]
        if isinstance(image, Failure):
            results.append(image)
        elif not questions:
            results.append(Failure("there is no question about a hard negative"))
        else:
            results.append({})
            images.append(image)
            asked.append(list(dict.fromkeys(questions)))
    answers = answer_questions(
        model,
        images,
        asked,
        template=cast("dict[str, Tensor]", chats).__getitem__,
        batch_size=config.score.batch_size,
        progress=False,
    )
    rows = iter(zip(asked, answers, strict=True))
    for result in results:
        if not isinstance(result, Failure):
            questions, found = next(rows)
            result |= {text: each["p_no"] - each["p_yes"] for text, each in zip(questions, found, strict=True)}
    return results


def _choose(
    record: Record, pair: Pair, margins: dict[str, float], model: UnifiedModel, config: Config, out: Path | None
) -> str | Failure:
    """Return the hard negative that the margins p_no − p_yes of the questions leave, the nearest of several."""
    limit = config.select.margin
    negatives = [
        negative
        for negative, questions in zip(record["negative_prompt"], _questions(record), strict=False)
        if negative and any(margins.get(text, -1.0) > limit for text in questions)
    ]
    if not negatives:
        return Failure("the chosen image shows no difference to a hard negative")
    if len(negatives) == 1:
        return negatives[0]
    ids = [image_prompt_ids(model, prompt) for prompt in (record["prompt"], *negatives)]
    if (failed := next((each for each in ids if isinstance(each, Failure)), None)) is not None:
        return failed
    codes = stack_codes(image_codes(model, [attempt(locate_image, pair["chosen"], out, config.read_from)]))
    if isinstance(codes, Failure):
        return codes
    values = mean_logprobs(
        model, cast("list[Tensor]", ids), codes.expand(len(ids), -1), batch_size=config.select.batch_size
    )
    gaps = [abs(value - values[0]) for value in values[1:]]
    return negatives[gaps.index(min(gaps))]

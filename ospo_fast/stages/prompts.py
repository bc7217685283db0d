"""Stage 1: the model writes prompts, kind by kind.

A call is `samples_per_call` answers to the same few-shot chat; after `refresh_every` calls the examples are replaced by
the model's own accepted answers. Seeds and examples depend on (seed, kind, call) alone, and each record notes the call
that it came from, so that a stopped run goes on as if it had not been stopped.
"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.config import Config, nearest
from ospo_fast.errors import Failure, OspoError, UsageError
from ospo_fast.records import Record, stable_hash
from ospo_fast.stages import StageContext
from ospo_fast.stages.common import (
    excluded,
    load_model_templates,
    numbered_prompts,
    prompt_key,
    sample_text,
    unusable,
    why_silent,
)
from ospo_fast.stages.templates import Kind, TemplateSet

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel

logger = logging.getLogger(__name__)

CALLS_PER_BATCH = 8  # calls sampled together; the answers do not depend on it
STOP_WORDS = ("\n", "/", "-", "(", ")", "color", "shape", "texture", "spatial", "numeracy")
NO_STOP_WORDS = ("non-spatial", "complex")
COUNTED = ("layout2", "layout3")
NUMBERS = ("one", "two", "three", "four")
_OTHERS = (
    "five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty "
    "thirty forty fifty sixty seventy eighty ninety hundred thousand million billion zero dozen"
)
OTHER_NUMBERS = frozenset(_OTHERS.split())
_CATEGORIES = ("attribute", "layout", "non-spatial", "complex")
# The parts of an answer, each begun by its label: a label inside a part means that the model lost the form.
_LABEL = r"\b(?:Prompt|Concepts and relations|Relations?)\s*:"
_ANSWER = re.compile(
    rf"\bPrompt:\s*(?P<prompt>(?:(?!{_LABEL})[^;\n])+?)\s*[;\n]\s*"
    rf"Concepts and relations:\s*(?P<concepts>(?:(?!{_LABEL}).)+?)\s*[;\n]\s*"
    rf"Relations?:\s*(?P<relation>(?:(?!{_LABEL})[^\n])*)",
    re.DOTALL | re.IGNORECASE,
)
_BEGUN = re.compile(r"\bPrompt:[ \t]*[^\s;]", re.IGNORECASE)


def parse_answer(answer: str) -> tuple[str, str, str] | None:
    """(prompt, concepts and relations, relation) of an answer's first prompt, or None when it does not keep the form.

    The form is `Prompt: …; Concepts and relations: …; Relation: …`, with line ends as good as semicolons. The prompt is
    one line without semicolons, prompt and concepts have a word each, and no part holds the label of another. What
    comes before the first label and after the third part does not count.
    """
    match = _ANSWER.search(answer)
    if match is None or _BEGUN.search(answer[: match.start()]):
        return None
    prompt, concepts, relation = (match[name].strip(" ;\t\n") for name in ("prompt", "concepts", "relation"))
    return (prompt, concepts, relation) if re.search(r"\w", prompt) and re.search(r"\w", concepts) else None


def objection(prompt: str, sub_category: str) -> str | None:
    """Why a parsed prompt is not accepted: a stop word, or (for counts) numbers other than one to four."""
    if sub_category not in NO_STOP_WORDS:
        for word in STOP_WORDS:
            if word in prompt.lower():
                return f"stop word {word!r}"
    if sub_category in COUNTED:
        words = re.findall(r"[a-z]+|\d+", prompt.lower())
        if not any(word in NUMBERS for word in words):
            return "no number from one to four"
        if any(word in OTHER_NUMBERS or word.isdigit() for word in words):
            return "a number other than one to four"
    return None


def wanted(templates: TemplateSet, config: Config) -> dict[str, int]:
    """How many prompts of each kind; UsageError for a kind that the template set does not have."""
    for kind in config.prompts.counts:
        if kind not in templates.kinds:
            raise UsageError(
                f"prompts.counts: the template set {templates.name!r} has no kind {kind!r}; "
                f"{nearest(kind, list(templates.kinds))}."
            )
    return {kind: config.prompts.counts.get(kind, entry.count) for kind, entry in templates.kinds.items()}


def plan_counts(model: UnifiedModel, config: Config, shard: Any = None) -> dict[str, int]:
    """Return how many prompts of each kind a call writes: of all kinds, or of those of a shard.

    Where `prompts.file` takes the place of the stage: check the file and return no kinds.

    Raises:
        UsageError: a kind that the template set does not have, or a file of prompts that cannot be used.

    """
    templates = load_model_templates(model, config)
    if config.prompts.file is not None:
        if shard is not None:
            raise UsageError("Prompts from a file are read at once; run the stage without --shard.")
        from_file(config, templates, model)
        return {}
    counts = wanted(templates, config)
    kinds = list(counts) if shard is None else list(counts)[shard.index :: shard.count]
    return {kind: counts[kind] for kind in kinds}


def _item_id(templates: TemplateSet, counts: dict[str, int], kind: str, index: int) -> str:
    """Category digit and running number; each kind has its own range, so that kinds can be written side by side."""
    category = templates.kinds[kind].category
    digit = _CATEGORIES.index(category) if category in _CATEGORIES else len(_CATEGORIES)
    before = 0
    for other, entry in templates.kinds.items():
        if other == kind:
            break
        if entry.category == category or (digit == len(_CATEGORIES) and entry.category not in _CATEGORIES):
            before += counts[other]
    return f"{digit}{before + index:06d}"


def _answer_of(record: Record) -> str:
    return (
        f"Prompt: {record['prompt']}; Concepts and relations: {record['concepts_and_relations']}; "
        f"Relation: {record['relation']}"
    )


def _examples(templates: TemplateSet, config: Config, kind: str, block: int, accepted: Sequence[Record]) -> list[str]:
    count = templates.few_shot.get(kind, 0)
    earlier = [r for r in accepted if r["source"]["call"] < block * config.prompts.refresh_every]
    if block == 0 or count == 0 or len(earlier) < count:
        return templates.examples(kind)
    rng = random.Random(stable_hash(config.seed, "examples", kind, block))
    return [_answer_of(record) for record in rng.sample(earlier, count)]


def run(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
    kinds: Sequence[str] | None = None,
) -> Iterator[Record]:
    """New prompts until every kind has as many as wanted.

    Args:
        records: the prompts that are there already.
        model: writes the prompts.
        config: section `prompts`.
        out: not used; every stage takes it.
        context: `shard` selects the kinds to write.
        kinds: the kinds to write; None: all.

    Yields:
        Records with `item_id`, `t2i_category`, `sub_category`, `prompt`, `concepts_and_relations`, `relation`, `kind`
        and `source` (call and sample).

    Raises:
        OspoError: not one prompt of any kind was accepted.

    """
    existing = list(records)
    templates = load_model_templates(model, config)
    if config.prompts.file is not None:
        have = {record["item_id"] for record in existing}
        yield from (record for record in from_file(config, templates, model) if record["item_id"] not in have)
        return
    counts = wanted(templates, config)
    banned = excluded(config)
    total = len(existing)
    refused: Counter[str] = Counter()
    if kinds is None:
        kinds = list(plan_counts(model, config, None if context is None else context.shard))
    for kind in kinds:
        accepted = [record for record in existing if record.get("kind") == kind]
        for record in _write_kind(accepted, model, config, templates, counts, kind, banned, refused):
            total += 1
            yield record
    if not total:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in refused.most_common(3)) or "none was asked for"
        raise OspoError(f"The model wrote no prompt that could be used: {reasons}.")


def _write_kind(
    accepted: list[Record],
    model: UnifiedModel,
    config: Config,
    templates: TemplateSet,
    counts: dict[str, int],
    kind: str,
    banned: frozenset[str],
    refused: Counter[str],
) -> Iterator[Record]:
    settings = config.prompts
    entry = templates.kinds[kind]
    seen = {prompt_key(record["prompt"]) for record in accepted}
    call = fruitful = max((record["source"]["call"] for record in accepted), default=0)
    while len(accepted) < counts[kind] and call - fruitful < settings.patience:
        block, offset = divmod(call, settings.refresh_every)
        calls = range(call, call + min(CALLS_PER_BATCH, settings.refresh_every - offset))
        plan = [(c, s) for c in calls for s in range(settings.samples_per_call)]
        examples = _examples(templates, config, kind, block, accepted)
        variables = {"kind": kind, "category": entry.category, "sub_category": entry.sub_category, "examples": examples}
        seeds = [stable_hash(config.seed, "prompts", kind, c, s) for c, s in plan]
        answers = sample_text(model, templates, "prompts", settings, [variables] * len(plan), seeds)
        for (number, sample), answer in zip(plan, answers, strict=True):
            if len(accepted) >= counts[kind] or number - fruitful >= settings.patience:
                break
            record, why = _accept(answer, entry, seen, banned)
            why = why_silent(answer) or why
            if record is None:
                refused[why] += 1
                continue
            seen.add(prompt_key(record["prompt"]))
            record["item_id"] = _item_id(templates, counts, kind, len(accepted))
            record["kind"] = kind
            record["source"] = {"call": number, "sample": sample}
            fruitful = number
            accepted.append(record)
            yield record
        call = calls.stop
    if len(accepted) < counts[kind]:
        logger.warning(
            "%s: %d of %d prompts; given up after %d calls without a new one",
            kind, len(accepted), counts[kind], settings.patience,
        )  # fmt: skip


def _accept(answer: str, entry: Kind, seen: set[str], banned: frozenset[str]) -> tuple[Record | None, str]:
    parts = parse_answer(answer)
    if parts is None:
        return None, "the answer does not parse"
    prompt, concepts, relation = parts
    why = objection(prompt, entry.sub_category)
    if why is not None:
        return None, why
    key = prompt_key(prompt)
    if key in seen:
        return None, "repeated"
    if key in banned:
        return None, "on the list of excluded prompts"
    record: Record = {
        "item_id": "",
        "t2i_category": entry.category,
        "sub_category": entry.sub_category,
        "prompt": prompt,
        "concepts_and_relations": concepts,
        "relation": relation,
    }
    return record, ""


def from_file(config: Config, templates: TemplateSet, model: UnifiedModel) -> list[Record]:
    """Records of the prompts of `prompts.file`, in place of stage 1; repeated prompts count once.

    Raises UsageError for a missing or empty file, for a `prompts.file_kind` that the template set does not have, and,
    with its line, for a prompt that is excluded, names no object or cannot be drawn by the model.
    """
    assert config.prompts.file is not None
    kind = config.prompts.file_kind or list(templates.kinds)[-1]
    if kind not in templates.kinds:
        raise UsageError(f"prompts.file_kind: no kind {kind!r}; {nearest(kind, list(templates.kinds))}.")
    entry = templates.kinds[kind]
    unique: dict[str, str] = {}
    banned = excluded(config)
    for line, prompt in numbered_prompts(config.prompts.file):
        where = f"{config.prompts.file}:{line}"
        if prompt_key(prompt) in banned:
            raise UsageError(
                f"{where}: {prompt!r} is on the list of excluded prompts, {config.prompts.exclude}; take it out of one."
            )
        if (why := unusable(model, prompt)) is not None:
            raise UsageError(f"{where}: {why.rstrip('.')}.")
        unique.setdefault(prompt_key(prompt), prompt)
    return [
        {
            "item_id": f"p{index:06d}",
            "t2i_category": entry.category,
            "sub_category": entry.sub_category,
            "prompt": prompt,
            "concepts_and_relations": "",
            "relation": "",
            "kind": kind,
        }
        for index, prompt in enumerate(unique.values())
    ]


def failure(record: Record) -> Failure | None:
    """Return None: an answer that is not accepted makes no record."""
    return None

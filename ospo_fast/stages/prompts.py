"""Stage 1: the model writes prompts, kind by kind.

A call is `samples_per_call` answers to the same few-shot chat. After `refresh_every` calls the examples are replaced by
the model's own accepted answers. Seeds and examples depend on (seed, kind, call) only, and each record notes its call,
so that an interrupted run resumes with the same prompts.
"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from ospo_fast.config import Config, nearest
from ospo_fast.errors import Failure, OspoError, UsageError
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.chat import TextModel
from ospo_fast.records import Record, shown, stable_hash
from ospo_fast.stages import Shard, StageContext
from ospo_fast.stages.object_tokens import check_prompt
from ospo_fast.stages.prompt_files import (
    divide_kinds,
    excluded_prompts,
    normalized,
    numbered_prompts,
    prompt_key,
    refuse_lines,
)
from ospo_fast.stages.templates import Kind, TemplateSet
from ospo_fast.stages.text_sampling import load_model_templates, load_named_templates, sample_text
from ospo_fast.work import count as count_work

logger = logging.getLogger(__name__)

CALLS_PER_BATCH = 8  # calls sampled together; the answers do not depend on it

STOP_WORDS = ("\n", "/", "-", "(", ")", "color", "shape", "texture", "spatial", "numeracy")
SUB_CATEGORIES_WITHOUT_STOP_WORDS = ("non-spatial", "complex")
COUNTED_SUB_CATEGORIES = ("layout2", "layout3")
NUMBERS = ("one", "two", "three", "four")
_OTHER_NUMBERS = (
    "five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty "
    "thirty forty fifty sixty seventy eighty ninety hundred thousand million billion zero dozen"
)
OTHER_NUMBERS = frozenset(_OTHER_NUMBERS.split())
_CATEGORIES = ("attribute", "layout", "non-spatial", "complex")
# The labels of the parts. With a space before its colon, a label ends a part and does not begin one.
_LABEL = re.compile(r"\b(?:Prompt|Concepts and relations|Relations?)\s*:", re.IGNORECASE)
_LABELS_IN_ORDER = (("prompt:",), ("concepts and relations:",), ("relation:", "relations:"))
_FIRST_PROMPT = re.compile(r"\bPrompt:[ \t]*[^\s;]", re.IGNORECASE)


def parse_answer(answer: str) -> tuple[str, str, str] | Failure:
    """Parse the first prompt of an answer: `Prompt: …; Concepts and relations: …; Relation: …`.

    Parts are separated by semicolons or line ends. The prompt is one line without semicolons, prompt and concepts
    contain a word each, and no part contains the label of another. Other text before and after is ignored.

    Returns:
        (prompt, concepts and relations, relation).

    """
    # One regular expression for all parts would backtrack through line ends, in cubic time.
    labels = list(_LABEL.finditer(answer))
    for n in range(len(labels) - 2):
        found = labels[n : n + 3]
        if any(label[0].casefold() not in names for label, names in zip(found, _LABELS_IN_ORDER, strict=True)):
            continue
        prompt = _before_separator(answer[found[0].end() : found[1].start()])
        concepts = _before_separator(answer[found[1].end() : found[2].start()])
        if not prompt.strip("\n") or set(";\n") & set(prompt.strip()) or not concepts:
            continue
        end = labels[n + 3].start() if n + 3 < len(labels) else len(answer)
        relation = answer[found[2].end() : end].lstrip().partition("\n")[0]
        prompt, concepts, relation = (part.strip(" ;\t\n") for part in (prompt.strip(), concepts.strip(), relation))
        if _FIRST_PROMPT.search(answer, 0, found[0].start()):
            break
        if re.search(r"\w", prompt) and re.search(r"\w", concepts):
            return prompt, concepts, relation
        break
    return Failure("the answer does not parse")


def _before_separator(part: str) -> str:
    """Return what is before the semicolon or line end that closes a part; the empty string without one."""
    text = part.rstrip()
    if text.endswith(";") and text != ";":
        return text[:-1]
    return part[: max(part.rfind("\n", len(text)), 0)]


def check_wording(prompt: str, sub_category: str) -> Failure | None:
    """Return why a parsed prompt is rejected: a stop word or, in counting prompts, a number other than one to four."""
    if sub_category not in SUB_CATEGORIES_WITHOUT_STOP_WORDS:
        for word in STOP_WORDS:
            if word in prompt.lower():
                return Failure(f"stop word {word!r}")
    if sub_category in COUNTED_SUB_CATEGORIES:
        words = re.findall(r"[a-z]+|\d+", prompt.lower())
        if not any(word in NUMBERS for word in words):
            return Failure("no number from one to four")
        if any(word in OTHER_NUMBERS or word.isdigit() for word in words):
            return Failure("a number other than one to four")
    return None


def plan_counts(model: TextModel, config: Config, shard: Shard | None = None) -> dict[str, int]:
    """Return how many prompts of each kind to write: of all kinds, or of those of a shard.

    A file of prompts in place of the stage (`prompts.file`) is checked, and there are no kinds.

    Raises:
        UsageError: a kind that the template set does not have, or a file of prompts that cannot be used.

    """
    templates = _load_templates(model, config)
    if config.prompts.file is not None:
        if shard is not None:
            raise UsageError("Prompts from a file are read at once; run the stage without --shard.")
        _read_file(config, templates, cast("UnifiedModel", model))
        return {}
    if config.prompts.file_kind is not None:  # it has no effect, but a wrong word is a mistake
        _check_kind("prompts.file_kind", config.prompts.file_kind, templates)
    counts = _all_counts(templates, config)
    return counts if shard is None else divide_kinds(counts, shard.count)[shard.index]


def item_order(model: TextModel, config: Config) -> list[str]:
    """Return the ids of the items in the order in which one process makes them; none for prompts of a file."""
    if config.prompts.file is not None:
        return []
    templates = _load_templates(model, config)
    return [item_id for kind in _all_counts(templates, config) for item_id in _ids(templates, config, kind)]


def _load_templates(model: TextModel, config: Config) -> TemplateSet:
    """Return the template set of the model that writes the prompts, which may not be loaded yet."""
    writer = config.prompts.writer
    return load_model_templates(model, config) if writer is None else load_named_templates(writer, config)


def _all_counts(templates: TemplateSet, config: Config) -> dict[str, int]:
    for kind in config.prompts.counts:
        _check_kind("prompts.counts", kind, templates)
    return {kind: config.prompts.counts.get(kind, entry.count) for kind, entry in templates.kinds.items()}


def _check_kind(setting: str, kind: str, templates: TemplateSet) -> None:
    if kind not in templates.kinds:
        raise UsageError(
            f"{setting}: the template set {templates.name!r} has no kind {kind!r}; "
            f"{nearest(kind, list(templates.kinds))}."
        )


def run(
    records: Iterable[Record],
    model: TextModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Write prompts until every kind, or every kind of the shard, has the requested number.

    `records` are the prompts that exist already. The new ones have `item_id`, `t2i_category`, `sub_category`, `prompt`,
    `concepts_and_relations`, `relation`, `kind` and `source` (call and sample).

    Raises:
        UsageError: see `plan_counts`.
        OspoError: no prompt of any kind was accepted.

    """
    existing, templates = list(records), _load_templates(model, config)
    if config.prompts.file is not None:
        present = {record["item_id"] for record in existing}
        own = cast("UnifiedModel", model)
        yield from (record for record in _read_file(config, templates, own) if record["item_id"] not in present)
        return
    excluded = excluded_prompts(config)
    total, taken = len(existing), {record["item_id"] for record in existing}
    rejected: Counter[str] = Counter()
    for kind, count in plan_counts(model, config, None if context is None else context.shard).items():
        entry = templates.kinds[kind]
        found = [record for record in existing if record.get("kind") == kind]
        accepted = list(filter(_can_be_continued, found))
        ids = [item_id for item_id in _ids(templates, config, kind) if item_id not in taken]
        count = min(count - (len(found) - len(accepted)), len(accepted) + len(ids))
        seen = {prompt_key(record["prompt"]) for record in accepted}
        for source, answer in _answers(accepted, count, model, config, templates, kind):
            parts = _accept(answer, entry.sub_category, seen, excluded)
            if isinstance(parts, Failure):
                rejected[parts.reason] += 1
                count_work(dropped=1)
                continue
            seen.add(prompt_key(parts[0]))
            record = _record(ids.pop(0), kind, entry, *parts)
            accepted.append({**record, "source": source})
            total += 1
            yield accepted[-1]
        if len(accepted) < count:
            logger.warning(
                "%s: %d of %d prompts; stopped after %d calls without a new one",
                kind, len(accepted), count, config.prompts.patience,
            )  # fmt: skip
    if not total and not (context and context.inputs is not None):  # other workers have other kinds
        reasons = ", ".join(f"{reason} ({count})" for reason, count in rejected.most_common(3)) or "none was requested"
        raise OspoError(f"The model wrote no prompt that could be used: {reasons}.")


def _can_be_continued(record: Record) -> bool:
    """Return whether a record of the store has what the next prompts depend on; warn of one that has not."""
    source = cast(object, record.get("source"))
    numbers = [source.get(name) if isinstance(source, dict) else None for name in ("call", "sample")]
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        found = f"`source` should be an object with the numbers `call` and `sample`, got {shown(source)}"
    elif missing := [name for name in ("prompt", "concepts_and_relations", "relation") if record.get(name) is None]:
        found = f"it has no {', '.join(missing)}"
    else:
        return True
    logger.warning("prompts: item %s is not used for further prompts: %s", record["item_id"], found)
    return False


def _answers(
    accepted: list[Record], count: int, model: TextModel, config: Config, templates: TemplateSet, kind: str
) -> Iterator[tuple[dict[str, int], str | Failure]]:
    """Yield (call and sample, answer) until `accepted`, to which the caller appends, holds `count` records.

    Stops earlier after `patience` calls in a row without an accepted answer.
    """
    settings, entry = config.prompts, templates.kinds[kind]
    call = latest = max((record["source"]["call"] for record in accepted), default=0)  # latest: with an accepted answer
    while len(accepted) < count and call - latest < settings.patience:
        block, offset = divmod(call, settings.refresh_every)
        calls = range(call, call + min(CALLS_PER_BATCH, settings.refresh_every - offset))
        sources = [
            {"call": number, "sample": sample} for number in calls for sample in range(settings.samples_per_call)
        ]
        examples = _examples(templates, config, kind, block, accepted)
        variables = {"kind": kind, "category": entry.category, "sub_category": entry.sub_category, "examples": examples}
        seeds = [stable_hash(config.seed, "prompts", kind, *source.values()) for source in sources]
        answers = sample_text(model, templates, "prompts", settings, [variables] * len(sources), seeds)
        for source, answer in zip(sources, answers, strict=True):
            before = len(accepted)
            if before >= count or source["call"] - latest >= settings.patience:
                break
            yield source, answer
            if len(accepted) > before:
                latest = source["call"]
        call = calls.stop


def _accept(
    answer: str | Failure, sub_category: str, seen: set[str], excluded: frozenset[str]
) -> tuple[str, str, str] | Failure:
    parts = answer if isinstance(answer, Failure) else parse_answer(answer)
    if isinstance(parts, Failure):
        return parts
    key = prompt_key(parts[0])
    if (failure := check_wording(parts[0], sub_category)) is not None:
        return failure
    if key in seen:
        return Failure("repeated")
    return Failure("on the list of excluded prompts") if key in excluded else parts


def _examples(templates: TemplateSet, config: Config, kind: str, block: int, accepted: Sequence[Record]) -> list[str]:
    count = templates.few_shot.get(kind, 0)
    earlier = [record for record in accepted if record["source"]["call"] < block * config.prompts.refresh_every]
    if block == 0 or count == 0 or len(earlier) < count:
        return templates.examples(kind)
    rng = random.Random(stable_hash(config.seed, "examples", kind, block))
    return [
        f"Prompt: {record['prompt']}; Concepts and relations: {record['concepts_and_relations']}; "
        f"Relation: {record['relation']}"
        for record in rng.sample(earlier, count)
    ]


def _ids(templates: TemplateSet, config: Config, kind: str) -> list[str]:
    """Return the ids of a kind: the category digit and a number, which do not depend on the shard."""
    counts = _all_counts(templates, config)
    digits = {
        name: _CATEGORIES.index(entry.category) if entry.category in _CATEGORIES else len(_CATEGORIES)
        for name, entry in templates.kinds.items()
    }
    earlier = list(digits)[: list(digits).index(kind)]
    first = sum(counts[name] for name in earlier if digits[name] == digits[kind])
    return [f"{digits[kind]}{number:06d}" for number in range(first, first + counts[kind])]


def _record(item_id: str, kind: str, entry: Kind, prompt: str, concepts: str = "", relation: str = "") -> Record:
    return {
        "item_id": item_id,
        "t2i_category": entry.category,
        "sub_category": entry.sub_category,
        "prompt": prompt,
        "concepts_and_relations": concepts,
        "relation": relation,
        "kind": kind,
    }


def _read_file(config: Config, templates: TemplateSet, model: UnifiedModel) -> list[Record]:
    """Return the records of `prompts.file`, which takes the place of stage 1; a repeated prompt counts once."""
    assert config.prompts.file is not None
    kind = config.prompts.file_kind or list(templates.kinds)[-1]
    _check_kind("prompts.file_kind", kind, templates)
    excluded = excluded_prompts(config)
    prompts = numbered_prompts(config.prompts.file)
    on_list = f"is on the list of excluded prompts, {config.prompts.exclude}; delete it from one"
    results = [
        (line, Failure(f"{prompt!r} {on_list}") if prompt_key(prompt) in excluded else check_prompt(model, prompt))
        for line, prompt in prompts
    ]
    refuse_lines(config.prompts.file, results)
    unique: dict[str, str] = {}
    for _, prompt in prompts:
        unique.setdefault(prompt_key(prompt), normalized(model, prompt))
    entry = templates.kinds[kind]
    return [_record(f"p{index:06d}", kind, entry, prompt) for index, prompt in enumerate(unique.values())]


def failure(record: Record) -> Failure | None:
    """Return None: an answer that is not accepted makes no record."""
    return None

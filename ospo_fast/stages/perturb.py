"""Stage 2: three near misses of every prompt, and dense versions of prompt and near miss that share their scene."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ospo_fast.config import Config
from ospo_fast.errors import Failure, OspoError
from ospo_fast.records import VARIANTS, Record, stable_hash
from ospo_fast.stages import StageContext
from ospo_fast.stages.common import (
    chunked,
    describe,
    excluded,
    load_model_templates,
    prompt_key,
    sample_text,
    why_silent,
)

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel

_MIXED = ("replace", "swap", "drop")
_SAME = ("replace", "replace", "replace")
METHODS = {
    "attribute1_color": _SAME,
    "attribute1_shape": _SAME,
    "attribute1_texture": _SAME,
    "attribute2": _MIXED,
    "layout1": _MIXED,
    "layout2": _SAME,
    "layout3": _MIXED,
    "complex": _MIXED,
    "non-spatial": ("replace", "drop", "replace"),
}
_CONTRAST = re.compile(r"Contrastive Prompt:[ \t]*([^\n]*)", re.IGNORECASE)
_END = r"(?=\s*;?\s*Step\s*\d+\s*[.:]|\n|$)"
_DENSE = tuple(re.compile(rf"Prompt {n} Dense:\s*(.*?){_END}", re.IGNORECASE) for n in (1, 2))

CHUNK = 64  # items between two writes to the store


def methods_for(sub_category: str) -> tuple[str, ...]:
    """The perturbation of each of the three variants; OspoError for a sub-category that is not one of the nine."""
    if sub_category not in METHODS:
        raise OspoError(f"No perturbation is known for the sub-category {sub_category!r}; known: {', '.join(METHODS)}.")
    return METHODS[sub_category]


def parse_contrast(answer: str) -> str:
    """The last contrastive prompt of an answer, or the empty string."""
    found = _CONTRAST.findall(answer)
    return found[-1].strip().strip("\"'").strip(" ;") if found else ""


def parse_dense(answer: str) -> tuple[str, str]:
    """(dense prompt, dense variant) of an answer; the empty string for one that is missing."""
    found = [pattern.search(answer) for pattern in _DENSE]
    base, negative = (match.group(1).strip(" ;\t") if match else "" for match in found)
    return base, negative


def run(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Every record with `perturbed_method`, `negative_prompt`, `long_prompt`, `negative_long_prompt`, each of three.

    A variant whose answer failed, is empty, does not parse, repeats the prompt or is an excluded prompt (itself or in a
    dense version) is left out: its long prompts are empty strings and `variant_reasons` says why (None for a good one).
    """
    templates = load_model_templates(model, config)
    banned = excluded(config)
    for chunk in chunked(records, CHUNK):
        slots = [(record, i) for record in chunk for i in range(VARIANTS)]
        asked = [describe(r) | {"method": methods_for(r["sub_category"])[i]} for r, i in slots]
        seeds = [stable_hash(config.seed, "perturb", record["item_id"], i) for record, i in slots]
        answers = sample_text(model, templates, "perturb", config.perturb, asked, seeds)
        negatives = [parse_contrast(answer) for answer in answers]
        reasons = [
            why_silent(answer) or _objection(record["prompt"], negative, banned)
            for (record, _), answer, negative in zip(slots, answers, negatives, strict=True)
        ]
        good = [n for n, reason in enumerate(reasons) if reason is None]
        asked = [{"prompt": slots[n][0]["prompt"], "negative_prompt": negatives[n]} for n in good]
        seeds = [stable_hash(config.seed, "densify", slots[n][0]["item_id"], slots[n][1]) for n in good]
        answers = sample_text(model, templates, "densify", config.perturb, asked, seeds)
        dense = dict(zip(good, map(parse_dense, answers), strict=True))
        for n, answer in zip(good, answers, strict=True):
            if not all(dense[n]):
                reasons[n] = why_silent(answer) or "no dense prompts in the answer"
            elif any(prompt_key(text) in banned for text in dense[n]):
                reasons[n] = "a dense prompt is on the list of excluded prompts"
        for position, record in enumerate(chunk):
            rows = range(position * VARIANTS, (position + 1) * VARIANTS)
            pairs = [("", "") if reasons[n] else dense[n] for n in rows]
            yield {
                **record,
                "perturbed_method": list(methods_for(record["sub_category"])),
                "negative_prompt": [negatives[n] for n in rows],
                "long_prompt": [base for base, _ in pairs],
                "negative_long_prompt": [negative for _, negative in pairs],
                "variant_reasons": [reasons[n] for n in rows],
            }


def _objection(prompt: str, negative: str, banned: frozenset[str]) -> str | None:
    if not negative:
        return "no contrastive prompt in the answer"
    if prompt_key(negative) == prompt_key(prompt):
        return "the variant is the prompt itself"
    if prompt_key(negative) in banned:
        return "the variant is on the list of excluded prompts"
    return None


def failure(record: Record) -> Failure | None:
    """Return why no variant of an item could be used; None where one could."""
    if any(record["long_prompt"]):
        return None
    return next((Failure(reason) for reason in record["variant_reasons"] if reason), None)

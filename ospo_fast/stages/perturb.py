"""Stage 2: three hard negatives of every prompt, and dense versions of both prompts that share their scene."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ospo_fast.config import Config
from ospo_fast.errors import Failure, OspoError, attempt
from ospo_fast.models.base import UnifiedModel
from ospo_fast.records import VARIANTS, Record, chunked, stable_hash
from ospo_fast.stages import StageContext
from ospo_fast.stages.prompt_files import excluded_prompts, prompt_key
from ospo_fast.stages.text_sampling import load_model_templates, sample_text, template_variables

CHUNK = 64  # items between two writes to the store

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
_DENSE = tuple(re.compile(rf"Prompt {n} Dense:\s*", re.IGNORECASE) for n in (1, 2))
_STEP = re.compile(r"Step\s*\d+\s*[.:]", re.IGNORECASE)


def methods_for(sub_category: str) -> tuple[str, ...]:
    """Return the perturbation of each variant; OspoError for an unknown sub-category."""
    if sub_category not in METHODS:
        raise OspoError(f"No perturbation is known for the sub-category {sub_category!r}; known: {', '.join(METHODS)}.")
    return METHODS[sub_category]


def parse_contrast(answer: str) -> str:
    """Return the last contrastive prompt of an answer, or the empty string."""
    found = _CONTRAST.findall(answer)
    return found[-1].strip().strip("\"'").strip(" ;") if found else ""


def parse_dense(answer: str) -> tuple[str, str]:
    """Return (dense prompt, dense hard negative) of an answer; the empty string for one that is missing.

    A dense prompt ends with its line or before the next step.
    """
    base, negative = (_dense_part(answer, label.search(answer)) for label in _DENSE)
    return base, negative


def _dense_part(answer: str, label: re.Match[str] | None) -> str:
    if label is None:
        return ""
    # The end is searched first and the spaces before it are removed afterwards: one regular expression for all of it
    # takes cubic time.
    step = _STEP.search(answer, label.end())
    text = answer[label.end() : step.start() if step else None]
    if step:
        text = text.rstrip().removesuffix(";").rstrip()
    return text.partition("\n")[0].strip(" ;\t")


def run(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Add `perturbed_method`, `negative_prompt`, `long_prompt` and `negative_long_prompt`, a list of three each.

    A variant fails if an answer fails or does not parse, repeats the prompt, or gives an excluded prompt; those of an
    unknown sub-category all fail. Its prompts are then empty strings, and its entry of `variant_reasons` says why. The
    entries of other variants are None.
    """
    templates, excluded = load_model_templates(model, config), excluded_prompts(config)
    for chunk in chunked(records, CHUNK):
        methods = [attempt(methods_for, record.get("sub_category") or "") for record in chunk]
        known = [(record, m) for record, m in zip(chunk, methods, strict=True) if not isinstance(m, Failure)]
        slots = [(record, variant) for record, _ in known for variant in range(VARIANTS)]
        variables = [template_variables(record) | {"method": method} for record, m in known for method in m]
        seeds = [stable_hash(config.seed, "perturb", record["item_id"], variant) for record, variant in slots]
        answers = sample_text(model, templates, "perturb", config.perturb, variables, seeds)
        negatives = ["" if isinstance(answer, Failure) else parse_contrast(answer) for answer in answers]
        failures = [
            answer if isinstance(answer, Failure) else _check_negative(record["prompt"], negative, excluded)
            for (record, _), answer, negative in zip(slots, answers, negatives, strict=True)
        ]
        rows = [n for n, failed in enumerate(failures) if failed is None]
        variables = [{"prompt": slots[n][0]["prompt"], "negative_prompt": negatives[n]} for n in rows]
        seeds = [stable_hash(config.seed, "densify", slots[n][0]["item_id"], slots[n][1]) for n in rows]
        dense = [("", "")] * len(slots)
        for n, answer in zip(
            rows, sample_text(model, templates, "densify", config.perturb, variables, seeds), strict=True
        ):
            prompts = answer if isinstance(answer, Failure) else _accept_dense(answer, excluded)
            if isinstance(prompts, Failure):
                failures[n] = prompts
            else:
                dense[n] = prompts
        starts = iter(range(0, len(slots), VARIANTS))
        for record, method in zip(chunk, methods, strict=True):
            if isinstance(method, Failure):
                yield _without_variants(record, method)
                continue
            start = next(starts)
            rows_of_item = slice(start, start + VARIANTS)
            yield {
                **record,
                "perturbed_method": list(method),
                "negative_prompt": negatives[rows_of_item],
                "long_prompt": [base for base, _ in dense[rows_of_item]],
                "negative_long_prompt": [negative for _, negative in dense[rows_of_item]],
                "variant_reasons": [failed.reason if failed else None for failed in failures[rows_of_item]],
            }


def _without_variants(record: Record, failed: Failure) -> Record:
    none = [""] * VARIANTS
    prompts: Record = {"negative_prompt": none, "long_prompt": none, "negative_long_prompt": none}
    return {**record, "perturbed_method": none, **prompts, "variant_reasons": [failed.reason] * VARIANTS}


def _check_negative(prompt: str, negative: str, excluded: frozenset[str]) -> Failure | None:
    if not negative:
        return Failure("no contrastive prompt in the answer")
    if prompt_key(negative) == prompt_key(prompt):
        return Failure("the variant is the prompt itself")
    if prompt_key(negative) in excluded:
        return Failure("the variant is on the list of excluded prompts")
    return None


def _accept_dense(answer: str, excluded: frozenset[str]) -> tuple[str, str] | Failure:
    prompts = parse_dense(answer)
    if not all(prompts):
        return Failure("no dense prompts in the answer")
    if any(prompt_key(prompt) in excluded for prompt in prompts):
        return Failure("a dense prompt is on the list of excluded prompts")
    return prompts


def failure(record: Record) -> Failure | None:
    """Return why no variant of an item could be used; None where one could."""
    if any(record["long_prompt"]):
        return None
    return next((Failure(reason) for reason in record["variant_reasons"] if reason), None)

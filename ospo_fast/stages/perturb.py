"""Stage 2: three hard negatives of every prompt, and dense versions of both prompts that share their scene."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ospo_fast.config import Config
from ospo_fast.errors import Failure, OspoError, attempt
from ospo_fast.models.chat import TextModel
from ospo_fast.records import VARIANTS, Record, chunked, stable_hash
from ospo_fast.stages import StageContext
from ospo_fast.stages.prompt_files import excluded_prompts, prompt_key
from ospo_fast.stages.templates import TemplateSet
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
    model: TextModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Add `perturbed_method`, `negative_prompt`, `long_prompt` and `negative_long_prompt`: lists, an entry per variant.

    Hard negatives and dense prompts that an item comes with, such as one of an official file, are kept.

    A variant fails if an answer fails or does not parse, repeats the prompt, or gives an excluded prompt; those of an
    unknown sub-category all fail. Its prompts are then empty strings, and its entry of `variant_reasons` says why. The
    entries of other variants are None.
    """
    templates, excluded = load_model_templates(model, config), excluded_prompts(config)
    for chunk in chunked(records, CHUNK):
        methods = [_methods(record) for record in chunk]
        slots = [
            _Slot(record, variant, method)
            for record, found in zip(chunk, methods, strict=True)
            if not isinstance(found, Failure)
            for variant, method in enumerate(found)
        ]
        written = iter(
            _write_negatives([s for s in slots if s.given("negative_prompt") is None], model, templates, config)
        )
        negatives = [next(written) if (text := slot.given("negative_prompt")) is None else text for slot in slots]
        failures = [
            negative if isinstance(negative, Failure) else _check_negative(slot.record["prompt"], negative, excluded)
            for slot, negative in zip(slots, negatives, strict=True)
        ]
        texts = ["" if isinstance(negative, Failure) else negative for negative in negatives]
        dense = [(slot.given("long_prompt") or "", slot.given("negative_long_prompt") or "") for slot in slots]
        rows = [n for n, failed in enumerate(failures) if failed is None and not all(dense[n])]
        variables = [{"prompt": slots[n].record["prompt"], "negative_prompt": texts[n]} for n in rows]
        seeds = [stable_hash(config.seed, "densify", slots[n].record["item_id"], slots[n].variant) for n in rows]
        answers = sample_text(model, templates, "densify", config.perturb, variables, seeds)
        for n, answer in zip(rows, answers, strict=True):
            if isinstance(answer, Failure):
                failures[n] = answer
            else:
                dense[n] = parse_dense(answer)
        for n, failed in enumerate(failures):
            failures[n] = failed or _check_dense(dense[n], excluded)
            if failures[n] is not None:
                dense[n] = "", ""
        start = 0
        for record, method in zip(chunk, methods, strict=True):
            if isinstance(method, Failure):
                yield _without_variants(record, method)
                continue
            own = slice(start, start + len(method))
            start = own.stop
            yield {
                **record,
                "perturbed_method": list(method),
                "negative_prompt": texts[own],
                "long_prompt": [base for base, _ in dense[own]],
                "negative_long_prompt": [negative for _, negative in dense[own]],
                "variant_reasons": [failed.reason if failed else None for failed in failures[own]],
            }


@dataclass(frozen=True)
class _Slot:
    """One variant of an item."""

    record: Record
    variant: int
    method: str

    def given(self, field: str) -> str | None:
        """Return the text of a field of variants that the item comes with; None where it has none."""
        texts: Sequence[str] = cast("Mapping[str, Any]", self.record).get(field) or ()
        return texts[self.variant] if self.variant < len(texts) else None


def _methods(record: Record) -> Sequence[str] | Failure:
    """Return the perturbation of each variant of an item."""
    given, methods = record.get("negative_prompt") or [], record.get("perturbed_method") or []
    if not given:
        return attempt(methods_for, record.get("sub_category") or "")
    return methods if len(methods) == len(given) else [""] * len(given)


def _write_negatives(
    slots: Sequence[_Slot], model: TextModel, templates: TemplateSet, config: Config
) -> list[str | Failure]:
    variables = [template_variables(slot.record) | {"method": slot.method} for slot in slots]
    seeds = [stable_hash(config.seed, "perturb", slot.record["item_id"], slot.variant) for slot in slots]
    answers = sample_text(model, templates, "perturb", config.perturb, variables, seeds)
    return [answer if isinstance(answer, Failure) else parse_contrast(answer) for answer in answers]


def _without_variants(record: Record, failed: Failure) -> Record:
    none = [""] * VARIANTS
    prompts: Record = {"negative_prompt": none, "long_prompt": none, "negative_long_prompt": none}
    return {**record, "perturbed_method": none, **prompts, "variant_reasons": [failed.reason] * VARIANTS}


def _check_negative(prompt: str, negative: str, excluded: frozenset[str]) -> Failure | None:
    if not negative:
        return Failure("no contrastive prompt in the answer")
    if "\n" in negative:
        return Failure("the hard negative has several lines, so it is an answer without a contrastive prompt")
    if prompt_key(negative) == prompt_key(prompt):
        return Failure("the variant is the prompt itself")
    if prompt_key(negative) in excluded:
        return Failure("the variant is on the list of excluded prompts")
    return None


def _check_dense(prompts: tuple[str, str], excluded: frozenset[str]) -> Failure | None:
    if not all(prompts):
        return Failure("no dense prompts in the answer")
    if any(prompt_key(prompt) in excluded for prompt in prompts):
        return Failure("a dense prompt is on the list of excluded prompts")
    return None


def failure(record: Record) -> Failure | None:
    """Return why no variant of an item could be used; None where one could."""
    if any(record["long_prompt"]):
        return None
    return next((Failure(reason) for reason in record["variant_reasons"] if reason), None)

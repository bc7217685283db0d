"""What each stage needs of an item, so that records of any origin are refused by name, and what it adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ospo_fast.config import Config
from ospo_fast.errors import OspoError
from ospo_fast.records import Record, image_verdicts


@dataclass(frozen=True)
class Lack:
    """What an item does not have, so that a stage can do nothing with it."""

    reason: str
    remedy: str
    recorded: bool = False  # an earlier stage has failed on it, said why, and counted it


def has_prompt(record: Record) -> bool:
    """Return whether an item has its prompt."""
    return bool(record.get("prompt"))


def has_dense_prompts(record: Record) -> bool:
    """Return whether an item has dense prompts of both kinds."""
    return any(record.get("long_prompt") or []) and any(record.get("negative_long_prompt") or [])


def has_image(record: Record) -> bool:
    """Return whether an item has an image."""
    return any(True for _ in image_verdicts(record))


def has_question(record: Record) -> bool:
    """Return whether an item has a question."""
    return bool(record.get("question"))


def has_score(record: Record) -> bool:
    """Return whether an item has an image with a score."""
    return any("local_score" in verdict for *_, verdict in image_verdicts(record))


def has_pair(record: Record) -> bool:
    """Return whether an item has a pair."""
    return bool(record.get("pairs"))


def _again(stages: str) -> str:
    return f"run {stages} with --no-resume and other settings or another model"


def perturb(config: Config, record: Record) -> Lack | None:
    """Needs a sub-category, or hard negatives to make dense forms of."""
    from ospo_fast.stages.perturb import METHODS

    found = record.get("sub_category")
    if found in METHODS or any(record.get("negative_prompt") or []):
        return None
    reason = (
        "it has no `sub_category`" if not found else f"its `sub_category` {found!r:.60} is none of {', '.join(METHODS)}"
    )
    return Lack(f"{reason}, and no `negative_prompt`", "add one of them to the records of prompts")


def images(config: Config, record: Record) -> Lack | None:
    """Needs a variant with both dense prompts."""
    lists = [cast("Mapping[str, Any]", record).get(name) or [] for name in ("long_prompt", "negative_long_prompt")]
    if any(base and negative for base, negative in zip(*lists, strict=False)):
        return None
    reasons = list(dict.fromkeys(reason for reason in record.get("variant_reasons") or [] if reason))
    missing = [
        name for name, texts in zip(("long_prompt", "negative_long_prompt"), lists, strict=True) if not any(texts)
    ]
    named = (
        " and ".join(f"`{name}`" for name in missing) or "variant with both `long_prompt` and `negative_long_prompt`"
    )
    if reasons:
        return Lack("; ".join(reasons), _again("perturb"), recorded=True)
    return Lack(f"it has no {named}", "run the stage perturb, which also makes dense prompts of given hard negatives")


def score(config: Config, record: Record) -> Lack | None:
    """Needs an image and, except by rule likeliest, a question."""
    if not has_image(record):
        return _no_image(record)
    if has_question(record) or config.select.rule == "likeliest":
        return None
    if reason := record.get("question_reason"):
        return Lack(reason, _again("questions"), recorded=True)
    return Lack("it has no `question`", "run the stage questions")


def _no_image(record: Record) -> Lack:
    reasons = list(dict.fromkeys(reason for reason in record.get("variant_reasons") or [] if reason))
    if reasons:
        return Lack("; ".join(reasons), _again("perturb and images"), recorded=True)
    return Lack(
        "it has no image in `base_metadata` and `negative_metadata`",
        "run the stage images, or put the official folder images, with PNG files in base and negative, into the run "
        "folder",
    )


def select(config: Config, record: Record) -> Lack | None:
    """Needs images and, except by rule random, answers about them or, by rule likeliest, scores of them."""
    found = [verdict for *_, verdict in image_verdicts(record)]
    if not found:
        return _no_image(record)
    field = "local_score" if config.select.rule == "likeliest" else "answer_metadata"
    if config.select.rule == "random" or any(verdict.get(field) not in (None, []) for verdict in found):
        return None
    reasons = list(dict.fromkeys(reason for verdict in found if (reason := verdict.get("reason"))))
    if reason := record.get("question_reason") or "; ".join(reasons):
        return Lack(reason, _again("questions and score"), recorded=True)
    lacking = f"its images have no `{field}`" if record.get("question") else "it has no `question`"
    return Lack(lacking, "run the stages questions and score")


def masks(config: Config, record: Record) -> Lack | None:
    """Needs a pair."""
    if has_pair(record):
        return None
    if record.get("kept") is not None:
        return Lack(record.get("reason") or "no pair was kept", _again("select"), recorded=True)
    return Lack("it has no `chosen` and `rejected`", "run the stage select")


def refuse(stage: str, source: str, lacks: Sequence[Lack]) -> None:
    """Raise OspoError for the items of a stage, all of which lack something."""
    reasons = Counter(lack.reason for lack in lacks)
    named = "; ".join(f"{reason} ({count} items)" if count > 1 else reason for reason, count in reasons.most_common(3))
    remedy = Counter(lack.remedy for lack in lacks).most_common(1)[0][0]
    raise OspoError(f"{stage}: none of the {len(lacks)} items of {source} can be used: {named}; {remedy}.")

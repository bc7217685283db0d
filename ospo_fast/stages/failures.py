"""Which items a stage failed on, as their records say: a stage leaves such an item out and goes on."""

from __future__ import annotations

from typing import cast

from ospo_fast.records import ImageVerdict, Record, iter_pairs


def failure(stage: str, record: Record) -> str | None:
    """Why a stage could not do its work on an item, or on one of the item's images; None where it could.

    A selection that keeps no pair is a decision, not a failure, and what an earlier stage failed on counts there.
    """
    if stage == "perturb" and not any(record["long_prompt"]):
        return _first(record["variant_reasons"])
    if stage == "images":
        wanted = enumerate(record.get("long_prompt", []))
        missing = [n for n, prompt in wanted if prompt and f"base_{n}" not in record["base_metadata"]]
        return _first([record["variant_reasons"][n] for n in missing])
    if stage == "questions" and not record["question"]:
        return record["question_reason"]
    if stage == "score" and record.get("base_metadata"):
        if not record.get("question"):
            return record.get("question_reason") or "the item has no question"
        sides = (record.get("base_metadata", {}), record.get("negative_metadata", {}))
        verdicts = [verdict for side in cast("tuple[dict[str, ImageVerdict], ...]", sides) for verdict in side.values()]
        return _first([verdict.get("reason") for verdict in verdicts])
    if stage == "masks" and record.get("kept", "chosen" in record):
        return _first([pair.get("mask_reason") for pair in iter_pairs([record])])
    return None


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)

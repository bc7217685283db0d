"""See `failure` of each stage's module."""

import importlib

from ospo_fast.records import Record


def failure(stage: str, record: Record) -> str | None:
    """Return why a stage failed on an item."""
    found = importlib.import_module(f"ospo_fast.stages.{stage}").failure(record)
    return None if found is None else str(found)

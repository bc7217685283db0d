"""Fields of configurations: their meaning, and what they accept, are metadata that documentation and checks read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any


def setting(default: Any, meaning: str, accepted: dict[str, Any] | None = None) -> Any:
    """Return a field of a dataclass.

    Args:
        default: its default, or a function that makes it.
        meaning: one line for users, with the unit; `null` is what None means.
        accepted: what `expect`, `one_of` and `up_to` give, joined by `|`.

    """
    metadata = {"meaning": meaning, **(accepted or {})}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def expect(text: str, accepts: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return the metadata of a field that accepts only some values. `text` completes "KEY should be …".

    Without `accepts`, the value is checked where it is used.
    """
    return {"expected": text, "accepts": accepts}


def one_of(*choices: str) -> dict[str, Any]:
    """Return the metadata of a field that accepts only some words."""
    return expect("one of " + ", ".join(choices), choices.__contains__)


def up_to(limit: int | None) -> dict[str, Any]:
    """Return the metadata of a field whose numbers have another limit than those of `ospo_fast.config`. None: none."""
    return {"limit": limit}

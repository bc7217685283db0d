"""Errors and failures. Each message says what was wrong, what was given, what is expected and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class OspoError(Exception):
    """An error that the user can fix. The command line prints it and exits with code 1."""


class UsageError(OspoError):
    """A wrong argument, configuration key or preset. The command line prints it and exits with code 2."""


class OpError(OspoError, ValueError):
    """An operation got tensors that it cannot take. Names operation, argument, value and expectation."""


@dataclass(frozen=True)
class Failure:
    """Reason why one item, image, text or pair could not be processed. Functions return it in place of a result.

    An item that fails does so alone: the others of its batch are processed, and its record keeps the reason.
    """

    reason: str

    def __str__(self) -> str:
        return self.reason


def attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Failure:
    """Call `function`; an OspoError that it raises becomes a Failure."""
    try:
        return function(*args, **kwargs)
    except OspoError as error:
        return Failure(str(error))


def some_failed(what: str, reasons: Sequence[str], total: int) -> str:
    """Format `2 of 10 images failed: …`, with the first three reasons."""
    return f"{len(reasons)} of {total} {what} failed: " + "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else "")

"""Errors and failures. Each message says what was wrong, what was given, what is expected and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class OspoError(Exception):
    """An error that the user can fix. The command line prints it and exits with code 1.

    It can be pickled with all its attributes, so that one raised in a worker process reaches the parent.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args`, which hold the message alone, also where __init__ takes more.
        return _rebuild_error, (type(self), self.args), self.__dict__


class UsageError(OspoError):
    """A wrong argument, configuration key or preset. The command line prints it and exits with code 2."""


class OpError(OspoError, ValueError):
    """An operation got tensors that it cannot take. Names operation, argument, value and expectation."""


def _rebuild_error(kind: type[OspoError], args: tuple[Any, ...]) -> OspoError:
    error = kind.__new__(kind)
    error.args = args
    return error


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


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a library in Rust, which is no Exception, though as harmless as one."""
    return type(error).__name__ == "PanicException"


def check_text(argument: str, text: object) -> str:
    """Return a text that every tokenizer and file can take. Raises UsageError for another value.

    Refused are lone surrogates, which have no encoding, and NUL, which is where other programs end a text.
    """
    if not isinstance(text, str):
        raise UsageError(f"{argument}: got {type(text).__name__}, expected a text (str)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{argument}: {text[:60]!r} holds a lone surrogate (U+{ord(text[error.start]):04X} at character "
            f"{error.start}), which is half a character; remove it"
        ) from None
    if "\0" in text:
        raise UsageError(f"{argument}: {text[:60]!r} holds a NUL character; remove it")
    return text


def printable(text: str) -> str:
    """Return a text of any origin for a terminal: what is not printable, such as ESC, as an escape of Python."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def some_failed(what: str, reasons: Sequence[str], total: int) -> str:
    """Format `2 of 10 images failed: …`, with the first three reasons."""
    return f"{len(reasons)} of {total} {what} failed: " + "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else "")

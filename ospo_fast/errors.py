"""The exceptions that users see: one clear sentence each, saying what was given, what was expected and what helps."""

from collections.abc import Sequence


class OspoError(Exception):
    """Something that the user can mend. The command line prints it and exits with code 1."""


class UsageError(OspoError):
    """A wrong argument, configuration key or preset. The command line prints it and exits with code 2."""


class OpError(OspoError, ValueError):
    """Tensors that an operation cannot take; names the operation, the argument, what it got and what it expects."""


def some_failed(what: str, reasons: Sequence[str], total: int) -> str:
    """`2 of 10 images failed: …`, with the first three reasons."""
    return f"{len(reasons)} of {total} {what} failed: " + "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else "")

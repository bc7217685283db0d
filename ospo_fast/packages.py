"""Optional packages: which are missing, which break when they are imported, and what to install."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
from collections.abc import Iterator

from ospo_fast.errors import OspoError


class MissingPackageError(OspoError, ModuleNotFoundError):
    """A package of an extra is missing or cannot be imported. The message says which extra to install."""


@functools.cache  # a package that breaks would run its first lines again at every look
def import_error(name: str) -> str:
    """Return why a package cannot be imported; empty if it can.

    A package whose binaries do not fit the others raises anything: OSError, RuntimeError, AttributeError, SystemExit.
    """
    try:
        importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return _reason(error)
    return ""


def silence_imports() -> None:
    """Hide the notices of packages that others import if they are installed, and that warn of kernels they lack."""
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_installed(what: str, *names: str, extra: str = "pipeline", one_of_them: bool = False) -> None:
    """Raise MissingPackageError if packages that `what`, a public name, needs are not installed. Imports nothing.

    one_of_them: one of the packages is enough.
    """
    missing = [name for name in names if not _is_installed(name)]
    if missing and (len(missing) == len(names) or not one_of_them):
        are = "are" if len(missing) > 1 else "is"
        listed = (" or " if one_of_them else ", ").join(missing)
        message = f"{what} needs {listed}, which {are} not installed; {_install(extra)}"
        raise MissingPackageError(message, name=missing[0])


@contextlib.contextmanager
def required_by(what: str, *names: str, extra: str = "pipeline") -> Iterator[None]:
    """Run `check_installed`, then turn every error of a block of imports into a MissingPackageError.

    Several packages hide what is missing, or fail only when something is used, so `names` are looked for first.
    """
    check_installed(what, *names, extra=extra)
    try:
        yield
    except (OspoError, KeyboardInterrupt):
        raise
    except BaseException as error:
        needs = f"{what} needs packages of which one cannot be imported ({_reason(error)})"
        raise MissingPackageError(f"{needs}; {_install(extra)}") from error


def _install(extra: str) -> str:
    return f"run: pip install 'ospo-fast[{extra}]'"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # of a finder that refuses the name
        return False
    except ValueError:  # a module without a spec, which somebody has put into sys.modules
        return True


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")

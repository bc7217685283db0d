"""The versions of what results depend on."""

import importlib.metadata
import platform

from ospo_fast._version import __version__

_NAMES = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "numpy")


def run_versions() -> dict[str, str]:
    """Return the versions of this package, Python and the packages that compute results, where they are installed."""
    return {
        "ospo_fast": __version__,
        "python": platform.python_version(),
        **{name: version for name in _NAMES if (version := _version(name)) is not None},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

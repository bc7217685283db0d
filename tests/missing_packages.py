"""Hide or break packages in a new interpreter, as if they were not installed or did not fit."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_HIDE = """
import importlib.machinery, sys
class Without(importlib.machinery.PathFinder):
    names = set({names!r})
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.names else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
"""


def run_without(names: Iterable[str], code: str) -> str:
    """Return the output of `code` in a new interpreter that does not find the packages."""
    return run(_HIDE.format(names=sorted(names)) + code)


def run(code: str, *folders: Path) -> str:
    """Return the output of `code` in a new interpreter that looks for packages in `folders` first."""
    path = os.pathsep.join(map(str, (*folders, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_package(folder: Path, name: str, version: str, body: str) -> None:
    """Write an installed package with this code."""
    module = name.replace("-", "_")
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(body)
    (folder / f"{module}-{version}.dist-info").mkdir()
    (folder / f"{module}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")

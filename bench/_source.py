"""The commit that is measured, and the folder of its results. Needs only the standard library."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent  # the checkout, or the package in which a wheel installs this folder
INSTALLED = ROOT.name == "ospo_fast" and (ROOT / "__init__.py").is_file()
CLONE = "git clone https://github.com/KU-AGI/OSPO"
_PATH = str(ROOT.parent if INSTALLED else ROOT)
if _PATH not in sys.path:  # every benchmark imports this module first, so the package need not be installed
    sys.path.insert(0, _PATH)


def results_folder() -> Path:
    """Return the folder of results where none is named: bench/results of a checkout, else ./bench-results."""
    return Path("bench-results") if INSTALLED else HERE / "results"


def open_folder(path: Path) -> Path:
    """Return the root of a checkout of KU-AGI/OSPO. Raises UsageError for a folder that is none."""
    from ospo_fast.errors import UsageError

    if not path.is_dir():
        kind = "a file" if path.exists() else "not there"
        raise UsageError(f"--reference: {path} is {kind}, expected the folder of a checkout; run: {CLONE}.")
    if not (path / "ospo").is_dir():
        raise UsageError(f"--reference: {path} is not a checkout of KU-AGI/OSPO (it has no folder ospo); run: {CLONE}.")
    return path.resolve()


def git_commit(root: Path) -> str | None:
    """Return the commit of the checkout, with "+" if tracked files other than results differ from it.

    None outside a checkout, and without git.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # inside the checkout of another project
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git or no checkout
        return None


def commit(root: Path = ROOT) -> str:
    """Return `git_commit` of the checkout; the version in a wheel.

    Outside a checkout: OSPO_FAST_COMMIT, which is set where the files were copied, or "unknown".
    """
    if root == ROOT and INSTALLED:
        from ospo_fast._version import __version__

        return f"{__version__} (wheel)"
    return git_commit(root) or os.environ.get("OSPO_FAST_COMMIT") or "unknown"


def device_folder(results: Path, device: str) -> Path:
    """Return the folder of a device: its name in lower case, only letters, digits and hyphens."""
    return results / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")

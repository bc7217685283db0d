"""Which files are measured, and where their results go. Needs nothing but Python."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # every benchmark imports this module first: a checkout need not be installed
    sys.path.insert(0, str(ROOT))


def commit(root: Path = ROOT) -> str:
    """The commit of the checkout, with "+" when tracked files but results differ from it.

    Outside of a checkout what OSPO_FAST_COMMIT says (whoever copied the files knows), else "unknown".
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    copied = os.environ.get("OSPO_FAST_COMMIT") or "unknown"
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return copied  # inside of another project's checkout
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return copied


def device_folder(results: Path, device: str) -> Path:
    """Where rows of this device go: its name in lower case, letters and digits alone."""
    return results / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")

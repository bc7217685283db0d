"""The commit that is measured, and the folder of its results. Needs only the standard library."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # every benchmark imports this module first, so the package need not be installed
    sys.path.insert(0, str(ROOT))


def commit(root: Path = ROOT) -> str:
    """Return the commit of the checkout, with "+" if tracked files other than results differ from it.

    Outside a checkout: OSPO_FAST_COMMIT, which is set where the files were copied, or "unknown".
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    copied = os.environ.get("OSPO_FAST_COMMIT") or "unknown"
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return copied  # inside the checkout of another project
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git or no checkout
        return copied


def device_folder(results: Path, device: str) -> Path:
    """Return the folder of a device: its name in lower case, only letters, digits and hyphens."""
    return results / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")

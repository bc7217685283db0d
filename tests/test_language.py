"""Rules of language that a program can check: banned words, and the form of commit subjects. See CONTRIBUTING.md."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BANNED = (
    *("anew", "afresh", "beside", "likewise", "mend", "mends", "mended", "mending", "nobody", "whatever", "alike"),
    *("goes on", "gone on", "lies in", "stands in"),
)
# Between the words of a phrase: spaces, underscores, and the line ends of comments and strings.
GAP = r"""(?:[\s_#*/"'>|\\]|\bf(?="))+"""
PATTERN = re.compile(rf"(?<![a-z])(?:{'|'.join(word.replace(' ', GAP) for word in BANNED)})(?![a-z])", re.IGNORECASE)
DATA = (
    "bench/results/",
    "ospo_fast/shapes/checkpoint/",
    "ospo_fast/shapes/checkpoint-large/",
    "tests/golden/pair_selection.json",
    "tests/test_language.py",
)
# Words that are data: few-shot prompts, and a list of prepositions.
ALLOWED = {
    "ospo_fast/stages/templates/janus.yaml": {"beside", "mends"},
    "ospo_fast/stages/object_tokens.py": {"beside"},
}
FIRST_CHECKED = "[house] Rename files and identifiers to the field's terms"


def git(root: Path, *arguments: str) -> str:
    """The output of a git command in the checkout at `root`; skip the test where there is none."""
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("not a git checkout")
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def find_banned(root: Path) -> Iterator[tuple[str, int, str]]:
    """Path, line number and match of each banned word in the text files of the checkout at `root`."""
    for name in git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        path = root / name
        if not name or name.startswith(DATA) or not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" in content:
            continue
        text = content.decode()
        for match in PATTERN.finditer(text):
            if match[0].lower() not in ALLOWED.get(name, ()):
                yield name, text.count("\n", 0, match.start()) + 1, " ".join(match[0].split())


def test_no_banned_words() -> None:
    hits = [f"{name}:{line}: {match}" for name, line, match in find_banned(ROOT)]
    assert not hits, "\n".join(["banned words, see Language in CONTRIBUTING.md:", *hits])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Drawn Anew.", True),
        ("it goes\n    # on", True),
        ('"it goes "\n    f"on"', True),
        ("test_a_run_goes_on", True),
        ("beside_rate", True),
        ("besides, we recommend it", False),
        ("lies inside", False),
    ],
)
def test_pattern_matches_whole_words_across_lines(text: str, found: bool) -> None:
    assert bool(PATTERN.search(text)) == found


def test_commit_subjects() -> None:
    subjects = git(ROOT, "log", "--no-merges", "--format=%s").splitlines()
    if FIRST_CHECKED not in subjects:
        pytest.skip("the history does not reach the first commit that is checked")
    checked = subjects[: subjects.index(FIRST_CHECKED) + 1]
    assert [subject for subject in checked if len(subject) > 72 or not re.match(r"\[[a-z0-9_]+\] [A-Z]", subject)] == []

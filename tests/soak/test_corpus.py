"""Replay the corpus: found and hand-written inputs, with which every parser and reader returns or raises its own error.

An entry is an input as `text` or `base64`, repeated `times`, and what it is `about`. A fault that is not fixed yet has
the reason as `open`, and `crashes` if it ends the process.
"""

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("omegaconf", reason="configurations need omegaconf, from the extra `pipeline`")

from soak.fuzz import failure
from soak.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
ENTRIES = [
    pytest.param(path.stem, each, id=f"{path.stem}-{number}")
    for path in sorted(CORPUS.glob("*.json"))
    for number, each in enumerate(json.loads(path.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_input(name: str, entry: dict[str, Any]) -> None:
    if entry.get("crashes"):
        pytest.xfail(entry["open"])
    text = entry.get("text")
    data = base64.b64decode(entry["base64"]) if text is None else text.encode("utf-8", "surrogatepass")
    found = failure(TARGETS[name], data * entry.get("times", 1))
    if found is not None and "open" in entry:
        pytest.xfail(f"{entry['open']}: {found}")
    assert found is None


def test_every_target_has_an_entry() -> None:
    assert {path.stem for path in CORPUS.glob("*.json")} == set(TARGETS)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_target_returns_for_some_inputs(name: str) -> None:
    """An error that every input raises would hide what comes after it."""
    target, rng = TARGETS[name], random.Random(0)
    seeds = target.seeds()

    def returns() -> bool:
        try:
            target.call(target.generate(rng, seeds))
        except Exception:
            return False
        return True

    assert any(returns() for _ in range(100))


def test_failure_is_told_by_its_error() -> None:
    def broken(data: bytes) -> None:
        raise KeyError("x")

    target = TARGETS["shards"]
    assert failure(target, b"1/0") is None
    found = failure(type(target)(broken, target.generate, target.seeds), b"")
    assert found is not None
    assert found.startswith("KeyError at test_corpus.py:")

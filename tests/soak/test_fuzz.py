"""The soak finds what it looks for: planted faults in a target and in an operation."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("omegaconf", reason="configurations need omegaconf, from the extra `pipeline`")

from soak import fuzz, inputs, steady
from soak.parts import Options
from soak.targets import TARGETS, Target


def _die(data: bytes) -> None:
    if b"<script>" in data:
        os.kill(os.getpid(), signal.SIGKILL)


def _raise(data: bytes) -> None:
    if b"(" in data:
        raise KeyError("planted")


@pytest.mark.parametrize(
    ("call", "error", "piece"),
    [(_raise, "KeyError at test_fuzz.py:", "("), (_die, "the process died: -9", "<script>"), (len, None, "")],
)
def test_a_planted_fault_is_found_and_kept(
    call: Callable[[bytes], object], error: str | None, piece: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "planted", Target(call, inputs.text, lambda: ["a red circle"]))
    found = fuzz.fuzz_target("planted", 0, 500, 60.0, tmp_path)
    if error is None:
        assert (found["cases"], found["failures"], list(tmp_path.iterdir())) == (500, 0, [])
        return
    assert found["texts"][0].startswith(f"planted: {error}")
    [kept, *_] = json.loads((tmp_path / "planted.json").read_text())
    assert piece in kept["text"]


def test_a_target_with_too_few_inputs_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "planted", Target(len, inputs.text, lambda: ["a red circle"]))
    found = fuzz.fuzz_target("planted", 0, 500, 0.0, tmp_path)
    assert found["failures"] == 1
    assert "inputs in 0 s; give it more --minutes" in found["texts"][0]


def test_another_result_in_a_thread_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "ROUNDS", 2)
    monkeypatch.setattr(steady, "_calls", lambda: {"same": lambda: 1, "other": random.random})
    outcome = steady.threads(Options(Path(), 1, 1, 0, 1, float("inf")))
    assert outcome.cases == outcome.wanted == 8 * 2 * 2
    assert len(outcome.failures) == 16
    assert all("other" in failure for failure in outcome.failures)

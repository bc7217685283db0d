import json
import subprocess
import time
from pathlib import Path
from typing import Any

import _measure
import _source
import pytest
import torch


def test_variants_are_interleaved_on_the_same_inputs() -> None:
    calls: list[tuple[str, float]] = []
    values = iter(range(10**6))

    def note(name: str, pause: float = 0.0) -> object:
        def run(value: float) -> None:
            calls.append((name, value))
            time.sleep(pause)

        return run

    times = _measure.interleaved(
        {"a": note("a", 0.002), "b": note("b")}, lambda: (next(values),), seconds=0.0, warmup=1
    )
    assert calls[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert times["a"].repeats == times["b"].repeats == len(calls) / 2 - 1
    assert times["a"].p20_ms <= times["a"].median_ms <= times["a"].p80_ms
    assert times["a"].median_ms >= 2 > times["b"].median_ms


def test_every_variant_runs_for_the_given_time() -> None:
    times = _measure.interleaved({"a": lambda: time.sleep(0.001)}, lambda: (), seconds=0.03)
    assert times["a"].repeats * times["a"].p80_ms >= 20


def test_max_turns() -> None:
    times = _measure.interleaved({"a": lambda: None}, lambda: (), seconds=10.0, warmup=1, max_turns=5)
    assert times["a"].repeats == 5


def test_the_commit_marks_changes_outside_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.delenv("OSPO_FAST_COMMIT", raising=False)

    def commit() -> str:
        return _source.commit(tmp_path)

    assert commit() == "unknown"
    monkeypatch.setenv("OSPO_FAST_COMMIT", "0123456789ab")  # for files that were copied without .git
    assert commit() == "0123456789ab"
    git("init", "-q")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for name in ("code.py", "bench/results/rows.jsonl"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "--short=12", "HEAD").strip()
    assert commit() == head
    (tmp_path / "bench/results/rows.jsonl").write_text("2")
    assert commit() == head
    (tmp_path / "code.py").write_text("2")
    assert commit() == f"{head}+"
    # A copy inside the checkout of another project does not have the commit of that project.
    copy = tmp_path / "vendor" / "copy"
    copy.mkdir(parents=True)
    assert _source.commit(copy) == "0123456789ab"


def test_peak_memory_excludes_the_inputs() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.zeros(250_000, device=device)  # 1 MB, not part of the peak

    def two_at_once(x: torch.Tensor) -> None:
        first = x + 1
        del first
        second = x + 1
        third = second + 1
        del second, third

    assert _measure.peak_mb(two_at_once, x) == pytest.approx(2.0, abs=0.01 if device == "cpu" else 0.2)


def test_rows_name_device_and_versions(tmp_path: Path) -> None:
    timing = _measure.Timing(1.0, 0.9, 1.2, 7)
    row = _measure.row("otsu_threshold", "torch", {"B": 2}, "fp32", timing, peak_mb=3.0)
    assert {"op", "variant", "shapes", "dtype", "device", "driver", "versions", "commit", "date", "peak_mb"} <= set(row)
    path = _measure.write([row, row], tmp_path, "otsu_threshold")
    assert path.parent.parent == tmp_path
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row, row]
    _measure.write([row], tmp_path, "otsu_threshold")
    assert len(path.read_text().splitlines()) == 1
    assert [file.name for file in path.parent.iterdir()] == ["otsu_threshold.jsonl"]


def test_rows_of_several_cases_are_merged_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = _measure.Timing(1.0, 0.9, 1.1, 5)

    def rows(*sizes: int) -> list[dict[str, Any]]:
        return [_measure.row("op", f"variant {n}", {"rows": n}, "fp32", timing) for n in sizes]

    def kept() -> list[int]:
        return [json.loads(line)["shapes"]["rows"] for line in path.read_text().splitlines()]

    monkeypatch.setattr(_measure, "commit", lambda: "0123456789ab")
    path = _measure.write(rows(1, 2), tmp_path, "op")
    assert _measure.chosen("7B, 64 prompts")
    _measure.only_cases(["7B", "1B"])
    try:
        assert _measure.chosen("7B, 64 prompts")
        assert not _measure.chosen("tiny")
        _measure.write(rows(2, 3), tmp_path, "op")
        assert kept() == [1, 2, 3]
        _measure.write([_measure.row("other", "variant 3", {"rows": 3}, "fp32", timing)], tmp_path, "op")
        assert kept() == [1, 2, 3, 3]  # of another op
        monkeypatch.setattr(_measure, "commit", lambda: "ba9876543210")
        _measure.write(rows(3), tmp_path, "op")
        assert kept() == [3]  # rows of another commit are removed
    finally:
        _measure.only_cases([])
    _measure.write(rows(1), tmp_path, "op")
    assert kept() == [1]


def test_device_limits_and_floors() -> None:
    limits = _measure.ceilings()
    assert limits is _measure.ceilings()
    assert limits.bandwidth > 1e8
    assert limits.product > 1e8
    limits = _measure.Ceilings(4e12, 800e12)
    assert limits.floor_ms(bytes_moved=4e9) == pytest.approx(1.0)
    assert limits.floor_ms(bytes_moved=4e9, flop=1.6e12) == pytest.approx(2.0)
    assert limits.metrics(1.5, _measure.Timing(2.0, 1.9, 2.1, 5)) == {
        "floor_ms": 1.5, "share": 0.75, "copy_gb_s": 4000, "product_tflop_s": 800,
    }  # fmt: skip


def test_rows_of_a_rehearsal_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_measure, "_rehearsal", [False])
    timing = _measure.Timing(1.0, 0.9, 1.1, 5)
    assert "quick" not in _measure.row("op", "variant", {}, "fp32", timing)
    _measure.rehearse(True)
    assert _measure.row("op", "variant", {}, "fp32", timing)["quick"] is True

"""Measuring the engine on a GPU that is simulated: one variant after the other, every row written at once."""

import json
import types
from pathlib import Path
from typing import Any

import _measure
import generation as bench
import pytest
import torch

from ospo_fast.generation.decode_batch import DecodeBatch
from ospo_fast.generation.throughput import streamed_bytes, weight_bytes


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A clock (seconds) that only runs advance, and memory (bytes): held now, and its peak."""
    state = {"now": 0, "held": 0, "peak": 0}
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: state["now"]))
    for name, value in (
        ("synchronize", lambda: None),
        ("empty_cache", lambda: None),
        ("memory_allocated", lambda: state["held"]),
        ("reset_peak_memory_stats", lambda: state.update(peak=state["held"])),
        ("max_memory_allocated", lambda: state["peak"]),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return state


def test_the_first_run_does_not_count_and_memory_that_stays_allocated_does(fake_gpu: dict[str, int]) -> None:
    runs: list[str] = []

    def maker(name: str, seconds: int, held: int) -> Any:
        def make() -> bench.Variant:
            def run(*_: object) -> None:
                runs.append(name)
                if runs.count(name) == 1:
                    fake_gpu["held"] += held
                    fake_gpu["peak"] = fake_gpu["held"] + 10**9  # of the first run alone
                else:
                    fake_gpu["peak"] = fake_gpu["held"] + 10**6
                fake_gpu["now"] += seconds

            return run

        return make

    def broken() -> bench.Variant:
        def run(*_: object) -> None:
            raise TypeError("missing argument")

        return run

    kept: dict[str, tuple[_measure.Timing, float]] = {}
    makers = {
        "ospo_fast": maker("ospo_fast", 30, 5 * 10**6), "broken": broken,
        "official": maker("official", 30, 0), "transformers": maker("transformers", 10, 0),
    }  # fmt: skip
    failed = bench.one_by_one(makers, lambda: (None, None), lambda name, *found: kept.update({name: found}))
    assert failed == ["broken"]
    assert list(kept) == ["ospo_fast", "official", "transformers"]
    assert [timing.repeats for timing, _ in kept.values()] == [3, 1, 2]  # a slow peer is run once
    assert [timing.median_ms for timing, _ in kept.values()] == [30e3, 30e3, 10e3]
    assert [peak for _, peak in kept.values()] == [6.0, 1.0, 1.0]  # held + peak of the timed runs


def test_prompts_have_the_same_lengths_in_all_runs() -> None:
    assert bench.make_lengths(5, 60) == [45, 52, 60, 67, 75]
    assert bench.make_lengths(1, 60) == [60]


def test_only_chosen_cases_are_measured_and_other_rows_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "check", lambda size, device: None)  # tests/bench/test_run.py runs it
    try:
        for case in ("2 texts", "2 questions", "2 drafted images", "7B"):
            _measure.only_cases([case])
            bench.run(tmp_path, quick=True)
    finally:
        _measure.only_cases([])
    (path,) = tmp_path.glob("*/generation.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [("texts_s" in row, "answers_s" in row) for row in rows[:4]] == [(True, False)] * 2 + [(False, True)] * 2
    drafted = {row["variant"]: row for row in rows[4:]}
    assert list(drafted) == ["ospo_fast", *(f"ospo_fast, window {w}" for w in (4, 8, 16))]
    assert drafted["ospo_fast"]["codes_step"] == 1
    assert all(row["codes_step"] >= 1 and row["images_s"] > 0 for row in drafted.values())


def test_a_batch_that_does_not_fit_is_skipped_and_not_measured_as_a_smaller_one(
    fake_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bench.build(bench.QUICK, "cpu", torch.float32)
    prefill = DecodeBatch.prefill

    def limited(self: DecodeBatch, requests: list[Any]) -> None:
        if len(requests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        prefill(self, requests)

    monkeypatch.setattr(DecodeBatch, "prefill", limited)
    kept: list[str] = []
    makers = {"four": lambda: bench.engine(batch_size=4), "two": lambda: bench.engine(batch_size=2)}
    for name, count in (("four", 4), ("two", 2)):
        prompts = bench.make_prompts(model, [6] * count)
        failed = bench.one_by_one(
            {name: makers[name]}, lambda prompts=prompts: (model, prompts), lambda name, *_: kept.append(name)
        )
        assert failed == []
    assert kept == ["two"]
    assert "four: skipped, the memory holds 2 images per batch, not 4" in capsys.readouterr().out


def test_the_floor_is_the_weights_or_the_products_and_then_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = bench.build(bench.QUICK, "cpu", torch.float32), [5, 7]
    weights, steps = weight_bytes(model), model.grid[0] * model.grid[1]
    cached = streamed_bytes(model, lengths, 2) - steps * weights
    for product, first in ((1e18, steps * weights / 1e9), (1e3, 2 * 2 * 2 * steps * weights / 4 / 1e3)):
        monkeypatch.setattr(bench, "ceilings", lambda product=product: _measure.Ceilings(1e9, product))
        assert bench.floor_ms(model, lengths, 2) == pytest.approx(1e3 * (first + cached / 1e9))

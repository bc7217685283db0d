"""The GPU table of docs/benchmarks.md is written from the results."""

from pathlib import Path
from typing import Any

import figures
import pytest

ROOT = Path(__file__).parents[2]
CARD = "NVIDIA H100 80GB HBM3"


def row(op: str, variant: str, shapes: dict[str, int], **more: Any) -> dict[str, Any]:
    return {
        "op": op, "variant": variant, "shapes": shapes, "dtype": "bf16", "median_ms": 1.0, "device": CARD,
        "driver": "580.1", "versions": {"torch": "2.11.0"}, "commit": "0123456789ab", "date": "2026-11-26T12:00:00",
        **more,
    }  # fmt: skip


HEAD = {"N": 18432, "D": 4096, "V": 16384}
DECODER = {"L": 30, "B": 16, "H": 32, "D": 4096, "T": 576}
JANUS = {"hidden": 4096, "layers": 30, "prompts": 64, "tokens": 576}
ROWS = [
    row("gpu_tests", "pytest -m gpu", {}, passed=500, failed=1, skipped=3, complete=True),
    row("object_masks", "ospo_fast", {"B": 32, "O": 4, "H": 24, "W": 24}, median_ms=0.015, floor_ms=0.003, share=0.2),
    row("sample_codes", "ospo_fast", {"B": 64, "V": 16384}, median_ms=0.01, floor_ms=0.001, share=0.1),
    row(
        "decode_attention", "triton", {"rows": 128, "heads": 32, "width": 128, "length": 640},
        gb_s=2400.0, floor_ms=0.4, share=0.8,
    ),
    row("token_logprobs", "ospo_fast", HEAD, median_ms=9.0, floor_ms=8.0, share=8 / 9, peak_mb=480.0),
    row("token_logprobs", "official", HEAD, median_ms=18.0, peak_mb=5000.0),
    row("token_logprobs", "ospo_fast", {**HEAD, "linear": 1}, median_ms=6.0),
    row("token_logprobs", "Liger", {**HEAD, "linear": 1}, median_ms=6.6),
    row(
        "attention_columns", "LSE given", {"L": 25, "B": 16, "H": 32, "S": 600, "D": 128},
        median_ms=1.0, floor_ms=0.5, share=0.5,
    ),
    row("AttentionCapture", "forward", DECODER, median_ms=100.0),
    row("AttentionCapture", "forward with capture", DECODER, median_ms=100.6),
    row("generation", "ospo_fast", JANUS, median_ms=6000.0, images_s=10.6, share=0.76),
    row("generation", "transformers", JANUS, median_ms=19000.0),
]  # fmt: skip
EXPECTED = {
    "gpu-marked tests": "500 passed, 1 failed, 3 skipped; goal missed",
    "`object_masks`, 32 × 4 maps of 24 × 24": "15 µs; floor 3 µs (20.0%)",
    "`sample_codes`, 64 × 16384": "10 µs; floor 1 µs (10.0%)",
    "decode attention, 128 rows × 32 heads × 640 positions": "2400 GB/s; roofline 3000 GB/s (80.0%); goal missed",
    "`token_logprobs`, forward and backward, 18432 × 4096 × 16384, two-layer head": "9 ms; floor 8 ms (88.9%)",
    "the same, against the official computation": "2×",
    "the same, memory above the inputs": "0.48 GB",
    "linear head of that size, against Liger": "1.1×; goal missed",
    "the same, against `linear_cross_entropy` of torch 2.13": "not measured",
    "`attention_columns`, a layer of 16 sequences of 600, log-sum-exp given": "40 µs; floor 20 µs (50.0%)",
    "`AttentionCapture` in a 7B forward, 16 sequences of 600": "+0.60%",
    "Janus-Pro-7B, 64 prompts, guidance": "10.6 images/s; roofline 13.95 images/s (76.0%)",
    "the same, against transformers' `generate`": "3.167×",
    "Janus-Pro-7B, 1 prompt": "not measured",
}


def cells(table: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["metric", "goal", CARD]
    return {line[0]: line[2] for line in lines[2:]}


def test_metrics_have_value_bound_and_share() -> None:
    found = cells(figures.markdown({CARD: figures.Results(ROWS)}))
    assert {name: found[name] for name in EXPECTED} == EXPECTED
    rest = {name for name in found if name not in EXPECTED}
    assert all(found[name] == "not measured" for name in rest)
    text = figures.text(figures.Results(ROWS), part=2)
    assert "AttentionCapture" in text
    assert "Janus-Pro-7B, 64" not in text
    line = next(line for line in text.splitlines() if line.startswith("`token_logprobs`"))
    assert [cell.strip() for cell in line.split("  ") if cell.strip()][1:] == [
        "9 ms", "≤ 1.15× floor", "floor 8 ms", "88.9%", "yes",
    ]  # fmt: skip


def test_ratios_compare_rows_of_one_commit() -> None:
    older = [{**ROWS[5], "commit": "ba9876543210"}, ROWS[4]]
    found = cells(figures.markdown({CARD: figures.Results(older)}))
    assert found["the same, against the official computation"] == "not measured"
    later = {**ROWS[1], "median_ms": 0.03, "date": "2026-11-27T12:00:00"}
    found = cells(figures.markdown({CARD: figures.Results([later, ROWS[1]])}))
    assert found["`object_masks`, 32 × 4 maps of 24 × 24"].startswith("30 µs")


def test_rows_of_a_rehearsal_or_of_other_shapes_are_ignored() -> None:
    rows = [{**one, "quick": True} for one in ROWS]
    rows.append({**ROWS[2], "shapes": {"B": 64, "V": 16384, "top_k": 7}})
    found = cells(figures.markdown({CARD: figures.Results(rows)}))
    assert set(found.values()) == {"not measured"}


def test_every_metric_is_measured_by_a_part_of_the_gpu_day() -> None:
    import _gpu_day

    assert {metric.part for metric in figures.METRICS} == set(_gpu_day.PARTS)
    names = [metric.name for metric in figures.METRICS if not metric.name.startswith("the same")]
    assert len(names) == len(set(names))


def test_the_page_is_up_to_date() -> None:
    """`python bench/figures.py` after a merge."""
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    table = figures.markdown(figures.load(ROOT / "bench" / "results"))
    assert figures.with_table(page, table) == page


def test_the_table_is_written_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    page, results = tmp_path / "benchmarks.md", tmp_path / "results"
    page.write_text(f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n")
    (results / "card").mkdir(parents=True)
    (results / "card" / "object_masks.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    (results / "cpu").mkdir()
    (results / "cpu" / "object_masks.jsonl").write_text(json.dumps({**ROWS[1], "driver": None, "device": "CPU"}) + "\n")
    given = ["--results", str(results), "--page", str(page)]
    assert figures.main([*given, "--check"]) == 1
    assert "old" in page.read_text()
    assert figures.main(given) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "15 µs; floor 3 µs" in text
    assert f"{CARD}: driver 580.1, torch 2.11.0, commit 0123456789ab, 2026-11-26." in text
    assert "CPU" not in text
    assert figures.main([*given, "--check"]) == 0
    assert figures.main([*given, "--print"]) == 0
    assert CARD in capsys.readouterr().out
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="2"):
        figures.main(given)
    assert page.read_text() == "no marks"


def test_goals_are_compared_with_the_rounded_value() -> None:
    def found(name: str, rows: list[dict[str, Any]]) -> str:
        return cells(figures.markdown({CARD: figures.Results(rows)}))[name]

    memory, share = "the same, memory above the inputs", "Janus-Pro-7B, 64 prompts, guidance"
    logps = ROWS[4]
    assert found(memory, [{**logps, "peak_mb": 500.0}]) == "0.5 GB"
    assert found(memory, [{**logps, "peak_mb": 500.4}]) == "0.5004 GB; goal missed"
    janus = ROWS[-2]
    assert found(share, [{**janus, "share": 0.7496}]).endswith(" (75.0%)")
    assert found(share, [{**janus, "share": 0.7494}]).endswith(" (74.9%); goal missed")
    skinny = {"rows": 2, "depth": 4096, "columns": 49408}
    pair = [row("skinny_linear", "triton", skinny), row("skinny_linear", "single kernels", skinny, median_ms=1.01)]
    assert found("`skinny_linear`, a layer of 7B, 2 rows, against single kernels", pair) == "1.01×; goal missed"


def test_a_stopped_test_run_misses_its_goal() -> None:
    stopped = {**ROWS[0], "failed": 0, "complete": False}
    found = cells(figures.markdown({CARD: figures.Results([stopped])}))["gpu-marked tests"]
    assert found == "500 passed, 0 failed, 3 skipped, stopped before the end; goal missed"


def test_an_error_names_the_invalid_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, path = tmp_path / "benchmarks.md", tmp_path / "results" / "card" / "op.jsonl"
    path.parent.mkdir(parents=True)
    page.write_bytes(f"a\r\n{figures.BEGIN}\r\n{figures.END}\r\nb\r\n".encode())
    for line in ("{", "7", '{"op": "a"}'):
        path.write_text(line + "\n")
        with pytest.raises(SystemExit, match="2"):
            figures.main(["--results", str(path.parents[1]), "--page", str(page)])
        assert "line 1 of" in capsys.readouterr().err
    path.unlink()
    assert figures.main(["--results", str(path.parents[1]), "--page", str(page)]) == 0
    assert page.read_bytes().startswith(b"a\r\n")
    assert page.read_bytes().endswith(b"\r\nb\r\n")

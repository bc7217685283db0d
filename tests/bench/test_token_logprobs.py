"""The benchmark of token_logprobs: rows of every case, checks that can fail, peers that may, and its goals."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _gpu_day
import _logprob_variants
import _measure
import pytest
import run as bench
import token_logprobs as benchmark
import torch

import ospo_fast

ROOT = Path(__file__).parents[2]
Rows = dict[str, dict[str, dict[str, Any]]]  # by case, then by variant
FROZEN, TRAINED = "linear", "linear trained"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads slow down small sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def case(row: dict[str, Any]) -> str:
    return " ".join(name for name in row["shapes"] if name not in "NDV")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    out = tmp_path_factory.mktemp("results")
    assert bench.main(["--only", "token_logprobs", "--quick", "--out", str(out)]) == 0
    assert list(out.glob("*/token_logprobs.png"))
    (path,) = out.glob("*/token_logprobs.jsonl")
    found: Rows = {}
    for row in read(path):
        found.setdefault(case(row), {})[row["variant"]] = row
    return found


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def test_every_case_has_its_rows(rows: Rows) -> None:
    both = {"ospo_fast", "torch", "eager", "bare GEMMs", "bare GEMMs, one chunk"}
    names, kinds = ("ospo_fast", "eager"), ("entropy as metric", "entropy in the loss")
    entropy = {f"{name}, {kind}" for name in names for kind in kinds} | set(names)
    forward_only = {f"{name}, no grad{end}" for name in names for end in ("", ", entropy")}
    softcap = {f"{name}, temperature{end}" for name in names for end in ("", " and soft-cap")} | set(names)
    passes = ("no grad", "forward", "forward and backward")
    expected = {
        "": both | {"official"},
        FROZEN: both,
        TRAINED: both | {"ospo_fast, keep_logits=True", "ospo_fast, keep_logits=False", "ospo_fast.cross_entropy"},
        "linear entropy": entropy | forward_only,
        "linear trained entropy": entropy,
        "linear softcap": softcap,
        "linear dispatch": {f"{kind}, {name}" for kind in passes for name in ("module", "Head", "eager")},
    }
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        torch_op = {f"torch linear_cross_entropy{end}" for end in ("", ", per token", ", per token, default")}
        expected |= {name: expected[name] | torch_op for name in (FROZEN, TRAINED)}
    if installed("trl", "transformers"):
        expected |= {name: expected[name] | {"TRL"} for name in (FROZEN, TRAINED)}
        both_kinds = {f"TRL, {kind}" for kind in kinds}
        expected |= {name: expected[name] | both_kinds for name in ("linear entropy", "linear trained entropy")}
    assert expected.keys() == rows.keys()
    for name, variants in expected.items():
        assert variants <= rows[name].keys(), name


def test_rows_say_what_they_were_measured_with(rows: Rows) -> None:
    keys = {"device", "threads", "driver", "versions", "commit", "date", "quick", "median_ms", "p20_ms", "p80_ms"}
    for variants in rows.values():
        for row in variants.values():
            assert keys <= row.keys()
            assert row["versions"]["torch"] == torch.__version__
            assert ("trl" in row["versions"]) == installed("trl")
            assert row["median_ms"] > 0


def test_rows_compare_with_eager_and_without_entropy(rows: Rows) -> None:
    for name, variants in rows.items():
        if name == "linear dispatch":
            continue
        for row in variants.values():
            assert {"over_eager", "memory_over_eager", "peak_mb"} <= row.keys()
        assert variants["eager"]["over_eager"] == variants["eager"]["memory_over_eager"] == 1
    entropy = rows["linear entropy"]
    assert entropy["eager, entropy in the loss"]["over_eager"] == 1
    for name in ("ospo_fast, entropy as metric", "ospo_fast, no grad, entropy"):
        without = entropy[name.partition(", entropy")[0]]
        ratio = entropy[name]["median_ms"] / without["median_ms"]
        assert entropy[name]["over_without_entropy"] == pytest.approx(ratio, rel=1e-3)
    assert "over_bare_gemms" not in entropy["ospo_fast, no grad"]


def test_rows_have_the_errors_of_what_they_compute(rows: Rows) -> None:
    def errors(row: dict[str, Any]) -> set[str]:
        return {key for key in row if key.startswith("error_") and not key.endswith("_50")}

    values, gradients = {"error_values", "error_loss"}, {"error_gradients"}
    weights, entropies = {"error_weight_gradients"}, {"error_entropies"}
    assert errors(rows[FROZEN]["ospo_fast"]) == errors(rows[FROZEN]["eager"]) == values | gradients
    assert errors(rows[TRAINED]["ospo_fast"]) == values | gradients | weights
    assert errors(rows[TRAINED]["ospo_fast.cross_entropy"]) == {"error_loss"} | gradients | weights
    assert errors(rows["linear trained entropy"]["ospo_fast, entropy in the loss"]) == (
        values | gradients | weights | entropies
    )
    assert errors(rows["linear entropy"]["ospo_fast, no grad, entropy"]) == values | entropies
    assert all(
        row[f"{key}_50"] < 1e-4 for variants in rows.values() for row in variants.values() for key in errors(row)
    )


def test_rows_of_dispatch_are_beyond_the_products(rows: Rows) -> None:
    dispatch = rows["linear dispatch"]
    assert "overhead_us" not in dispatch["one product"]
    for name, row in dispatch.items():
        assert row["threads"] == 1
        if "product" not in name:
            assert 0 < row["overhead_us"] < row["p80_ms"] * 1e3
            two = "backward" in name or (name.startswith("forward") and "eager" not in name)
            assert row["beyond"] == ("two products" if two else "one product")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_have_the_growth_of_a_new_process(rows: Rows) -> None:
    for name in ("ospo_fast", "eager"):
        assert rows[TRAINED][name]["rss_mb"] >= 0
        assert rows[TRAINED][name]["imports_mb"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_growth_counts_memory_that_was_released(tmp_path: Path) -> None:
    (tmp_path / "sizes.py").write_text(
        "def steps(case, variant, quick):\n"
        "    assert (case, variant, quick) == ('a', 'b', True)\n"
        "    global imported\n"
        "    def tiny():\n"
        "        global imported\n"
        "        imported = b'1' * 20_000_000\n"
        "    return tiny, lambda: len(b'1' * 50_000_000)\n"
    )
    command = [sys.executable, str(ROOT / "bench" / "_peak_rss.py"), "sizes", "a", "b", "--quick"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    found = json.loads(done.stdout)
    assert found.pop("ms") > 0
    assert found == {
        "rss_mb": pytest.approx(50, abs=2),
        "imports_mb": pytest.approx(20, abs=2),
    }


def test_cases_are_selected_by_name(tmp_path: Path) -> None:
    arguments = ["--only", "token_logprobs", "--quick", "--out", str(tmp_path), "--case"]
    try:
        for name, cases, chunks in (
            ("soft-cap", ["linear softcap"], 0),
            ("chunk_rows", ["linear softcap"], 1),
            ("dispatch", ["linear softcap", "linear dispatch"], 1),
        ):
            assert bench.main([*arguments, name]) == 0
            written = {path.stem: read(path) for path in tmp_path.glob("*/*.jsonl")}
            assert list(dict.fromkeys(map(case, written["token_logprobs"]))) == cases
            assert ("token_logprobs_chunks" in written) == bool(chunks)
    finally:
        _measure.only_cases([])


def test_cases_of_devices_are_different_and_outside_of_the_gpu_day() -> None:
    day = [case for step in _gpu_day.PARTS[2] if step.name == "token_logprobs" for case in step.cases]
    for shapes in (benchmark.CPU_SHAPES, benchmark.GPU_SHAPES, benchmark.QUICK_SHAPES):
        assert len({shape.name for shape in shapes}) == len(shapes)
        sizes = [json.dumps(shape.sizes) for shape in shapes]
        assert len(set(sizes)) == len(sizes)  # rows are told apart by them
    timed = {shape.name for shape in benchmark.GPU_SHAPES if any(name in shape.name for name in day)}
    assert timed == {"7B", "linear 7B", "1B"}  # the time limit of the part is for these
    assert {goal.case for goal in benchmark.CPU_GOALS} <= {shape.name for shape in benchmark.CPU_SHAPES} | {"dispatch"}


def off_by_a_thousandth(what: str) -> Callable[..., Any]:
    real = ospo_fast.token_logprobs

    def more_gradient(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if not tensor.requires_grad else tensor * 1.001 - tensor.detach() * 0.001

    def function(hidden: torch.Tensor, head: ospo_fast.Head, labels: torch.Tensor, **options: Any) -> Any:
        if what == "gradients":
            hidden = more_gradient(hidden)
        if what == "weight_gradients":
            head = ospo_fast.Head(more_gradient(head.weight))
        found = real(hidden, head, labels, **options)
        if what == "entropies" and options.get("return_entropy"):
            return found[0], found[1] * 1.001
        return found * 1.001 if what == "values" and not options else found

    return function


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("values", "quick linear"),
        ("gradients", "quick linear"),
        ("weight_gradients", "quick linear, trained"),
        ("entropies", "quick linear, entropy"),
        ("gradients", "quick linear, soft-cap"),
    ],
)
def test_wrong_results_stop_the_benchmark(what: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (shape,) = (shape for shape in benchmark.QUICK_SHAPES if shape.name == name)
    monkeypatch.setattr(ospo_fast, "token_logprobs", off_by_a_thousandth(what))
    with pytest.raises(AssertionError, match=rf"^\('error_{what}'"):
        benchmark.measure(shape, "cpu", torch.float32, quick=True)


def test_a_missing_gradient_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ospo_fast.token_logprobs

    def function(hidden: torch.Tensor, head: ospo_fast.Head, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        return real(hidden, ospo_fast.Head(head.weight.detach()), labels, **options)

    shape = next(shape for shape in benchmark.QUICK_SHAPES if shape.trained)
    monkeypatch.setattr(ospo_fast, "token_logprobs", function)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        benchmark.measure(shape, "cpu", torch.float32, quick=True)


def test_a_peer_that_fails_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise ValueError("no such kernel\nwith details")

    monkeypatch.setattr(_logprob_variants, "PEERS", {"TRL": broken, "Liger": _logprob_variants.eager})
    shape = benchmark.QUICK_LINEAR
    found = benchmark.measure(shape, "cpu", torch.float32, quick=True)
    assert "TRL is skipped: ValueError: no such kernel\n" in capsys.readouterr().out
    assert {"Liger", "ospo_fast"} <= {row["variant"] for row in found}
    assert "TRL" not in {row["variant"] for row in found}


def test_goals_compare_rows_of_a_case() -> None:
    def rows(ours: float, other: float) -> dict[str, list[dict[str, Any]]]:
        return {"linear": [{"variant": "a", "median_ms": ours}, {"variant": "b", "median_ms": other}]}

    goal = benchmark.Goal("linear", "a", "median_ms", 0.9, "b")
    assert goal.line(rows(9, 10)) == "linear: median_ms of a over b: 0.900, goal ≤ 0.9: reached"
    assert goal.line(rows(10, 10)).endswith("1.000, goal ≤ 0.9: missed")
    assert benchmark.Goal("linear", "a", "median_ms", 15).line(rows(16, 1)).endswith("of a: 16.000, goal ≤ 15: missed")
    assert goal.line({}) == goal.line({"linear": rows(1, 1)["linear"][:1]}) == ""

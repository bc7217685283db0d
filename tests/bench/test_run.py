import json
from pathlib import Path

import pytest
import run as bench

from ospo_fast.stages import STAGE_NAMES


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("dispatch", {"call", "bare"}),
        ("object_masks", {"ospo_fast", "torch"}),
        ("sample_codes", {"ospo_fast", "torch"}),
        (
            "attention_columns",
            {"LSE given", "own LSE", "eager", "forward with capture", "DAAM-style hooks", "output_attentions"},
        ),
        ("decode_attention", {"torch", "masked SDPA"}),
        ("skinny_linear", {"torch", "single kernels"}),
    ],
)
def test_a_quick_run_writes_its_rows(name: str, variants: set[str], tmp_path: Path) -> None:
    assert bench.main(["--only", name, "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob(f"*/{name}.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert variants <= {row["variant"] for row in rows}
    assert all(row["median_ms"] > 0 for row in rows)


def test_rows_of_the_engine_have_rates(tmp_path: Path) -> None:
    assert bench.main(["--only", "generation", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/generation.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    seen = set()
    for row in rows:
        shapes, seconds = row["shapes"], row["median_ms"] / 1e3
        if "prompts" in shapes:
            assert row["images_s"] == pytest.approx(shapes["prompts"] / seconds, rel=1e-3)
            seen.add(row["variant"])
            if row["variant"] != "ospo_fast, images":  # decoding of pixels has no floor
                assert row["gb_s"] > 0
                # The floor counts part of the bytes read, at the bandwidth of a copy; products can take longer.
                assert row["share"] >= 0.99 * row["gb_s"] / row["copy_gb_s"] > 0
        elif "texts" in shapes:
            assert row["texts_s"] == pytest.approx(shapes["texts"] / seconds, rel=1e-3)
            seen.add("texts")
        elif "drafted" in shapes:
            assert row["images_s"] == pytest.approx(shapes["drafted"] / seconds, rel=1e-3)
            seen.add("drafted images")
        else:
            assert row["answers_s"] == pytest.approx(shapes["images"] * shapes["questions"] / seconds, rel=1e-3)
            seen.add("questions")
    assert seen == {
        "ospo_fast",
        "ospo_fast, images",
        "official",
        "transformers",
        "texts",
        "questions",
        "drafted images",
    }


def test_other_benchmarks_run_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_one.py").write_text("def run(out, quick):\n    raise ValueError('wrong thresholds')\n")
    (tmp_path / "working_one.py").write_text("def run(out, quick):\n    (out / 'ran').write_text(str(quick))\n")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    assert bench.main(["--all", "--quick", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "ran").read_text() == "True"
    assert "failed: broken_one" in capsys.readouterr().err


def test_operations_exclude_runs_of_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(bench.names()) > bench.METHOD
    for name in ("stages", "generation", "sample_codes", "token_logprobs"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    assert bench.operations() == ["generation", "sample_codes", "token_logprobs"]
    ran: list[str] = []
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: Recorder(name, ran))
    assert bench.main(["--ops", "--out", str(tmp_path)]) == 0
    assert ran == bench.operations()


class Recorder:
    """Takes the place of the module of a benchmark."""

    def __init__(self, name: str, ran: list[str]) -> None:
        self.run = lambda out, quick: ran.append(name)
        self.only_cases = self.rehearse = lambda given: None


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--only", "nothing"])
    assert "sample_codes" in capsys.readouterr().err


@pytest.mark.usefixtures("omegaconf")
def test_stages_are_measured_separately(tmp_path: Path) -> None:
    """A quick run with the shipped model: a row per stage with its items, rate and peak memory."""
    assert bench.main(["--only", "stages", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/stages.jsonl")
    rows = {row["variant"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert tuple(rows) == STAGE_NAMES
    assert rows["train"]["shapes"] == {"steps": 4}
    items = rows["prompts"]["shapes"]["items"]
    assert items > 20
    for stage in STAGE_NAMES[:-1]:
        assert rows[stage]["shapes"]["items"] == items
        assert rows[stage]["items_s"] == pytest.approx(items / rows[stage]["median_ms"] * 1e3, rel=1e-3)
        assert rows[stage]["peak_mb"] > 50


def test_quick_runs_do_not_replace_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--only", "sample_codes", "--quick"])
    assert "expected --out with it" in capsys.readouterr().err

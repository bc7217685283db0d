import json
from pathlib import Path

import pytest
import run as bench


@pytest.mark.parametrize("name", ["object_masks", "sample_codes"])
def test_a_quick_run_writes_its_rows(name: str, tmp_path: Path) -> None:
    assert bench.main(["--only", name, "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob(f"*/{name}.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"ospo_fast", "torch"} <= {row["variant"] for row in rows}
    assert all(row["median_ms"] > 0 for row in rows)


def test_a_benchmark_that_fails_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_one.py").write_text("def run(out, quick):\n    raise ValueError('wrong thresholds')\n")
    (tmp_path / "working_one.py").write_text("def run(out, quick):\n    (out / 'ran').write_text(str(quick))\n")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    assert bench.main(["--all", "--quick", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "ran").read_text() == "True"
    assert "failed: broken_one" in capsys.readouterr().err


def test_an_unknown_benchmark_is_a_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--only", "nothing"])
    assert "sample_codes" in capsys.readouterr().err

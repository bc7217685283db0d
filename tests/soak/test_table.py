"""The table of a soak, its exit code, and where it is written."""

import json
from pathlib import Path

import pytest
from soak import __main__ as soak
from soak.parts import Options, Outcome


def test_table_exit_code_and_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "reliability.md"
    document.write_text(f"before\n{soak.MARKERS[0]}\nNot measured yet.\n{soak.MARKERS[1]}\nafter\n")
    monkeypatch.setattr(soak, "DOCUMENT", document)
    found: list[str] = []

    def outcome(part: str, options: Options) -> Outcome:
        return Outcome(
            part,
            "0 lost",
            1000,
            1000,
            found,
            2.0,
            [{"name": "x", "goal": "y", "cases": 5, "failures": 0, "seconds": 1}],
        )

    monkeypatch.setattr(soak, "_outcome", outcome)
    command = ["--parts", "kills", "--out", str(tmp_path), "--seed", "7"]
    assert soak.main(command) == 0
    assert "Not measured yet." in document.read_text()
    found.append("lost: a")
    assert soak.main([*command, "--write"]) == 1
    text = document.read_text()
    assert "| kills | 0 lost | 1,000 | 1 | 2 |\n| kills: x | y | 5 | 0 | 1 |\n" in text
    assert "seed 7" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    row = json.loads((tmp_path / "soak.jsonl").read_text())
    assert row["failures"] == ["lost: a"]
    assert {"device", "versions", "commit", "date"} <= set(row)


def test_a_part_with_too_few_cases_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    from soak import runs

    options = Options(Path(), 300, 1, 0, 1, 0.0)
    for cases, failures in ((299, ["only 299 of 300 cases; give it more --minutes"]), (300, [])):
        monkeypatch.setattr(runs, "kills", lambda options, cases=cases: Outcome("kills", "", 300, cases))
        assert soak._outcome("kills", options).failures == failures


def test_document_of_the_checkout_has_the_markers() -> None:
    text = soak.DOCUMENT.read_text(encoding="utf-8")
    assert [text.count(marker) for marker in soak.MARKERS] == [1, 1]

"""The pictures of the README are made from measurements."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readme_pictures as pictures
from PIL import Image

from ospo_fast.shapes.evaluate import AlignmentResult


def result(correct: list[list[bool]], **changes: Any) -> AlignmentResult:
    fields: dict[str, Any] = {
        "split": "test", "guidance_scale": 1.5, "seeds": (0, 1), "kinds": ("color2", "color1", "color2", "2D_spatial"),
        "prompts": ("a red circle and a blue square", "a cross", "b", "c"), "images": (Image.new("RGB", (48, 48)),) * 8,
        "correct": np.array(correct),
    }  # fmt: skip
    return AlignmentResult(**{**fields, **changes})


BEFORE = result([[False, True], [False, False], [True, True], [False, False]])
AFTER = result([[True, True], [True, True], [False, True], [False, True]])


def test_images_are_those_that_became_right_and_both_changes_are_counted() -> None:
    assert pictures.pick(BEFORE, AFTER) == [(0, 0)]
    assert pictures.changes(BEFORE, AFTER) == (6, 2, 1)
    assert pictures.compose(BEFORE, AFTER).size == (56 + 104, 64 + 2 * 104)
    with pytest.raises(ValueError, match="other prompts, seeds or guidance scales"):
        pictures.pick(BEFORE, result([[True, True]] * 4, guidance_scale=1.0))


def test_rows_are_the_newest_of_one_commit(tmp_path: Path) -> None:
    rows = [
        {"variant": v, "shapes": {"N": 1}, "commit": c, "date": d}
        for v, c, d in (("a", "1", "2026-01"), ("a", "2", "2026-02"), ("b", "2", "2026-02"), ("c", "1", "2026-01"))
    ]
    (tmp_path / "op.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row["commit"] for row in pictures.newest("op", {"N": 1}, ("a", "b"), tmp_path)] == ["2", "2"]
    with pytest.raises(ValueError, match="of the commits 1, 2, expected one"):
        pictures.newest("op", {"N": 1}, ("a", "c"), tmp_path)
    with pytest.raises(ValueError, match="got no row of 'd'"):
        pictures.newest("op", {"N": 1}, ("a", "d"), tmp_path)


def test_the_rows_of_the_plot_are_there() -> None:
    head = pictures.newest("token_logprobs", pictures.HEAD, ("ospo_fast", "official"))
    assert [round(row["median_ms"]) for row in head] == [501, 799]  # as the README says
    assert [round(row["peak_mb"]) for row in head] == [39, 476]


def test_a_folder_that_is_no_demo_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        pictures.main(["--demo", str(tmp_path)])
    assert "summary.json" in capsys.readouterr().err

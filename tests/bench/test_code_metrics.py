"""Structure of the package: one list of stages, a short path to the decode loop, and few settings."""

import ast
import re
from pathlib import Path

import code_metrics

from ospo_fast.stages import STAGE_NAMES

ROOT = Path(__file__).resolve().parents[2]


def test_structure_of_the_package() -> None:
    assert code_metrics.stage_files(ROOT)["stage_lists"] == ["ospo_fast/stages/__init__.py"]
    assert 0 < code_metrics.hops(ROOT)["hops_to_decode_loop"] <= 4
    assert 0 < code_metrics.config_fields() <= 100


def stage_comparisons(source: str) -> list[int]:
    """Return the lines of comparisons with the name of a stage, also in a tuple, list or set of words."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and side.attr == "split" for side in sides):
                continue  # of prompts: train, validation, test
            literals = [item for side in sides for item in (side, *getattr(side, "elts", ()))]
            if any(isinstance(item, ast.Constant) and item.value in STAGE_NAMES for item in literals):
                lines.append(node.lineno)
    return lines


def test_no_code_tests_the_name_of_a_stage() -> None:
    assert stage_comparisons('if "masks" != stage.name or name in ("train", "x"):\n    pass') == [1, 1]
    found = {path: stage_comparisons(path.read_text(encoding="utf-8")) for path in (ROOT / "ospo_fast").rglob("*.py")}
    assert not {path: lines for path, lines in found.items() if lines}


def test_every_logger_has_the_name_of_its_module() -> None:
    for path in (ROOT / "ospo_fast").rglob("*.py"):
        for line in re.findall(r"^.*= .*getLogger.*$", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert line == "logger = logging.getLogger(__name__)", f"{path}: {line}"

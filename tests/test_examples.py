"""Every example trains with and without ospo_fast, and the curves agree."""

import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

FOLDER = Path(__file__).resolve().parents[1] / "examples"
STEPS = 50
# A curve of each example and by how much it moves at least: curves that do not move always agree.
MOVES = {
    "accelerate_loop": ("loss", -1.0),
    "grpo": ("reward", 0.08),
    "lightning_module": ("loss", -3.0),
    "transformers_trainer": ("loss", -0.3),
    "trl_dpo": ("loss", -0.3),
    "trl_grpo": ("kl", 0.03),
    "trl_ospo": ("loss", -3.0),
    "verl_policy": ("loss", -0.1),
    "weighted_dpo": ("loss", -0.5),
}


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OspoOps(TorchDispatchMode):
    """Count the operations of this package that run in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.namespace == "ospo_fast"
        return function(*args, **(kwargs or {}))


def test_every_example_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(MOVES)


@pytest.mark.parametrize("name", MOVES)
def test_curves_agree(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    example = load(name)
    plain = example.main(["--plain", "--steps", str(STEPS), "--out", str(tmp_path / "plain.json")])
    fused = example.main(["--steps", str(STEPS), "--out", str(tmp_path / "fused.json")])
    for curves, file in ((plain, "plain.json"), (fused, "fused.json")):
        assert json.loads((tmp_path / file).read_text()) == curves
        assert all(len(curve) == STEPS for curve in curves.values())
    assert fused.keys() == plain.keys()
    for curve, values in fused.items():
        difference = max(abs(a - b) for a, b in zip(values, plain[curve], strict=True))
        assert difference < 1e-5, f"{curve} of {name} differs by {difference}"
    curve, change = MOVES[name]
    moved = sum(fused[curve][-4:]) / 4 - sum(fused[curve][:4]) / 4
    assert moved / change > 1, f"{curve} of {name} moves by {moved}"


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("plain", [True, False])
def test_only_the_changed_line_runs_this_package(name: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with OspoOps() as ops:
        load(name).main(["--steps", "2", *(["--plain"] if plain else [])])
    assert (ops.count == 0) == plain


def test_object_masks_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    example = load("trl_ospo")
    plain, masked = (example.main(["--steps", "2", *more])["loss"] for more in ([], ["--masks"]))
    assert min(abs(a - b) for a, b in zip(plain, masked, strict=True)) > 1e-4

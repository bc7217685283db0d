"""Every example trains with and without ospo_fast, and the curves agree. That of Ray generates images."""

import importlib.util
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import ospo_fast as of

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
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted([*MOVES, "ray_data"])


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


class FakeRay:
    """What the example uses of Ray, with actors in this process that take turns."""

    def __init__(self) -> None:
        self.data = self
        self.options: dict[str, Any] = {}

    def ActorPoolStrategy(self, *, size: int) -> int:  # noqa: N802
        return size

    def from_items(self, rows: list[dict[str, Any]]) -> "FakeRay":
        self.rows = rows
        return self

    def map_batches(self, actor: Any, *, batch_size: int, compute: int, **options: Any) -> "FakeRay":
        self.options = options
        actors = [actor(*options["fn_constructor_args"], **options["fn_constructor_kwargs"]) for _ in range(compute)]
        parts = [self.rows[i : i + batch_size] for i in range(0, len(self.rows), batch_size)]
        self.results: dict[int, dict[str, Any]] = {}
        for n, part in reversed(list(enumerate(parts))):
            columns = actors[n % compute]({key: np.array([row[key] for row in part]) for key in part[0]})
            for place, index in enumerate(columns["index"].tolist()):
                self.results[index] = {key: values[place] for key, values in columns.items()}
        return self

    def write_parquet(self, out: str) -> None:
        Path(out).write_text(str(len(self.results)))


def test_actors_of_ray_give_the_images_of_one_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["two red circles", "a blue square", "a green cross above a yellow circle"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts) + "\n")
    example = load("ray_data")
    generator = of.ImageGenerator(of.load_model("shapes"))
    options = {"num_images": 3, "seeds": [5, 6, 7] * 3, "guidance_scale": 1.5}
    codes = generator.generate(prompts, output="codes", **options)
    images = generator.generate(prompts, **options)
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--num", "3", "--seed", "5", "--guidance-scale", "1.5"]
    for actors, batch_size in ((1, 96), (2, 4), (3, 2)):
        ray = FakeRay()
        monkeypatch.setitem(sys.modules, "ray", ray)
        out = tmp_path / str(actors)
        example.main([*words, "--out", str(out), "--actors", str(actors), "--batch-size", str(batch_size)])
        assert out.read_text() == "9"
        assert ray.options["num_gpus"] == 0
        for index, row in ray.results.items():
            assert (row["prompt"], row["seed"]) == (prompts[index // 3], 5 + index % 3)
            assert row["codes"].tolist() == codes[index].tolist()
            assert PIL.Image.open(io.BytesIO(row["png"])).tobytes() == images[index].tobytes()

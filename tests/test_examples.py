"""Every example trains with and without ospo_fast, and the curves agree.

That of Ray generates images. That of an own family is an adapter: what holds for the families is tested for it, too.
"""

import importlib.util
import io
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ospo_fast as of
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation import answer_questions
from ospo_fast.generation.decoder import InferenceDecoder
from ospo_fast.generation.module_decoder import ModuleDecoder
from ospo_fast.models import UnifiedModel

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
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted([*MOVES, "own_family", "ray_data"])


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


def test_an_own_family_generates_trains_and_chats(tmp_path: Path) -> None:
    example = load("own_family")
    found = example.main(["--out", str(tmp_path / "image.png")])
    assert found["losses"][1] < found["losses"][0]
    model, prompts = example.build_model(), ["a dark square", "a square"]
    assert isinstance(model, UnifiedModel)
    assert PIL.Image.open(tmp_path / "image.png").size == model.image_size[::-1]
    assert torch.equal(model.encode_images(model.decode_codes(found["codes"])), found["codes"])
    options: dict[str, Any] = {"guidance_scale": 3.0, "output": "codes"}
    generator = of.ImageGenerator(model)
    codes = generator.generate(prompts, seeds=[0, 1], **options)
    assert type(generator._engine.decoder) is InferenceDecoder  # type: ignore[union-attr]
    assert torch.equal(of.ImageGenerator(model, batch_size=1).generate(prompts, seeds=[0, 1], **options), codes)
    assert len(set(codes.flatten().tolist())) > 4

    def chat(question: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": question}]

    assert int((model.chat(chat("is it dark ?"), image=True) == model.image_id).sum()) == model.layout.tokens
    [[answer]] = answer_questions(model, model.decode_codes(codes[:1]), [["is it dark ?"]], template=chat)
    assert 0 < answer["p_yes"] < 1
    with pytest.raises(UsageError, match="'red'"):
        model.image_prompt("a red square")
    with pytest.raises(UsageError, match="control token"):
        model.image_prompt("a code3 square")


def test_an_own_family_with_soft_capped_attention_runs_by_its_modules(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    example = load("own_family")
    processor = example.build_model().processor
    config = Gemma2Config(
        vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128, sliding_window=8,
        attn_logit_softcapping=1.0, final_logit_softcapping=None,
    )  # fmt: skip
    torch.manual_seed(0)
    module = Gemma2ForCausalLM(config).eval()
    module.set_attn_implementation("eager")
    with torch.no_grad():
        for weight in module.model.layers.parameters():
            # So large that the cap has an effect.
            weight.copy_(torch.randn(weight.shape) * (0.3 if weight.dim() == 2 else 0.1))
    model = example.ToyAdapter(module, processor, name="toy")
    config.final_logit_softcapping = 30.0
    with pytest.raises(OspoError, match=r"final_logit_softcapping of toy is 30.0, expected none: logits are those"):
        example.ToyAdapter(module, processor, name="toy")
    config.final_logit_softcapping = None
    generator = of.ImageGenerator(model)
    options: dict[str, Any] = {"guidance_scale": 1.0, "temperature": 0, "output": "codes"}
    with caplog.at_level(logging.WARNING):
        [codes] = generator.generate(["a dark square"], seeds=[0], **options)
        generator.generate(["a square"], seeds=[0], **options)
    assert type(generator._engine.decoder) is ModuleDecoder  # type: ignore[union-attr]
    [warning] = [record.getMessage() for record in caplog.records if record.name.startswith("ospo_fast")]
    assert "the decoder is a Gemma2Model, which the fused decoder does not know" in warning

    @torch.no_grad()
    def greedy() -> list[int]:
        given, ids, expected = dict(model.layout.structure), model.image_prompt("a dark square").tolist(), []
        for n in range(model.layout.tokens):
            if n not in given:
                hidden = module.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
                expected.append(int(model.head(hidden).argmax()))
            ids.append(given[n] if n in given else int(model.code_ids[expected[-1]]))
        return expected

    assert codes.tolist() == greedy()
    for layer in module.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert codes.tolist() != greedy()

"""Every stage, from prompts to training and evaluation, on a tiny random model of each family, with a stop within."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ospo_fast as of
from ospo_fast.cli import main
from ospo_fast.config import load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation import ImageGenerator
from ospo_fast.loss import OSPOLoss
from ospo_fast.models.glm_image import GlmImageUnifiedModel
from ospo_fast.pipeline import Pipeline, read_stage
from ospo_fast.workers import Workers
from tests import scripted
from tests.models.tiny_families import build

pytestmark = pytest.mark.usefixtures("omegaconf")

SETTINGS = [
    "prompts.counts={color1: 2, shape1: 1, color2: 3, 2D_spatial: 3, numeracy1: 0, numeracy2: 0}",
    "templates=shapes",
    "images.guidance_scale=3",
    "train.steps=3",
    "train.batch_size=2",
    "train.save_every=1",
    "train.eval_every=0",
    "masks.layers=[0]",
]

TEXTS = ("prompts", "perturb", "questions", "score")  # stages that ask a model


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted texts and answers. The chats of the families have other texts around a message."""
    import ospo_fast.generation

    def generate_text(model: Any, prompts: Any, *, seeds: Any, **_: Any) -> list[str]:
        texts = [re.split(r"USER: ", model.detokenize(ids))[-1].replace("ASSISTANT:", "").strip() for ids in prompts]
        return [scripted.reply(text, seed) for text, seed in zip(texts, seeds, strict=True)]

    monkeypatch.setattr(ospo_fast.generation, "generate_text", generate_text)
    monkeypatch.setattr(ospo_fast.generation, "answer_questions", scripted.answer_questions)


def settings_of(variant: str, folder: Path, out: Path, *more: str) -> Any:
    model = build(variant)
    if not folder.exists():
        model.save(folder)
    height, width = model.image_size
    overrides = [*SETTINGS, f"model={folder}", f"out={out}", f"image_size={height}x{width}", *more]
    return load_config(overrides, family="shapes")


def run(config: Any, stages: list[str] | None = None) -> None:
    Pipeline(config, progress=False).run(stages)


@pytest.mark.parametrize("variant", ["emu3", "emu3_5", "chameleon", "lumina"])
def test_a_run(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, folder = tmp_path / "run", tmp_path / "model"
    others = [f"{stage}.model={scripted.save_tiny(tmp_path / 'other')}" for stage in TEXTS if variant == "emu3_5"]
    config = settings_of(variant, folder, out, *others)
    monkeypatch.setattr(OSPOLoss, "forward", stopped := _Stop(OSPOLoss.forward, after=1))
    with pytest.raises(KeyboardInterrupt):
        run(config)
    stopped.left = 10**6
    run(config)  # continues from the checkpoint
    pairs = [pair for record in read_stage(out, "masks") for pair in record.get("pairs") or []]
    assert pairs
    assert all(Path(out, pair["mask_path"]).is_file() for pair in pairs)
    log = [json.loads(line) for line in (out / "train" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3]
    whole = tmp_path / "whole"
    run(settings_of(variant, folder, whole, *others))
    for name in ("adapter_model.safetensors",):
        assert Path(out, "train", "adapter", name).read_bytes() == Path(whole, "train", "adapter", name).read_bytes()

    size = build(variant).image_size
    base, trained = (of.load_model(path, image_size=size) for path in (folder, out / "train" / "model"))
    assert trained.layout == base.layout
    options: dict[str, Any] = {"seeds": [0], "guidance_scale": 3.0, "output": "codes", "progress": False}
    codes = [ImageGenerator(model).generate(["a red circle"], **options) for model in (base, trained)]
    assert codes[0].shape == codes[1].shape
    with torch.no_grad():
        changed = [n for n, p in trained.module.named_parameters() if not torch.equal(p, _parameter(base.module, n))]
    assert changed
    assert all(name.split(".")[-2] in config.train.lora_targets for name in changed)
    check_adapter(out, trained, size)


def check_adapter(out: Path, trained: Any, size: tuple[int, int]) -> None:
    """The adapter on its base model is the merged model."""
    adapted = dict(of.load_model(out / "train" / "adapter", image_size=size).module.named_parameters())
    for name, weight in trained.module.named_parameters():
        torch.testing.assert_close(adapted[name], weight, rtol=1e-6, atol=1e-7)


def run_two(config: Any, forked: Any, output: Path) -> None:
    """Do a run with two processes."""

    def do(rank: int) -> int:
        workers = Workers.from_environment()
        with workers.together():
            workers.agree({})
            Pipeline(config, progress=False, workers=workers).run()
        return 0

    ended = forked.run_workers(do, 2, output)
    assert [worker.code for worker in ended] == [0, 0], "\n".join(worker.output for worker in ended)


@pytest.mark.parametrize("variant", ["emu3", "emu3_5", "lumina"])
def test_two_processes_make_the_records_and_the_adapter_of_one(variant: str, tmp_path: Path, forked: Any) -> None:
    others = [f"{stage}.model={scripted.save_tiny(tmp_path / 'other')}" for stage in TEXTS if variant == "emu3_5"]
    run(settings_of(variant, tmp_path / "model", tmp_path / "one", *others))
    run_two(settings_of(variant, tmp_path / "model", tmp_path / "two", *others), forked, tmp_path / "output")
    for name in ("images.jsonl", "score.jsonl", "select.jsonl", "masks.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    one, two = (load_file(tmp_path / out / "train" / "adapter" / "adapter_model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys()
    for name, matrix in one.items():
        torch.testing.assert_close(two[name], matrix, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("variant", ["emu3", "chameleon", "lumina"])
def test_two_processes_that_train_all_weights(variant: str, tmp_path: Path, forked: Any) -> None:
    """FSDP2 shards the layers. A Chameleon's decoder holds the VQ model, whose blocks are frozen and stay whole."""
    full, size = ("train.full=true", "dtype=bfloat16"), build(variant).image_size
    run(settings_of(variant, tmp_path / "model", tmp_path / "one", *full))
    run_two(settings_of(variant, tmp_path / "model", tmp_path / "two", *full), forked, tmp_path / "output")
    paths = (tmp_path / "one" / "train" / "model", tmp_path / "two" / "train" / "model", tmp_path / "model")
    one, two, base = (of.load_model(path, dtype="bfloat16", image_size=size).module.state_dict() for path in paths)
    for name, weight in one.items():
        if "vqmodel" in name or "embed" in name:
            assert torch.equal(two[name], base[name])
        torch.testing.assert_close(two[name], weight, rtol=2e-2, atol=2e-3)


def test_a_run_of_a_model_that_only_generates_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, folder = tmp_path / "run", tmp_path / "model"
    other = scripted.save_tiny(tmp_path / "other")
    with pytest.raises(OspoError, match="only generates images, expected a model that chats"):
        run(settings_of("glm_image", folder, out))
    assert not out.exists()
    others = [f"{stage}.model={other}" for stage in TEXTS]
    with pytest.raises(OspoError, match="has no pipeline that makes pixels of its codes"):
        run(settings_of("glm_image", folder, out, *others))
    # In place of that pipeline, whose pictures take seconds each: a gray value for each code.
    monkeypatch.setattr(GlmImageUnifiedModel, "check_pixels", lambda self: None)
    monkeypatch.setattr(GlmImageUnifiedModel, "_load_pipeline", lambda self: _gray)
    monkeypatch.setattr(OSPOLoss, "forward", stopped := _Stop(OSPOLoss.forward, after=1))
    with pytest.raises(KeyboardInterrupt):
        run(settings_of("glm_image", folder, out, *others))
    stopped.left = 10**6
    run(settings_of("glm_image", folder, out, *others))  # continues from the checkpoint
    pairs = [pair for record in read_stage(out, "masks") for pair in record.get("pairs") or []]
    assert pairs
    log = [json.loads(line) for line in (out / "train" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3]
    assert "Its pixels need the other parts of that folder." in (out / "train" / "model" / "README.md").read_text()
    trained = of.load_model(out / "train" / "model", image_size=(64, 96))
    changed = {name.split(".")[-2] for name, p in trained.module.named_parameters() if _differs(folder, name, p)}
    check_adapter(out, trained, (64, 96))
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_full_training_leaves_the_vq_model_as_it_is(tmp_path: Path) -> None:
    out, folder = tmp_path / "run", tmp_path / "model"
    run(settings_of("chameleon", folder, out, "train.full=true", "dtype=bfloat16"))
    trained = of.load_model(out / "train" / "model", dtype="bfloat16")
    assert trained.module.dtype == torch.bfloat16
    base = of.load_model(folder, dtype="bfloat16")
    changed = [n for n, p in trained.module.named_parameters() if not torch.equal(p, _parameter(base.module, n))]
    assert changed
    assert all(name.startswith(("model.layers.", "model.norm.")) for name in changed)


def _differs(folder: Path, name: str, parameter: torch.Tensor) -> bool:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return not torch.equal(file.get_tensor(name), parameter)


def _gray(*, height: int, width: int, prior_token_ids: torch.Tensor, **_: Any) -> Any:
    cells = prior_token_ids.view(1, 1, height // 16, width // 16) / 24
    return SimpleNamespace(images=torch.nn.functional.interpolate(cells, (height, width)).expand(-1, 3, -1, -1))


def _parameter(module: torch.nn.Module, name: str) -> torch.nn.Parameter:
    return module.get_parameter(name)


class _Stop:
    """A method that ends the process, as ^C does, after some calls."""

    def __init__(self, method: Any, after: int) -> None:
        self.method, self.left = method, after

    def __get__(self, owner: Any, kind: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return self.method(owner, *arguments, **options)

        return call


@pytest.mark.parametrize("variant", ["emu3", "chameleon", "lumina"])
def test_generate_and_evaluate(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the answers are the model's own
    model = build(variant)
    model.save(tmp_path / "model")
    options = [f"--model={tmp_path / 'model'}", f"image_size={'x'.join(map(str, model.image_size))}"]
    assert main(["generate", "a red circle", "--num=2", f"--out={tmp_path / 'images'}", *options]) == 0
    assert len(list((tmp_path / "images").glob("0000_*.png"))) == 2
    row = {"prompt": "a red circle", "questions": ["Is there a circle?"], "skills": ["object"], "category": "one"}
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(row))
    command = [
        "evaluate",
        f"--questions={questions}",
        f"--out={tmp_path / 'scores'}",
        "--judge=self",
        "--num=2",
        *options,
    ]
    assert main(command) == 0
    scores = json.loads((tmp_path / "scores" / "evaluate.json").read_text())
    assert 0 < scores["soft_tifa_am"]["mean"] < 1
    assert len(list((tmp_path / "scores").rglob("*.png"))) == 2


def test_images_without_pixels_are_refused_before_any_is_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("glm_image").save(tmp_path / "model")
    command = ["generate", "a cross", f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", "image_size=64x96"]
    assert main(command) == 1
    assert "has no pipeline that makes pixels of its codes; give the whole folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_image_size_is_another_run(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    run(settings_of("emu3", folder, tmp_path / "run"), ["prompts", "perturb", "images"])
    other = settings_of("emu3", folder, tmp_path / "run")
    for size in ("10x8", None):
        other.image_size = size
        with pytest.raises(UsageError, match="image_size"):
            run(other, ["images"])


def test_the_command_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings_of("emu3", tmp_path / "model", tmp_path / "run")  # saves the model
    command = ["run", f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'run'}", "image_size=8x10", *SETTINGS]
    assert main([*command, "--dry-run"]) == 1
    assert "whose cost is not known, expected a Janus model" in capsys.readouterr().err
    assert main(command) == 0
    assert (tmp_path / "run" / "train" / "model").is_dir()
    # Other stages of another size would read the codes in another grid.
    shutil.rmtree(tmp_path / "run" / "masks")
    for name in ("masks.jsonl", "settings.json"):
        (tmp_path / "run" / name).unlink()
    main(["masks", f"--out={tmp_path / 'run'}", "image_size=10x8"])
    pairs = [pair for record in read_stage(tmp_path / "run", "masks") for pair in record.get("pairs") or []]
    assert pairs
    assert all("8 x 10 pixels, the model generates 10 x 8" in pair["mask_reason"] for pair in pairs)


def test_models_that_do_not_chat_are_refused_before_a_run(tmp_path: Path) -> None:
    other = tmp_path / "Emu3-Gen-hf"
    build("emu3").save(other)
    with pytest.raises(OspoError, match=r"score\.model: .*only generates images, expected a model that chats"):
        run(settings_of("chameleon", tmp_path / "model", tmp_path / "run", f"score.model={other}"))
    texts = [f"{stage}.model=shapes" for stage in ("prompts", "perturb", "questions", "score")]
    texts += ["select.rejected_prompt=asked", "preset=v2"]
    with pytest.raises(OspoError, match="is the half of Emu3 that generates images, expected that for chats"):
        run(settings_of("emu3", other, tmp_path / "run", *texts))
    assert not (tmp_path / "run").exists()

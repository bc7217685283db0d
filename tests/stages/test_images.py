"""Stage 3: what is generated, which files are written, and that finished images are neither repeated nor changed."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.generation import ImageGenerator, ImageWriter
from ospo_fast.generation.requests import CUDA_ROWS, plan_batches
from ospo_fast.models import load_model
from ospo_fast.stages import StageContext, image_files
from ospo_fast.stages import images as stage
from ospo_fast.stages.image_files import load_codes
from ospo_fast.stages.images import failure, plan_images, run

pytestmark = pytest.mark.usefixtures("omegaconf")  # nearly every test reads a configuration


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny)


def item(n, variants=(0, 1, 2)):
    return {
        "item_id": f"000000{n}",
        "prompt": "a red circle",
        "long_prompt": [
            f"a red circle on a {c} background" if i in variants else ""
            for i, c in enumerate(["gray", "black", "white"])
        ],
        "negative_long_prompt": ["a blue circle" if i in variants else "" for i in range(3)],
        "variant_reasons": [None if i in variants else "no dense prompts in the answer" for i in range(3)],
    }


def config(*overrides):
    return load_config(["images.guidance_scale=1", *overrides])


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def generated(monkeypatch):
    """The prompts (ids) that were generated."""
    prompts = []
    original = ImageGenerator.generate

    def generate(self, given, **settings):
        prompts.extend(given)
        return original(self, given, **settings)

    monkeypatch.setattr(ImageGenerator, "generate", generate)
    return prompts


def test_files_and_record(model, tmp_path, monkeypatch):
    tokenized = []
    original = type(model).image_prompt
    monkeypatch.setattr(type(model), "image_prompt", lambda self, p: tokenized.append(p) or original(self, p))
    (done,) = run([item(1, (0, 2))], model, config(), out=tmp_path)
    assert list(done["base_metadata"]) == ["base_0", "base_2"]
    assert list(done["negative_metadata"]) == ["negative_0", "negative_2"]
    assert failure(done) is None
    path = tmp_path / done["base_metadata"]["base_2"]["path"]
    assert path == tmp_path / "images" / "0000001" / "base_2.png"
    stored = load_codes(path.with_suffix(".npz"))
    assert stored["codes"].shape == (36,)
    assert stored["prompt"] == "a red circle on a white background"
    assert (stored["guidance_scale"], stored["temperature"], stored["top_k"], stored["top_p"]) == (1.0, 1.0, 0, 1.0)
    assert np.array_equal(np.asarray(model.decode_codes(stored["codes"][None])[0]), np.asarray(Image.open(path)))
    assert len(files(tmp_path)) == 8
    assert len(tokenized) == len(set(tokenized)) == 3  # each prompt once


def test_plan_shares_the_seed_of_base_and_negative_only():
    plan = {image.name: image.seed for image in plan_images(item(1), 42)}
    assert plan["base_0"] == plan["negative_0"]
    assert len({plan[f"base_{i}"] for i in range(3)}) == 3
    assert plan["base_0"] != {image.name: image.seed for image in plan_images(item(2), 42)}["base_0"]
    assert plan["base_0"] != {image.name: image.seed for image in plan_images(item(1), 43)}["base_0"]


def test_plan_with_more_draws():
    one, more = plan_images(item(1, (0, 2)), 42), plan_images(item(1, (0, 2)), 42, draws=3)
    assert [image.name for image in more[4:]] == [f"base_{i}" for i in (3, 5, 6, 8)]
    assert more[:4] == one
    assert len({image.seed for image in more}) == 6
    first_variant = {image.prompt for image in more if image.name in ("base_0", "base_3", "base_6")}
    assert first_variant == {"a red circle on a gray background"}


def test_plan_with_plain_prompts():
    record = {**item(1, (0, 2)), "negative_prompt": ["a blue circle", "a red circle", "a red square"]}
    plan = {image.name: image.prompt for image in plan_images(record, 42, draws=2, prompts="plain")}
    assert plan == {
        **dict.fromkeys(("base_0", "base_2", "base_3", "base_5"), "a red circle"),
        "negative_0": "a blue circle",
        "negative_2": "a red square",
    }
    with pytest.raises(
        OspoError, match=r"Item 0000001 has no negative_prompt for each long_prompt, which images\.prompts=plain needs"
    ):
        plan_images(item(1), 42, prompts="plain")


def test_images_do_not_depend_on_order_or_chunk(model, tmp_path, monkeypatch):
    items = [item(n) for n in range(2)]
    list(run(items, model, config(), out=tmp_path / "a"))
    monkeypatch.setattr(stage, "CHUNK", 1)
    list(run(items[::-1], model, config("images.batch_size=5"), out=tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_images_are_written_while_the_next_chunk_is_generated(model, tmp_path, monkeypatch):
    """A single writer serves all chunks. A record comes out after its images are on disk."""
    begun, calls, writers, waited = threading.Event(), [], [], []
    original, write = ImageGenerator.generate, image_files.write_files

    def generate(self, prompts, **settings):
        calls.append(len(prompts))
        if len(calls) == 2:
            begun.set()
        return original(self, prompts, **settings)

    def slow(files):
        if "0000000" in str([*files]):
            waited.append(begun.wait(60))  # the first chunk's images wait until the second is being generated
        write(files)

    monkeypatch.setattr(ImageGenerator, "generate", generate)
    monkeypatch.setattr(image_files, "write_files", slow)
    enter = ImageWriter.__enter__
    monkeypatch.setattr(ImageWriter, "__enter__", lambda self: writers.append(self) or enter(self))
    monkeypatch.setattr(stage, "CHUNK", 1)
    context, items = StageContext(), [item(n) for n in range(3)]
    for n, done in enumerate(run(items, model, config(), out=tmp_path, context=context)):
        assert done["item_id"] == f"000000{n}"
        assert len(files(tmp_path / "images" / done["item_id"])) == 12
        assert len(calls) == min(n + 2, 3)
    assert waited == [True] * 6
    assert sum(isinstance(writer, image_files.ImageFiles) for writer in writers) == 1
    assert context.report.drawing["images"] == 18
    again = StageContext()
    list(run(items, model, config(), out=tmp_path, context=again))
    assert again.report.drawing is None  # nothing was generated


def test_a_full_disk_ends_the_stage(model, tmp_path, monkeypatch):
    def full(files):
        raise OSError("no space left")

    monkeypatch.setattr(image_files, "write_files", full)
    monkeypatch.setattr(stage, "CHUNK", 1)
    with pytest.raises(OSError, match="no space left"):
        list(run([item(n) for n in range(3)], model, config(), out=tmp_path))


def test_a_chunk_fills_the_batches_of_a_gpu():
    """With three variants, images.draws=1: no batch has free rows, and no item is in two batches."""
    plan = [image for n in range(stage.CHUNK) for image in plan_images(item(n), 42)]
    batches = plan_batches(plan, [image.path.rsplit("/", 1)[0] for image in plan], CUDA_ROWS)
    assert {len(batch) for batch in batches} == {CUDA_ROWS}
    assert len(batches) == 2


def test_finished_images_are_not_generated_again(model, tmp_path, generated):
    records = list(run([item(1)], model, config(), out=tmp_path))
    before = files(tmp_path)
    assert len(generated) == 6
    assert list(run([item(1)], model, config(), out=tmp_path)) == records
    assert len(generated) == 6
    (tmp_path / "images/0000001/base_1.npz").unlink()
    (tmp_path / "images/0000001/negative_2.png").unlink()
    (tmp_path / "images/0000001/base_0.npz").write_bytes(b"half a file")
    torn = tmp_path / "images/0000001/negative_0.png"
    torn.write_bytes(torn.read_bytes()[:90])
    list(run([item(1)], model, config(), out=tmp_path))
    assert len(generated) == 10
    assert files(tmp_path) == before
    list(run([item(1)], model, config("images.temperature=0.5"), out=tmp_path))
    assert len(generated) == 16


def test_an_interruption_loses_only_the_current_batch(model, tmp_path, monkeypatch, generated):
    list(run([item(1)], model, config(), out=tmp_path / "whole"))
    original = ImageGenerator.generate

    def generate(self, prompts, *, callback, **settings):
        def once(batch):
            callback(batch)
            raise KeyboardInterrupt

        return original(self, prompts, callback=once, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(ImageGenerator, "generate", generate)
        with pytest.raises(KeyboardInterrupt):
            list(run([item(1)], model, config("images.batch_size=2"), out=tmp_path / "killed"))
    assert len(files(tmp_path / "killed")) == 4
    generated.clear()
    list(run([item(1)], model, config(), out=tmp_path / "killed"))
    assert len(generated) == 4
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("role", ["base", "negative"])
def test_a_failed_image_takes_no_other_along(model, tmp_path, monkeypatch, role):
    original = ImageGenerator.generate
    failing = model.image_prompt("a red circle on a black background" if role == "base" else "a blue circle")

    def generate(self, prompts, *, callback, **settings):
        bad = [n for n, ids in enumerate(prompts) if torch.equal(ids, failing)][role == "negative"]

        def others(batch):
            kept = [n for n, index in enumerate(batch.indices) if index != bad]
            callback(replace(batch, indices=[batch.indices[n] for n in kept], codes=batch.codes[kept]))

        codes = original(self, prompts, callback=others, **settings)
        codes[bad] = -1
        return codes

    monkeypatch.setattr(ImageGenerator, "generate", generate)
    (done,) = run([item(1)], model, config(), out=tmp_path)
    left = {name: [f"{name}_{n}" for n in range(3) if (name, n) != (role, 1)] for name in ("base", "negative")}
    assert {name: list(done[f"{name}_metadata"]) for name in left} == left
    assert [reason is None for reason in done["variant_reasons"]] == [True, False, True]
    assert "not finite" in done["variant_reasons"][1]
    assert failure(done).reason == done["variant_reasons"][1]
    assert not (tmp_path / f"images/0000001/{role}_1.png").exists()


def test_a_variant_with_an_invalid_prompt_has_no_image(model, tmp_path):
    record = item(1)
    record["long_prompt"][0] = "a red zebra"
    record["negative_long_prompt"][2] = "a blue circle " * 200
    one, other = run([record, item(2)], model, config("images.draws=2"), out=tmp_path)
    assert list(one["base_metadata"]) == ["base_1", "base_4"]
    assert list(one["negative_metadata"]) == ["negative_1"]
    assert "does not know ('zebra')" in one["variant_reasons"][0]
    assert one["variant_reasons"][1] is None
    assert "tokens, at most" in one["variant_reasons"][2]
    assert len(other["base_metadata"]) == 6


def test_no_run_folder(model):
    with pytest.raises(OspoError, match="run folder"):
        list(run([item(1)], model, config()))

"""Stage 3: what is drawn, what lies beside it, and that nothing is drawn twice or depends on its neighbours."""

import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ospo_fast import generation
from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.generation import ImageGenerator, ImageWriter
from ospo_fast.generation.requests import CUDA_ROWS, in_groups
from ospo_fast.models import load_model
from ospo_fast.stages import images as stage
from ospo_fast.stages.common import image_codes, load_codes, save_codes
from ospo_fast.stages.images import drawings, run

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
def counted(monkeypatch):
    drawn = []
    original = ImageGenerator.generate

    def generate(self, prompts, **settings):
        drawn.extend(prompts)
        return original(self, prompts, **settings)

    monkeypatch.setattr(ImageGenerator, "generate", generate)
    return drawn


def test_files_and_record(model, tmp_path):
    (done,) = run([item(1, (0, 2))], model, config(), out=tmp_path)
    assert list(done["base_metadata"]) == ["base_0", "base_2"]
    assert list(done["negative_metadata"]) == ["negative_0", "negative_2"]
    path = tmp_path / done["base_metadata"]["base_2"]["path"]
    assert path == tmp_path / "images" / "0000001" / "base_2.png"
    assert Image.open(path).size == (48, 48)
    stored = load_codes(path.with_suffix(".npz"))
    assert stored["codes"].shape == (36,)
    assert stored["codes"].dtype == torch.int64
    assert stored["prompt"] == "a red circle on a white background"
    assert (stored["guidance_scale"], stored["temperature"], stored["top_k"], stored["top_p"]) == (1.0, 1.0, 0, 1.0)
    # The PNG is what the codes decode to.
    assert np.array_equal(np.asarray(model.decode_codes(stored["codes"][None])[0]), np.asarray(Image.open(path)))
    assert len(files(tmp_path)) == 8


def test_base_and_negative_of_a_variant_share_their_seed():
    plan = {d.name: d.seed for d in drawings(item(1), 42)}
    assert plan["base_0"] == plan["negative_0"]
    assert len({plan[f"base_{i}"] for i in range(3)}) == 3
    assert plan["base_0"] != {d.name: d.seed for d in drawings(item(2), 42)}["base_0"]
    assert plan["base_0"] != {d.name: d.seed for d in drawings(item(1), 43)}["base_0"]


def test_more_draws_count_on_and_have_seeds_of_their_own(model, tmp_path):
    one, more = drawings(item(1, (0, 2)), 42), drawings(item(1, (0, 2)), 42, draws=3)
    assert [d.name for d in more] == [
        "base_0",
        "negative_0",
        "base_2",
        "negative_2",
        *(f"base_{i}" for i in (3, 5, 6, 8)),
    ]
    assert more[: len(one)] == one
    assert len({d.seed for d in more}) == 6
    assert {d.prompt for d in more if d.name in ("base_0", "base_3", "base_6")} == {"a red circle on a gray background"}
    (done,) = run([item(1, (0, 2))], model, config("images.draws=2"), out=tmp_path)
    assert list(done["base_metadata"]) == ["base_0", "base_2", "base_3", "base_5"]
    assert list(done["negative_metadata"]) == ["negative_0", "negative_2"]
    assert load_codes(tmp_path / "images/0000001/base_5.npz")["prompt"] == "a red circle on a white background"


def test_plain_prompts_are_drawn_where_wanted(model, tmp_path):
    record = {**item(1, (0, 2)), "negative_prompt": ["a blue circle", "a red circle", "a red square"]}
    plan = {d.name: d.prompt for d in drawings(record, 42, draws=2, prompts="plain")}
    assert plan == {
        **dict.fromkeys(("base_0", "base_2", "base_3", "base_5"), "a red circle"),
        "negative_0": "a blue circle",
        "negative_2": "a red square",
    }
    list(run([record], model, config("images.prompts=plain"), out=tmp_path))
    assert load_codes(tmp_path / "images/0000001/negative_2.npz")["prompt"] == "a red square"
    with pytest.raises(OspoError, match=r"Item 0000001 has no negative_prompt, which images\.prompts=plain needs"):
        drawings(item(1), 42, prompts="plain")


def test_images_do_not_depend_on_order_or_chunk(model, tmp_path, monkeypatch):
    items = [item(n) for n in range(3)]
    list(run(items, model, config(), out=tmp_path / "a"))
    monkeypatch.setattr(stage, "CHUNK", 1)
    list(run(items[::-1], model, config("images.batch_size=5"), out=tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_images_are_written_while_the_next_chunk_is_drawn(model, tmp_path, monkeypatch):
    """By one writer for all chunks; a record comes out once its images lie there, not before."""
    begun, drawn, writers = threading.Event(), [], []
    original, write = ImageGenerator.generate, stage.write_atomic

    def generate(self, prompts, **settings):
        drawn.append(len(prompts))
        if len(drawn) == 2:
            begun.set()
        return original(self, prompts, **settings)

    def slow(path, data):
        if "0000000" in str(path):
            assert begun.wait(60)  # the first chunk's images wait until the second is being drawn
        write(path, data)

    def counted(*given):
        writers.append(ImageWriter(*given))
        return writers[-1]

    monkeypatch.setattr(ImageGenerator, "generate", generate)
    monkeypatch.setattr(stage, "write_atomic", slow)
    monkeypatch.setattr(stage, "CHUNK", 1)
    monkeypatch.setattr(generation, "ImageWriter", counted)
    speeds = []
    for n, done in enumerate(run([item(n) for n in range(3)], model, config(), out=tmp_path,
                                 speed=speeds.append)):  # fmt: skip
        assert done["item_id"] == f"000000{n}"
        assert len(files(tmp_path / "images" / done["item_id"])) == 12
        assert len(drawn) == min(n + 2, 3)
    assert len(writers) == 1
    assert [speed.images for speed in speeds] == [6, 12, 18]
    assert speeds[2].seconds > speeds[0].seconds > 0
    list(run([item(n) for n in range(3)], model, config(), out=tmp_path, speed=speeds.append))
    assert len(speeds) == 3  # nothing was drawn


def test_a_disk_that_is_full_ends_the_stage(model, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError("no space left")

    monkeypatch.setattr(stage, "write_atomic", full)
    monkeypatch.setattr(stage, "CHUNK", 1)
    with pytest.raises(OSError, match="no space left"):
        list(run([item(n) for n in range(3)], model, config(), out=tmp_path))


def test_chunks_of_items_fill_the_batches_of_a_gpu():
    """Of three variants each, with their near misses: no batch has room left, and no item is in two of them."""
    plan = [d for n in range(stage.CHUNK) for d in drawings(item(n), 42)]
    batches = in_groups(plan, [d.path.rsplit("/", 1)[0] for d in plan], CUDA_ROWS)
    assert {len(batch) for batch in batches} == {CUDA_ROWS}
    assert len(batches) == 2


def test_finished_images_are_not_drawn_again(model, tmp_path, counted):
    records = list(run([item(1)], model, config(), out=tmp_path))
    before = files(tmp_path)
    assert len(counted) == 6
    assert list(run([item(1)], model, config(), out=tmp_path)) == records
    assert len(counted) == 6
    (tmp_path / "images/0000001/base_1.npz").unlink()
    (tmp_path / "images/0000001/negative_2.png").unlink()
    (tmp_path / "images/0000001/base_0.npz").write_bytes(b"half a file")
    (tmp_path / "images/0000001/base_2.npz").write_bytes(b"PK\x03\x04 half an archive")
    torn = tmp_path / "images/0000001/negative_0.png"
    torn.write_bytes(torn.read_bytes()[:90])
    list(run([item(1)], model, config(), out=tmp_path))
    assert len(counted) == 11
    assert files(tmp_path) == before
    list(run([item(1)], model, config("images.temperature=0.5"), out=tmp_path))
    assert len(counted) == 17


def test_a_kill_loses_the_current_batch_alone(model, tmp_path, monkeypatch, counted):
    list(run([item(1)], model, config(), out=tmp_path / "whole"))
    original = ImageGenerator.generate

    def generate(self, prompts, *, callback, **settings):
        def once(drawn):
            callback(drawn)
            raise KeyboardInterrupt

        return original(self, prompts, callback=once, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(ImageGenerator, "generate", generate)
        with pytest.raises(KeyboardInterrupt):
            list(run([item(1)], model, config("images.batch_size=2"), out=tmp_path / "killed"))
    assert len(files(tmp_path / "killed")) == 4
    counted.clear()
    list(run([item(1)], model, config(), out=tmp_path / "killed"))
    assert len(counted) == 4
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_an_image_that_fails_takes_its_partner_along(model, tmp_path, monkeypatch):
    original = ImageGenerator.generate

    def generate(self, prompts, *, callback, **settings):
        bad = prompts.index("a red circle on a black background")

        def others(drawn):
            kept = [n for n, index in enumerate(drawn.indices) if index != bad]
            callback(replace(drawn, indices=[drawn.indices[n] for n in kept], codes=drawn.codes[kept]))

        codes = original(self, prompts, callback=others, **settings)
        codes[bad] = -1
        return codes

    monkeypatch.setattr(ImageGenerator, "generate", generate)
    (done,) = run([item(1)], model, config(), out=tmp_path)
    assert list(done["base_metadata"]) == ["base_0", "base_2"]
    assert list(done["negative_metadata"]) == ["negative_0", "negative_2"]
    assert "not finite" in done["variant_reasons"][1]
    assert not (tmp_path / "images/0000001/base_1.png").exists()


def test_a_prompt_that_cannot_be_drawn_is_left_out(model, tmp_path):
    record = item(1)
    record["long_prompt"][0] = "a red zebra"
    record["negative_long_prompt"][2] = "a blue circle " * 200
    one, other = run([record, item(2)], model, config(), out=tmp_path)
    assert list(one["base_metadata"]) == ["base_1"]
    assert list(one["negative_metadata"]) == ["negative_1"]
    assert "does not know ('zebra')" in one["variant_reasons"][0]
    assert one["variant_reasons"][1] is None
    assert "tokens, at most" in one["variant_reasons"][2]
    (again,) = run([record], model, config("images.draws=2"), out=tmp_path / "again")
    assert list(again["base_metadata"]) == ["base_1", "base_4"]
    assert again["variant_reasons"] == one["variant_reasons"]
    assert len(other["base_metadata"]) == 3


def test_codes_are_read_back_or_encoded(model, tmp_path):
    list(run([item(1, (0,))], model, config(), out=tmp_path))
    path = tmp_path / "images/0000001/base_0.png"
    stored = image_codes(model, [path])
    assert torch.equal(stored[0], load_codes(path.with_suffix(".npz"))["codes"])
    path.with_suffix(".npz").unlink()
    (encoded,) = image_codes(model, [path])
    assert torch.equal(encoded, model.encode_images([Image.open(path).convert("RGB")])[0].cpu())


def test_codes_of_another_model(model, tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (48, 48)).save(path)
    for codes in (torch.zeros(35, dtype=torch.long), torch.full((36,), 9999), torch.zeros(0, dtype=torch.long)):
        save_codes(path.with_suffix(".npz"), codes)
        assert "made by another model" in image_codes(model, [path])[0]


def test_damaged_files_are_told_from_the_others(model, tmp_path):
    """Whatever a cut or a changed byte does to an image or its codes, it has a reason and troubles no other."""
    list(run([item(1, (0,))], model, config(), out=tmp_path))
    fine = tmp_path / "images/0000001/base_0.png"
    (codes,) = image_codes(model, [fine])
    rng = random.Random(0)
    paths = [fine]
    for n in range(60):
        for suffix in (".png", ".npz"):
            data = bytearray(fine.with_suffix(suffix).read_bytes())
            if n % 2:
                del data[rng.randrange(len(data)) :]
            else:
                data[rng.randrange(len(data))] ^= 0xFF
            (tmp_path / f"{n}{suffix[1]}{suffix}").write_bytes(data)
            if suffix == ".png":
                paths.append(tmp_path / f"{n}p.png")
            else:
                (tmp_path / f"{n}n.png").write_bytes(fine.read_bytes())
                paths.append(tmp_path / f"{n}n.png")
    first, *others = image_codes(model, paths)
    assert torch.equal(first, codes)
    reasons = [found for found in others if isinstance(found, str)]
    assert len(reasons) > 90
    assert all(reason.startswith("Cannot read the ") or "another model" in reason for reason in reasons)


def test_no_folder(model):
    with pytest.raises(OspoError, match="run folder"):
        list(run([item(1)], model, config()))

"""GLM-Image: its prompts, positions and previews as in transformers, and pixels by the pipeline of diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ospo_fast as of
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation import ImageGenerator
from ospo_fast.models.glm_image import GlmImageUnifiedModel
from ospo_fast.packages import MissingPackageError
from tests.models.tiny_families import build, build_glm_image, save_glm_pipeline

CODES = {"guidance_scale": 1, "temperature": 0, "output": "codes", "progress": False}


@pytest.fixture
def model() -> Any:
    return build("glm_image")


def inputs_of(model: Any, prompt: str) -> Any:
    height, width = model.image_size
    return model.processor(text=[prompt], target_h=height, target_w=width, return_tensors="pt")


def test_an_image_prompt_is_that_of_the_processor(model: Any) -> None:
    given = inputs_of(model, "a red circle")
    assert torch.equal(model.image_prompt("a red circle"), given["input_ids"][0])
    assert [tuple(grid) for grid in given["image_grid_thw"][:, 1:].tolist()] == list(model.layout.grids[::-1])
    assert len(model.unconditional(given["input_ids"][0])) < given["input_ids"].shape[1]


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 64)])
def test_greedy_codes_are_those_of_generate(size: tuple[int, int]) -> None:
    module, processor = build_glm_image()
    model = GlmImageUnifiedModel(module, processor, name="tiny", image_size=size)
    given = inputs_of(model, "two squares")
    ids = module.generate(
        **given,
        max_new_tokens=model.layout.tokens,
        do_sample=False,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda *_: model.code_ids.tolist(),
    )
    [codes] = ImageGenerator(model).generate(["two squares"], seeds=[0], **CODES)
    assert ids[0, given["input_ids"].shape[1] :].tolist() == codes.tolist()


def test_codes_of_an_image_are_those_of_transformers(model: Any) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    given = model.processor.image_processor(images=[image], return_tensors="pt")
    features = model.module.model.get_image_features(given["pixel_values"], given["image_grid_thw"], return_dict=True)
    found = features.pooler_output
    if found[0].dim() == 2:  # transformers before 5.18: patches of each image
        found = torch.cat(tuple(found))
    expected = model.module.model.get_image_tokens(found, given["image_grid_thw"])
    codes = model.encode_images([image, image])
    assert torch.equal(codes[0], codes[1])
    assert codes.shape[1] == model.layout.codes
    assert torch.equal(codes[0, -len(expected) :], expected)


def test_it_does_not_chat(model: Any) -> None:
    remedy = r"name a vision-language model in prompts\.model, perturb\.model, questions\.model and score\.model"
    for call in (lambda: model.chat([{"role": "user", "content": "a"}]), lambda: model.text_logits(torch.zeros(1, 32))):
        with pytest.raises(OspoError, match=remedy):
            call()


@pytest.mark.parametrize("size", [(64, 65), (0, 64), (32, 160)])
def test_sizes_that_it_does_not_know_are_refused(size: tuple[int, int]) -> None:
    module, processor = build_glm_image()
    with pytest.raises(UsageError, match=f"image_size: got {size[0]}x{size[1]}, expected multiples of 32"):
        GlmImageUnifiedModel(module, processor, name="tiny", image_size=size)


def test_pixels_need_the_pipeline_and_diffusers(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OspoError, match="has no pipeline that makes pixels of its codes; give the whole folder"):
        ImageGenerator(model).generate(["a"], seeds=[0], guidance_scale=1, progress=False)
    (tmp_path / "model_index.json").write_text("{}")
    model.module.config.pixel_pipeline = str(tmp_path)
    import ospo_fast.packages

    monkeypatch.setattr(ospo_fast.packages, "_is_installed", lambda name: name != "diffusers")
    with pytest.raises(MissingPackageError, match=r"needs diffusers, which is not installed; .*ospo-fast\[glm\]"):
        model.check_pixels()
    monkeypatch.undo()
    pytest.importorskip("diffusers")
    with pytest.raises(OspoError, match=r"the pipeline .* cannot be loaded"):
        model.decode_codes(torch.zeros(1, model.layout.codes, dtype=torch.long))


def test_a_folder_of_the_pipeline(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    folder = save_glm_pipeline(tmp_path / "GLM-Image", model.module, model.processor)
    for place in (folder, folder / "vision_language_encoder"):
        loaded: Any = of.load_model(place, image_size=(64, 96))
        assert torch.equal(loaded.image_prompt("a cross"), model.image_prompt("a cross"))
    images = ImageGenerator(loaded).generate(["a cross"], seeds=[3], guidance_scale=1, progress=False)
    assert images[0].size == (96, 64)
    codes = torch.arange(model.layout.codes)[None] % model.num_codes
    [pixels] = loaded.decode_codes(codes)
    # Pixels depend on the codes alone, and a saved copy finds the pipeline of its base model.
    loaded.save(tmp_path / "copy")
    copied: Any = of.load_model(tmp_path / "copy", image_size=(64, 96))
    assert copied.decode_codes(codes.repeat(2, 1))[1].tobytes() == pixels.tobytes()
    assert copied.decode_codes((codes + 1) % model.num_codes)[0].tobytes() != pixels.tobytes()


def test_an_image_beyond_the_positions_is_refused_at_once() -> None:
    module, processor = build_glm_image(target=(99968, 99968))
    with pytest.raises(
        OspoError, match=r"an image of tiny takes 9759376 tokens, expected fewer than its 1024 positions"
    ):
        GlmImageUnifiedModel(module, processor, name="tiny")

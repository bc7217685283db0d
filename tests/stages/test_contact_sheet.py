"""Contact sheets: sizes, captions of any script, and several sheets of many images."""

import json

import numpy as np
import pytest
from PIL import Image

from ospo_fast.config import load_config
from ospo_fast.models import load_model
from ospo_fast.stages import generate as generate_module
from ospo_fast.stages.contact_sheet import GAP, LINE, Entry, columns_of, contact_sheet
from ospo_fast.stages.generate import generate


def entry(size=(48, 48), prompt="a red circle", color="red"):
    return Entry(Image.new("RGB", size, color), prompt, "0000_0, seed 42")


def test_small_images_are_enlarged_by_a_whole_factor():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    sheet = contact_sheet([Entry(image, "a red circle", "seed 42")], 4)
    pixels = np.asarray(sheet)[GAP : GAP + 192, GAP : GAP + 192]
    assert np.array_equal(pixels, np.asarray(image).repeat(4, 0).repeat(4, 1))
    assert sheet.getpixel((GAP - 1, GAP - 1)) != (255, 255, 255)  # the frame
    caption = np.asarray(sheet)[GAP + 192 + 3 :]
    assert (caption < 128).any()


def test_large_images_are_reduced_and_a_sheet_stays_small():
    sheet = contact_sheet([entry((1024, 768))] * 64, 8)
    assert sheet.width == GAP + 8 * (384 + GAP)
    assert sheet.width * sheet.height < 16e6
    assert contact_sheet([entry((256, 256))], 8).width == GAP + 256 + GAP


@pytest.mark.parametrize(
    "prompt", ["赤い丸と青い四角", "красный круг", "दो नीले वर्ग", "\u202e\x1b🔴", "wort" * 500, "a " * 999]
)
def test_prompts_of_any_script_and_length_have_a_caption(prompt):
    sheet = contact_sheet([entry(prompt=prompt), entry()], 2)
    assert sheet.height <= GAP + 192 + GAP // 2 + 4 * LINE + GAP
    assert (np.asarray(sheet)[GAP + 195 :, : GAP + 192] < 128).any()


@pytest.mark.parametrize(
    ("images", "per_prompt", "columns"), [(4, 4, 4), (64, 4, 8), (64, 3, 6), (64, 1, 8), (5, 1, 5), (64, 12, 8)]
)
def test_rows_hold_whole_prompts(images, per_prompt, columns):
    assert columns_of(images, per_prompt) == columns


def test_many_images_have_several_sheets(omegaconf, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_module, "PER_SHEET", 4)
    monkeypatch.setattr(generate_module, "MAX_SHEETS", 2)
    config = load_config(["images.guidance_scale=1"], family="shapes")
    model, prompts = load_model(tiny), ["a red circle", "two blue squares", "a green triangle"]
    result = generate(model, prompts, config, num=3, out=tmp_path, progress=False)
    assert result["sheets"] == [str(tmp_path / "sheet.png"), str(tmp_path / "sheet_2.png")]
    assert (result["sheet"], result["on_sheets"], len(result["images"])) == (str(tmp_path / "sheet.png"), 6, 9)
    assert json.loads((tmp_path / "sheet.json").read_text())["on_sheets"] == 6
    (tmp_path / "sheet_mine.png").touch()
    result = generate(model, prompts[:1], config, num=3, out=tmp_path, progress=False)
    assert result["sheets"] == [str(tmp_path / "sheet.png")]
    assert sorted(path.name for path in tmp_path.glob("sheet*.png")) == ["sheet.png", "sheet_mine.png"]

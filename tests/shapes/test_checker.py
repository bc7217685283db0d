"""The checker reads every render whole, and is not fooled by near misses."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ospo_fast.shapes import grammar
from ospo_fast.shapes.checker import UNKNOWN, holds, read, satisfies
from ospo_fast.shapes.evaluate import truth
from ospo_fast.shapes.render import CELL, IMAGE_SIZE, object_masks, render, render_array
from ospo_fast.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    parse,
    prompts,
    random_scene,
    sample_scene,
)


def test_every_object_on_every_background_is_read() -> None:
    for color in COLORS:
        for shape in SHAPES:
            for size in SIZES:
                for background in BACKGROUNDS:
                    scene = Scene((Object(color, shape, size, (1, 2)),), background)
                    reading = read(render(scene))
                    assert reading.background == background
                    (seen,) = reading.objects
                    assert (seen.color, seen.shape, seen.size) == (color, shape, size)
                    assert (int(seen.y) // CELL, int(seen.x) // CELL) == (1, 2)


def test_random_scenes_are_read_whole() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = random_scene(rng)
        seen = {(o.color, o.shape, o.size, (int(o.y) // CELL, int(o.x) // CELL)) for o in read(render(scene)).objects}
        assert seen == {(o.color, o.shape, o.size, o.cell) for o in scene.objects}


def test_objects_off_the_board_s_raster_are_read() -> None:
    scene = Scene((Object("red", "triangle", "large", (1, 1)),), "white")
    moved = np.roll(render_array([scene])[0], (3, -2), axis=(0, 1))
    (seen,) = read(moved).objects
    assert (seen.color, seen.shape) == ("red", "triangle")


def test_masks_cover_the_objects() -> None:
    scene = random_scene(np.random.default_rng(3))
    reading = read(render(scene))
    for mask, thing in zip(object_masks(scene), scene.objects, strict=True):
        seen = next(o for o in reading.objects if (int(o.y) // CELL, int(o.x) // CELL) == thing.cell)
        assert (mask & seen.mask).sum() / (mask | seen.mask).sum() > 0.8


def test_prompts_hold_for_their_scenes_and_not_for_variants() -> None:
    rng = np.random.default_rng(1)
    for kind, (_, sub_category) in KINDS.items():
        for description in prompts(kind, "train")[::40]:
            image = render(sample_scene(description, rng))
            assert satisfies(image, description.text)
            for method in grammar.METHODS[sub_category]:
                other = grammar.contrast(description, method, sub_category, rng)
                assert not satisfies(render(sample_scene(other, rng)), description.text)


def test_noise_and_blur() -> None:
    rng = np.random.default_rng(2)
    assert not satisfies(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8), "a red circle")
    scene = Scene((Object("red", "square", "large", (0, 0)), Object("blue", "cross", "large", (2, 2))), "white")
    soft = render(scene).filter(ImageFilter.GaussianBlur(0.6))
    assert satisfies(soft, "a red square and a blue cross")


def test_two_colours_in_one_object_are_unknown() -> None:
    pixels = render_array([Scene((Object("red", "square", "large", (1, 1)),), "white")])[0].copy()
    pixels[:, 24:][(pixels[:, 24:] == COLORS["red"]).all(-1)] = COLORS["blue"]
    assert all(thing.shape == UNKNOWN for thing in read(pixels).objects)


def test_other_sizes_are_brought_to_size() -> None:
    image = render(Scene((Object("cyan", "circle", "large", (0, 1)),), "black"))
    assert satisfies(image.resize((192, 192), Image.Resampling.NEAREST), "a cyan circle")


def test_a_plain_picture_holds_no_object() -> None:
    reading = read(Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS["gray"]))
    assert reading.objects == ()
    description = parse("a red circle")
    assert description is not None
    assert not holds(reading, description)


def test_what_is_no_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="a dog"):
        satisfies(Image.new("RGB", (48, 48)), "a dog")


def test_the_checker_answers_questions_as_the_scene_does() -> None:
    rng = np.random.default_rng(4)
    for _ in range(300):
        scene = random_scene(rng)
        reading = read(render(scene))
        for kind in ("existence", "count", "total", "relation"):
            asked = grammar.ask(scene, kind, rng)
            assert truth(asked.text, reading) == asked.answer, (asked, scene)

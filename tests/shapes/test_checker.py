"""The checker detects every rendered object and rejects hard negatives."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ospo_fast.shapes import grammar
from ospo_fast.shapes.checker import UNKNOWN, detect, matches, satisfies
from ospo_fast.shapes.evaluate import true_answer
from ospo_fast.shapes.render import CELL, IMAGE_SIZE, outline, render, render_array
from ospo_fast.shapes.scenes import (
    BACKGROUNDS,
    BOARD,
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


def test_every_object_on_every_background_is_detected() -> None:
    for color in COLORS:
        for shape in SHAPES:
            for size in SIZES:
                for background in BACKGROUNDS:
                    scene = Scene((Object(color, shape, size, (1, 2)),), background)
                    detected = detect(render(scene))
                    (obj,) = detected.objects
                    assert (obj.color, obj.shape, obj.size) == (color, shape, size)
                    assert (int(obj.y) // CELL, int(obj.x) // CELL) == (1, 2)


def test_random_scenes_are_detected_completely() -> None:
    """Objects, masks and answers to questions, against the scene."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = random_scene(rng)
        detected = detect(render(scene))
        by_cell = {(int(obj.y) // CELL, int(obj.x) // CELL): obj for obj in detected.objects}
        assert {(o.color, o.shape, o.size, cell) for cell, o in by_cell.items()} == {
            (o.color, o.shape, o.size, o.cell) for o in scene.objects
        }
        for obj in scene.objects:
            mask = np.zeros((BOARD, CELL, BOARD, CELL), bool)
            mask[obj.cell[0], :, obj.cell[1]] = outline(obj.shape, SIZES[obj.size], (CELL / 2, CELL / 2)) >= 0.5
            found = by_cell[obj.cell].mask
            mask = mask.reshape(found.shape)
            assert (mask & found).sum() / (mask | found).sum() > 0.8
        for kind in ("existence", "count", "total", "relation"):
            question = grammar.sample_question(scene, kind, rng)
            assert true_answer(question.text, detected) == question.answer, (question, scene)


def test_objects_between_cells_are_detected() -> None:
    scene = Scene((Object("red", "triangle", "large", (1, 1)),), "white")
    moved = np.roll(render_array([scene])[0], (3, -2), axis=(0, 1))
    (obj,) = detect(moved).objects
    assert (obj.color, obj.shape) == ("red", "triangle")


def test_scenes_satisfy_their_prompt_and_hard_negatives_do_not() -> None:
    rng = np.random.default_rng(1)
    for kind, (_, sub_category) in KINDS.items():
        for description in prompts(kind, "train")[::80]:
            image = render(sample_scene(description, rng))
            assert satisfies(image, description.text)
            for method in grammar.METHODS[sub_category]:
                other = grammar.perturb(description, method, sub_category, rng)
                assert not satisfies(render(sample_scene(other, rng)), description.text)


def test_noise_satisfies_nothing_and_blur_is_tolerated() -> None:
    rng = np.random.default_rng(2)
    assert not satisfies(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8), "a red circle")
    scene = Scene((Object("red", "square", "large", (0, 0)), Object("blue", "cross", "large", (2, 2))), "white")
    blurred = render(scene).filter(ImageFilter.GaussianBlur(0.6))
    assert satisfies(blurred, "a red square and a blue cross")


def test_two_colors_in_one_object_are_unknown() -> None:
    pixels = render_array([Scene((Object("red", "square", "large", (1, 1)),), "white")])[0].copy()
    pixels[:, 24:][(pixels[:, 24:] == COLORS["red"]).all(-1)] = COLORS["blue"]
    assert all(obj.shape == UNKNOWN for obj in detect(pixels).objects)


def test_images_of_other_sizes_are_resized() -> None:
    image = render(Scene((Object("cyan", "circle", "large", (0, 1)),), "black"))
    assert satisfies(image.resize((192, 192), Image.Resampling.NEAREST), "a cyan circle")


def test_a_plain_image_has_no_object() -> None:
    detected = detect(Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS["gray"]))
    assert detected.objects == ()
    description = parse("a red circle")
    assert description is not None
    assert not matches(detected, description)


def test_a_text_outside_the_grammar_is_refused() -> None:
    with pytest.raises(ValueError, match="a dog"):
        satisfies(Image.new("RGB", (48, 48)), "a dog")

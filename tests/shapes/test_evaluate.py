"""The rule of evaluation: what is counted, what errors are given, what may be compared."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ospo_fast.shapes.checker import read
from ospo_fast.shapes.evaluate import HEADLINE, Drawings, held_out_prompts, truth
from ospo_fast.shapes.render import render
from ospo_fast.shapes.scenes import KINDS, parse, prompts, sample_scene


def drawings(correct: list[list[bool]], seeds: tuple[int, ...] = (0, 1), split: str = "test") -> Drawings:
    kinds = tuple(kind for kind in HEADLINE for _ in range(len(correct) // len(HEADLINE)))
    images = tuple(Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(len(correct) * len(seeds)))
    texts = tuple(f"prompt {i}" for i in range(len(correct)))
    return Drawings(split, 1.5, seeds, kinds, texts, images, np.array(correct))


def test_alignment_is_the_mean_over_kinds_and_errors_are_over_prompts() -> None:
    drawn = drawings([[True, True], [False, False], [True, False], [True, False], [False, False], [False, False]])
    kinds = drawn.by_kind()
    assert [kinds[kind]["alignment"] for kind in HEADLINE] == [0.5, 0.5, 0.0]
    assert kinds[HEADLINE[0]]["standard_error"] == pytest.approx(0.5)  # rates 1 and 0: std 0.7071 over sqrt(2)
    assert kinds[HEADLINE[1]]["standard_error"] == 0
    headline = drawn.headline()
    assert headline["alignment"] == pytest.approx(1 / 3)
    assert headline["standard_error"] == pytest.approx(0.5 / 3)


def test_a_gain_is_paired() -> None:
    base = drawings([[True, True], [False, False]] * 3)
    same = drawings([[True, True], [False, False]] * 3)
    better = drawings([[True, True], [True, True]] * 3)
    assert same.gain(base) == {"alignment": 0, "standard_error": 0, "prompts": 6}
    assert better.gain(base)["alignment"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="same seeds"):
        drawings([[True]] * 6, seeds=(0,)).gain(base)


def test_drawings_come_back_from_a_file(tmp_path: Path) -> None:
    drawn = drawings([[True, False]] * 6)
    drawn.save(tmp_path / "drawn.npz")
    back = Drawings.load(tmp_path / "drawn.npz")
    assert (back.split, back.guidance_scale, back.seeds, back.kinds, back.prompts) == (
        drawn.split,
        drawn.guidance_scale,
        drawn.seeds,
        drawn.kinds,
        drawn.prompts,
    )
    assert (back.correct == drawn.correct).all()
    assert [image.getpixel((0, 0)) for image in back.images] == [image.getpixel((0, 0)) for image in drawn.images]


def test_held_out_prompts_are_of_their_split_and_stay_the_same() -> None:
    for split in ("validation", "test"):
        chosen = held_out_prompts(split, 5)
        assert chosen == held_out_prompts(split, 5)
        first, rest = (held_out_prompts(split, n, HEADLINE[1:2], skip=skip) for n, skip in ((5, 0), (1000, 5)))
        assert sorted(d.text for _, d in [*first, *rest]) == sorted(d.text for d in prompts(HEADLINE[1], split))
        assert all(description.split == split for _, description in chosen)
        assert {kind for kind, _ in chosen} == set(KINDS)
    assert all(len(prompts(kind, "test")) >= 20 for kind in HEADLINE)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("is there a red circle?", True),
        ("is there a red square?", False),
        ("is there one red circle?", True),
        ("are there two red circles?", False),
        ("are there two objects?", True),
        ("is there one object?", False),
        ("is the red circle left of the blue square?", True),
        ("is the blue square left of the red circle?", False),
        ("is the red circle left of the blue cross?", False),
        ("what is this?", None),
    ],
)
def test_the_checker_answers(question: str, expected: bool | None) -> None:
    description = parse("a red circle left of a blue square")
    assert description is not None
    assert truth(question, read(render(sample_scene(description, np.random.default_rng(0))))) is expected

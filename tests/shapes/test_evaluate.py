"""Evaluation: alignment, standard errors, paired gains and the choice of prompts."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ospo_fast.errors import OspoError
from ospo_fast.shapes.checker import detect
from ospo_fast.shapes.evaluate import DENSE_SPLITS, HEADLINE, AlignmentResult, select_prompts, true_answer
from ospo_fast.shapes.render import render
from ospo_fast.shapes.scenes import KINDS, WORLDS, World, held_out_prompts, parse, prompts, sample_scene


def result(correct: list[list[bool]], seeds: tuple[int, ...] = (0, 1)) -> AlignmentResult:
    kinds = tuple(kind for kind in HEADLINE for _ in range(len(correct) // len(HEADLINE)))
    images = tuple(Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(len(correct) * len(seeds)))
    texts = tuple(f"prompt {i}" for i in range(len(correct)))
    return AlignmentResult("test", 1.5, seeds, kinds, texts, images, np.array(correct))


def test_alignment_is_the_mean_over_kinds_and_errors_are_over_prompts() -> None:
    evaluated = result([[True, True], [False, False], [True, False], [True, False], [False, False], [False, False]])
    kinds = evaluated.by_kind()
    assert [kinds[kind]["alignment"] for kind in HEADLINE] == [0.5, 0.5, 0.0]
    assert kinds[HEADLINE[0]]["standard_error"] == pytest.approx(0.5)  # rates 1 and 0: std 0.7071 over sqrt(2)
    assert kinds[HEADLINE[1]]["standard_error"] == 0
    headline = evaluated.headline()
    assert headline["alignment"] == pytest.approx(1 / 3)
    assert headline["standard_error"] == pytest.approx(0.5 / 3)


def test_a_gain_is_paired() -> None:
    base = result([[True, True], [False, False]] * 3)
    same = result([[True, True], [False, False]] * 3)
    better = result([[True, True], [True, True]] * 3)
    assert same.gain(base) == {"alignment": 0, "standard_error": 0, "prompts": 6}
    assert better.gain(base)["alignment"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="same seeds"):
        result([[True]] * 6, seeds=(0,)).gain(base)


def test_results_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    saved = result([[True, False]] * 6)
    saved.save(tmp_path / "result.npz")
    loaded = AlignmentResult.load(tmp_path / "result.npz")
    for name in ("split", "guidance_scale", "seeds", "kinds", "prompts"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert (loaded.correct == saved.correct).all()
    assert [image.getpixel((0, 0)) for image in loaded.images] == [image.getpixel((0, 0)) for image in saved.images]


def test_selected_prompts_are_of_their_split_and_fixed() -> None:
    for split in ("validation", "test"):
        selected = select_prompts(split, 5)
        assert selected == select_prompts(split, 5)
        first, rest = (select_prompts(split, n, HEADLINE[1:2], skip=skip) for n, skip in ((5, 0), (1000, 5)))
        assert sorted(d.text for _, d in [*first, *rest]) == sorted(d.text for d in prompts(HEADLINE[1], split))
        assert all(description.split == split for _, description in selected)
        assert {kind for kind, _ in selected} == set(KINDS)
    assert all(len(prompts(kind, "test")) >= 20 for kind in HEADLINE)


def test_the_checker_answers_questions() -> None:
    description = parse("a red circle left of a blue square")
    assert description is not None
    scene = detect(render(sample_scene(description, np.random.default_rng(0))))
    for question, expected in [
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
    ]:
        assert true_answer(question, scene) is expected, question


def test_files_that_are_no_result_are_refused(tmp_path: Path) -> None:
    saved = result([[True, False]] * 6)
    path = tmp_path / "result.npz"
    saved.save(path)
    data = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    changes = {
        "about": [np.array("{"), np.array("[]"), np.array('{"split": "test"}'), np.array(1)],
        "kinds": [arrays["kinds"][1:], np.array("x")],
        "prompts": [arrays["prompts"][1:]],
        "images": [arrays["images"][1:], arrays["images"].astype(float), np.zeros(12, np.uint8)],
        "correct": [arrays["correct"].T, arrays["correct"].astype(float), np.array(True)],
    }
    contents = [b"", b"PK", data[: len(data) // 2]]
    for name, values in changes.items():
        for changed in [*({**arrays, name: value} for value in values), {k: v for k, v in arrays.items() if k != name}]:
            np.savez(path, **changed)
            contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(
            OspoError, match=r"Cannot read the evaluation .*result\.npz: .*; delete it to evaluate again"
        ):
            AlignmentResult.load(path)


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_dense_prompts_are_held_out_and_new(world: World) -> None:
    selected = select_prompts("dense", 120, world=world)
    assert selected == select_prompts("dense", 120, world=world)
    counts = Counter(kind for kind, _ in selected)
    few = {"shapes": (115, 115, 48), "shapes-large": (30, 30, 80)}[world.name]
    assert counts == dict.fromkeys(KINDS, 120) | dict(zip(("color1", "shape1", "numeracy1"), few, strict=True))
    texts, held_out = [description.text for _, description in selected], set(held_out_prompts(world))
    assert len(set(texts)) == len(texts)
    assert held_out >= set(texts)
    plain = {d.text for kind in KINDS for split in ("train", "validation", "test") for d in prompts(kind, split, world)}
    assert not plain & set(texts)
    assert all(parse(text, world).split == "test" for text in texts)


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_settings_are_chosen_by_other_dense_prompts(world: World) -> None:
    tested, chosen = ({d.text for _, d in select_prompts(s, 120, world=world)} for s in DENSE_SPLITS)
    assert len(chosen) > 500
    assert not tested & chosen
    assert chosen <= set(held_out_prompts(world))
    assert all(parse(text, world).split == "validation" for text in chosen)


def test_dense_prompts_of_one_meaning_count_together() -> None:
    """Four meanings, of each of which all prompts have the same outcome, say no more than four prompts."""
    meanings = ["a red circle", "a blue square", "a cyan cross", "a red cross"]
    texts = tuple(f"{text} on a {color} background" for color in ("white", "black", "gray") for text in meanings)
    correct = np.array([[True], [False], [True], [True]] * 3)
    images = (Image.new("RGB", (4, 4)),) * len(texts)
    dense, plain = (
        AlignmentResult(split, 1.5, (0,), ("color1",) * len(texts), texts, images, correct)
        for split in ("dense", "test")
    )
    error = dense.by_kind()["color1"]["standard_error"]
    assert error == pytest.approx(np.sqrt(3 * 0.25**2 + 0.75**2) / 4 * np.sqrt(4 / 3))
    assert error > 1.5 * plain.by_kind()["color1"]["standard_error"]
    assert dense.gain_by_kind(dense)["color1"] == {"alignment": 0, "standard_error": 0, "prompts": 12}

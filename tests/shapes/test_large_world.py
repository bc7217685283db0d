"""The world of small objects: its checker, its prompts, its shares of object cells, and a run of all stages on it."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ospo_fast import models
from ospo_fast.cli import main
from ospo_fast.config import load_config, model_family
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import load_model
from ospo_fast.shapes import demo, evaluate, grammar
from ospo_fast.shapes.checker import UNKNOWN, detect, matches, satisfies
from ospo_fast.shapes.evaluate import HEADLINE, true_answer
from ospo_fast.shapes.render import render, render_array, texture
from ospo_fast.shapes.scenes import (
    COLORS,
    KINDS,
    LARGE_WORLD,
    SHAPES,
    SHAPES_WORLD,
    Object,
    Scene,
    World,
    descriptions,
    held_out_prompts,
    parse,
    prompts,
    random_scene,
    sample_scene,
)


def test_random_scenes_are_detected_completely() -> None:
    """With every number of objects on every texture; questions have their true answers."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        scene = random_scene(rng, LARGE_WORLD)
        detected = detect(render(scene), LARGE_WORLD)
        found = {(o.color, o.shape, o.size, (int(o.y) // 8, int(o.x) // 8)) for o in detected.objects}
        assert found == {(o.color, o.shape, o.size, o.cell) for o in scene.objects}
        seen.add((scene.background, len(scene.objects)))
        for kind in evaluate.QUESTION_KINDS:
            question = grammar.sample_question(scene, kind, rng)
            assert true_answer(question.text, detected) == question.answer, (question, scene)
    assert seen == {(name, n) for name in LARGE_WORLD.backgrounds for n in range(1, 7)}


def test_every_object_on_every_texture_is_detected() -> None:
    for seed, color in enumerate(COLORS):
        for shape in SHAPES:
            for size in LARGE_WORLD.sizes:
                for background in LARGE_WORLD.backgrounds:
                    scene = Scene((Object(color, shape, size, (7, 2)),), background, seed, LARGE_WORLD)
                    (obj,) = detect(render(scene), LARGE_WORLD).objects
                    assert (obj.color, obj.shape, obj.size) == (color, shape, size)


def test_a_texture_is_no_object_and_needs_a_name() -> None:
    for seed in range(40):
        for name in LARGE_WORLD.backgrounds:
            gray = texture(name, seed, 64)
            assert (gray == texture(name, seed, 64)).all()
            assert gray.std() > 3
            assert detect(np.repeat(gray[..., None], 3, axis=2), LARGE_WORLD).objects == ()
    with pytest.raises(ValueError, match="plaid"):
        texture("plaid", 0, 64)


def test_what_fits_no_template_satisfies_no_prompt() -> None:
    rng = np.random.default_rng(2)
    assert not satisfies(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), "a red circle", LARGE_WORLD)
    scene = Scene((Object("red", "circle", "large", (1, 1)),), "cloudy", 3, LARGE_WORLD)
    pixels = render_array([scene])[0].copy()
    assert satisfies(pixels, "a red circle", LARGE_WORLD)
    pixels[40:44, 20:44] = COLORS["blue"]  # a bar
    assert [obj.shape for obj in detect(pixels, LARGE_WORLD).objects] == ["circle", UNKNOWN]
    assert not satisfies(pixels, "a red circle", LARGE_WORLD)


def test_scenes_satisfy_their_prompt_and_hard_negatives_do_not() -> None:
    rng = np.random.default_rng(1)
    for kind, (_, sub_category) in KINDS.items():
        for description in prompts(kind, "train", LARGE_WORLD)[::60]:
            assert satisfies(render(sample_scene(description, rng)), description.text, LARGE_WORLD)
            for method in grammar.METHODS[sub_category]:
                other = grammar.perturb(description, method, sub_category, rng)
                assert not satisfies(render(sample_scene(other, rng)), description.text, LARGE_WORLD)
            dense = grammar.densify(description, description, rng)[0]
            scene = sample_scene(dense, rng)
            assert matches(detect(render(scene), LARGE_WORLD), dense)
            assert (scene.background, scene.objects[0].size) == (dense.background, dense.size)
            assert dense.place in (None, LARGE_WORLD.place(scene.objects[0].cell))


def test_prompts_are_parsed_in_their_world_only() -> None:
    for kind in KINDS:
        for description in descriptions(kind, LARGE_WORLD)[::7]:
            assert parse(description.text, LARGE_WORLD) == description
    for text in held_out_prompts(LARGE_WORLD)[::101]:
        description = parse(text, LARGE_WORLD)
        assert description is not None
        assert (description.text, description.split != "train") == (text, True)
    for text in ("five red circles", "a red circle on a striped background"):
        assert parse(text, LARGE_WORLD) is not None
        assert parse(text) is None
    assert parse("a red circle on a white background", LARGE_WORLD) is None
    assert parse("three red circles and four blue squares", LARGE_WORLD) is None


def test_splits_are_disjoint_and_headline_kinds_have_prompts() -> None:
    for kind in KINDS:
        parts = {split: prompts(kind, split, LARGE_WORLD) for split in ("train", "validation", "test")}
        keys = {split: {description.key for description in part} for split, part in parts.items()}
        assert sum(map(len, parts.values())) == len(descriptions(kind, LARGE_WORLD))
        assert len(set.union(*keys.values())) == sum(map(len, keys.values()))
        assert (len(parts["test"]) >= 20) == (kind in HEADLINE), kind


@pytest.mark.parametrize(("world", "low", "high"), [(SHAPES_WORLD, 0.2, 0.4), (LARGE_WORLD, 0.03, 0.1)])
def test_share_of_object_cells(world: World, low: float, high: float) -> None:
    """On average over the prompts of each headline kind, as `object_cells` counts them."""
    rng, side = np.random.default_rng(0), world.image_size // 8
    for kind in HEADLINE:
        shares = []
        for description in prompts(kind, "train", world)[:: 40 if kind == "numeracy2" else 15]:
            cells = demo.object_cells(render(sample_scene(description, rng)), (side, side), world)
            assert cells is not None
            assert world is SHAPES_WORLD or cells.sum() == description.total
            shares.append(cells.mean())
        assert low < np.mean(shares) < high, kind


def test_the_first_world_is_unchanged() -> None:
    """Held-out prompts and renders have the digests that they had before there was another world."""

    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()[:16]

    assert digest("\n".join(held_out_prompts()).encode()) == "f9b1ed5f9b0d809c"
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng) for _ in range(300)]
    for description in (d for kind in KINDS for d in prompts(kind, "train")[::37]):
        scenes.append(sample_scene(description, rng))
        scenes.append(sample_scene(grammar.densify(description, description, rng)[0], rng))
    assert digest(render_array(scenes).tobytes()) == "36a10db53b106877"
    questions = [grammar.sample_question(scene, kind, rng).text for scene in scenes for kind in evaluate.QUESTION_KINDS]
    assert digest("\n".join(questions).encode()) == "951af81f7e76b0f1"


def test_a_demo_runs_on_random_weights(omegaconf: Any, scripted: Any, tmp_path: Path) -> None:
    """All stages and evaluations, with texts and answers of a script."""
    folder = scripted.save_tiny(tmp_path / "tiny", world=LARGE_WORLD)
    model = load_model(folder)
    assert (model.templates, model.grid, model.image_size) == ("shapes-large", (8, 8), (64, 64))
    settings = [
        "prompts.counts={color1: 2, shape1: 1, color2: 3, 2D_spatial: 3, numeracy1: 2, numeracy2: 3}",
        "train.steps=2",
        "train.eval_every=1",
        "train.batch_size=4",
        "evaluate.per_kind=2",
        "evaluate.watch_per_kind=2",
        "evaluate.guidance_scales=[1.0, 2.0]",
    ]
    out = tmp_path / "run"
    config = load_config([*settings, f"model={folder}", f"out={out}"], family=model_family(str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        scripted.install(patch.setattr)
        summary = demo.run(config, progress=False)
    assert (out / "held_out.txt").read_text().splitlines() == held_out_prompts(LARGE_WORLD)
    assert summary["pairs"] > 0
    assert summary["evaluation"]["by_kind"].keys() == KINDS.keys()
    assert set(summary["vqa_by_kind"]) == set(evaluate.QUESTION_KINDS)
    result = evaluate.evaluate_alignment(model, per_kind=2, kinds=HEADLINE, progress=False)
    assert all(parse(prompt, LARGE_WORLD) is not None for prompt in result.prompts)
    assert {image.size for image in result.images} == {(64, 64)}


def test_commands_take_the_name_of_the_world(
    omegaconf: Any, scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models._EMBEDDED, "shapes-large", scripted.save_tiny(tmp_path / "tiny", world=LARGE_WORLD))
    named, out = ["--model", "shapes-large"], tmp_path / "images"
    words = "five red circles on a striped background"
    assert main(["generate", words, *named, "--num", "2", "--out", str(out)]) == 0
    few = ["evaluate.per_kind=1", "evaluate.seeds=[0]", "evaluate.guidance_scales=[1]"]
    assert main(["evaluate", *named, "--out", str(tmp_path / "scores"), *few, "--json"]) == 0
    assert main(["generate", words, "--model", "shapes", "--out", str(out)]) == 2  # other words


def test_a_model_of_no_world_is_refused(omegaconf: Any) -> None:
    class Other:
        name, templates = "org/janus", "janus"

    with pytest.raises(UsageError, match=r"org/janus is of no Shapes world; use 'shapes', 'shapes-large'"):
        evaluate.world_of(Other())


def test_a_wheel_says_where_the_checkpoint_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(models._EMBEDDED, "shapes-large", tmp_path / "checkpoint-large")
    with pytest.raises(OspoError, match=r"leave out the checkpoint of shapes-large; install from a clone .*-large"):
        models.find_model("shapes-large")


@pytest.fixture(scope="module")
def large() -> Any:
    """The model of the world of small objects, from the clone, because wheels leave it out."""
    return load_model(Path(__file__).parents[2] / "ospo_fast" / "shapes" / "checkpoint-large")


def test_the_checkpoint_answers_questions(large: Any) -> None:
    assert evaluate.world_of(large) is LARGE_WORLD
    answers = evaluate.evaluate_answers(large, count=60, progress=False)
    assert answers["all"] >= 0.95
    assert min(answers.values()) >= 0.85


def test_the_checkpoint_draws_some_prompts_and_not_all(large: Any) -> None:
    drawn = evaluate.evaluate_alignment(
        large, split="validation", per_kind=24, guidance_scale=2.0, seeds=(0,), kinds=evaluate.HEADLINE, progress=False
    )
    assert 0.25 < drawn.headline()["alignment"] < 0.75

"""Pretraining of the Shapes model: its data, its losses, and resuming."""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import codebook
import numpy as np
import pretrain
import pytest
import tasks
import torch
import vision_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tasks import Recipe, TrainingData

from ospo_fast.errors import OspoError
from ospo_fast.models import load_model
from ospo_fast.shapes.model import build_model, build_processor, vocabulary
from ospo_fast.shapes.scenes import (
    COLORS,
    LARGE_WORLD,
    PLACES,
    SHAPES,
    SHAPES_WORLD,
    WORLDS,
    Object,
    Scene,
    World,
    held_out_prompts,
    parse,
    random_scene,
)

ROOT = Path(__file__).resolve().parents[2]
TINY = Recipe(
    codes_steps=2,
    vision_encoder_steps=2,
    polish_steps=2,
    steps=3,
    image_sequences=3,
    question_images=2,
    questions=3,
    texts=3,
    pool=20,
    decoded=10,
)


@pytest.fixture(scope="module")
def model():
    return build_model(0, hidden=32, layers=2, intermediate=48, heads=2)


@pytest.fixture(scope="module")
def data(model) -> TrainingData:
    return TrainingData(model, build_processor(), TINY)


@pytest.fixture(scope="module")
def large_data() -> TrainingData:
    model = build_model(0, LARGE_WORLD, hidden=32, layers=2, intermediate=48, heads=2)
    return TrainingData(model, build_processor(LARGE_WORLD), replace(TINY, world="shapes-large"))


@pytest.mark.parametrize("name", ["data", "large_data"])
def test_no_held_out_prompt_occurs(name: str, request: pytest.FixtureRequest) -> None:
    data: TrainingData = request.getfixturevalue(name)
    for text in data.prompts:
        description = parse(text, data.world)
        assert description is not None
        assert description.split == "train"
    assert not set(held_out_prompts(data.world)) & set(data.prompts)
    for step in range(60):
        ids, labels = data.text_batch(step)
        for row in (*ids, *labels):
            text = data.tokenizer.decode(row[row >= 0], skip_special_tokens=True)
            for part in text.replace(";", "\n").replace("Dense:", "\n").replace("Prompt:", "\n").splitlines():
                description = parse(part.split("/")[-1], data.world)
                assert description is None or description.split == "train", text


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_vocabulary_has_no_duplicates_and_restores_text(world: World) -> None:
    assert len(set(vocabulary(world))) == len(vocabulary(world))
    tokenizer = build_processor(world).tokenizer
    for text in held_out_prompts(world)[::97]:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text


def test_packed_questions_have_the_logits_of_single_ones(model, data: TrainingData) -> None:
    pixels, ids, positions, blocks, *_ = data.question_batch(0)
    with torch.no_grad():
        packed, _ = tasks.answer_logits(model, pixels, ids, positions, blocks)
        for number in range(1, TINY.questions + 2):
            for row in range(len(ids)):
                kept = (blocks[row] == 0) | (blocks[row] == number)
                single, _ = tasks.answer_logits(
                    model,
                    pixels[row : row + 1],
                    ids[row : row + 1, kept],
                    torch.arange(int(kept.sum()))[None],
                    torch.zeros(1, int(kept.sum()), dtype=torch.long),
                )
                torch.testing.assert_close(packed[row, kept][-1], single[0, -1], atol=1e-5, rtol=1e-5)


def test_image_loss_is_that_of_single_sequences(model, data: TrainingData) -> None:
    ids, lengths, codes = data.image_batch(0)
    losses = []
    with torch.no_grad():
        for row, length, image in zip(ids, lengths, codes, strict=True):
            words = model.model.language_model.embed_tokens(row[:length])
            embeds = model.prepare_embeddings_for_image_generation(image)
            hidden = model.model.language_model(inputs_embeds=torch.cat([words, embeds])[None]).last_hidden_state
            logits = model.model.generation_head(hidden[0, length - 1 : -1])
            losses.append(torch.nn.functional.cross_entropy(logits, image))
        torch.testing.assert_close(tasks.image_loss(model, ids, lengths, codes), torch.stack(losses).mean())


def test_patches_with_a_reserved_code_have_that_of_what_they_show() -> None:
    codes = codebook.reserved_codes(LARGE_WORLD, 16)
    assert codes.shape == (48, 16)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(48))
    similar = codes @ codes.T - torch.eye(48)
    assert similar.max() < 0.67  # two of color, shape and size are the same
    pixels, weights, fixed = codebook._batch(np.random.default_rng(0), 8, LARGE_WORLD)
    objects = fixed >= 0
    assert fixed.shape == (8, 8, 8)
    assert fixed.max() < 48
    assert (weights[:, 0, ::8, ::8] == torch.where(objects, 16.0, 1.0)).all()
    chroma = (pixels - pixels.mean(dim=1, keepdim=True)).abs().sum(1)
    colored = torch.nn.functional.max_pool2d(chroma, 8) > 0.1
    assert (colored == objects).all()
    plain = codebook._batch(np.random.default_rng(0), 8, SHAPES_WORLD)[2]
    assert set(plain.unique().tolist()) == {-1, 0, 1, 2}


def test_unused_codes_restart_at_a_vector() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(400, 8, generator=generator), dim=1)
    book = codebook.Codebook(codebook._kmeans(vectors, 16, generator))
    assert (book.codes.norm(dim=1) - 1).abs().max() < 1e-5
    book.counts[3] = 0
    book.sums[3] = 0
    nearest = (vectors @ book.codes.T).argmax(1)
    kept = nearest != 3
    book.update(vectors[kept], nearest[kept], generator)
    assert (vectors @ book.codes[3]).max() > 0.999


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "WARM", 1)
    monkeypatch.setattr(
        pretrain, "build_model", lambda *given: build_model(*given, hidden=32, layers=2, intermediate=48, heads=2)
    )
    monkeypatch.setattr(codebook, "evaluate", lambda *_, **__: {"measured": 0.0})
    monkeypatch.setattr(pretrain, "answer_accuracy", lambda *_, **__: {"measured": 0.0})


@pytest.mark.usefixtures("small_world")
@pytest.mark.parametrize("recipe", [TINY, replace(TINY, world="shapes-large", dtype="float16")], ids=WORLDS)
def test_a_resumed_run_ends_with_the_same_weights(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain.run(tmp_path / "whole", recipe, checkpoint_every=2)

    save = pretrain._save
    saved: list[Path] = []

    def interrupt(state: dict, path: Path) -> None:
        save(state, path)
        saved.append(path)
        if path.name == "state.pt" and len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "_save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(tmp_path / "interrupted", recipe, checkpoint_every=2)
    pretrain.run(tmp_path / "interrupted", recipe, checkpoint_every=2)

    from safetensors.torch import load_file

    first = load_file(tmp_path / "whole" / "checkpoint" / "model.safetensors")
    second = load_file(tmp_path / "interrupted" / "checkpoint" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {str(tensor.dtype) for tensor in first.values()} == {f"torch.{recipe.dtype}"}
    loaded = load_model(tmp_path / "whole" / "checkpoint")
    assert (loaded.templates, loaded.dtype) == (recipe.world, torch.float32)

    state = torch.load(tmp_path / "whole" / "state.pt", weights_only=False)
    del state["pointer"]
    torch.save(state, tmp_path / "whole" / "state.pt")
    with pytest.raises(OspoError, match=r"state\.pt was made by an earlier version.*another folder"):
        pretrain.run(tmp_path / "whole", recipe)


@pytest.mark.usefixtures("small_world")
def test_another_recipe_is_refused(tmp_path: Path) -> None:
    pretrain._check_recipe(tmp_path, TINY)
    pretrain._check_recipe(tmp_path, TINY)
    with pytest.raises(OspoError, match="steps 3 → 5"):
        pretrain.run(tmp_path, replace(TINY, steps=5))
    (tmp_path / "file").write_text("")
    with pytest.raises(OspoError, match="can be written"):
        pretrain.run(tmp_path / "file" / "out", TINY)


def test_cells_of_the_names_in_a_question(data: TrainingData) -> None:
    objects = (("red", "circle", (0, 1)), ("red", "circle", (2, 2)), ("blue", "cross", (1, 0)))
    scene = Scene(tuple(Object(color, shape, "small", cell) for color, shape, cell in objects), "white")
    for text, expected in {
        "are there two red circles?": {"circles": 1 << 1 | 1 << 8},
        "is the red circle above the blue cross?": {"circle": 1 << 1 | 1 << 8, "cross": 1 << 3},
        "is there a green square?": {"square": 0},
        "are there three objects?": {},
    }.items():
        tokens = list(data.ids(text))
        found = {
            data.tokenizer.decode([token]): cells
            for token, cells in zip(tokens, data._cells(tokens, scene), strict=True)
        }
        assert {word.strip(): cells for word, cells in found.items() if cells != tasks.IGNORE_INDEX} == expected


def test_the_last_of_64_cells_is_located(large_data: TrainingData) -> None:
    scene = Scene((Object("red", "circle", "small", (7, 7)), Object("red", "circle", "small", (0, 2))), "cloudy")
    tokens = list(large_data.ids("are there two red circles?"))
    (mask,) = (cells for cells in large_data._cells(tokens, scene) if cells != tasks.IGNORE_INDEX)
    cells = torch.full((1, 2), tasks.IGNORE_INDEX)
    cells[0, 1] = mask
    head = tasks.LocalizationHead(16, 64)
    hidden = torch.randn(1, 2, 16)
    occupied = torch.zeros(1, 64)
    occupied[0, [2, 63]] = 1
    logits = head.cells(head.norm(hidden[:, 1]))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, occupied, reduction="sum")
    torch.testing.assert_close(head.loss(hidden, cells), expected)


def test_only_looks_join_color_and_shape() -> None:
    objects = (Object("red", "circle", "small", (7, 7)), Object("blue", SHAPES[-1], "small", (0, 2)))
    scene = Scene(objects, "cloudy", world=LARGE_WORLD)
    labels = vision_encoder.patch_labels([scene])
    color, shape, look = (labels[name].view(8, 8) for name in ("color", "shape", "look"))
    assert torch.equal(look > 0, color > 0)
    assert int((look > 0).sum()) == 2
    joint = {(c, s): (c - 1) * len(SHAPES) + s for c in range(1, len(COLORS) + 1) for s in range(1, len(SHAPES) + 1)}
    assert sorted(joint.values()) == list(range(1, vision_encoder._classes(LARGE_WORLD)["look"]))
    for cell in ((7, 7), (0, 2)):
        assert look[cell] == joint[int(color[cell]), int(shape[cell])]


def test_localization_is_the_cross_entropy_at_the_named_tokens() -> None:
    head = tasks.LocalizationHead(16)
    hidden, cells = torch.randn(2, 3, 16), torch.full((2, 3), tasks.IGNORE_INDEX)
    cells[0, 1], cells[1, 2] = 0b101, 0
    occupied = torch.zeros(2, 9)
    occupied[0, [0, 2]] = 1
    logits = head.cells(head.norm(torch.stack([hidden[0, 1], hidden[1, 2]])))
    expected = -(occupied * logits.sigmoid().log() + (1 - occupied) * (-logits).sigmoid().log()).sum(1).mean()
    torch.testing.assert_close(head.loss(hidden, cells), expected)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_answers_about_locations_are_true(seed: int, pair: bool) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    looks = [(obj.color, obj.shape) for obj in scene.objects]
    unique = {look: o.cell for look, o in zip(looks, scene.objects, strict=True) if looks.count(look) == 1}
    question = tasks.location_question(scene, rng, pair=pair)
    if question is None:
        assert len(unique) < 1 + pair
        return
    named = [tuple(part.split()) for part in question[0].removeprefix("where is the ").rstrip("?").split(" and the ")]
    (row, column), *rest = (unique[look] for look in named)
    if pair:
        ((other_row, other_column),) = rest
        across = "left of" if column < other_column else "right of" if column > other_column else ""
        along = "above" if row < other_row else "below" if row > other_row else ""
        assert question[1] == f"{across} {along}".strip()
    else:
        assert question[1] == {place: word for word, place in PLACES.items()}[row, column]


def test_two_processes_share_the_batches(tmp_path: Path) -> None:
    """The means of losses over parts with other numbers of tokens differ a little from those of one process."""
    options = [
        f"--{name.replace('_', '-')}={getattr(TINY, name)}" for name in asdict(TINY) if name not in ("world", "dtype")
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    weights = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        out = tmp_path / str(len(weights))
        command = [sys.executable, *launcher, ROOT / "bench/pretraining/pretrain.py", "--out", out, *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        weights.append(load_file(out / "checkpoint" / "model.safetensors"))
    one, two = weights
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=0.05, msg=lambda m, n=name: f"{n}: {m}")
    assert not all(torch.equal(two[name], tensor) for name, tensor in one.items())

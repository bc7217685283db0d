"""Pretraining: nothing held out is shown, packed questions are what single ones are, a stop loses nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ospo_fast.errors import OspoError
from ospo_fast.shapes import codebook, pretrain
from ospo_fast.shapes.model import build_model, build_processor, vocabulary
from ospo_fast.shapes.pretrain import Data, Recipe
from ospo_fast.shapes.scenes import Object, Scene, held_out, parse

TINY = Recipe(
    codes_steps=2,
    tower_steps=2,
    polish_steps=2,
    steps=3,
    draw=3,
    pictures=2,
    questions=3,
    texts=3,
    pool=20,
    decoded=10,
)


@pytest.fixture(scope="module")
def model():
    return build_model(0, hidden=32, layers=2, intermediate=48, heads=2)


@pytest.fixture(scope="module")
def data(model) -> Data:
    return Data(model, build_processor(), TINY)


def test_nothing_held_out_is_drawn_or_written(data: Data) -> None:
    excluded = set(held_out())
    for text in data.drawn:
        description = parse(text)
        assert description is not None
        assert description.split == "train"
    assert not excluded & set(data.drawn)
    words = data.tokenizer
    for step in range(60):
        ids, labels = data.write(step)
        for row in (*ids, *labels):
            text = words.decode(row[row >= 0], skip_special_tokens=True)
            for part in text.replace(";", "\n").replace("Dense:", "\n").replace("Prompt:", "\n").splitlines():
                description = parse(part.split("/")[-1])
                assert description is None or description.split == "train", text


def test_vocabulary_has_no_duplicates_and_text_comes_back() -> None:
    assert len(set(vocabulary())) == len(vocabulary())
    tokenizer = build_processor().tokenizer
    for text in held_out()[::97]:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text


def test_packed_questions_are_answered_as_single_ones(model, data: Data) -> None:
    pixels, ids, positions, blocks, *_ = data.ask(0)
    with torch.no_grad():
        packed, _ = pretrain.answer_logits(model, pixels, ids, positions, blocks)
        for number in range(1, TINY.questions + 2):
            for row in range(len(ids)):
                kept = (blocks[row] == 0) | (blocks[row] == number)
                single, _ = pretrain.answer_logits(
                    model,
                    pixels[row : row + 1],
                    ids[row : row + 1, kept],
                    torch.arange(int(kept.sum()))[None],
                    torch.zeros(1, int(kept.sum()), dtype=torch.long),
                )
                torch.testing.assert_close(packed[row, kept][-1], single[0, -1], atol=1e-5, rtol=1e-5)


def test_drawing_loss_is_that_of_single_sequences(model, data: Data) -> None:
    ids, lengths, codes = data.draw(0)
    losses = []
    with torch.no_grad():
        for row, length, drawn in zip(ids, lengths, codes, strict=True):
            words = model.model.language_model.embed_tokens(row[:length])
            pictures = model.prepare_embeddings_for_image_generation(drawn)
            hidden = model.model.language_model(inputs_embeds=torch.cat([words, pictures])[None]).last_hidden_state
            logits = model.model.generation_head(hidden[0, length - 1 : -1])
            losses.append(torch.nn.functional.cross_entropy(logits, drawn))
        torch.testing.assert_close(pretrain.draw_loss(model, ids, lengths, codes), torch.stack(losses).mean())


def test_codebook_covers_and_restarts() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(400, 8, generator=generator), dim=1)
    book = codebook.Codebook(codebook._kmeans(vectors, 16, generator))
    assert (book.codes.norm(dim=1) - 1).abs().max() < 1e-5
    book.counts[3] = 0
    book.sums[3] = 0
    nearest = (vectors @ book.codes.T).argmax(1)
    kept = nearest != 3
    book.update(vectors[kept], nearest[kept], generator)
    assert (vectors @ book.codes[3]).max() > 0.999  # moved to a vector


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "WARM", 1)
    monkeypatch.setattr(
        pretrain, "build_model", lambda seed: build_model(seed, hidden=32, layers=2, intermediate=48, heads=2)
    )
    for name in ("evaluate", "answering"):
        module = codebook if name == "evaluate" else pretrain
        monkeypatch.setattr(module, name, lambda *_, **__: {"measured": 0.0})


@pytest.mark.usefixtures("small_world")
def test_a_stopped_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain.run(tmp_path / "whole", TINY, checkpoint_every=2)

    real = pretrain._save
    saved: list[Path] = []

    def stop(state: dict, path: Path) -> None:
        real(state, path)
        saved.append(path)
        if path.name == "state.pt" and len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(tmp_path / "stopped", TINY, checkpoint_every=2)
    pretrain.run(tmp_path / "stopped", TINY, checkpoint_every=2)

    from safetensors.torch import load_file

    first = load_file(tmp_path / "whole" / "checkpoint" / "model.safetensors")
    second = load_file(tmp_path / "stopped" / "checkpoint" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("small_world")
def test_the_state_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    pretrain.run(tmp_path, TINY, checkpoint_every=2)
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    del state["pointer"]
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(OspoError, match=r"state\.pt was made by an earlier version.*another folder"):
        pretrain.run(tmp_path, TINY)


@pytest.mark.usefixtures("small_world")
def test_another_recipe_is_refused(tmp_path: Path) -> None:
    pretrain._same_recipe(tmp_path, TINY)
    pretrain._same_recipe(tmp_path, TINY)
    with pytest.raises(OspoError, match="steps 3 → 5"):
        pretrain.run(tmp_path, replace(TINY, steps=5))
    (tmp_path / "file").write_text("")
    with pytest.raises(OspoError, match="can be written"):
        pretrain.run(tmp_path / "file" / "out", TINY)


def test_names_are_asked_for_their_cells(data: Data) -> None:
    things = (("red", "circle", (0, 1)), ("red", "circle", (2, 2)), ("blue", "cross", (1, 0)))
    scene = Scene(tuple(Object(color, shape, "small", cell) for color, shape, cell in things), "white")
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
        assert {word.strip(): cells for word, cells in found.items() if cells != pretrain.IGNORED} == expected


def test_pointing_is_the_cross_entropy_of_the_named_tokens() -> None:
    pointer = pretrain.LocalizationHead(16)
    hidden, cells = torch.randn(2, 3, 16), torch.full((2, 3), pretrain.IGNORED)
    cells[0, 1], cells[1, 2] = 0b101, 0
    held = torch.zeros(2, 9)
    held[0, [0, 2]] = 1
    logits = pointer.cells(pointer.norm(torch.stack([hidden[0, 1], hidden[1, 2]])))
    expected = -(held * logits.sigmoid().log() + (1 - held) * (-logits).sigmoid().log()).mean()
    torch.testing.assert_close(pointer.loss(hidden, cells), expected)

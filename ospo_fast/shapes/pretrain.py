"""Makes the checkpoint that ships with the package: `python -m ospo_fast.shapes.pretrain --out DIR`.

Four parts, all from one seed: the VQ model (`codebook.py`); the vision encoder; everything but the VQ model
on several tasks at once: prompt → codes, picture and question → yes or no or a place, the names in a question → the
cells that hold them, picture → caption, and the text tasks of the stages; last the VQ decoder once more,
with the codes as they are. Drawing gets few sequences a step on purpose (`Recipe.draw`), so that the model makes the
mistakes that OSPO is there to mend; nothing else is done to it. Prompts whose meaning is held out
(`Description.split`) are never drawn and never written. Pictures that are looked at (VQ model, tower, captions,
questions) are of random scenes, which may hold any objects.

Stopped at any point, the same command goes on from the last saved state.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JanusForConditionalGeneration, JanusProcessor
from transformers.utils import logging as transformers_logging

from ospo_fast.errors import OspoError
from ospo_fast.shapes import codebook, grammar, vision_encoder
from ospo_fast.shapes.model import GRID, build_model, build_processor
from ospo_fast.shapes.render import render_array
from ospo_fast.shapes.scenes import (
    BOARD,
    COLORS,
    KINDS,
    SHAPES,
    Description,
    Group,
    Scene,
    prompts,
    random_scene,
    sample_scene,
)
from ospo_fast.stages.templates import load_templates

logger = logging.getLogger(__name__)
IGNORED = -100
CAPTION = 0.3  # weight of captions: words for what a picture shows, from which answering is a short way
POINTING = 1.0  # weight of pointing (`LocalizationHead`)
POINTING_STATES = -3  # of the hidden states of all layers: two layers are left to compare and to count
WHERE = 0.4  # share of the questions that ask for a place, or for how two lie: what relations are learnt from
# How often each kind of prompt is drawn and written, and each kind of question asked.
PROMPT_SHARES = {
    "color1": 0.08,
    "shape1": 0.06,
    "color2": 0.22,
    "2D_spatial": 0.26,
    "numeracy1": 0.13,
    "numeracy2": 0.25,
}
QUESTION_SHARES = {"existence": 0.18, "count": 0.24, "total": 0.10, "relation": 0.48}


@dataclass(frozen=True)
class Recipe:
    """Sizes of the run; the defaults make the shipped checkpoint."""

    seed: int = 0
    codes_steps: int = 5000
    polish_steps: int = 1500
    tower_steps: int = 1000
    steps: int = 7000
    draw: int = 24  # drawing sequences a step
    pictures: int = 16  # pictures a step that questions are asked about
    questions: int = 8  # questions a picture
    texts: int = 6  # text answers a step
    lr: float = 1e-3
    matrix_lr: float = 3e-3  # of Muon, which trains the matrices of the language model's layers
    vision_lr: float = 3e-4  # of the vision tower and its aligner, which come trained
    decay: float = 0.3  # share of the steps, at the end, over which the learning rate falls to zero
    pool: int = 30_000  # drawings encoded beforehand
    decoded: int = 6_000  # pictures that went through the VQ model, as the model's own drawings do


def _choose(rng: np.random.Generator, shares: dict[str, float]) -> str:
    weights = np.array(list(shares.values()))
    return str(rng.choice(list(shares), p=weights / weights.sum()))


class Data:
    """Everything the language model is shown. Every batch is a function of the seed and the step alone."""

    def __init__(self, model: JanusForConditionalGeneration, processor: JanusProcessor, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = processor.tokenizer
        self.templates = load_templates("shapes")
        self.train = {kind: prompts(kind, "train") for kind in KINDS}
        self.ids = lru_cache(maxsize=200_000)(self._ids)
        self.bos, self.eos, self.pad, self.boi, self.eoi, self.image, self.user, self.assistant = (
            self.tokenizer.convert_tokens_to_ids(token)
            for token in ("<bos>", "<eos>", "<pad>", "<boi>", "<eoi>", "<image>", "<|User|>", "<|Assistant|>")
        )
        self.colors = {self.ids(color)[0]: color for color in COLORS}
        self.shapes = {self.ids(Group(n, "red", shape).text())[-1]: shape for shape in SHAPES for n in (1, 2)}
        rng = np.random.default_rng([recipe.seed, 3])
        self.drawn: list[str] = []
        scenes: list[Scene] = []
        for _ in range(recipe.pool):
            description = self._describe(rng)
            scene = sample_scene(description, rng)
            self.drawn.append(description.text)
            scenes.append(scene)
        parts = [scenes[i : i + 500] for i in range(0, len(scenes), 500)]
        self.codes = torch.cat([codebook.encode(model, codebook.to_tensor(render_array(part))) for part in parts])
        self.decoded_scenes = [random_scene(rng) for _ in range(recipe.decoded)]
        self.decoded = np.concatenate(
            [self._through_codes(model, self.decoded_scenes[i : i + 500]) for i in range(0, recipe.decoded, 500)]
        )

    def _through_codes(self, model: JanusForConditionalGeneration, scenes: list[Scene]) -> np.ndarray:
        codes = codebook.encode(model, codebook.to_tensor(render_array(scenes)))
        return codebook.to_pixels(codebook.decode(model, codes))

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer(" " + text, add_special_tokens=False).input_ids
        if self.tokenizer.unk_token_id in ids:
            raise ValueError(f"{text!r} has a word that the vocabulary lacks")
        return tuple(ids)

    def _describe(self, rng: np.random.Generator) -> Description:
        """A prompt to draw: as it is, with scenery, or one of its near misses with scenery."""
        kind = _choose(rng, PROMPT_SHARES)
        description = self.train[kind][rng.integers(len(self.train[kind]))]
        style = rng.random()
        if style < 0.5:
            return description
        if style < 0.75:
            other = self._variant(description, KINDS[kind][1], rng)[1]
            if other is not None:
                return grammar.densify(description, other, rng)[int(rng.integers(2))]
        return grammar.densify(description, description, rng)[0]

    def _variant(
        self, description: Description, sub_category: str, rng: np.random.Generator
    ) -> tuple[str, Description | None]:
        """A method and the near miss that it makes, None where that is held out."""
        methods = grammar.METHODS[sub_category]
        method = methods[int(rng.integers(len(methods)))]
        for _ in range(8):
            other = grammar.contrast(description, method, sub_category, rng)
            if other.split == "train":
                return method, other
        return method, None

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, P) of the prompts, lengths (B,), codes (B, cells); one prompt in ten is made unconditional."""
        rng = np.random.default_rng([self.recipe.seed, 4, step])
        chosen = rng.integers(len(self.drawn), size=self.recipe.draw)
        rows = []
        for index in chosen:
            row = [self.bos, self.user, *self.ids(self.drawn[index]), self.assistant, self.boi]
            if rng.random() < 0.1:
                row = [self.bos, *[self.pad] * (len(row) - 2), self.boi]
            rows.append(row)
        return _pad(rows, self.pad), torch.tensor([len(row) for row in rows]), self.codes[chosen]

    def ask(self, step: int) -> tuple[Tensor, ...]:
        """Pixels (B, 3, H, W); ids, positions, blocks, labels and cells, each (B, L).

        Block 0 is the picture, 1 is its caption, 2 and on are the questions, -1 is padding. Cells are those of
        `_cells`, of the questions' words.
        """
        rng = np.random.default_rng([self.recipe.seed, 5, step])
        yes, no = self.ids("yes")[0], self.ids("no")[0]
        prefix = [self.bos, self.user, self.boi, *[self.image] * (GRID * GRID), self.eoi]
        pictures: list[np.ndarray] = []
        rows: list[list[int]] = []
        positions: list[list[int]] = []
        blocks: list[list[int]] = []
        labels: list[list[int]] = []
        cells: list[list[int]] = []
        for _ in range(self.recipe.pictures):
            if rng.random() < 0.4:
                index = int(rng.integers(len(self.decoded)))
                scene, picture = self.decoded_scenes[index], self.decoded[index]
            else:
                if rng.random() < 0.35:  # as prompts describe them: two kinds of things, counted or related
                    kind = _choose(rng, PROMPT_SHARES)
                    scene = sample_scene(self.train[kind][rng.integers(len(self.train[kind]))], rng)
                else:
                    scene = random_scene(rng)
                picture = render_array([scene])[0]
            row, position = list(prefix), list(range(len(prefix)))
            block, label, cell = [0] * len(prefix), [IGNORED] * len(prefix), [IGNORED] * len(prefix)
            answer = [*self.ids(grammar.caption(scene)), self.eos]
            turns = [(self.ids("Prompt:"), answer)]
            for _ in range(self.recipe.questions):
                place = grammar.where(scene, rng, pair=rng.random() < 0.6) if rng.random() < WHERE else None
                if place:
                    turns.append((self.ids(place[0]), [*self.ids(place[1])]))
                else:
                    asked = grammar.ask(scene, _choose(rng, QUESTION_SHARES), rng)
                    turns.append((self.ids(asked.text), [yes if asked.answer else no]))
            for number, (question, answer) in enumerate(turns, 1):
                tokens = [*question, self.assistant, *answer[:-1]]
                row += tokens
                position += range(len(prefix), len(prefix) + len(tokens))
                block += [number] * len(tokens)
                label += [IGNORED] * len(question) + answer
                cell += self._cells(tokens, scene) if number > 1 else [IGNORED] * len(tokens)
            pictures.append(picture)
            for rows_, values in ((rows, row), (positions, position), (blocks, block), (labels, label), (cells, cell)):
                rows_.append(values)
        pixels = codebook.to_tensor(np.stack(pictures))
        padded = (_pad(positions, 0), _pad(blocks, -1), _pad(labels, IGNORED), _pad(cells, IGNORED))
        return pixels, _pad(rows, self.pad), *padded

    def _cells(self, tokens: list[int], scene: Scene) -> list[int]:
        """Where a token ends the name of a thing (`red circle`), the cells of the board that hold one, a bit each."""
        found = [IGNORED] * len(tokens)
        for place, (color, shape) in enumerate(pairwise(tokens), 1):
            if color in self.colors and shape in self.shapes:
                thing = (self.colors[color], self.shapes[shape])
                at = [o.cell[0] * BOARD + o.cell[1] for o in scene.objects if (o.color, o.shape) == thing]
                found[place] = sum(1 << cell for cell in at)
        return found

    def write(self, step: int) -> tuple[Tensor, Tensor]:
        """Ids and labels (B, L) of the text tasks."""
        rng = np.random.default_rng([self.recipe.seed, 6, step])
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        while len(rows) < self.recipe.texts:
            pair = self._text(rng)
            if pair is None:
                continue
            asked = [self.bos, self.user, *self.ids(pair[0]), self.assistant]
            answer = [*self.ids(pair[1]), self.eos]
            rows.append(asked + answer)
            labels.append([IGNORED] * (len(asked) - 1) + answer + [IGNORED])  # shifted: each predicts the next
        return _pad(rows, self.pad), _pad(labels, IGNORED)

    def _text(self, rng: np.random.Generator) -> tuple[str, str] | None:
        kind = _choose(rng, PROMPT_SHARES)
        sub_category = KINDS[kind][1]
        description = self.train[kind][rng.integers(len(self.train[kind]))]
        task = rng.integers(4)
        if task == 0:
            stage, variables, answer = "prompts", {"kind": kind}, grammar.stage1_answer(description)
        elif task == 3:
            stage, answer = "questions", grammar.questions_answer(description)
            variables = {"prompt": description.text}
        else:
            method, other = self._variant(description, sub_category, rng)
            if other is None:
                return None
            if task == 1:
                stage, answer = "perturb", f"Contrastive Prompt: {other.text}"
                variables = {"method": method, "prompt": description.text}
            else:
                stage, answer = "densify", grammar.densify_answer(*grammar.densify(description, other, rng))
                variables = {"prompt": description.text, "negative_prompt": other.text}
        return self.templates.messages(stage, **variables)[-1]["content"], answer


def _pad(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def draw_loss(model: JanusForConditionalGeneration, ids: Tensor, lengths: Tensor, codes: Tensor) -> Tensor:
    """Mean cross-entropy of the codes. Each row is its prompt, its codes, then padding that nothing attends to."""
    inner = model.model
    words = inner.language_model.embed_tokens(ids)
    drawn = model.prepare_embeddings_for_image_generation(codes)
    rows, cells = codes.shape
    places = lengths[:, None] + torch.arange(cells)
    embeds = torch.zeros(rows, ids.shape[1] + cells, words.shape[-1])
    embeds[:, : ids.shape[1]] = words
    embeds = embeds.scatter(1, places[..., None].expand(-1, -1, words.shape[-1]), drawn)
    hidden = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    before = (places - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    logits = inner.generation_head(hidden.gather(1, before))
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def answer_logits(
    model: JanusForConditionalGeneration, pixels: Tensor, ids: Tensor, positions: Tensor, blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """Text logits (B, L, V) and the hidden states (B, L, D) that point (`POINTING_STATES`).

    The questions of a row share its picture and do not see one another.
    """
    inner = model.model
    features = inner.get_image_features(pixels).pooler_output
    embeds = inner.language_model.embed_tokens(ids)
    embeds = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], features)
    same = (blocks[:, None, :] == 0) | (blocks[:, None, :] == blocks[:, :, None])
    mask = same & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    bias = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)[:, None]
    states = inner.language_model(
        inputs_embeds=embeds,
        attention_mask=bias,
        position_ids=positions,
        use_cache=False,
        output_hidden_states=True,
    )
    return model.lm_head(states.last_hidden_state), states.hidden_states[POINTING_STATES]


class LocalizationHead(nn.Module):
    """Asks the hidden state of a thing's name which cells of the board hold one; thrown away after pretraining.

    Yes and no say nothing of where to look, and of two things both must be found before a relation between them can be
    told: without this, relations are learnt late, after thousands of steps, or not at all.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.cells = nn.Linear(width, BOARD * BOARD)

    def loss(self, hidden: Tensor, cells: Tensor) -> Tensor:
        """Mean binary cross-entropy over names and cells, of hidden states (B, L, D) and `Data.ask`'s cells (B, L)."""
        named = cells != IGNORED
        held = (cells[named][:, None] >> torch.arange(BOARD * BOARD)) & 1
        return F.binary_cross_entropy_with_logits(self.cells(self.norm(hidden[named])), held.to(hidden.dtype))


def ask_loss(
    model: JanusForConditionalGeneration, pointer: LocalizationHead, batch: tuple[Tensor, ...]
) -> tuple[Tensor, float, float]:
    """Mean cross-entropy of the answers plus `CAPTION` times the caption's and `POINTING` times what `pointer` says.

    With it the share of answers that is right, and the loss of pointing.
    """
    *inputs, labels, cells = batch
    logits, middle = answer_logits(model, *inputs)
    blocks = inputs[-1]
    answers, caption = (labels != IGNORED) & (blocks > 1), (labels != IGNORED) & (blocks == 1)
    right = (logits[answers].argmax(-1) == labels[answers]).float().mean()
    pointing = pointer.loss(middle, cells)
    loss = F.cross_entropy(logits[answers], labels[answers])
    loss = loss + CAPTION * F.cross_entropy(logits[caption], labels[caption]) + POINTING * pointing
    return loss, float(right), float(pointing.detach())


def write_loss(model: JanusForConditionalGeneration, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    hidden = model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def answering(model: JanusForConditionalGeneration, data: Data, *, seed: int, batches: int = 12) -> dict[str, float]:
    """Share of right answers on fresh rendered scenes, by kind of question: what training watches."""
    right: dict[str, list[bool]] = {kind: [] for kind in QUESTION_SHARES}
    yes, no = data.ids("yes")[0], data.ids("no")[0]
    for batch in range(batches):
        rng = np.random.default_rng([seed, 7, batch])
        scenes = [random_scene(rng) for _ in range(24)]
        asked = [[grammar.ask(scene, kind, rng) for kind in QUESTION_SHARES] for scene in scenes]
        prefix = [data.bos, data.user, data.boi, *[data.image] * (GRID * GRID), data.eoi]
        for column in range(len(QUESTION_SHARES)):
            rows = [[*prefix, *data.ids(questions[column].text), data.assistant] for questions in asked]
            ids = _pad(rows, data.pad)
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            blocks = torch.zeros_like(ids)
            logits, _ = answer_logits(model, codebook.to_tensor(render_array(scenes)), ids, positions, blocks)
            for row, questions, values in zip(rows, asked, logits, strict=True):
                last = values[len(row) - 1]
                question = questions[column]
                right[question.kind].append(bool(last[yes] > last[no]) == question.answer)
    return {kind: float(np.mean(values)) for kind, values in right.items()}


def _save(state: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)


def run(out: Path, recipe: Recipe, *, checkpoint_every: int = 250) -> None:
    """All parts of the pretraining; ends with `out/checkpoint`, a folder for `from_pretrained`.

    Raises OspoError where `out` holds a run with another recipe, or cannot be written.
    """
    _same_recipe(out, recipe)
    transformers_logging.set_verbosity_error()
    model, processor = build_model(recipe.seed), build_processor()
    seconds = _codes(model, out / "codes.pt", recipe)
    state_path, clock = out / "state.pt", time.monotonic()
    if not state_path.exists():
        logger.info("tower: %s", vision_encoder.train(model, steps=recipe.tower_steps, seed=recipe.seed))
    data = Data(model, processor, recipe)
    seconds += _tasks(model, data, state_path, recipe, checkpoint_every, clock)
    clock = time.monotonic()
    quality = codebook.polish(model, steps=recipe.polish_steps, seed=recipe.seed)
    seconds += time.monotonic() - clock
    folder = out / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    made = {
        "recipe": asdict(recipe),
        "codes": quality,
        "answering": answering(model, data, seed=recipe.seed + 1, batches=40),
        "minutes": round(seconds / 60, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (folder / "pretraining.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    logger.info("made %s: %s", folder, made)


def _same_recipe(out: Path, recipe: Recipe) -> None:
    path = out / "recipe.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OspoError(f"--out {out}: {error.strerror or error}; take a folder that can be written.") from error
    wanted = asdict(recipe)
    changed = [f"{name} {saved.get(name)} → {value}" for name, value in wanted.items() if saved.get(name) != value]
    if changed:
        raise OspoError(f"--out {out} holds a run with another recipe ({', '.join(changed)}); take another folder.")


def _codes(model: JanusForConditionalGeneration, path: Path, recipe: Recipe) -> float:
    """Trains the VQ model, or takes it from `path`, and freezes it. Returns the seconds that it took in all."""
    vq = model.model.vqmodel
    state = torch.load(path, weights_only=False) if path.exists() else None
    if state is None or "final" not in state:
        clock = time.monotonic() - (state["seconds"] if state else 0.0)
        quality = codebook.train(
            model,
            steps=recipe.codes_steps,
            seed=recipe.seed,
            state=state,
            save=lambda kept: _save({**kept, "seconds": time.monotonic() - clock}, path),
        )
        state = {"final": vq.state_dict(), "quality": quality, "seconds": time.monotonic() - clock}
        _save(state, path)
    vq.load_state_dict(state["final"])
    logger.info("codes: %s", state["quality"])
    with torch.no_grad():  # the generation embeddings start where the codes lie
        model.model.generation_embeddings.weight.copy_(vq.quantize.embedding.weight)
    vq.requires_grad_(False)
    return float(state["seconds"])


def _optimizers(
    model: JanusForConditionalGeneration, pointer: LocalizationHead, recipe: Recipe
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the language model's layers, AdamW for all else.

    AdamW's weight decay is on matrices; the vision tower and its aligner, which come trained, have a learning rate of
    their own.
    """
    inner = model.model
    seeing = {id(p) for part in (inner.vision_model, inner.aligner) for p in part.parameters()}
    matrices = [p for p in inner.language_model.layers.parameters() if p.dim() == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    others += pointer.parameters()
    groups: list[dict[str, Any]] = []
    for lr, mine in (
        (recipe.lr, [p for p in others if id(p) not in seeing]),
        (recipe.vision_lr, [p for p in others if id(p) in seeing]),
    ):
        groups.append({"params": [p for p in mine if p.dim() > 1], "lr": lr, "weight_decay": 0.02})
        groups.append({"params": [p for p in mine if p.dim() <= 1], "lr": lr, "weight_decay": 0.0})
    # Existence questions are answered after half as many steps as with AdamW alone.
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    optimizers: list[torch.optim.Optimizer] = [muon, torch.optim.AdamW(groups, betas=(0.9, 0.99))]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _scale(step: int, recipe: Recipe) -> float:
    """The learning rate's share of its peak: up, level, down to nothing."""
    return min(1.0, (step + 1) / 200, max((recipe.steps - step) / (recipe.decay * recipe.steps), 1e-3))


def _tasks(
    model: JanusForConditionalGeneration,
    data: Data,
    path: Path,
    recipe: Recipe,
    checkpoint_every: int,
    clock: float,
) -> float:
    """Trains everything but the VQ model on all tasks; `path` keeps the state.

    Returns the seconds it took in all, this time counted from `clock`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        pointer = LocalizationHead(model.config.text_config.hidden_size)
    optimizers = _optimizers(model, pointer, recipe)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    start, seconds = 0, 0.0
    if path.exists():
        kept = torch.load(path, weights_only=False)
        if "pointer" not in kept:
            raise OspoError(f"--out: {path} was made by an earlier version of this script; take another folder.")
        model.load_state_dict(kept["model"])
        pointer.load_state_dict(kept["pointer"])
        for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        start, seconds = kept["step"], kept["seconds"]
    model.train()
    recent: list[tuple[float, ...]] = []
    for step in range(start, recipe.steps):
        scale = _scale(step, recipe)
        for group in groups:
            group["lr"] = group["peak"] * scale
        for parameter in parameters:
            parameter.grad = None
        drawn = draw_loss(model, *data.draw(step))
        drawn.backward()
        asked, right, pointing = ask_loss(model, pointer, data.ask(step))
        asked.backward()
        written = write_loss(model, *data.write(step))
        (0.5 * written).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        recent.append((float(drawn.detach()), float(asked.detach()), right, pointing, float(written.detach())))
        if (step + 1) % 50 == 0:
            means = np.mean(recent, axis=0)
            words = "step %d/%d: draw %.3f, ask %.3f (%.3f right, pointing %.3f), write %.3f"
            logger.info(words, step + 1, recipe.steps, *means)
            recent.clear()
        if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
            seconds += time.monotonic() - clock
            clock = time.monotonic()
            states = [optimizer.state_dict() for optimizer in optimizers]
            kept = {"model": model.state_dict(), "pointer": pointer.state_dict(), "optimizers": states}
            _save({**kept, "step": step + 1, "seconds": seconds}, path)
        if (step + 1) % 1000 == 0:
            model.eval()
            logger.info("answering after %d: %s", step + 1, answering(model, data, seed=recipe.seed))
            model.train()
    model.eval()
    return seconds


def main() -> None:
    """The command line: every field of `Recipe` is an option."""
    parser = argparse.ArgumentParser(prog="python -m ospo_fast.shapes.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and, at the end, checkpoint/")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out = arguments.pop("out")
    torch.set_flush_denormal(True)  # Adam's smallest moments would otherwise take the slow path of the processor
    try:
        run(out, Recipe(**arguments))
    except OspoError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()

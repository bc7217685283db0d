"""Part 3 of pretraining: the data and losses of the tasks that the language model learns together.

Prompt → image codes; image and question → yes, no or a location; the names in a question → the cells that hold them;
image → caption; and the text tasks of the stages. Validation and test prompts (`Description.split`) never occur as
prompts. Images of questions and captions show random scenes, which may hold any objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import codebook
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ospo_fast.ops import IGNORE_INDEX
from ospo_fast.shapes import grammar
from ospo_fast.shapes.model import PATCH
from ospo_fast.shapes.render import render_array
from ospo_fast.shapes.scenes import (
    COLORS,
    KINDS,
    RELATIONS,
    SHAPES,
    Description,
    Group,
    Scene,
    prompts,
    random_scene,
    sample_scene,
)
from ospo_fast.stages.templates import load_templates

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration, JanusProcessor

CAPTION_WEIGHT = 0.3
LOCALIZATION_WEIGHT = 1 / 9  # per cell: a mean over the cells would be too small where most are empty
LOCALIZATION_LAYER = -3  # of the hidden states: two layers remain to compare and to count
LOCATION_SHARE = 0.4  # of the questions ask for a location or a relation in words, from which relations are learned
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
    """Sizes of the run. The defaults are those of the checkpoint of the first world.

    Its pretraining.json has older names: tower_steps, draw and pictures.
    """

    world: str = "shapes"
    seed: int = 0
    codes_steps: int = 5000
    codes_batch: int = 24  # images per step of the VQ model
    polish_steps: int = 1500
    vision_encoder_steps: int = 1000
    steps: int = 7000
    image_sequences: int = 24  # sequences with an image to generate per step
    question_images: int = 16  # images with questions per step
    questions: int = 8  # per image
    texts: int = 6  # text answers per step
    lr: float = 1e-3
    matrix_lr: float = 3e-3  # of Muon, which trains the matrices of the language model's layers
    vision_lr: float = 3e-4  # of the vision encoder and its aligner, which are pretrained
    decay: float = 0.3  # share of the steps, at the end, over which the learning rate falls to zero
    pool: int = 30_000  # images that are encoded in advance for generation
    decoded: int = 6_000  # images that are encoded and decoded for questions, as generated images are
    dtype: str = "float32"  # of the saved weights


RECIPES = {
    "shapes": Recipe(),
    "shapes-large": Recipe(
        world="shapes-large",
        codes_steps=3000,
        codes_batch=16,
        polish_steps=1000,
        vision_encoder_steps=800,
        steps=6000,
        dtype="float16",
    ),
}


def choose(rng: np.random.Generator, shares: dict[str, float]) -> str:
    """Sample a key with a probability proportional to its value."""
    weights = np.array(list(shares.values()))
    return str(rng.choice(list(shares), p=weights / weights.sum()))


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Stack rows of different lengths, (B, longest), padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def location_question(scene: Scene, rng: np.random.Generator, *, pair: bool) -> tuple[str, str] | None:
    """Sample a question about a location and its answer; None if the scene has too few objects of a unique look.

    `where is the red circle?` is answered by `top left`; of a pair, `where is the red circle and the blue square?` by
    the relations of the first to the second, such as `left of above`.
    """
    looks = [(obj.color, obj.shape) for obj in scene.objects]
    unique = [obj for obj in scene.objects if looks.count((obj.color, obj.shape)) == 1]
    if len(unique) < 1 + pair:
        return None
    objects = [unique[int(i)] for i in rng.permutation(len(unique))[: 1 + pair]]
    names = [f"the {obj.color} {obj.shape}" for obj in objects]
    if not pair:
        return f"where is {names[0]}?", scene.world.place(objects[0].cell)
    first, second = ([obj.cell] for obj in objects)
    relations = [relation for relation in RELATIONS if grammar.positions_related(first, relation, second)]
    return f"where is {' and '.join(names)}?", " ".join(relations)


def caption(scene: Scene) -> str:
    """Describe every object: `a large red circle at the top left and … on a white background`."""
    objects = sorted(scene.objects, key=lambda obj: obj.cell)
    words = [f"a {obj.size} {obj.color} {obj.shape} at the {scene.world.place(obj.cell)}" for obj in objects]
    return f"{' and '.join(words)} on a {scene.background} background"


class TrainingData:
    """Batches of all tasks. Each batch depends on the seed and the step only."""

    def __init__(self, model: JanusForConditionalGeneration, processor: JanusProcessor, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = processor.tokenizer
        self.world = codebook.world_of(model)
        self.templates = load_templates(self.world.name)
        self.train = {kind: prompts(kind, "train", self.world) for kind in KINDS}
        self.patches = (self.world.image_size // PATCH) ** 2
        self.ids = lru_cache(maxsize=200_000)(self._ids)
        self.bos, self.eos, self.pad, self.boi, self.eoi, self.image, self.user, self.assistant = (
            self.tokenizer.convert_tokens_to_ids(token)
            for token in ("<bos>", "<eos>", "<pad>", "<boi>", "<eoi>", "<image>", "<|User|>", "<|Assistant|>")
        )
        self.colors = {self.ids(color)[0]: color for color in COLORS}
        self.shapes = {self.ids(Group(n, "red", shape).text())[-1]: shape for shape in SHAPES for n in (1, 2)}
        rng = np.random.default_rng([recipe.seed, 3])
        self.prompts: list[str] = []
        scenes: list[Scene] = []
        for _ in range(recipe.pool):
            description = self._sample_description(rng)
            scene = sample_scene(description, rng)
            self.prompts.append(description.text)
            scenes.append(scene)
        parts = [scenes[i : i + 500] for i in range(0, len(scenes), 500)]
        self.codes = torch.cat([codebook.encode(model, codebook.to_tensor(render_array(part))) for part in parts])
        self.decoded_scenes = [random_scene(rng, self.world) for _ in range(recipe.decoded)]
        self.decoded = np.concatenate(
            [self._reconstruct(model, self.decoded_scenes[i : i + 500]) for i in range(0, recipe.decoded, 500)]
        )

    def _reconstruct(self, model: JanusForConditionalGeneration, scenes: list[Scene]) -> np.ndarray:
        codes = codebook.encode(model, codebook.to_tensor(render_array(scenes)))
        return codebook.to_pixels(codebook.decode(model, codes))

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer(" " + text, add_special_tokens=False).input_ids
        if self.tokenizer.unk_token_id in ids:
            raise ValueError(f"text: {text!r} has a word that is not in the vocabulary")
        return tuple(ids)

    def _sample_description(self, rng: np.random.Generator) -> Description:
        """A prompt of an image: plain, with scenery, or a hard negative with scenery."""
        kind = choose(rng, PROMPT_SHARES)
        description = self.train[kind][rng.integers(len(self.train[kind]))]
        style = rng.random()
        if style < 0.5:
            return description
        if style < 0.75:
            other = self._sample_negative(description, KINDS[kind][1], rng)[1]
            if other is not None:
                return grammar.densify(description, other, rng)[int(rng.integers(2))]
        return grammar.densify(description, description, rng)[0]

    def _sample_negative(
        self, description: Description, sub_category: str, rng: np.random.Generator
    ) -> tuple[str, Description | None]:
        """A method and its hard negative; None if that is a validation or test prompt in eight attempts."""
        methods = grammar.METHODS[sub_category]
        method = methods[int(rng.integers(len(methods)))]
        for _ in range(8):
            other = grammar.perturb(description, method, sub_category, rng)
            if other.split == "train":
                return method, other
        return method, None

    def image_batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return prompts (B, P), their lengths (B,) and codes (B, cells); a tenth of the prompts is unconditional."""
        rng = np.random.default_rng([self.recipe.seed, 4, step])
        indices = rng.integers(len(self.prompts), size=self.recipe.image_sequences)
        rows = []
        for index in indices:
            row = [self.bos, self.user, *self.ids(self.prompts[index]), self.assistant, self.boi]
            if rng.random() < 0.1:
                row = [self.bos, *[self.pad] * (len(row) - 2), self.boi]
            rows.append(row)
        return pad(rows, self.pad), torch.tensor([len(row) for row in rows]), self.codes[indices]

    def question_batch(self, step: int) -> tuple[Tensor, ...]:
        """Return pixels (B, 3, H, W); ids, positions, blocks, labels and cells, each (B, L).

        All questions about an image share its tokens in one row. Block 0 is the image, block 1 its caption, blocks 2
        and up the questions, -1 padding. Cells are those of `_cells`, for the words of the questions.
        """
        rng = np.random.default_rng([self.recipe.seed, 5, step])
        yes, no = self.ids("yes")[0], self.ids("no")[0]
        prefix = [self.bos, self.user, self.boi, *[self.image] * self.patches, self.eoi]
        images: list[np.ndarray] = []
        rows: list[list[int]] = []
        positions: list[list[int]] = []
        blocks: list[list[int]] = []
        labels: list[list[int]] = []
        cells: list[list[int]] = []
        for _ in range(self.recipe.question_images):
            if rng.random() < 0.4:
                index = int(rng.integers(len(self.decoded)))
                scene, image = self.decoded_scenes[index], self.decoded[index]
            else:
                if rng.random() < 0.35:  # scenes of prompts: two looks with counts or a relation
                    kind = choose(rng, PROMPT_SHARES)
                    scene = sample_scene(self.train[kind][rng.integers(len(self.train[kind]))], rng)
                else:
                    scene = random_scene(rng, self.world)
                image = render_array([scene])[0]
            row, position = list(prefix), list(range(len(prefix)))
            block, label, cell = [0] * len(prefix), [IGNORE_INDEX] * len(prefix), [IGNORE_INDEX] * len(prefix)
            answer = [*self.ids(caption(scene)), self.eos]
            turns = [(self.ids("Prompt:"), answer)]
            for _ in range(self.recipe.questions):
                located = None
                if rng.random() < LOCATION_SHARE:
                    located = location_question(scene, rng, pair=rng.random() < 0.6)
                if located:
                    turns.append((self.ids(located[0]), [*self.ids(located[1])]))
                else:
                    question = grammar.sample_question(scene, choose(rng, QUESTION_SHARES), rng)
                    turns.append((self.ids(question.text), [yes if question.answer else no]))
            for number, (words, answer) in enumerate(turns, 1):
                tokens = [*words, self.assistant, *answer[:-1]]
                row += tokens
                position += range(len(prefix), len(prefix) + len(tokens))
                block += [number] * len(tokens)
                label += [IGNORE_INDEX] * len(words) + answer
                cell += self._cells(tokens, scene) if number > 1 else [IGNORE_INDEX] * len(tokens)
            images.append(image)
            for lists, values in ((rows, row), (positions, position), (blocks, block), (labels, label), (cells, cell)):
                lists.append(values)
        pixels = codebook.to_tensor(np.stack(images))
        padded = (pad(positions, 0), pad(blocks, -1), pad(labels, IGNORE_INDEX), pad(cells, IGNORE_INDEX))
        return pixels, pad(rows, self.pad), *padded

    def _cells(self, tokens: list[int], scene: Scene) -> list[int]:
        """For the last token of each name (`red circle`), the cells that hold such an object, as a bit mask."""
        cells = [IGNORE_INDEX] * len(tokens)
        for index, (color, shape) in enumerate(pairwise(tokens), 1):
            if color in self.colors and shape in self.shapes:
                look = (self.colors[color], self.shapes[shape])
                occupied = [o.cell for o in scene.objects if (o.color, o.shape) == look]
                mask = sum(1 << row * self.world.board + column for row, column in occupied)
                cells[index] = mask - (mask >> 63 << 64)  # the last of 64 cells is the sign of an int64
        return cells

    def text_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return ids and labels (B, L) of the text tasks."""
        rng = np.random.default_rng([self.recipe.seed, 6, step])
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        while len(rows) < self.recipe.texts:
            pair = self._sample_text(rng)
            if pair is None:
                continue
            prompt = [self.bos, self.user, *self.ids(pair[0]), self.assistant]
            answer = [*self.ids(pair[1]), self.eos]
            rows.append(prompt + answer)
            # Shifted by one: each position predicts the next token.
            labels.append([IGNORE_INDEX] * (len(prompt) - 1) + answer + [IGNORE_INDEX])
        return pad(rows, self.pad), pad(labels, IGNORE_INDEX)

    def _sample_text(self, rng: np.random.Generator) -> tuple[str, str] | None:
        """A request of stage 1, 2 or 4 and its answer; None if the hard negative is a validation or test prompt."""
        kind = choose(rng, PROMPT_SHARES)
        sub_category = KINDS[kind][1]
        description = self.train[kind][rng.integers(len(self.train[kind]))]
        task = rng.integers(4)
        if task == 0:
            stage, variables, answer = "prompts", {"kind": kind}, grammar.stage1_answer(description)
        elif task == 3:
            stage, answer = "questions", grammar.questions_answer(description)
            variables = {"prompt": description.text}
        else:
            method, other = self._sample_negative(description, sub_category, rng)
            if other is None:
                return None
            if task == 1:
                stage, answer = "perturb", f"Contrastive Prompt: {other.text}"
                variables = {"method": method, "prompt": description.text}
            else:
                stage, answer = "densify", grammar.densify_answer(*grammar.densify(description, other, rng))
                variables = {"prompt": description.text, "negative_prompt": other.text}
        return self.templates.messages(stage, **variables)[-1]["content"], answer


def image_loss(model: JanusForConditionalGeneration, ids: Tensor, lengths: Tensor, codes: Tensor) -> Tensor:
    """Mean cross-entropy of the codes. Each row is a prompt, its codes, then padding that no token attends to."""
    inner = model.model
    words = inner.language_model.embed_tokens(ids)
    code_embeds = model.prepare_embeddings_for_image_generation(codes)
    rows, cells = codes.shape
    positions = lengths[:, None] + torch.arange(cells)
    embeds = torch.zeros(rows, ids.shape[1] + cells, words.shape[-1])
    embeds[:, : ids.shape[1]] = words
    embeds = embeds.scatter(1, positions[..., None].expand(-1, -1, words.shape[-1]), code_embeds)
    hidden = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    previous = (positions - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    logits = inner.generation_head(hidden.gather(1, previous))
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def answer_logits(
    model: JanusForConditionalGeneration, pixels: Tensor, ids: Tensor, positions: Tensor, blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """Text logits (B, L, V) and the hidden states (B, L, D) of `LOCALIZATION_LAYER`.

    The questions of a row attend to its image and not to each other.
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
    return model.lm_head(states.last_hidden_state), states.hidden_states[LOCALIZATION_LAYER]


class LocalizationHead(nn.Module):
    """Head that predicts the cells of an object from the hidden state of its name. Used in pretraining only.

    A yes or no carries no signal about locations, and a relation needs the locations of two objects. Without this
    loss, relations are learned after thousands of steps or not at all.
    """

    def __init__(self, width: int, cells: int = 9) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.cells = nn.Linear(width, cells)

    def loss(self, hidden: Tensor, cells: Tensor) -> Tensor:
        """Binary cross-entropy: sum over cells, mean over names; hidden (B, L, D), cells (B, L) of `question_batch`."""
        named = cells != IGNORE_INDEX
        occupied = (cells[named][:, None] >> torch.arange(self.cells.out_features)) & 1
        logits = self.cells(self.norm(hidden[named]))
        return F.binary_cross_entropy_with_logits(logits, occupied.to(hidden.dtype)) * self.cells.out_features


def question_loss(
    model: JanusForConditionalGeneration, localization: LocalizationHead, batch: tuple[Tensor, ...]
) -> tuple[Tensor, float, float]:
    """Cross-entropy of the answers, plus the weighted losses of captions and of `localization`.

    Returns the loss, the share of answer tokens that are correct, and the loss of `localization`.
    """
    *inputs, labels, cells = batch
    logits, states = answer_logits(model, *inputs)
    blocks = inputs[-1]
    answers, captions = (labels != IGNORE_INDEX) & (blocks > 1), (labels != IGNORE_INDEX) & (blocks == 1)
    correct = (logits[answers].argmax(-1) == labels[answers]).float().mean()
    located = localization.loss(states, cells)
    loss = F.cross_entropy(logits[answers], labels[answers])
    loss = loss + CAPTION_WEIGHT * F.cross_entropy(logits[captions], labels[captions]) + LOCALIZATION_WEIGHT * located
    return loss, float(correct), float(located.detach())


def text_loss(model: JanusForConditionalGeneration, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens of the answers."""
    hidden = model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)


@torch.no_grad()
def answer_accuracy(
    model: JanusForConditionalGeneration, data: TrainingData, *, seed: int, batches: int = 12
) -> dict[str, float]:
    """Share of correct answers on new rendered scenes, by kind of question."""
    correct: dict[str, list[bool]] = {kind: [] for kind in QUESTION_SHARES}
    yes, no = data.ids("yes")[0], data.ids("no")[0]
    for batch in range(batches):
        rng = np.random.default_rng([seed, 7, batch])
        scenes = [random_scene(rng, data.world) for _ in range(24)]
        questions = [[grammar.sample_question(scene, kind, rng) for kind in QUESTION_SHARES] for scene in scenes]
        prefix = [data.bos, data.user, data.boi, *[data.image] * data.patches, data.eoi]
        for column in zip(*questions, strict=True):
            rows = [[*prefix, *data.ids(question.text), data.assistant] for question in column]
            ids = pad(rows, data.pad)
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            blocks = torch.zeros_like(ids)
            logits, _ = answer_logits(model, codebook.to_tensor(render_array(scenes)), ids, positions, blocks)
            for row, question, values in zip(rows, column, logits, strict=True):
                last = values[len(row) - 1]
                correct[question.kind].append(bool(last[yes] > last[no]) == question.answer)
    return {kind: float(np.mean(values)) for kind, values in correct.items()}

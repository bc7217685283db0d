"""Part 2 of pretraining: the vision encoder and its aligner, by classification of each patch.

Janus starts from a pretrained vision encoder (SigLIP), and so does this model. Without this part the yes-no answers of
part 3 stay at chance for thousands of steps. The classifiers (color, shape, size, background, row, column, look) are
discarded.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from codebook import to_tensor, world_of
from torch import Tensor, nn
from torch.nn import functional as F

from ospo_fast.shapes.model import PATCH
from ospo_fast.shapes.render import render_array
from ospo_fast.shapes.scenes import COLORS, SHAPES, Scene, World, random_scene

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration

logger = logging.getLogger(__name__)
BATCH = 64
LEARNING_RATE = 1e-3


def _classes(world: World) -> dict[str, int]:
    """The number of classes of each classifier."""
    grid = world.image_size // PATCH
    classes = {
        "color": len(COLORS) + 1,
        "shape": len(SHAPES) + 1,
        "size": len(world.sizes) + 1,
        "background": len(world.backgrounds),
        "row": grid,
        "column": grid,
    }
    # A question looks for a color and a shape in one cell. Among 64 cells the language model is slow to learn that from
    # features in which the two are separate.
    return classes | {"look": len(COLORS) * len(SHAPES) + 1} if world.textured else classes


def patch_labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Return the class of each patch, (N, patches) int64, by name. 0 of color, shape, size and look is no object."""
    world = scenes[0].world
    span, grid = world.cell // PATCH, world.image_size // PATCH
    labels = {name: np.zeros((len(scenes), grid, grid), np.int64) for name in _classes(world)}
    for number, scene in enumerate(scenes):
        for obj in scene.objects:
            row, column = obj.cell
            patches = (number, slice(row * span, (row + 1) * span), slice(column * span, (column + 1) * span))
            labels["color"][patches] = 1 + list(COLORS).index(obj.color)
            labels["shape"][patches] = 1 + SHAPES.index(obj.shape)
            labels["size"][patches] = 1 + list(world.sizes).index(obj.size)
        labels["background"][number] = world.backgrounds.index(scene.background)
    if "look" in labels:
        labels["look"][:] = np.where(labels["color"], (labels["color"] - 1) * len(SHAPES) + labels["shape"], 0)
    labels["row"][:] = np.arange(grid)[None, :, None]
    labels["column"][:] = np.arange(grid)[None, None, :]
    return {name: torch.from_numpy(values).flatten(1) for name, values in labels.items()}


def train(model: JanusForConditionalGeneration, *, steps: int, seed: int) -> dict[str, float]:
    """Train `vision_model` and `aligner` in place; return the accuracy of each classifier in the last step."""
    inner, world = model.model, world_of(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleDict(
            {name: nn.Linear(model.config.text_config.hidden_size, count) for name, count in _classes(world).items()}
        )
    parameters = [*inner.vision_model.parameters(), *inner.aligner.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.02)
    accuracy: dict[str, float] = {}
    for step in range(steps):
        rng = np.random.default_rng([seed, 8, step])
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50, max((steps - step) / (0.5 * steps), 0.02))
        scenes = [random_scene(rng, world) for _ in range(BATCH)]
        labels = patch_labels(scenes)
        features = inner.get_image_features(to_tensor(render_array(scenes))).pooler_output
        loss = features.new_zeros(())
        accuracy = {}
        for name, head in heads.items():
            logits = head(features)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels[name].flatten())
            accuracy[name] = (logits.argmax(-1) == labels[name]).float().mean().item()
        # Image features and word embeddings are inputs of one language model: keep their scales similar.
        loss = loss + 0.02 * features.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            logger.info("vision encoder %d/%d: loss %.3f, accuracy %s", step, steps, loss.item(), accuracy)
    return accuracy

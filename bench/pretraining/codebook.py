"""Part 1 of pretraining: the VQ model, which encodes images of a Shapes world into codes and decodes them.

`JanusVQVAE.forward` cannot train its encoder, because it decodes indices and normalizes the codebook. This loop uses
cosine quantization with straight-through gradients, updates the codebook by moving averages, and restarts unused
codes at badly represented vectors. Some codes are reserved (`reserved_codes`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ospo_fast.shapes.checker import detect
from ospo_fast.shapes.render import render_array
from ospo_fast.shapes.scenes import COLORS, LARGE_WORLD, SHAPES, WORLDS, Scene, World, random_scene

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration

logger = logging.getLogger(__name__)
OBJECT_WEIGHTS = {"shapes": 8.0, "shapes-large": 16.0}  # objects are about two thirds of the loss
WARM = 300  # steps without quantization before the codebook is initialized from the features
DECAY = 0.99
_LOOKS = [(color, shape, size) for color in COLORS for shape in SHAPES for size in LARGE_WORLD.sizes]
COMMITMENT = 0.5


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert pixels (N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_pixels(values: Tensor) -> np.ndarray:
    """Convert (N, 3, H, W) float in [-1, 1] to pixels (N, H, W, 3) uint8."""
    scaled = values.add(1).mul(127.5).round().clamp(0, 255)
    return np.asarray(scaled.permute(0, 2, 3, 1).to(torch.uint8))


def _kmeans(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Spherical k-means with k-means++ seeding, (count, D)."""
    centers = vectors[torch.randint(len(vectors), (1,), generator=generator)]
    distance = (1 - vectors @ centers[0]).clamp_min(1e-6)
    for _ in range(count - 1):
        new = vectors[torch.multinomial(distance, 1, generator=generator)]
        centers = torch.cat([centers, new])
        distance = torch.minimum(distance, (1 - vectors @ new[0]).clamp_min(1e-6))
    for _ in range(10):
        nearest = (vectors @ centers.T).argmax(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, vectors)
        centers = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centers)
    return centers


class Codebook:
    """Unit vectors of the codes, with the running sums and counts that they are means of."""

    def __init__(self, centers: Tensor) -> None:
        self.codes = centers
        self.sums, self.counts = centers.clone(), torch.ones(len(centers))

    def update(self, vectors: Tensor, nearest: Tensor, generator: torch.Generator) -> None:
        """Update the moving averages; unused codes restart at vectors sampled by their quantization error."""
        used = torch.bincount(nearest, minlength=len(self.codes)).float()
        self.counts.mul_(DECAY).add_(used, alpha=1 - DECAY)
        self.sums.mul_(DECAY).index_add_(0, nearest, vectors, alpha=1 - DECAY)
        self.codes = F.normalize(self.sums, dim=1)
        dead = (self.counts < 0.02).nonzero()[:, 0]
        if len(dead):
            error = (1 - (vectors * self.codes[nearest]).sum(1)).clamp_min(1e-8)
            sampled = torch.multinomial(error, len(dead), generator=generator)
            self.codes[dead] = vectors[sampled]
            self.sums[dead], self.counts[dead] = vectors[sampled] * 0.5, torch.full((len(dead),), 0.5)


def world_of(model: JanusForConditionalGeneration) -> World:
    """Return the world of a model of `build_model`."""
    return WORLDS[model.config.template_set]


def _batch(rng: np.random.Generator, count: int, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Images, weights of their pixels (objects count more), and for each patch its reserved code, or -1.

    Small objects are twice as many as in scenes of the world, because each image teaches little about them.
    """
    if world.textured:
        world = replace(world, counts=world.counts * 2)
    scenes = [random_scene(rng, world) for _ in range(count)]
    pixels = to_tensor(render_array(scenes))
    back = torch.tensor([-1 if world.textured else world.backgrounds.index(scene.background) for scene in scenes])
    plain = torch.ones(count, pixels.shape[-1], pixels.shape[-1], dtype=torch.bool)
    for row, scene in zip(plain, scenes, strict=True):
        for obj in scene.objects:
            r, c = obj.cell
            row[r * world.cell : (r + 1) * world.cell, c * world.cell : (c + 1) * world.cell] = False
    weights = torch.where(plain, 1.0, OBJECT_WEIGHTS[world.name])[:, None]
    fixed = torch.where(plain[:, ::8, ::8], back[:, None, None], -1)
    if world.textured:
        for row, scene in zip(fixed, scenes, strict=True):
            for obj in scene.objects:
                row[obj.cell] = _LOOKS.index((obj.color, obj.shape, obj.size))
    return pixels, weights, fixed


def reserved_codes(world: World, width: int) -> Tensor:
    """The first codes, (codes, width) unit vectors, which stay as they are.

    Plain background has one code for each color. Otherwise about a hundred codes would stand for it, one for each
    neighborhood, and generating an image would be guessing among them. On textures it is the small objects that have
    one code for each color, shape and size, the normalized sum of a unit vector for each of the three. Objects are 2%
    of an image, so that textures would take the codes otherwise.
    """
    if not world.textured:
        return torch.eye(width)[: len(world.backgrounds)]
    units = iter(torch.eye(width))
    color, shape, size = ({name: next(units) for name in names} for names in (COLORS, SHAPES, LARGE_WORLD.sizes))
    return F.normalize(torch.stack([color[c] + shape[s] + size[z] for c, s, z in _LOOKS]), dim=1)


def train(
    model: JanusForConditionalGeneration,
    *,
    steps: int,
    seed: int,
    batch: int = 24,
    state: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
    save_every: int = 500,
) -> dict[str, float]:
    """Train `model.model.vqmodel` in place and return its `evaluate`.

    `save` is called with the state of the training every `save_every` steps; `state` resumes from it.
    """
    vq, world = model.model.vqmodel, world_of(model)
    parameters = [p for name, p in vq.named_parameters() if not name.startswith("quantize")]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    book: Codebook | None = None
    reserved = reserved_codes(world, vq.quantize.embedding_dim)
    start = 0
    if state:
        vq.load_state_dict(state["vq"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start, book = state["step"], state["book"]
    vq.train()
    for step in range(start, steps):
        rng = np.random.default_rng([seed, 1, step])
        remaining = 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 50) * min(1.0, max(remaining / 0.5, 0.02))
        pixels, weights, fixed = _batch(rng, batch, world)
        features = vq.quant_conv(vq.encoder(pixels))
        directions = F.normalize(features, dim=1)
        flat = directions.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        if step == WARM:
            many = torch.cat([flat.detach(), *(_vectors(vq, rng, batch, world) for _ in range(16))])
            centers = _kmeans(many, vq.quantize.num_embeddings, generator)
            centers[: len(reserved)] = reserved
            book = Codebook(centers)
        given = fixed.reshape(-1)
        is_fixed = given >= 0
        fixed_error = (flat[is_fixed] - reserved[given[is_fixed]]).square().sum(1).mean()
        quantized, commitment = directions, flat.new_zeros(())
        if book is not None:
            nearest = (flat.detach() @ book.codes.T).argmax(1)
            nearest = torch.where(is_fixed, given, nearest)
            codes = book.codes[nearest]
            commitment = (flat - codes).square().sum(1).mean()
            straight = flat + (codes - flat).detach()
            quantized = straight.view(directions.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
            book.update(flat.detach(), nearest, generator)
            book.codes[: len(reserved)] = reserved
        rebuilt = vq.decoder(vq.post_quant_conv(quantized))
        error = (weights * ((rebuilt - pixels).abs() + (rebuilt - pixels).square())).sum() / weights.sum() / 3
        loss = error + COMMITMENT * (commitment + fixed_error)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            used = int((book.counts > 0.05).sum()) if book else 0
            values = (error.item(), commitment.item(), used)
            logger.info("codes %d/%d: error %.4f, commitment %.4f, used %d", step, steps, *values)
        if save and (step + 1) % save_every == 0:
            state = {"vq": vq.state_dict(), "optimizer": optimizer.state_dict(), "book": book, "step": step + 1}
            save({**state, "generator": generator.get_state()})
    vq.eval()
    if book is not None:
        vq.quantize.embedding.weight.data.copy_(book.codes)
    return evaluate(model, seed=seed + 1)


def polish(model: JanusForConditionalGeneration, *, steps: int, seed: int, batch: int = 24) -> dict[str, float]:
    """Train the decoder only, on encoded images. The codes keep their meaning."""
    vq, world = model.model.vqmodel, world_of(model)
    parameters = [*vq.post_quant_conv.parameters(), *vq.decoder.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        pixels, weights, _ = _batch(np.random.default_rng([seed, 9, step]), batch, world)
        rebuilt = decode_with_gradient(model, encode(model, pixels))
        error = (weights * ((rebuilt - pixels).abs() + (rebuilt - pixels).square())).sum() / weights.sum() / 3
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            logger.info("polish %d/%d: error %.4f", step, steps, error.item())
    vq.requires_grad_(False)
    return evaluate(model, seed=seed + 1)


@torch.no_grad()
def _vectors(vq: Any, rng: np.random.Generator, batch: int, world: World) -> Tensor:
    features = vq.quant_conv(vq.encoder(_batch(rng, batch, world)[0]))
    return F.normalize(features, dim=1).permute(0, 2, 3, 1).reshape(-1, features.shape[1])


@torch.no_grad()
def encode(model: JanusForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Encode images (N, 3, H, W) in [-1, 1] into codes (N, cells) int64."""
    codes: Tensor = model.model.vqmodel.encode(pixels).image_tokens.view(len(pixels), -1)
    return codes


def decode_with_gradient(model: JanusForConditionalGeneration, codes: Tensor) -> Tensor:
    """Decode codes (N, cells) into images (N, 3, H, W), with gradients."""
    pixels: Tensor = model.model.vqmodel.decode(codes)
    return pixels


@torch.no_grad()
def decode(model: JanusForConditionalGeneration, codes: Tensor) -> Tensor:
    """Decode codes (N, cells) into images (N, 3, H, W)."""
    return decode_with_gradient(model, codes)


def shows_scene(image: np.ndarray, scene: Scene) -> bool:
    """Return whether the checker detects the objects of `scene` in `image`, each in its cell."""
    cell = scene.world.cell
    detected = {(o.color, o.shape, int(o.y) // cell, int(o.x) // cell) for o in detect(image, scene.world).objects}
    return detected == {(o.color, o.shape, *o.cell) for o in scene.objects}


def evaluate(model: JanusForConditionalGeneration, *, seed: int, count: int = 400) -> dict[str, float]:
    """Return the share of scenes whose objects are all detected after encoding and decoding, and the codes in use."""
    rng, world = np.random.default_rng([seed, 2]), world_of(model)
    scenes = [random_scene(rng, world) for _ in range(count)]
    codes = encode(model, to_tensor(render_array(scenes)))
    images = to_pixels(decode(model, codes))
    shown = np.mean([shows_scene(image, scene) for image, scene in zip(images, scenes, strict=True)])
    return {"scenes_read_back": float(shown), "codes_used": float(codes.unique().numel())}

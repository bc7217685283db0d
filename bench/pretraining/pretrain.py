"""Pretrain a model of a Shapes world that ships with the package.

    python bench/pretraining/pretrain.py --out DIR [--world shapes-large]
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 bench/pretraining/pretrain.py --out DIR …

Two processes share the batches of the third part, which more threads do not make faster.

Three parts, all from one seed:

1. the VQ model (`codebook.py`);
2. the vision encoder (`vision_encoder.py`);
3. everything except the VQ model, on all tasks together (`tasks.py`).

At the end the VQ decoder is trained once more on the final codes. Image generation gets few sequences per step on
purpose (`Recipe.image_sequences`), so that the model makes the mistakes that OSPO fixes. An interrupted run resumes
from its last saved state with the same command.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import codebook
import numpy as np
import torch
import vision_encoder
from tasks import (
    RECIPES,
    LocalizationHead,
    Recipe,
    TrainingData,
    answer_accuracy,
    image_loss,
    question_loss,
    text_loss,
)

from ospo_fast.errors import OspoError
from ospo_fast.shapes.model import build_model, build_processor
from ospo_fast.shapes.scenes import WORLDS
from ospo_fast.stages.parallel import Ranks

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration

logger = logging.getLogger(__name__)


def _save(state: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)


def run(out: Path, recipe: Recipe, *, checkpoint_every: int = 250) -> None:
    """Run all parts; the result is `out/checkpoint`, a folder for `from_pretrained`.

    Raises OspoError if `out` holds a run with another recipe, or cannot be written.
    """
    ranks = Ranks()
    ranks.first(lambda: _check_recipe(out, recipe))
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    world = WORLDS[recipe.world]
    model, processor = build_model(recipe.seed, world), build_processor(world)
    seconds = ranks.first_alone(lambda: _train_codes(model, out / "codes.pt", recipe))
    state_path, clock = out / "state.pt", time.monotonic()
    if not ranks.first(state_path.exists):
        accuracy = ranks.first(lambda: vision_encoder.train(model, steps=recipe.vision_encoder_steps, seed=recipe.seed))
        logger.info("vision encoder: %s", accuracy)
        if ranks.size > 1:
            for tensor in model.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
    data = TrainingData(model, processor, recipe)
    seconds += _train_tasks(model, data, state_path, recipe, checkpoint_every, clock, ranks)
    if ranks.rank > 0:
        return
    clock = time.monotonic()
    quality = codebook.polish(model, steps=recipe.polish_steps, seed=recipe.seed, batch=recipe.codes_batch)
    seconds += time.monotonic() - clock
    folder = out / "checkpoint"
    model.to(getattr(torch, recipe.dtype)).save_pretrained(folder)
    processor.save_pretrained(folder)
    model.float()  # measured is what loading gives
    summary = {
        "recipe": asdict(recipe),
        "codes": codebook.evaluate(model, seed=recipe.seed + 1) if recipe.dtype != "float32" else quality,
        "answering": answer_accuracy(model, data, seed=recipe.seed + 1, batches=40),
        "minutes": round(seconds / 60, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": ranks.size,
    }
    (folder / "pretraining.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    logger.info("saved %s: %s", folder, summary)


def _check_recipe(out: Path, recipe: Recipe) -> None:
    path = out / "recipe.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OspoError(f"--out {out}: {error.strerror or error}; choose a folder that can be written.") from error
    given = asdict(recipe)
    changed = [f"{name} {saved.get(name)} → {value}" for name, value in given.items() if saved.get(name) != value]
    if changed:
        raise OspoError(f"--out {out} holds a run with another recipe ({', '.join(changed)}); choose another folder.")


def _train_codes(model: JanusForConditionalGeneration, path: Path, recipe: Recipe) -> float:
    """Train the VQ model, or load it from `path`, and freeze it. Returns the seconds of all its runs."""
    vq = model.model.vqmodel
    state = torch.load(path, weights_only=False) if path.exists() else None
    if state is None or "final" not in state:
        clock = time.monotonic() - (state["seconds"] if state else 0.0)
        quality = codebook.train(
            model,
            steps=recipe.codes_steps,
            seed=recipe.seed,
            batch=recipe.codes_batch,
            state=state,
            save=lambda kept: _save({**kept, "seconds": time.monotonic() - clock}, path),
        )
        state = {"final": vq.state_dict(), "quality": quality, "seconds": time.monotonic() - clock}
        _save(state, path)
    vq.load_state_dict(state["final"])
    logger.info("codes: %s", state["quality"])
    with torch.no_grad():  # the generation embeddings start as the vectors of the codes
        model.model.generation_embeddings.weight.copy_(vq.quantize.embedding.weight)
    vq.requires_grad_(False)
    return float(state["seconds"])


def _build_optimizers(
    model: JanusForConditionalGeneration, localization: LocalizationHead, recipe: Recipe
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the language model's layers, AdamW for all other parameters.

    AdamW decays matrices only. The pretrained vision encoder and aligner have their own learning rate.
    """
    inner = model.model
    vision = {id(p) for part in (inner.vision_model, inner.aligner) for p in part.parameters()}
    matrices = [p for p in inner.language_model.layers.parameters() if p.dim() == 2]
    by_muon = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in by_muon]
    others += localization.parameters()
    groups: list[dict[str, Any]] = []
    for lr, parameters in (
        (recipe.lr, [p for p in others if id(p) not in vision]),
        (recipe.vision_lr, [p for p in others if id(p) in vision]),
    ):
        groups.append({"params": [p for p in parameters if p.dim() > 1], "lr": lr, "weight_decay": 0.02})
        groups.append({"params": [p for p in parameters if p.dim() <= 1], "lr": lr, "weight_decay": 0.0})
    # With Muon, existence questions are learned in half the steps that AdamW alone needs.
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    optimizers: list[torch.optim.Optimizer] = [muon, torch.optim.AdamW(groups, betas=(0.9, 0.99))]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _lr_scale(step: int, recipe: Recipe) -> float:
    """Share of the peak learning rate: warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / 200, max((recipe.steps - step) / (recipe.decay * recipe.steps), 1e-3))


def _train_tasks(
    model: JanusForConditionalGeneration,
    data: TrainingData,
    path: Path,
    recipe: Recipe,
    checkpoint_every: int,
    clock: float,
    ranks: Ranks,
) -> float:
    """Train everything except the VQ model on all tasks, with the state in `path`.

    Each process has a part of the rows of every batch. Gradients are means over the processes: those of losses whose
    parts have other numbers of tokens differ a little from those of one process.

    Returns the seconds of all its runs; this one started at `clock`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        localization = LocalizationHead(model.config.text_config.hidden_size, data.world.board**2)
    optimizers = _build_optimizers(model, localization, recipe)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    start, seconds = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=False)
        if "pointer" not in saved:
            raise OspoError(f"--out: {path} was made by an earlier version of this script; choose another folder.")
        model.load_state_dict(saved["model"])
        localization.load_state_dict(saved["pointer"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        start, seconds = saved["step"], saved["seconds"]
    model.train()
    recent: list[tuple[float, ...]] = []
    for step in range(start, recipe.steps):
        scale = _lr_scale(step, recipe)
        for group in groups:
            group["lr"] = group["peak"] * scale
        for parameter in parameters:
            parameter.grad = None
        image_batch, question_batch, text_batch = (
            tuple(rows[ranks.rank :: ranks.size] for rows in batch)
            for batch in (data.image_batch(step), data.question_batch(step), data.text_batch(step))
        )
        images = image_loss(model, *image_batch)
        images.backward()
        questions, accuracy, located = question_loss(model, localization, question_batch)
        questions.backward()
        texts = text_loss(model, *text_batch)
        (0.5 * texts).backward()
        _average_gradients(parameters, ranks)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        recent.append((float(images.detach()), float(questions.detach()), accuracy, located, float(texts.detach())))
        if (step + 1) % 50 == 0:
            means = np.mean(recent, axis=0)
            line = "step %d/%d: images %.3f, questions %.3f (accuracy %.3f, localization %.3f), texts %.3f"
            logger.info(line, step + 1, recipe.steps, *means)
            recent.clear()
        if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
            seconds += time.monotonic() - clock
            clock = time.monotonic()
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": model.state_dict(), "pointer": localization.state_dict(), "optimizers": states}
            ranks.first(partial(_save, {**state, "step": step + 1, "seconds": seconds}, path))
        if (step + 1) % 1000 == 0 and ranks.rank == 0:
            model.eval()
            logger.info("answers after step %d: %s", step + 1, answer_accuracy(model, data, seed=recipe.seed))
            model.train()
    model.eval()
    return seconds


def _average_gradients(parameters: list[torch.nn.Parameter], ranks: Ranks) -> None:
    """Let every process have the mean of the gradients of all."""
    if ranks.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.div_(ranks.size).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def main() -> None:
    """Parse the command line; every field of `Recipe` is an option."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the final checkpoint/")
    parser.add_argument("--world", choices=RECIPES, default="shapes", help="its recipe is the default of the others")
    for name, value in asdict(Recipe()).items():
        if name != "world":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    arguments = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(asctime)s %(message)s")
    out = arguments.pop("out")
    torch.set_flush_denormal(True)  # denormal moments of Adam are slow on CPUs
    try:
        run(out, replace(RECIPES[arguments["world"]], **arguments))
    except OspoError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()

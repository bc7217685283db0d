"""What exact log-probabilities cost on the Shapes model: in generation, and in a training pass.

"generate": images with `return_logps` and without. "policy gradient": the log-probabilities of given codes and the
gradients of LoRA adapters, by `exact_logprobs` and by the model's own modules; `difference` is the largest one between
the log-probabilities of the two, of which only `exact_logprobs` has the bits of the generation. Cases are called
"generate, 16 images, guidance 1.5", "generate, 64 images, guidance 1.0, top_p 0.9" and "policy gradient, 16 images,
guidance 1.0".
"""

import functools
import random
from pathlib import Path
from typing import Any

import _measure as measure
import torch
from torch import Tensor

from ospo_fast.config import load_config
from ospo_fast.generation import ImageGenerator, exact_logprobs
from ospo_fast.models import load_model
from ospo_fast.ops import Head, token_logprobs
from ospo_fast.shapes.scenes import KINDS, descriptions
from ospo_fast.stages.teacher_forcing import hidden_states, teacher_forced
from ospo_fast.stages.trained_weights import add_lora

TRUNCATIONS: list[dict[str, Any]] = [{}, {"top_k": 50}, {"top_p": 0.9}]


def make_prompts(count: int) -> list[str]:
    choose = random.Random(0)
    return [choose.choice(descriptions(choose.choice(sorted(KINDS)))).text for _ in range(count)]


def own_logprobs(model: Any, prompts: list[str], codes: Tensor, guidance: float) -> Tensor:
    """As a trainer without the engine computes them."""

    def states(ids: list[Tensor]) -> Tensor:
        batch = teacher_forced(model, ids, codes)
        hidden = hidden_states(model, batch.embeds)
        starts = batch.lengths[:, None] + torch.arange(-1, codes.shape[1] - 1)
        return hidden[torch.arange(len(hidden))[:, None], starts]

    ids = [model.image_prompt(prompt) for prompt in prompts]
    hidden, head = states(ids), Head.of(model.head)
    if guidance != 1:
        hidden, head = head.guided(hidden, states([model.unconditional(one) for one in ids]), guidance)
    return token_logprobs(hidden, head, codes)


def run(out: Path, quick: bool) -> None:
    model, rows = load_model("shapes"), []
    seconds = 0.1 if quick else 10.0
    for count, truncation in [(2, {})] if quick else [(16, {}), *((64, kept) for kept in TRUNCATIONS)]:
        for guidance in (1.0, 1.5):
            kept = "".join(f", {name} {value}" for name, value in truncation.items())
            if not measure.chosen(f"generate, {count} images, guidance {guidance}{kept}"):
                continue
            prompts = make_prompts(count)
            given = {"guidance_scale": guidance, "output": "codes", "progress": False, **truncation}
            generators = {name: ImageGenerator(model) for name in ("codes", "codes, logps")}

            def generate(name: str, made: Any = generators, prompts: Any = prompts, given: Any = given) -> object:
                seeds = torch.randint(2**62, (len(prompts),))
                return made[name].generate(prompts, seeds=seeds, return_logps=name != "codes", **given)

            variants = {name: functools.partial(generate, name) for name in generators}
            rows += time(f"generate{kept}", variants, sizes(count, guidance), seconds, guidance_scale=guidance)
    add_lora(model, load_config([], family="shapes").train).train()
    parameters = [weight for weight in model.module.parameters() if weight.requires_grad]
    count = 2 if quick else 16
    prompts = make_prompts(count)
    for guidance in (1.0, 1.5):
        if not measure.chosen(f"policy gradient, {count} images, guidance {guidance}"):
            continue
        codes = ImageGenerator(model).generate(
            prompts, seeds=range(count), guidance_scale=guidance, output="codes", progress=False
        )

        def exact(codes: Tensor = codes, guidance: float = guidance) -> Tensor:
            return exact_logprobs(model, prompts, codes, guidance_scale=guidance)

        def own(codes: Tensor = codes, guidance: float = guidance) -> Tensor:
            return own_logprobs(model, prompts, codes, guidance)

        difference = float((exact() - own()).detach().abs().max())
        variants = {
            name: lambda run=run: torch.autograd.grad(run().sum(), parameters)
            for name, run in (("own modules", own), ("exact_logprobs", exact))
        }
        metrics = {"guidance_scale": guidance, "difference": difference}
        rows += time("policy gradient", variants, sizes(count, guidance), seconds, **metrics)
    measure.write(rows, out, "exact")
    measure.show(rows)


def sizes(count: int, guidance: float) -> dict[str, int]:
    """Images, and sequences that the decoder runs for them."""
    return {"images": count, "sequences": count * (1 if guidance == 1 else 2)}


def time(op: str, variants: Any, shapes: dict[str, int], seconds: float, **metrics: Any) -> list[dict[str, Any]]:
    """Rows of variants that take turns; `ratio` is the time over that of the first one."""
    timings = measure.interleaved(variants, tuple, seconds=seconds)
    first = next(iter(timings.values())).median_ms
    return [
        measure.row(op, name, shapes, "fp32", timing, ratio=round(timing.median_ms / first, 4), **metrics)
        for name, timing in timings.items()
    ]

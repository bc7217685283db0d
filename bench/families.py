"""Images of each model family by the engine, and by transformers' `generate`, on the CPU or a GPU.

Models have random weights, 6 layers of width 256, and 144 codes or more in an image, generated without guidance and
with sampling from all codes. `generate` has a static mask of the ids that may come next, which is the fastest form of
what the documentation of Emu3 does by `prefix_allowed_tokens_fn`. For Chameleon, whose forward pass masks the logits of
image codes, that mask is taken away first.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import interleaved, row, show, write
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ospo_fast.generation import ImageGenerator
from ospo_fast.models.adapter import Adapter
from ospo_fast.models.families import FAMILIES
from tests.models import tiny_families

PROMPTS = 8
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
WORDS = ("red", "blue", "green", "two", "cross", "circle", "square", "a")


def build(family: str, quick: bool) -> tuple[str, Adapter]:
    sizes = {} if quick else SIZES
    builders: dict[str, tuple[Callable[..., Any], tuple[int, int] | None]] = {
        "emu3": (tiny_families.build_emu3, (8, 10) if quick else (24, 24)),
        "emu3_5": (tiny_families.build_emu3_5, (8, 12) if quick else (24, 24)),
        "chameleon": (tiny_families.build_chameleon, None),
        "lumina": (lambda **given: tiny_families.build_chameleon(lumina=True, **given), (8, 12) if quick else (24, 24)),
        "glm_image": (tiny_families.build_glm_image, (64, 96) if quick else (384, 384)),
    }
    builder, image_size = builders[family]
    if family == "emu3_5" and not quick:
        sizes = {**sizes, "head_dim": 64}
    torch.manual_seed(0)
    module, processor = builder(**sizes)
    if family == "chameleon" and not quick:  # its size is that of its VQ model
        module.config.vq_config.resolution = 24
    name = "chameleon" if family == "lumina" else family
    return name, FAMILIES[name].adapt(module, processor, name=family, image_size=image_size)


def generate(model: Any, ids: Tensor) -> Tensor:
    """Run transformers' `generate` for prompts (B, S) of one length."""
    options: dict[str, Any] = {}
    if model.layout.positions is not None:
        grids = torch.tensor([[1, *grid] for grid in model.layout.grids[::-1]])
        options = {"image_grid_thw": grids.repeat(len(ids), 1), "images_per_sample": torch.tensor([2] * len(ids))}
    found: Tensor = model.module.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=model.layout.tokens,
        do_sample=True,
        top_k=0,
        eos_token_id=None,
        logits_processor=[tiny_families.AllowedTokens(model, ids.shape[1])],
        **options,
    )
    return found


def run(out: Path, quick: bool) -> None:
    rows: list[dict[str, Any]] = []
    for family in ("emu3", "emu3_5", "chameleon", "lumina", "glm_image"):
        rows += measure(family, quick)
    write(rows, out, "families")
    show(rows)


def measure(family: str, quick: bool) -> list[dict[str, Any]]:
    name, model = build(family, quick)
    if name == "chameleon":
        model.module.model.vocabulary_mapping.image_tokens = []
    prompts = [model.image_prompt(f"a {word} {WORDS[(n + 3) % len(WORDS)]}") for n, word in enumerate(WORDS)]
    length = min(map(len, prompts)) - 1  # of one length: no padding for `generate`
    ids = [torch.cat([prompt[:length], torch.tensor([model.boi_id])]) for prompt in prompts]
    generator = ImageGenerator(model)
    seeds = itertools.count(step=PROMPTS)

    def own(seed: int) -> object:
        return generator.generate(
            ids, seeds=range(seed, seed + PROMPTS), guidance_scale=1, output="codes", progress=False
        )

    def transformers(seed: int) -> object:
        torch.manual_seed(seed)
        return generate(model, torch.stack(ids))

    timings = interleaved(
        {"ospo_fast": own, "transformers generate": transformers},
        lambda: (next(seeds),),
        seconds=0.1 if quick else 20,
        warmup=1,
    )
    shapes = {"prompts": PROMPTS, "tokens": model.layout.tokens, "D": model.hidden_size}
    base = timings["transformers generate"].median_ms
    return [
        row("families", f"{variant}, {family}", shapes, "fp32", timing, speedup=round(base / timing.median_ms, 2))
        for variant, timing in timings.items()
    ]

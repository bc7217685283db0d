"""A training pass over sequences of the Shapes world, padded to one length and packed without padding.

A pass has chosen, rejected and swapped sequences, LoRA on the decoder, and the OSPO loss. `padding` is the share of the
positions of the padded batch that are padding, `difference` that of the losses of the two variants.
"""

import contextlib
import random
from pathlib import Path

import _measure as measure
import torch

from ospo_fast.config import load_config
from ospo_fast.loss import OSPOLoss
from ospo_fast.models import load_model
from ospo_fast.shapes.scenes import KINDS, descriptions
from ospo_fast.stages.packing import Packed, pack, packed_attention, packed_hidden_states
from ospo_fast.stages.teacher_forcing import hidden_states, teacher_forced
from ospo_fast.stages.train_settings import loss_config
from ospo_fast.stages.trained_weights import add_lora


def run(out: Path, quick: bool) -> None:
    config = load_config([], family="shapes")
    model = load_model("shapes")
    add_lora(model, config.train).train()
    loss = OSPOLoss(loss_config(config))
    pairs, choose = (2 if quick else config.train.batch_size), random.Random(0)
    texts = [choose.choice(descriptions(choose.choice(sorted(KINDS)))).text for _ in range(2 * pairs)]
    ids = [model.image_prompt(text) for text in texts]
    prompts = ids[:pairs] * 2 + ids[pairs:]
    codes = torch.randint(model.num_codes, (2 * pairs, model.grid[0] * model.grid[1]))
    codes = torch.cat([codes, codes[:pairs]])

    def padded() -> torch.Tensor:
        with torch.no_grad():
            batch = teacher_forced(model, prompts, codes)
        return step(hidden_states(model, batch.embeds), batch.labels)

    def packed() -> torch.Tensor:
        with torch.no_grad():
            batch: Packed = pack(model, prompts, codes)
        with packed_attention(model):
            return step(packed_hidden_states(model, batch), batch.labels)

    def step(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = loss(hidden, labels, model.head).loss
        total.backward()
        return total.detach()

    half = model.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext():
        difference = float((padded() - packed()).abs())
        variants = {"padded": padded, "packed": packed}
        timings = measure.interleaved(variants, tuple, seconds=0.1 if quick else 5)
    length = max(map(len, prompts)) + codes.shape[1]
    tokens = sum(map(len, prompts)) + codes.numel()
    shapes = {"pairs": pairs, "sequences": len(prompts), "tokens": tokens}
    metrics = {"padding": round(1 - tokens / (length * len(prompts)), 4), "difference": difference}
    dtype = "bf16" if half else "fp32"
    rows = [measure.row("packing", name, shapes, dtype, timing, **metrics) for name, timing in timings.items()]
    measure.write(rows, out, "packing")
    measure.show(rows)

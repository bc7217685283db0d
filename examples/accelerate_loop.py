"""Supervised fine-tuning in a loop with Accelerate: `LossModule` and `training_step`.

The changed line is the loss: `next_token_loss` for a loss of all logits, which `--plain` uses. The loss is part of the
module that Accelerate prepares, so that DDP and FSDP2 average its gradients: never compute it on `module.module`.

    accelerate launch examples/accelerate_loop.py --steps 50 --out losses.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from ospo_fast.integrations.accelerate import training_step
from ospo_fast.integrations.loss_module import LossModule, next_token_loss

VOCAB = 128


def eager_loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Compute the cross-entropy of the next token from all logits."""
    return F.cross_entropy(head(hidden[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())


def build_dataset(size: int) -> list[dict[str, Tensor]]:
    """Return sequences that count upwards by a step of their own."""
    generator = torch.Generator().manual_seed(0)
    starts, steps = (torch.randint(1, n, (size, 1), generator=generator) for n in (VOCAB, 8))
    ids = (starts + steps * torch.arange(24)) % VOCAB
    labels = ids.masked_fill(torch.arange(24) < 4, -100)  # the prompt
    return [{"inputs": i, "labels": j} for i, j in zip(ids, labels, strict=True)]


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train a tiny random model; return the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--plain", action="store_true", help="compute the loss from all logits")
    parser.add_argument("--out", type=Path, help="write the curves to this JSON file")
    args = parser.parse_args(argv)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)

    set_seed(0)
    accelerator = Accelerator(cpu=True)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    module: nn.Module = LossModule(model.model, model.lm_head, eager_loss if args.plain else next_token_loss)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    loader = DataLoader(build_dataset(8 * args.steps * accelerator.num_processes), batch_size=8)
    module, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    losses = []
    for step, batch in enumerate(loader, start=1):
        loss, _ = training_step(accelerator, module, optimizer, batch, max_grad_norm=1.0)
        losses.append(accelerator.reduce(loss, "mean").item())
        accelerator.print(f"step {step}: loss {losses[-1]:.5f}")
    if args.out and accelerator.is_main_process:
        args.out.write_text(json.dumps({"loss": losses}))
    return {"loss": losses}


if __name__ == "__main__":
    main()

"""Pairs of images with Lightning: `LossModule` with `OSPOLoss` in a `LightningModule`.

The changed line is the loss: `OSPOLoss` for a loss of all logits, which `--plain` uses. Tokens of objects weigh more,
by object masks.

    python examples/lightning_module.py --steps 50 --out losses.json
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaModel

import ospo_fast as of
from ospo_fast.integrations.lightning import LossLightningModule
from ospo_fast.integrations.loss_module import LossModule

TEXT, CODES, GRID, PROMPT = 16, 112, 4, 4  # ids of text come first, then those of image codes


def eager_loss(hidden: Tensor, labels: Tensor, head: nn.Module, object_masks: Tensor) -> Tensor:
    """Compute `OSPOLoss` from all logits."""
    labels, present = labels[:, 1:], labels[:, 1:] >= 0
    logps = head(hidden[:, :-1]).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * present
    weights = torch.zeros_like(logps).masked_scatter(present, 1 + object_masks)
    chosen, rejected = ((weights * logps).sum(1) / weights.sum(1)).chunk(2)
    sft = -logps.chunk(2)[0].sum() / present.chunk(2)[0].sum()
    return -F.logsigmoid(5.0 * (chosen - rejected - 0.5)).mean() + 2.0 * sft


def build_batch(generator: torch.Generator, pairs: int) -> dict[str, Tensor]:
    """Return pairs of images, chosen rows first: a prompt, then the codes; and masks of their left halves."""
    prompts = torch.randint(TEXT, (pairs, PROMPT), generator=generator)
    chosen = TEXT + (7 * prompts[:, :1] + torch.arange(GRID * GRID)) % CODES
    rejected = torch.randint(TEXT, TEXT + CODES, (pairs, GRID * GRID), generator=generator)
    ids = torch.cat([torch.cat([prompts, codes], dim=1) for codes in (chosen, rejected)])
    masks = torch.zeros(2 * pairs, GRID, GRID)
    masks[:, :, : GRID // 2] = 1
    return {"inputs": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < PROMPT, -100), "object_masks": masks}


class Curve(lightning.Callback):
    """Keep and print the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Read the logged loss."""
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        print(f"step {trainer.global_step}: loss {self.losses[-1]:.5f}")


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train a tiny random model; return the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--plain", action="store_true", help="compute the loss from all logits")
    parser.add_argument("--out", type=Path, help="write the curves to this JSON file")
    args = parser.parse_args(argv)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)

    lightning.seed_everything(0)
    config = LlamaConfig(
        vocab_size=TEXT + CODES, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    loss = eager_loss if args.plain else of.OSPOLoss(of.OSPOLossConfig(mask_blur=1))
    module = LossModule(LlamaModel(config), head, loss)
    generator, curve = torch.Generator().manual_seed(0), Curve()
    trainer = lightning.Trainer(
        max_steps=args.steps, accelerator="cpu", callbacks=[curve], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batches = [build_batch(generator, pairs=4) for _ in range(args.steps)]
    trainer.fit(LossLightningModule(module, partial(torch.optim.AdamW, lr=1e-3)), DataLoader(batches, batch_size=None))
    curves = {"loss": curve.losses}
    if args.out:
        args.out.write_text(json.dumps(curves))
    return curves


if __name__ == "__main__":
    main()

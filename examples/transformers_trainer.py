"""Supervised fine-tuning with transformers: `FusedLossTrainer` in place of `Trainer`.

The changed line is the class of the trainer. Scales and soft caps of the model's logits, gradient accumulation, PEFT,
DDP and FSDP2 work as with `Trainer`. `--plain` trains with `Trainer`, with all logits in memory.

    python examples/transformers_trainer.py --steps 50 --out losses.json
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer, TrainingArguments, set_seed

from ospo_fast.integrations.transformers import FusedLossTrainer

VOCAB = 128


def build_dataset(size: int) -> list[dict[str, torch.Tensor]]:
    """Return sequences that count upwards by a step of their own."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(size):
        start, step = (int(torch.randint(1, n, (), generator=generator)) for n in (VOCAB, 8))
        ids = (start + step * torch.arange(24)) % VOCAB
        labels = ids.clone()
        labels[:4] = -100  # the prompt
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train a tiny random model; return the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--plain", action="store_true", help="train with Trainer")
    parser.add_argument("--out", type=Path, help="write the curves to this JSON file")
    args = parser.parse_args(argv)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)

    set_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=30.0,
    )  # fmt: skip
    trainer_class = Trainer if args.plain else FusedLossTrainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=Gemma2ForCausalLM(config),
            train_dataset=build_dataset(256),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=3e-3,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
            ),
        )
        trainer.train()
    curves = {"loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}
    if args.out:
        args.out.write_text(json.dumps(curves))
    return curves


if __name__ == "__main__":
    main()

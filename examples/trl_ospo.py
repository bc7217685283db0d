"""Pairs of images with TRL: `OSPOTrainer` in place of `CPOTrainer`.

The changed line is the class of the trainer. The loss is that of `CPOTrainer` (SimPO and a supervised term), without
logits in memory. With `--masks`, tokens of objects weigh more. `--plain` trains with `CPOTrainer`, which has no masks.

    python examples/trl_ospo.py --steps 50 --out losses.json
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl.experimental.cpo import CPOConfig, CPOTrainer

from ospo_fast.integrations.trl_ospo import OSPOTrainer

TEXT, CODES, GRID = 16, 112, 4  # ids of text come first, then those of image codes


def build_dataset(pairs: int) -> Dataset:
    """Return pairs of images as a model of text and image codes sees them: a prompt, then the codes."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(pairs):
        prompt = torch.randint(3, TEXT, (4,), generator=generator).tolist()
        row = {}
        for name in ("chosen", "rejected"):
            noise = torch.randint(0, CODES, (GRID * GRID,), generator=generator)
            rising = TEXT + (7 * prompt[0] + torch.arange(GRID * GRID)) % CODES
            codes = (rising if name == "chosen" else TEXT + noise).tolist()
            row[f"{name}_input_ids"] = prompt + codes
            row[f"{name}_attention_mask"] = [1] * len(prompt + codes)
            row[f"{name}_labels"] = [-100] * len(prompt) + codes
            row[f"{name}_object_mask"] = [[1.0, 1.0, 0.0, 0.0]] * GRID  # the object is on the left
        rows.append(row)
    return Dataset.from_list(rows)


class TokenizedCPOTrainer(CPOTrainer):
    """`CPOTrainer` for rows that are tokenized already."""

    def tokenize_row(self, feature: dict, model: object = None) -> dict:
        """Return the row as it is."""
        return feature


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train a tiny random model; return the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--plain", action="store_true", help="train with CPOTrainer")
    parser.add_argument("--masks", action="store_true", help="weight the tokens of objects; not with --plain")
    parser.add_argument("--out", type=Path, help="write the curves to this JSON file")
    args = parser.parse_args(argv)
    if args.plain and args.masks:
        parser.error("--masks needs OSPOTrainer, which --plain replaces; remove one of them")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)

    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TEXT + CODES, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
    )
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    dataset = build_dataset(64)
    if not args.masks:
        dataset = dataset.remove_columns(["chosen_object_mask", "rejected_object_mask"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = (TokenizedCPOTrainer if args.plain else OSPOTrainer)(
            model=model,
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
            train_dataset=dataset,
            args=CPOConfig(
                output_dir=folder,
                loss_type="simpo",
                beta=5.0,
                simpo_gamma=2.5,
                cpo_alpha=2.0,
                max_steps=args.steps,
                per_device_train_batch_size=8,
                learning_rate=1e-3,
                logging_steps=1,
                bf16=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = {name: [entry[name] for entry in logs] for name in ("loss", "rewards/margins", "nll_loss")}
    if args.out:
        args.out.write_text(json.dumps(curves))
    return curves


if __name__ == "__main__":
    main()

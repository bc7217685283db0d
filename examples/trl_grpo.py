"""GRPO with TRL: log-probabilities and entropies from ospo_fast.

The changed line is `with use_ospo_fast(trainer):` around `trainer.train()`. `build_trainer` of the same module also
takes LoRA adapters on the head, which TRL refuses. TRL keeps no logits either: `--plain` trains with its own function.

    python examples/trl_grpo.py --steps 50 --out losses.json
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

from ospo_fast.integrations.trl import use_ospo_fast

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(125))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Return the share of words with an even number."""
    return [sum(i % 2 == 1 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train a tiny random model; return the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--plain", action="store_true", help="train without ospo_fast")
    parser.add_argument("--out", type=Path, help="write the curves to this JSON file")
    args = parser.parse_args(argv)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)

    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        trainer = GRPOTrainer(
            model=folder,
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(64)]}),
            args=GRPOConfig(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=8,
                num_generations=4,
                num_iterations=2,
                max_completion_length=8,
                temperature=0.9,
                beta=0.04,
                learning_rate=5e-3,
                logging_steps=1,
                bf16=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
        with nullcontext() if args.plain else use_ospo_fast(trainer):
            trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = {name: [entry[name] for entry in logs] for name in ("loss", "kl", "entropy")}
    if args.out:
        args.out.write_text(json.dumps(curves))
    return curves


if __name__ == "__main__":
    main()

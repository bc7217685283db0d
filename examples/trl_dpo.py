"""DPO with TRL: log-probabilities of the policy and of the reference model from ospo_fast.

The changed line is `with use_ospo_fast(trainer):` around `trainer.train()`. `build_trainer` of the same module also
takes LoRA adapters on the head, which TRL refuses. TRL keeps no logits either: `--plain` trains with its own function.

    python examples/trl_dpo.py --steps 50 --out losses.json
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
from trl import DPOConfig, DPOTrainer

from ospo_fast.integrations.trl import use_ospo_fast

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(125))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def build_dataset() -> Dataset:
    """Return pairs: the chosen text counts upwards, the rejected one downwards."""
    starts = range(20, 84)
    return Dataset.from_dict(
        {
            "prompt": [f"w{i}" for i in starts],
            "chosen": [" " + " ".join(f"w{i + k}" for k in range(1, 9)) for i in starts],
            "rejected": [" " + " ".join(f"w{i - k}" for k in range(1, 9)) for i in starts],
        }
    )


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
        trainer = DPOTrainer(
            model=folder,
            train_dataset=build_dataset(),
            args=DPOConfig(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=8,
                beta=0.1,
                learning_rate=1e-3,
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
    curves = {name: [entry[name] for entry in logs] for name in ("loss", "entropy", "mean_token_accuracy")}
    if args.out:
        args.out.write_text(json.dumps(curves))
    return curves


if __name__ == "__main__":
    main()

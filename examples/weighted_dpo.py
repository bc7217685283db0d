"""DPO with a weight per token, in a plain loop: log-probabilities of policy and reference from `token_logprobs`.

The changed line computes the log-probabilities: `of.token_logprobs(hidden, head, labels)` for a log-softmax of all
logits, which `--plain` uses. Weights of tokens, such as those of objects in images, are applied to its result.

    python examples/weighted_dpo.py --steps 50 --out losses.json
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ospo_fast as of

VOCAB, PROMPT, LENGTH, BETA = 128, 4, 20, 0.1


def eager_logprobs(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """Compute `token_logprobs` from all logits."""
    logps = head(hidden).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps * (labels >= 0)


def sequence_logprobs(model: LlamaForCausalLM, ids: Tensor, labels: Tensor, weights: Tensor, plain: bool) -> Tensor:
    """Return the weighted log-probability of each sequence."""
    hidden = model.model(ids).last_hidden_state[:, :-1]
    logprobs = eager_logprobs if plain else of.token_logprobs
    return (weights * logprobs(hidden, model.lm_head, labels)).sum(1)


def build_batch(generator: torch.Generator, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, labels and weights of pairs, chosen rows first: these count upwards, rejected rows downwards."""
    starts = torch.randint(VOCAB, (pairs, 1), generator=generator)
    ids = torch.cat([starts + torch.arange(LENGTH), starts - torch.arange(LENGTH)]) % VOCAB
    labels = ids.masked_fill(torch.arange(LENGTH) < PROMPT, -100)[:, 1:]  # each is predicted from the token before
    return ids, labels, 1 + torch.rand(labels.shape, generator=generator)


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train a tiny random model; return the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--plain", action="store_true", help="compute log-probabilities from all logits")
    parser.add_argument("--out", type=Path, help="write the curves to this JSON file")
    args = parser.parse_args(argv)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    policy = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(1, args.steps + 1):
        batch = build_batch(generator, pairs=8)
        with torch.no_grad():
            reference_logps = sequence_logprobs(reference, *batch, plain=args.plain)
        ratios = sequence_logprobs(policy, *batch, plain=args.plain) - reference_logps
        chosen, rejected = ratios.chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.5f}")
    if args.out:
        args.out.write_text(json.dumps({"loss": losses}))
    return {"loss": losses}


if __name__ == "__main__":
    main()

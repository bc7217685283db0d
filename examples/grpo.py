"""GRPO in a plain loop: log-probabilities and entropies from `token_logprobs`, with temperature.

The changed line computes both: `of.token_logprobs(hidden, head, labels, temperature=…, return_entropy=True)` for a
log-softmax of all logits, which `--plain` uses. The ratios are clipped, and a bonus rewards entropy.

    python examples/grpo.py --steps 50 --out losses.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ospo_fast as of

VOCAB, PROMPT, LENGTH, GROUPS, GROUP_SIZE = 128, 4, 16, 4, 8
TEMPERATURE, CLIP, ENTROPY_BONUS, UPDATES = 0.9, 0.2, 0.01, 4  # updates for each batch of samples


def eager_logprobs(hidden: Tensor, head: nn.Module, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute `token_logprobs` and entropies from all logits."""
    logps = (head(hidden) / temperature).log_softmax(-1)
    return logps.gather(-1, labels[..., None])[..., 0], -(logps.exp() * logps).sum(-1)


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor) -> Tensor:
    """Continue the prompts."""
    ids = prompts
    while ids.shape[1] < LENGTH:
        logits = model(ids, use_cache=False).logits[:, -1] / TEMPERATURE
        ids = torch.cat([ids, logits.softmax(-1).multinomial(1)], dim=1)
    return ids


def advantages(rewards: Tensor) -> Tensor:
    """Return by how much each reward exceeds the mean of its group, in standard deviations."""
    groups = rewards.view(GROUPS, GROUP_SIZE)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


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
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curves: dict[str, list[float]] = {"loss": [], "entropy": [], "reward": []}
    for step in range(args.steps):
        if step % UPDATES == 0:
            prompts = torch.randint(VOCAB, (GROUPS, PROMPT)).repeat_interleave(GROUP_SIZE, dim=0)
            ids = sample(model, prompts)
            rewards = (ids[:, PROMPT:] % 2 == 0).float().mean(1)  # the share of even tokens
            scores, old_logps = advantages(rewards)[:, None], None
        hidden = model.model(ids).last_hidden_state[:, PROMPT - 1 : -1]  # each predicts the token after it
        if args.plain:
            logps, entropy = eager_logprobs(hidden, model.lm_head, ids[:, PROMPT:], TEMPERATURE)
        else:
            logps, entropy = of.token_logprobs(
                hidden, model.lm_head, ids[:, PROMPT:], temperature=TEMPERATURE, return_entropy=True
            )
        if old_logps is None:
            old_logps = logps.detach()
        ratio = (logps - old_logps).exp()
        gain = torch.minimum(ratio * scores, ratio.clamp(1 - CLIP, 1 + CLIP) * scores)
        loss = -gain.mean() - ENTROPY_BONUS * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curves["loss"].append(loss.item())
        curves["entropy"].append(entropy.mean().item())
        curves["reward"].append(rewards.mean().item())
        print(f"step {step + 1}: " + ", ".join(f"{name} {values[-1]:.5f}" for name, values in curves.items()))
    if args.out:
        args.out.write_text(json.dumps(curves))
    return curves


if __name__ == "__main__":
    main()

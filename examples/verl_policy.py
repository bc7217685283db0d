"""A PPO update with verl's function: log-probabilities and entropies of ospo_fast under the same contract.

The changed line is the import: `from ospo_fast.integrations.verl import FusedLinearForPPO` for
`from verl.utils.experimental.torch_functional import FusedLinearForPPO`. In verl itself, call
`ospo_fast.integrations.verl.use_ospo_fast(model)` once the worker has built its model with use_fused_kernels=True.
`--plain` computes both from all logits.

    python examples/verl_policy.py --steps 50 --out losses.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ospo_fast.integrations.verl import FusedLinearForPPO

VOCAB, LENGTH, ROWS = 128, 16, 16
TEMPERATURE, CLIP, ENTROPY_COEFFICIENT = 0.8, 0.2, 0.01


class EagerLinearForPPO:
    """`FusedLinearForPPO` by all logits."""

    def __call__(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies."""
        logps = (hidden_states @ vocab_weights.T / temperature).log_softmax(-1)
        return logps.gather(-1, input_ids[..., None])[..., 0], -(logps.exp() * logps).sum(-1)


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train a tiny random model on rollouts with advantages; return the curves."""
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
    fused_linear_for_ppo = EagerLinearForPPO() if args.plain else FusedLinearForPPO()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    rollouts = torch.randint(VOCAB, (ROWS, LENGTH))
    advantages = torch.randn(ROWS, 1)
    rolled_ids = rollouts.roll(-1, dims=-1)  # what each position predicts; the last one is not used
    old_log_probs = None
    curves: dict[str, list[float]] = {"loss": [], "entropy": []}
    for step in range(args.steps):
        hidden = model.model(rollouts).last_hidden_state
        log_probs, entropy = fused_linear_for_ppo(hidden, model.lm_head.weight, rolled_ids, TEMPERATURE)
        log_probs, entropy = log_probs[:, :-1], entropy[:, :-1]
        if old_log_probs is None:
            old_log_probs = log_probs.detach()
        ratio = (log_probs - old_log_probs).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        loss = -gain.mean() - ENTROPY_COEFFICIENT * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curves["loss"].append(loss.item())
        curves["entropy"].append(entropy.mean().item())
        print(f"step {step + 1}: loss {curves['loss'][-1]:.5f}, entropy {curves['entropy'][-1]:.5f}")
    if args.out:
        args.out.write_text(json.dumps(curves))
    return curves


if __name__ == "__main__":
    main()

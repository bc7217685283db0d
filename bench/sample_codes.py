"""sample_codes against the same draw in PyTorch, and against the softmax and multinomial of the official loop."""

from functools import partial
from pathlib import Path

import torch
from _measure import interleaved, peak_mb, row, show, write

import ospo_fast
from ospo_fast.ops.sample_codes import gumbel_noise, sample_codes_reference


def multinomial(cond: torch.Tensor, uncond: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    return torch.multinomial((uncond + 5.0 * (cond - uncond)).softmax(-1), 1).squeeze(1)


def gumbel_max(cond: torch.Tensor, uncond: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    z = uncond + 5.0 * (cond - uncond)
    return (z + gumbel_noise(seeds, torch.full_like(seeds, 7), z.shape[1])).argmax(1)


def run(out: Path, quick: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"guidance_scale": 5.0, "step": 7}
    variants = {
        "ospo_fast": lambda c, u, s: ospo_fast.sample_codes(c, u, seeds=s, **options),
        "torch": gumbel_max,
        "multinomial": multinomial,
    }
    rows = []
    for B, V in [(4, 256)] if quick else [(32, 256), (16, 16384), (128, 16384)]:
        logits = partial(torch.randn, B, V, device=device)

        def inputs(B=B, logits=logits) -> tuple[torch.Tensor, ...]:
            return logits(), logits(), torch.randint(2**62, (B,), device=device)

        arguments = inputs()
        cond, uncond, seeds = (x[:2].cpu() for x in arguments)
        expected = sample_codes_reference(cond, uncond, seeds=seeds.tolist(), **options)
        assert torch.equal(variants["ospo_fast"](*arguments)[:2].cpu(), expected)
        for name, time in interleaved(variants, inputs, seconds=0.02 if quick else 0.3).items():
            memory = round(peak_mb(variants[name], *arguments), 3)
            rows.append(row("sample_codes", name, {"B": B, "V": V}, "fp32", time, peak_mb=memory))
    write(rows, out, "sample_codes")
    show(rows)

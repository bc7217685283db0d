"""sample_codes, compared with the same sampling in PyTorch and with the softmax and multinomial of the official loop.

With top-k and top-p it is compared with the usual implementation by a sort.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _measure import ceilings, interleaved, peak_mb, row, show, write

import ospo_fast
from ospo_fast.ops.sample_codes import _truncate, gumbel_noise, sample_codes_reference

OPTIONS = {"guidance_scale": 5.0, "step": 7}
TOP_P = 0.9
Sampler = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def guided(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    return uncond + 5.0 * (cond - uncond)


def multinomial(cond: torch.Tensor, uncond: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(guided(cond, uncond).softmax(-1), 1).squeeze(1)


def gumbel_max(cond: torch.Tensor, uncond: torch.Tensor, seeds: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    z = guided(cond, uncond)
    if top_k is not None:
        z = _truncate(z, top_k, TOP_P)
    return (z + gumbel_noise(seeds, torch.full_like(seeds, 7), z.shape[1])).argmax(1)


def sort(cond: torch.Tensor, uncond: torch.Tensor, seeds: torch.Tensor, top_k: int) -> torch.Tensor:
    """Truncate by topk and sort in PyTorch, then sample with the kernel."""
    z = guided(cond, uncond)
    if top_k:
        z = z.masked_fill(z < z.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    ordered, order = z.sort(dim=1, descending=True, stable=True)
    probs = ordered.double().softmax(1)
    ordered = ordered.masked_fill(probs.cumsum(1) - probs >= TOP_P, -torch.inf)
    return ospo_fast.sample_codes(ordered.gather(1, order.argsort(1)), seeds=seeds, step=7)


def variants(top_k: int | None) -> dict[str, Sampler]:
    """Return the samplers to compare: without truncation if top_k is None, else with top_k (0: all codes) and TOP_P."""
    if top_k is None:
        return {
            "ospo_fast": lambda c, u, s: ospo_fast.sample_codes(c, u, seeds=s, **OPTIONS),
            "torch": gumbel_max,
            "multinomial": multinomial,
        }
    return {
        "ospo_fast": lambda c, u, s: ospo_fast.sample_codes(c, u, seeds=s, top_k=top_k, top_p=TOP_P, **OPTIONS),
        "torch": partial(gumbel_max, top_k=top_k),
        "sort": partial(sort, top_k=top_k),
    }


def run(out: Path, quick: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases: list[tuple[int, int, int | None]] = [
        (32, 256, None),
        (16, 16384, None),
        (64, 16384, None),  # a batch of 64 prompts
        (128, 16384, None),
        (16, 16384, 0),
        (16, 16384, 1000),
        (128, 16384, 1000),
        (16, 102400, 0),  # a text vocabulary
    ]
    rows = []
    for B, V, top_k in [(4, 256, None), (4, 256, 20)] if quick else cases:
        logits = partial(torch.randn, B, V, device=device)

        def inputs(B=B, logits=logits) -> tuple[torch.Tensor, ...]:
            return logits(), logits(), torch.randint(2**62, (B,), device=device)

        samplers, arguments = variants(top_k), inputs()
        shapes, options = {"B": B, "V": V}, {}
        if top_k is None:
            cond, uncond, seeds = (x[:2].cpu() for x in arguments)
            steps = torch.full_like(seeds, OPTIONS["step"])
            expected, _ = sample_codes_reference(cond, uncond, guidance_scale=5.0, seeds=seeds, steps=steps)
            assert torch.equal(samplers["ospo_fast"](*arguments)[:2].cpu(), expected)
        else:
            shapes["top_k"], options["top_p"] = top_k, TOP_P
            codes = samplers["ospo_fast"](*arguments)
            assert all(torch.equal(sampler(*arguments), codes) for sampler in samplers.values())
        limits = ceilings()
        floor = limits.floor_ms(bytes_moved=2 * arguments[0].nbytes)  # reads both rows of logits once
        for name, time in interleaved(samplers, inputs, seconds=0.02 if quick else 0.3).items():
            more = {"peak_mb": round(peak_mb(samplers[name], *arguments), 3), **limits.metrics(floor, time)}
            rows.append(row("sample_codes", name, shapes, "fp32", time, **options, **more))
        write(rows, out, "sample_codes")
    show(rows)

"""token_logprobs, forward and backward with a frozen head, against the usual computation (all logits, fp32 log-softmax,
gather), the same under torch.compile, and the bare GEMMs of its own chain.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from _measure import interleaved, peak_mb, row, show, write

import ospo_fast
from ospo_fast.ops.token_logprobs import token_logprobs_reference

# rows (pairs × 2 × image tokens), width, codes
CPU_SHAPES = {"pairs": (2304, 512, 16384), "shapes world": (32 * 36, 128, 256)}
GPU_SHAPES = {"Janus-Pro-7B, 16 pairs": (18432, 4096, 16384), "Janus-Pro-1B, 16 pairs": (18432, 2048, 16384)}
QUICK_SHAPES = {"quick": (64, 16, 97)}


def usual(hidden: torch.Tensor, head: ospo_fast.Head, labels: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(head(hidden).float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def bare_gemms(hidden: torch.Tensor, head: ospo_fast.Head) -> torch.Tensor:
    """The four GEMMs that no implementation with gradient can do without; what lies between them is left out."""
    features = hidden @ head.proj_weight.t()
    for begin in range(0, len(features), 256):
        chunk = features[begin : begin + 256]
        chunk.copy_(chunk @ head.weight.t() @ head.weight)
    return features @ head.proj_weight


def run(out: Path, quick: bool) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rows = []
    for N, D, V in (QUICK_SHAPES if quick else GPU_SHAPES if device == "cuda" else CPU_SHAPES).values():
        weights = [torch.randn(shape, device=device) * D**-0.5 for shape in ((V, D), (V,), (D, D), (D,))]
        head = ospo_fast.Head(*(tensor.to(dtype) for tensor in weights))

        def inputs(N=N, D=D, V=V) -> tuple[torch.Tensor, ...]:
            hidden = torch.randn(N, D, device=device).to(dtype).requires_grad_()
            return hidden, torch.randint(V, (N,), device=device), torch.randn(N, device=device)

        def training(function, head=head):
            def step(hidden: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
                (grad,) = torch.autograd.grad((function(hidden, head, labels) * scale).sum(), hidden)
                return grad

            return step

        variants = {"ospo_fast": training(ospo_fast.token_logprobs), "eager": training(usual)}
        check_gradients(variants, training(token_logprobs_reference), tuple(x[:32].detach() for x in inputs()))
        if not quick:
            variants["compiled eager"] = training(torch.compile(usual))
        variants["bare GEMMs"] = lambda hidden, *_, head=head: bare_gemms(hidden.detach(), head)
        times = interleaved(variants, inputs, seconds=0.02 if quick else 2.0)
        arguments = inputs()
        for name, time in times.items():
            memory = round(peak_mb(variants[name], *arguments), 3)
            name_of = "fp32" if dtype == torch.float32 else "bf16"
            rows.append(row("token_logprobs", name, {"N": N, "D": D, "V": V}, name_of, time, peak_mb=memory))
    write(rows, out, "token_logprob")
    show(rows)


def check_gradients(variants, exact, arguments: tuple[torch.Tensor, ...]) -> None:
    """Nothing is timed that is less exact than twice the eager computation's error."""
    hidden = arguments[0].requires_grad_()
    best = exact(hidden, *arguments[1:]).double()
    errors = {
        name: float((step(hidden, *arguments[1:]).double() - best).abs().max()) for name, step in variants.items()
    }
    rounding = torch.finfo(hidden.dtype).eps * float(best.abs().max())
    assert errors["ospo_fast"] <= 2 * errors["eager"] + rounding, errors

"""What bench/token_logprobs.py compares: this package, plain PyTorch, and peers, each as a loss with its results.

Peers take a linear head, so the projection and GELU of Janus' head run in PyTorch before them. Liger's scaled cross
entropy, cut-cross-entropy and quack have no output bias. Liger's SimPO and sum, quack, and torch's linear_cross_entropy
with a sum have no weight per token.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import ospo_fast
from ospo_fast.ops.token_logprobs import token_logprobs_reference

TEMPERATURE, SOFTCAP = 0.8, 30.0
TRL_COLUMNS = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
Tensors = dict[str, torch.Tensor]
# From hidden (N, D), head and labels (N,) to log-probabilities (N,), or to a pair of them and the entropies (N,).
Function = Callable[..., Any]
# From hidden, head, labels and token weights (N,) to a loss and its results by name: "values" (N,), "entropies" (N,).
Objective = Callable[..., tuple[torch.Tensor, Tensors]]


@dataclass(frozen=True)
class Variant:
    """A loss to differentiate, or to compute without gradient.

    `exact` is the same loss in float64, None if the errors are not measured. `against` is the variant of plain PyTorch
    with the same results. The errors of `ours` are at most twice its errors.
    """

    objective: Objective
    exact: Objective | None
    against: str = "eager"
    ours: bool = False
    needs_grad: bool = True
    note: str = ""


def per_token(function: Function) -> Objective:
    """Make the loss Σ scale·ℓ."""

    def objective(hidden, head, labels, scale) -> tuple[torch.Tensor, Tensors]:
        values = function(hidden, head, labels)
        return (values * scale).sum(), {"values": values}

    return objective


def with_entropy(function: Function, *, in_loss: bool) -> Objective:
    """Make the loss Σ scale·ℓ of a function that returns entropies too, with other weights of these if `in_loss`."""

    def objective(hidden, head, labels, scale) -> tuple[torch.Tensor, Tensors]:
        values, entropies = function(hidden, head, labels)
        loss = (values * scale).sum()
        if in_loss:
            loss = loss + (entropies * scale.flip(0)).sum()
        return loss, {"values": values, "entropies": entropies}

    return objective


def linear_loss(hidden, head, labels, scale) -> tuple[torch.Tensor, Tensors]:
    """Compute Σ scale·ℓ, whose gradients are known in the forward."""
    return -ospo_fast.cross_entropy(hidden, head, labels, weights=scale, reduction="sum"), {}


# ---------------------------------------------------------------- plain PyTorch


def eager(hidden, head, labels, temperature: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    return _log_softmax(hidden, head, temperature, softcap).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _log_softmax(hidden, head, temperature: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    scores = head(hidden).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return F.log_softmax(scores if temperature == 1 else scores / temperature, -1)


def eager_entropy(hidden, head, labels, *, in_loss: bool) -> tuple[torch.Tensor, torch.Tensor]:
    every = _log_softmax(hidden, head)
    with torch.set_grad_enabled(in_loss and torch.is_grad_enabled()):
        entropies = -(every.exp() * every).sum(-1)
    return every.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropies


def official(hidden, head, labels) -> torch.Tensor:
    """Return log-probabilities of sequences (G, S, D) with labels (G, S), -100 on text, as usual training code does."""
    targets = labels[:, 1:]
    logits = head(hidden).float()[:, :-1]
    logps = F.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * (targets != -100)


def bare_gemms(hidden: torch.Tensor, head: ospo_fast.Head, rows: int) -> list[torch.Tensor]:
    """Run the GEMMs of a step over chunks of `rows`, in reused buffers, with those of the weights' gradients if any."""
    hidden, out = hidden.detach(), torch.empty_like(hidden)
    weight, proj = head.weight.detach(), None if head.proj_weight is None else head.proj_weight.detach()
    dweight, dproj = (
        torch.zeros_like(w) if w is not None and head.trainable else None for w in (head.weight, head.proj_weight)
    )
    logits, features, gradient = (
        hidden.new_empty(min(rows, len(hidden)), n) for n in (len(weight), weight.shape[1], weight.shape[1])
    )
    for begin in range(0, len(hidden), rows):
        x, to = hidden[begin : begin + rows], out[begin : begin + rows]
        z, f, g = (buffer[: len(x)] for buffer in (logits, features, gradient))
        f = x if proj is None else torch.mm(x, proj.t(), out=f)
        torch.mm(f, weight.t(), out=z)
        torch.mm(z, weight, out=to if proj is None else g)
        if dweight is not None:
            dweight.addmm_(z.t(), f)
        if proj is not None:
            torch.mm(g, proj, out=to)
        if dproj is not None:
            dproj.addmm_(g.t(), x)
    return [out, *(t for t in (dweight, dproj) if t is not None)]


# ---------------------------------------------------------------- peers


def code_embeddings(hidden: torch.Tensor, head: ospo_fast.Head) -> torch.Tensor:
    if head.proj_weight is None:
        return hidden
    return F.gelu(F.linear(hidden, head.proj_weight, head.proj_bias))


def trl(hidden, head, labels, outputs: tuple[str, ...] = ()) -> Any:
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    features = code_embeddings(hidden, head)
    values, entropies, *_ = function.apply(
        features, head.weight, head.bias, labels, 1.0, TRL_COLUMNS, None, 1.0, outputs
    )
    return (values, entropies) if outputs else values


def liger(hidden, head, labels, reduction: str = "none") -> torch.Tensor:
    if not hidden.is_cuda:  # Triton's interpreter would run them, slowly
        raise RuntimeError("its Triton kernels need a GPU")
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction=reduction)
    return -loss(head.weight, code_embeddings(hidden, head), labels, head.bias)


def liger_scaled(hidden, head, labels, entropy: bool = False) -> Any:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function, features = module.LigerFusedLinearScaledCrossEntropyFunction, code_embeddings(hidden, head)
    found = function.apply(features, head.weight, labels, 1.0, -100, 1, entropy)
    return (-found[0], found[1]) if entropy else -found


def verl_like(hidden, head, labels) -> tuple[torch.Tensor, torch.Tensor]:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module._FusedLinearPPOFallbackFunction
    nll, entropies = function.apply(code_embeddings(hidden, head), head.weight, labels, 1.0, -100, True)
    return -nll, entropies


def liger_simpo(hidden, head, labels) -> torch.Tensor:
    module = importlib.import_module("liger_kernel.chunked_loss.simpo_loss")
    loss = module.LigerFusedLinearSimPOLoss(beta=5.0, gamma=0.5, compute_nll_loss=True)
    pairs = len(hidden) // 1152 if len(hidden) % 1152 == 0 else 1
    features = code_embeddings(hidden, head).view(2 * pairs, -1, head.weight.shape[1])
    return loss(head.weight, features, labels.view(2 * pairs, -1), head.bias)[0]


def cut_cross_entropy(hidden, head, labels) -> torch.Tensor:
    module = importlib.import_module("cut_cross_entropy")
    return -module.linear_cross_entropy(code_embeddings(hidden, head), head.weight, labels, reduction="none")


def quack(hidden, head, labels) -> torch.Tensor:
    module = importlib.import_module("quack.linear_cross_entropy")
    return -module.chunked_linear_cross_entropy(code_embeddings(hidden, head), head.weight, labels, reduction="sum")


def torch_linear_cross_entropy(hidden, head, labels, reduction: str = "sum", chunked: bool = True) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    features, given = code_embeddings(hidden, head), {"linear_bias": head.bias, "options": options}
    return -F.linear_cross_entropy(features, head.weight, labels, reduction=reduction, **given)


TORCH = "torch linear_cross_entropy"
PEERS: dict[str, Function] = {
    "TRL": trl,
    "Liger": liger,
    "Liger, sum": functools.partial(liger, reduction="sum"),
    "Liger scaled": liger_scaled,
    "Liger SimPO": liger_simpo,
    "cut-cross-entropy": cut_cross_entropy,
    "quack": quack,
    TORCH: torch_linear_cross_entropy,
    f"{TORCH}, per token": functools.partial(torch_linear_cross_entropy, reduction="none"),
    f"{TORCH}, per token, default": functools.partial(torch_linear_cross_entropy, reduction="none", chunked=False),
}
PER_TOKEN = {
    "TRL", "Liger", "Liger scaled", "cut-cross-entropy", f"{TORCH}, per token", f"{TORCH}, per token, default",
}  # fmt: skip
WITHOUT_BIAS = {"Liger scaled", "cut-cross-entropy"}
ENTROPY_PEERS: dict[str, Function] = {
    "TRL": functools.partial(trl, outputs=("entropy",)),
    "Liger scaled": functools.partial(liger_scaled, entropy=True),
    "verl-like": verl_like,
}
NOTES = {
    "TRL": "ChunkedLogProbFunction in blocks of 32768 codes, as TRL's trainers call it",
    "Liger": "reduction='none' computes logits twice: gradients are computed in the backward",
    "Liger, sum": "no weight per token; gradients are computed in the forward",
    "Liger scaled": "without output bias; formulas of verl in PyTorch, 512 rows at a time, except on Hopper GPUs",
    "Liger SimPO": "no weight per token",
    "cut-cross-entropy": "without output bias; filter_eps='high', its default, skips small gradients",
    "quack": "without output bias; no weight per token",
    "verl-like": "Liger's copy of verl's formulas, 512 rows at a time; the entropy is always computed",
    TORCH: "no weight per token; gradients are computed in the forward; needs torch 2.13",
    f"{TORCH}, per token": "with options: chunks, which the backward recomputes",
    f"{TORCH}, per token, default": "without options: all logits in memory",
}


# ---------------------------------------------------------------- what is compared in each task


def logps_variants(trained: bool, compiled: bool) -> dict[str, Variant]:
    """Return the variants of Σ scale·ℓ, without peers."""
    exact = per_token(token_logprobs_reference)

    def ours(**options: Any) -> Variant:
        return Variant(per_token(functools.partial(ospo_fast.token_logprobs, **options)), exact, ours=True)

    found = {"ospo_fast": ours(), "torch": ours(backend="torch")}
    if trained:
        found |= {f"ospo_fast, keep_logits={keep}": ours(keep_logits=keep) for keep in (True, False)}
        found["ospo_fast.cross_entropy"] = Variant(linear_loss, exact, ours=True)
    found["eager"] = Variant(per_token(eager), exact)
    if compiled:
        torch.compiler.reset()  # compile each shape for itself, below the limit of recompilations
        found["compiled eager"] = Variant(per_token(torch.compile(eager, dynamic=False)), exact)
    return found


def logps_peers(cuda: bool, torch_chunks: bool) -> dict[str, Variant]:
    """Return peers; on a CPU those with weights per token, and torch's operation.

    Without `torch_chunks` its chunked form is left out: its documentation advises against it for fewer rows than D.
    """
    exact = per_token(token_logprobs_reference)
    chunked = {TORCH, f"{TORCH}, per token"}
    return {
        name: Variant(per_token(function), exact if name in PER_TOKEN else None, note=NOTES[name])
        for name, function in PEERS.items()
        if (cuda or name in PER_TOKEN or name == TORCH) and (torch_chunks or name not in chunked)
    }


def entropy_variants(trained: bool) -> dict[str, Variant]:
    """Return variants with and without the entropy: as a metric, in the loss, and (frozen) in a pass without gradient.

    With a metric the loss is the same as without entropy.
    """
    exact = per_token(token_logprobs_reference)
    ours, reference = (
        functools.partial(function, return_entropy=True)
        for function in (ospo_fast.token_logprobs, token_logprobs_reference)
    )
    found = {
        "ospo_fast": Variant(per_token(ospo_fast.token_logprobs), exact, ours=True),
        "eager": Variant(per_token(eager), exact),
    }
    kinds = {"entropy as metric": False, "entropy in the loss": True}
    for kind, in_loss in kinds.items():
        exact_entropy = with_entropy(reference, in_loss=in_loss)
        same = functools.partial(Variant, exact=exact_entropy, against=f"eager, {kind}")
        plain = functools.partial(eager_entropy, in_loss=in_loss)
        found[f"ospo_fast, {kind}"] = same(with_entropy(ours, in_loss=in_loss), ours=True)
        found[f"eager, {kind}"] = same(with_entropy(plain, in_loss=in_loss))
    if not trained:
        kept = functools.partial(ours, keep_logits=True)
        found["ospo_fast, entropy in the loss, keep_logits=True"] = Variant(
            with_entropy(kept, in_loss=True), with_entropy(reference, in_loss=True), "eager, entropy in the loss", True
        )
        pairs = {"ospo_fast": (ospo_fast.token_logprobs, ours)}
        pairs["eager"] = eager, functools.partial(eager_entropy, in_loss=False)
        for name, (without, both) in pairs.items():
            forward = functools.partial(Variant, ours=name == "ospo_fast", needs_grad=False)
            found[f"{name}, no grad"] = forward(per_token(without), exact, "eager, no grad")
            found[f"{name}, no grad, entropy"] = forward(
                with_entropy(both, in_loss=False), with_entropy(reference, in_loss=False), "eager, no grad, entropy"
            )
    return found


def entropy_peers(cuda: bool) -> dict[str, Variant]:
    """Return peers with entropies. On a CPU Liger computes what `verl_like` does."""
    reference = functools.partial(token_logprobs_reference, return_entropy=True)
    return {
        f"{name}, {kind}": Variant(
            with_entropy(function, in_loss=in_loss), with_entropy(reference, in_loss=in_loss), f"eager, {kind}",
            note=NOTES[name],
        )
        for name, function in ENTROPY_PEERS.items()
        for kind, in_loss in {"entropy as metric": False, "entropy in the loss": True}.items()
        if cuda or name != "Liger scaled"
    }  # fmt: skip


def softcap_variants() -> dict[str, Variant]:
    """Return variants with temperature, then also with soft-capping, and without both."""
    found = {}
    for kind, options in {
        "": {},
        ", temperature": {"temperature": TEMPERATURE},
        ", temperature and soft-cap": {"temperature": TEMPERATURE, "softcap": SOFTCAP},
    }.items():
        ours, plain, exact = (
            per_token(functools.partial(function, **options))
            for function in (ospo_fast.token_logprobs, eager, token_logprobs_reference)
        )
        found[f"ospo_fast{kind}"] = Variant(ours, exact, f"eager{kind}", ours=True)
        found[f"eager{kind}"] = Variant(plain, exact, f"eager{kind}")
    return found

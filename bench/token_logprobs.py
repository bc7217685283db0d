"""token_logprobs with a frozen head, forward and backward, compared with other implementations in one run.

- eager: all logits of the image tokens, fp32 log-softmax, gather; also under torch.compile.
- official: the usual training code, with logits of all positions (text included), shift, log-softmax, gather and mask.
- bare GEMMs: the matrix products that every implementation with gradients needs.
- On a GPU, if installed: Liger, cut-cross-entropy, quack and torch's linear_cross_entropy. They take a linear head, so
  the projection and GELU of Janus' head run in PyTorch before them. cut-cross-entropy and quack have no output bias.
  Liger's SimPO and sum, and quack, have no weight per token.

Errors are those of 64 rows against float64, relative to the largest exact value, at logits of the usual size and up to
50. Errors of peers are shown but not checked; that of cut-cross-entropy is for a head without bias. `share` is the
floor (the products at the measured limit of this device) over the time.

The rows come with a plot, and with a sweep of chunk_rows at the first shape. Cases are named by shape: 7B, linear 7B,
1B, text head, Shapes, and on a CPU 2 pairs and Shapes. The sweep has the name of its shape and "chunk_rows".
"""

import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _measure import ceilings, chosen, dtype_name, interleaved, peak_mb, row, show, write

import ospo_fast
from ospo_fast.ops.token_logprobs import token_logprobs_reference

TEXT = 24  # positions of the prompt before each image
Step = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Rows N (pairs × 2 × image tokens), width D, codes V; `mlp`: the head is Janus' Linear-GELU-Linear."""

    name: str
    N: int
    D: int
    V: int
    mlp: bool = True
    tokens: int = 576  # per image; 0: no images and no text between them

    @property
    def sizes(self) -> dict[str, int]:
        """Return the shapes of a row; `linear` marks a head of one layer."""
        return {"N": self.N, "D": self.D, "V": self.V} | ({} if self.mlp else {"linear": 1})

    @property
    def tflop(self) -> float:
        """Return the TFLOP of the GEMMs, forward and backward to the hidden states."""
        return 4 * self.N * self.D * (self.V + self.D * self.mlp) / 1e12


CPU_SHAPES = [Shape("2 pairs", 2304, 512, 16384), Shape("Shapes", 1152, 128, 256)]
GPU_SHAPES = [
    Shape("7B", 18432, 4096, 16384),  # Janus-Pro-7B, 16 pairs
    Shape("linear 7B", 18432, 4096, 16384, mlp=False),  # the head that the peers take
    Shape("1B", 18432, 2048, 16384),  # Janus-Pro-1B, 16 pairs
    Shape("text head", 8192, 4096, 128256, mlp=False, tokens=0),
    Shape("Shapes", 1152, 128, 256),  # the world of shapes
]
QUICK_SHAPES = [Shape("quick", 64, 16, 97, tokens=32), Shape("quick linear", 40, 16, 64, mlp=False, tokens=0)]
# For the first shape: little memory, about a third of its rows, full waves of tiles on 132 SMs, half of its rows.
GPU_CHUNKS = (2304, 6144, 6272, 7296, 8448, 9216)


def eager(hidden: torch.Tensor, head: ospo_fast.Head, labels: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(head(hidden).float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def official(hidden: torch.Tensor, head: ospo_fast.Head, labels: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities of sequences (G, S, D) with labels (G, S), -100 on text, as usual training code does."""
    targets = labels[:, 1:]
    logits = head(hidden).float()[:, :-1]
    logps = F.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * (targets != -100)


def bare_gemms(hidden: torch.Tensor, head: ospo_fast.Head, rows: int) -> torch.Tensor:
    """Run the GEMMs over chunks of `rows`, in reused buffers."""
    hidden, out = hidden.detach(), torch.empty_like(hidden)
    weight, proj = head.weight, head.proj_weight
    logits, features, gradient = (
        hidden.new_empty(min(rows, len(hidden)), n) for n in (len(weight), weight.shape[1], weight.shape[1])
    )
    for begin in range(0, len(hidden), rows):
        x, to = hidden[begin : begin + rows], out[begin : begin + rows]
        z, f, g = (buffer[: len(x)] for buffer in (logits, features, gradient))
        torch.mm(x if proj is None else torch.mm(x, proj.t(), out=f), weight.t(), out=z)
        torch.mm(z, weight, out=to if proj is None else g)
        if proj is not None:
            torch.mm(g, proj, out=to)
    return out


def make_step(function: Callable[..., torch.Tensor], head: ospo_fast.Head) -> Step:
    """Make a step from hidden states, labels and token weights to the gradient of the hidden states."""

    def step(hidden: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad((function(hidden, head, labels) * scale).sum(), hidden)
        return grad

    return step


# ---------------------------------------------------------------- peers


def code_embeddings(hidden: torch.Tensor, head: ospo_fast.Head) -> torch.Tensor:
    if head.proj_weight is None:
        return hidden
    return F.gelu(F.linear(hidden, head.proj_weight, head.proj_bias))


def liger(hidden: torch.Tensor, head: ospo_fast.Head, labels: torch.Tensor, reduction: str = "none") -> torch.Tensor:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction=reduction)
    return -loss(head.weight, code_embeddings(hidden, head), labels, head.bias)


def liger_simpo(hidden: torch.Tensor, head: ospo_fast.Head, labels: torch.Tensor) -> torch.Tensor:
    module = importlib.import_module("liger_kernel.chunked_loss.simpo_loss")
    loss = module.LigerFusedLinearSimPOLoss(beta=5.0, gamma=0.5, compute_nll_loss=True)
    pairs = len(hidden) // 1152 if len(hidden) % 1152 == 0 else 1
    features = code_embeddings(hidden, head).view(2 * pairs, -1, head.weight.shape[1])
    return loss(head.weight, features, labels.view(2 * pairs, -1), head.bias)[0]


def cut_cross_entropy(hidden: torch.Tensor, head: ospo_fast.Head, labels: torch.Tensor) -> torch.Tensor:
    module = importlib.import_module("cut_cross_entropy")
    return -module.linear_cross_entropy(code_embeddings(hidden, head), head.weight, labels, reduction="none")


def quack(hidden: torch.Tensor, head: ospo_fast.Head, labels: torch.Tensor) -> torch.Tensor:
    module = importlib.import_module("quack.linear_cross_entropy")
    return -module.chunked_linear_cross_entropy(code_embeddings(hidden, head), head.weight, labels, reduction="sum")


def torch_linear_cross_entropy(hidden: torch.Tensor, head: ospo_fast.Head, labels: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # by chunks
    features, given = code_embeddings(hidden, head), {"linear_bias": head.bias, "reduction": "sum", "options": options}
    return -F.linear_cross_entropy(features, head.weight, labels, **given)


PEERS = {
    "Liger": liger,
    "Liger, sum": functools.partial(liger, reduction="sum"),
    "Liger SimPO": liger_simpo,
    "cut-cross-entropy": cut_cross_entropy,
    "quack": quack,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
}
PER_TOKEN = {"Liger", "cut-cross-entropy"}
NOTES = {
    "Liger": "reduction='none' computes logits twice: gradients are computed in the backward",
    "Liger, sum": "no weight per token; gradients are computed in the forward",
    "Liger SimPO": "no weight per token",
    "cut-cross-entropy": "without output bias; filter_eps='high', its default, skips small gradients",
    "quack": "without output bias; no weight per token",
    "torch linear_cross_entropy": "no weight per token; gradients are computed in the forward; needs torch 2.13",
}


def working_peers(head: ospo_fast.Head, arguments: tuple[torch.Tensor, ...]) -> dict[str, Step]:
    """Return the peers that are installed and support this shape; print why the others are skipped."""
    steps = {}
    for name, function in PEERS.items():
        step = make_step(function, head)
        try:
            step(*arguments)
        except Exception as error:  # an error of a peer does not stop the benchmark
            print(f"{name} is skipped: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        else:
            steps[name] = step
    return steps


# ---------------------------------------------------------------- measuring


def make_head(shape: Shape, where: str, dtype: torch.dtype) -> ospo_fast.Head:
    D, V = shape.D, shape.V
    sizes = ((V, D), (V,), (D, D), (D,)) if shape.mlp else ((V, D),)
    return ospo_fast.Head(*((torch.randn(size, device=where) * D**-0.5).to(dtype) for size in sizes))


def errors(function: Callable[..., torch.Tensor], head: ospo_fast.Head, arguments, largest: float | None):
    """Return relative errors of values and gradients against float64, with logits scaled up to `largest`."""
    hidden, labels, scale = (x[:64].detach() for x in arguments[:3])
    if largest is not None:
        factor = largest / float(head(hidden).abs().max())
        bias = None if head.bias is None else head.bias * factor
        head = ospo_fast.Head(head.weight * factor, bias, head.proj_weight, head.proj_bias)

    def both(compute: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x = hidden.clone().requires_grad_()
        values = compute(x, head, labels)
        (values * scale).sum().backward()
        return values.detach().double(), x.grad.double()

    return [
        float((actual - exact).abs().max() / exact.abs().max())
        for actual, exact in zip(both(function), both(token_logprobs_reference), strict=True)
    ]


def error_metrics(
    name: str, function: Callable[..., torch.Tensor], head: ospo_fast.Head, arguments
) -> dict[str, float]:
    if name == "cut-cross-entropy":
        head = ospo_fast.Head(head.weight, None, head.proj_weight, head.proj_bias)
    usual_size, to_50 = errors(function, head, arguments, None), errors(function, head, arguments, 50.0)
    names = "error_values", "error_gradients", "error_values_50", "error_gradients_50"
    return {name: float(f"{value:.3g}") for name, value in zip(names, (*usual_size, *to_50), strict=True)}


def check(ours: dict[str, float], reference: dict[str, float], dtype: torch.dtype) -> None:
    """Check that our error is at most twice that of the eager computation, plus rounding."""
    rounding = 4 * torch.finfo(torch.float32).eps
    for name, error in ours.items():
        floor = torch.finfo(dtype).eps if "gradients" in name else rounding
        assert error <= 2 * reference[name] + floor, (name, ours, reference)


def default_rows(shape: Shape, dtype: torch.dtype, where: str) -> int:
    module = importlib.import_module("ospo_fast.ops.token_logprobs")
    return module._default_chunk_rows(shape.V, torch.finfo(dtype).bits // 8, where)


def make_inputs(shape: Shape, where: str, dtype: torch.dtype) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return a function that makes hidden states, labels and weights: of image tokens, then (with text) of all."""

    def inputs() -> tuple[torch.Tensor, ...]:
        hidden = torch.randn(shape.N, shape.D, device=where).to(dtype).requires_grad_()
        labels = torch.randint(shape.V, (shape.N,), device=where)
        scale = torch.randn(shape.N, device=where)
        if not shape.tokens:
            return hidden, labels, scale
        images, length = shape.N // shape.tokens, TEXT + shape.tokens
        all_hidden = torch.randn(images, length, shape.D, device=where).to(dtype).requires_grad_()
        all_labels = F.pad(labels.view(images, -1), (TEXT, 0), value=-100)
        all_scales = F.pad(scale.view(images, -1), (TEXT - 1, 0))
        return hidden, labels, scale, all_hidden, all_labels, all_scales

    return inputs


def measure(shape: Shape, where: str, dtype: torch.dtype, quick: bool) -> list[dict]:
    limits, head, inputs = ceilings(), make_head(shape, where, dtype), make_inputs(shape, where, dtype)
    arguments = inputs()
    functions = {
        "ospo_fast": ospo_fast.token_logprobs,
        "torch": functools.partial(ospo_fast.token_logprobs, backend="torch"),
        "eager": eager,
    }
    if not quick:
        torch.compiler.reset()  # compile each shape for itself, below the limit of recompilations
        functions["compiled eager"] = torch.compile(eager, dynamic=False)
    variants = {name: make_step(function, head) for name, function in functions.items()}
    if shape.tokens:
        official_step = make_step(official, head)
        variants["official"] = lambda *arguments: official_step(*arguments[3:])
    if where == "cuda":
        peers = working_peers(head, arguments)
        variants |= peers
        functions |= {name: PEERS[name] for name in peers if name in PER_TOKEN}
    metrics = {name: error_metrics(name, function, head, arguments) for name, function in functions.items()}
    check(metrics["ospo_fast"], metrics["eager"], dtype)

    # In the same chunks, and with all rows at once, where a GEMM can be faster.
    for name, size in (("bare GEMMs", default_rows(shape, dtype, where)), ("bare GEMMs, one chunk", shape.N)):
        variants[name] = lambda hidden, *_, size=size: bare_gemms(hidden, head, size)
    # On a GPU, 50 turns of a large shape take half a second for the fastest variant and a minute for all.
    turns = 50 if where == "cuda" and shape.tflop > 0.1 else 300
    seconds = 0.02 if quick else 5.0 if where == "cpu" else 1.0
    times = interleaved(variants, inputs, seconds=seconds, max_turns=turns)
    rows = []
    for name, time in times.items():
        speed = shape.tflop / time.median_ms * 1e3
        more = {"peak_mb": round(peak_mb(variants[name], *arguments), 3), "tflop_s": round(speed, 4)}
        for other, key in (("eager", "eager_over_this"), ("official", "official_over_this")):
            if other in times:
                more[key] = round(times[other].median_ms / time.median_ms, 4)
        more["over_bare_gemms"] = round(time.median_ms / times["bare GEMMs"].median_ms, 4)
        more |= limits.metrics(limits.floor_ms(flop=shape.tflop * 1e12), time)
        more |= {"note": NOTES[name]} if name in NOTES else {}
        rows.append(row("token_logprobs", name, shape.sizes, dtype_name(dtype), time, **more, **metrics.get(name, {})))
    return rows


def sweep(shape: Shape, where: str, dtype: torch.dtype, quick: bool) -> list[dict]:
    """Measure time and peak memory for several chunk_rows, including the default."""
    head, default = make_head(shape, where, dtype), default_rows(shape, dtype, where)
    tried = [int(default * factor) for factor in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2, 4)]
    if where == "cuda":
        tried = [*GPU_CHUNKS, default, shape.N]
    sizes = sorted({min(size, shape.N) for size in tried})
    steps = {size: make_step(functools.partial(ospo_fast.token_logprobs, chunk_rows=size), head) for size in sizes}
    inputs = make_inputs(shape, where, dtype)
    times, arguments = interleaved(steps, inputs, seconds=0.02 if quick else 1.0, max_turns=100), inputs()
    return [
        row(
            "token_logprobs",
            f"{size} rows" + (" (default)" if size == default else ""),
            shape.sizes,
            dtype_name(dtype),
            time,
            peak_mb=round(peak_mb(steps[size], *arguments), 3),
            chunk_rows=size,
        )
        for size, time in times.items()
    ]


def plot(rows: list[dict], path: Path) -> None:
    """Plot time and memory of every variant, one row of panels per shape."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shapes = {tuple(line["shapes"].items()): None for line in rows}
    figure, axes = plt.subplots(len(shapes), 2, figsize=(11, 2.6 * len(shapes)), squeeze=False)
    for shape, (left, right) in zip(shapes, axes, strict=True):
        lines = [line for line in rows if tuple(line["shapes"].items()) == shape][::-1]
        names = [line["variant"] for line in lines]
        colors = ["#c2410c" if name == "ospo_fast" else "#94a3b8" for name in names]
        low = [line["median_ms"] - line["p20_ms"] for line in lines]
        high = [line["p80_ms"] - line["median_ms"] for line in lines]
        left.barh(names, [line["median_ms"] for line in lines], color=colors, xerr=(low, high))
        left.set_xlabel("forward + backward, ms (median, 20 to 80 %)")
        right.barh(names, [line["peak_mb"] for line in lines], color=colors)
        right.set_xlabel("peak memory above the inputs, MB")
        right.set_yticklabels([])
        left.set_title(" ".join(f"{name}={size}" for name, size in shape), loc="left", fontsize=10)
    first = rows[0]
    figure.suptitle(f"{first['device']}, {first['dtype']}, torch {first['versions']['torch']}, {first['commit']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(out: Path, quick: bool) -> None:
    where, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if where == "cuda" else CPU_SHAPES
    rows: list[dict] = []
    for shape in shapes:
        if chosen(shape.name):
            rows += measure(shape, where, dtype, quick)
            path = write(rows, out, "token_logprobs")
            plot([json.loads(line) for line in path.read_text().splitlines()], path.with_suffix(".png"))
        if shape is shapes[0] and chosen(f"{shape.name}, chunk_rows"):
            chunks = sweep(shape, where, dtype, quick)
            write(chunks, out, "token_logprobs_chunks")
            show(chunks)
    show(rows)

"""token_logprobs, forward and backward, compared with plain PyTorch and with other implementations in one run.

Cases, by name (`--case`):

- 2 pairs, Shapes, and on a GPU 7B, 1B: the two-layer head of Janus, frozen. `official` is the usual training code, with
  logits of all positions (text included), shift, log-softmax, gather and mask.
- linear (on a GPU: linear 7B), text head: frozen heads of one layer, with peers. On a CPU the text head has few rows,
  for which torch advises against its chunks, so these are not measured there.
- linear, trained; text head, trained; 2 pairs, trained: all weights have gradients.
- linear, entropy, also trained: with entropies as a metric, in the loss, and not at all.
- linear, soft-cap: with temperature and soft-capping.
- dispatch: time of a call with one row beyond that of its matrix products.
- chunk_rows: several chunk_rows at the first shape.

`eager` keeps all logits. `bare GEMMs` are the matrix products that every implementation with gradients needs. A peer
that is not installed, or that fails, is skipped with its reason. `_logprob_variants.py` has the implementations,
`_logprob_dispatch.py` the dispatch.

Errors are those of 64 rows against float64, relative to the largest exact value (of a loss: to Σ|weight·ℓ|), at logits
of the usual size and up to 50. Those of this package are checked: at most twice those of eager, plus rounding. Errors
of peers are shown. That of cut-cross-entropy and of Liger's scaled cross entropy is for a head without bias. `share` is
the floor (the products at the measured limit of this device) over the time. `over_eager`, `memory_over_eager` and
`rss_over_eager` compare with plain PyTorch with the same results. On a CPU `rss_mb` is the growth of a new process
(`_peak_rss.py`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _logprob_variants as variants_of
import torch
import torch.nn.functional as F
from _logprob_dispatch import dispatch
from _logprob_variants import Objective, Variant, bare_gemms, official
from _measure import (
    Prepared,
    ceilings,
    chosen,
    dtype_name,
    given_sizes,
    grown_memory,
    interleaved,
    peak_mb,
    row,
    show,
    write,
)

import ospo_fast
from ospo_fast.ops._logprob_call import default_chunk_rows

HERE = Path(__file__).resolve().parent
TEXT = 24  # positions of the prompt before each image
Step = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """Rows N (pairs × 2 × image tokens), width D, codes V; `mlp`: the head is Janus' Linear-GELU-Linear."""

    name: str
    N: int
    D: int
    V: int
    mlp: bool = True
    tokens: int = 576  # per image; 0: no images and no text between them
    trained: bool = False  # the head's weights have gradients
    task: str = ""  # "entropy", "softcap"; otherwise log-probabilities alone

    @property
    def sizes(self) -> dict[str, int]:
        """Return the shapes of a row; `linear` marks a head of one layer, others what the case measures."""
        marks = {"linear": not self.mlp, "trained": self.trained, self.task: bool(self.task)}
        return {"N": self.N, "D": self.D, "V": self.V} | {name: 1 for name, marked in marks.items() if marked}

    def tflop(self, needs_grad: bool = True) -> float:
        """Return the TFLOP of the GEMMs: forward, and the gradients of the hidden states and of a trained head."""
        products = 1 if not needs_grad else 3 if self.trained else 2
        return 2 * products * self.N * self.D * (self.V + self.D * self.mlp) / 1e12


def family(base: Shape, *tasks: str) -> list[Shape]:
    """Return `base` with a trained head and with each task; the entropy also with a trained head."""
    trained = replace(base, name=f"{base.name}, trained", trained=True)
    found = [trained]
    for task in tasks:
        name = f"{base.name}, {'soft-cap' if task == 'softcap' else task}"
        found.append(replace(base, name=name, task=task))
        if task == "entropy":
            found.append(replace(trained, name=f"{name}, trained", task=task))
    return found


TASKS = "entropy", "softcap"
CPU_PAIRS = Shape("2 pairs", 2304, 512, 16384)
CPU_LINEAR = Shape("linear", 2304, 512, 16384, mlp=False, tokens=0)
CPU_TEXT = Shape("text head", 256, 512, 128256, mlp=False, tokens=0)
CPU_SHAPES = [
    CPU_PAIRS,
    Shape("Shapes", 1152, 128, 256),
    *family(CPU_PAIRS),
    *(CPU_LINEAR, *family(CPU_LINEAR, *TASKS)),
    *(CPU_TEXT, *family(CPU_TEXT)),
]
GPU_TEXT = Shape("text head", 8192, 4096, 128256, mlp=False, tokens=0)
GPU_SHAPES = [
    Shape("7B", 18432, 4096, 16384),  # Janus-Pro-7B, 16 pairs
    Shape("linear 7B", 18432, 4096, 16384, mlp=False),  # the head that the peers take
    Shape("1B", 18432, 2048, 16384),  # Janus-Pro-1B, 16 pairs
    GPU_TEXT,
    Shape("Shapes", 1152, 128, 256),  # the world of shapes
    *family(Shape("linear", 18432, 4096, 16384, mlp=False, tokens=0), *TASKS),
    *family(GPU_TEXT),
]
QUICK_LINEAR = Shape("quick linear", 40, 16, 64, mlp=False, tokens=0)
QUICK_SHAPES = [Shape("quick", 64, 16, 97, tokens=32), QUICK_LINEAR, *family(QUICK_LINEAR, *TASKS)]
# For the first shape: little memory, about a third of its rows, full waves of tiles on 132 SMs, half of its rows.
GPU_CHUNKS = (2304, 6144, 6272, 7296, 8448, 9216)
TINY = {"N": 8, "D": 8, "V": 32, "tokens": 0}


def shapes_of(where: str, quick: bool) -> list[Shape]:
    return QUICK_SHAPES if quick else GPU_SHAPES if where == "cuda" else CPU_SHAPES


def device_and_dtype() -> tuple[str, torch.dtype]:
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


# ---------------------------------------------------------------- inputs and steps


def make_head(shape: Shape, where: str, dtype: torch.dtype) -> ospo_fast.Head:
    D, V = shape.D, shape.V
    sizes = ((V, D), (V,), (D, D), (D,)) if shape.mlp else ((V, D),)
    tensors = ((torch.randn(size, device=where) * D**-0.5).to(dtype) for size in sizes)
    return ospo_fast.Head(*(tensor.requires_grad_(shape.trained) for tensor in tensors))


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


def trained_tensors(head: ospo_fast.Head) -> list[torch.Tensor]:
    return [tensor for tensor in head.tensors if tensor is not None and tensor.requires_grad]


def make_step(objective: Objective, head: ospo_fast.Head, needs_grad: bool = True) -> Step:
    """Make a step from hidden states, labels and token weights to the gradients, of hidden states and trained head."""

    def step(hidden: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, *_: torch.Tensor) -> Any:
        loss, _results = objective(hidden, head, labels, scale)
        return torch.autograd.grad(loss, [hidden, *trained_tensors(head)])

    def forward(hidden: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, *_: torch.Tensor) -> Any:
        with torch.no_grad():
            return objective(hidden, head, labels, scale)

    return step if needs_grad else forward


def variants_for(shape: Shape, compiled: bool = False) -> dict[str, Variant]:
    """Return what is compared, without peers."""
    if shape.task == "softcap":
        return variants_of.softcap_variants()
    if shape.task == "entropy":
        return variants_of.entropy_variants(shape.trained)
    found = variants_of.logps_variants(shape.trained, compiled)
    if shape.mlp and shape.trained:
        del found["torch"]  # compared with the frozen head
    return found


def peers_for(shape: Shape, where: str) -> dict[str, Variant]:
    """Return the peers of a case: on a CPU those with a head of one layer, since each takes seconds."""
    cuda = where == "cuda"
    if shape.task == "softcap" or (shape.mlp and (shape.trained or not cuda)):
        return {}
    if shape.task == "entropy":
        return variants_of.entropy_peers(cuda)
    return variants_of.logps_peers(cuda, torch_chunks=shape.N >= shape.D)


def steps(case: str, variant: str, quick: bool) -> tuple[Step, Step]:
    """Return a tiny step and the step of a case (`_peak_rss.py`)."""
    where, dtype = device_and_dtype()
    (shape,) = (shape for shape in shapes_of(where, quick) if shape.name == case)
    found = []
    for size in (replace(shape, **TINY), shape):
        (chosen_variant,) = (v for n, v in (variants_for(size) | peers_for(size, where)).items() if n == variant)
        step = make_step(chosen_variant.objective, make_head(size, where, dtype), chosen_variant.needs_grad)
        found.append(functools.partial(step, *make_inputs(size, where, dtype)()))
    return found[0], found[1]


# ---------------------------------------------------------------- errors


def errors(
    variant: Variant, head: ospo_fast.Head, arguments: Sequence[torch.Tensor], largest: float | None
) -> dict[str, float]:
    """Return relative errors of results and gradients against float64, with logits scaled up to `largest`."""
    assert variant.exact is not None
    hidden, labels, scale = (x[:64].detach() for x in arguments[:3])
    factor = 1.0 if largest is None else largest / float(head(hidden).detach().abs().max())
    weight, bias, *rest = (None if tensor is None else tensor.detach() for tensor in head.tensors)
    tensors = weight * factor, None if bias is None else bias * factor, *rest

    def compute(objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor], Sequence[torch.Tensor]]:
        x = hidden.clone().requires_grad_(variant.needs_grad)
        own = (None if t is None else t.clone().requires_grad_(head.trainable and variant.needs_grad) for t in tensors)
        copy = ospo_fast.Head(*own)
        loss, results = objective(x, copy, labels, scale)
        gradients = torch.autograd.grad(loss, [x, *trained_tensors(copy)]) if variant.needs_grad else ()
        return loss.detach(), {name: tensor.detach() for name, tensor in results.items()}, gradients

    loss, results, gradients = compute(variant.objective)
    exact_loss, exact, exact_gradients = compute(variant.exact)

    def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
        return float((actual.double() - expected).abs().max() / expected.double().abs().max())

    found = {name: relative(results[name], exact[name]) for name in results}
    found["loss"] = float((loss.double() - exact_loss).abs() / (exact["values"] * scale).abs().sum())
    pairs = [relative(*pair) for pair in zip(gradients, exact_gradients, strict=True)]
    if pairs:
        found["gradients"] = pairs[0]
    if len(pairs) > 1:
        found["weight_gradients"] = max(pairs[1:])
    return found


def error_metrics(name: str, variant: Variant, head: ospo_fast.Head, arguments) -> dict[str, float]:
    """Return the errors as metrics of a row: error_values, error_gradients, … and with _50 at logits up to 50."""
    if variant.exact is None:
        return {}
    if name.partition(", entropy")[0] in variants_of.WITHOUT_BIAS:
        head = ospo_fast.Head(head.weight, None, head.proj_weight, head.proj_bias)
    sizes = {"": None, "_50": 50.0}
    return {
        f"error_{key}{suffix}": float(f"{value:.3g}")
        for suffix, largest in sizes.items()
        for key, value in errors(variant, head, arguments, largest).items()
    }


def working_peers(
    shape: Shape, where: str, head: ospo_fast.Head, arguments: tuple[torch.Tensor, ...]
) -> tuple[dict[str, Variant], dict[str, dict[str, float]]]:
    """Return the peers that are installed and support this shape, and their errors; print why others are skipped."""
    peers, errors_of = {}, {}
    for name, peer in peers_for(shape, where).items():
        step = make_step(peer.objective, head)
        try:
            step(*arguments)
            errors_of[name] = error_metrics(name, peer, head, arguments)
        except Exception as error:  # an error of a peer does not stop the benchmark
            missing = isinstance(error, ModuleNotFoundError)
            remedy = "; run: pip install 'ospo-fast[bench]'" if missing else ""
            first = str(error).splitlines()[0] if str(error) else ""
            print(f"{name} is skipped: {type(error).__name__}: {first}{remedy}")
        else:
            peers[name] = peer
    return peers, errors_of


def check(ours: Mapping[str, float], reference: Mapping[str, float], dtype: torch.dtype) -> None:
    """Check that our error is at most twice that of the eager computation, plus rounding."""
    rounding = 4 * torch.finfo(torch.float32).eps
    for name, error in ours.items():
        floor = torch.finfo(dtype).eps if "gradients" in name else rounding
        assert error <= 2 * reference[name] + floor, (name, ours, reference)


# ---------------------------------------------------------------- measuring


def default_rows(shape: Shape, dtype: torch.dtype, where: str) -> int:
    return default_chunk_rows(shape.V, dtype.itemsize, where)


def resident_memory(shape: Shape, names: Sequence[str], where: str, quick: bool) -> dict[str, dict[str, float]]:
    """Measure the resident memory of heads of one layer on a CPU; if `quick`, of two variants of a trained head."""
    if where != "cpu" or shape.mlp or shape.task or (quick and not shape.trained):
        return {}
    names = ("ospo_fast", "eager") if quick else [name for name in names if name != "compiled eager"]
    grown = {name: grown_memory("token_logprobs", shape.name, name, quick) for name in names}
    return {name: {key: value for key, value in found.items() if key != "ms"} for name, found in grown.items()}


def times_of_passes(
    variants: Mapping[str, Variant],
    head: ospo_fast.Head,
    inputs: Callable[[], tuple[torch.Tensor, ...]],
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Time forward and backward apart: forward_ms and backward_ms, medians, of each variant with gradients."""
    timed: dict[str, Step] = {}
    for name, variant in variants.items():
        if not variant.needs_grad:
            continue

        def forward(hidden, labels, scale, *_, objective=variant.objective) -> tuple[torch.Tensor, torch.Tensor]:
            return objective(hidden, head, labels, scale)[0], hidden

        def backward(loss: torch.Tensor, hidden: torch.Tensor) -> object:
            return torch.autograd.grad(loss, [hidden, *trained_tensors(head)])

        timed[f"forward {name}"] = forward
        timed[f"backward {name}"] = Prepared(forward, backward)
    found: dict[str, dict[str, float]] = {}
    for name, timing in interleaved(timed, inputs, **options).items():
        which, _, variant = name.partition(" ")
        found.setdefault(variant, {})[f"{which}_ms"] = round(timing.median_ms, 6)
    return found


def ratio(one: float, two: float) -> float:
    return round(one / two, 4)


def measure(shape: Shape, where: str, dtype: torch.dtype, quick: bool) -> list[dict]:
    torch.manual_seed(0)  # the same errors in every run
    limits, head, inputs = ceilings(), make_head(shape, where, dtype), make_inputs(shape, where, dtype)
    arguments = inputs()
    variants = variants_for(shape, compiled=not (quick or shape.trained or shape.task))
    errors_of = {name: error_metrics(name, variant, head, arguments) for name, variant in variants.items()}
    for name, variant in variants.items():
        if variant.ours:
            check(errors_of[name], errors_of[variant.against], dtype)
    peers, errors_of_peers = working_peers(shape, where, head, arguments)
    variants, errors_of = variants | peers, errors_of | errors_of_peers

    timed = {name: make_step(variant.objective, head, variant.needs_grad) for name, variant in variants.items()}
    if shape.tokens and not shape.trained:
        official_step = make_step(variants_of.per_token(official), head)
        timed["official"] = lambda *arguments: official_step(*arguments[3:])
    # In the same chunks, and with all rows at once, where a GEMM can be faster.
    for name, size in (("bare GEMMs", default_rows(shape, dtype, where)), ("bare GEMMs, one chunk", shape.N)):
        timed[name] = lambda hidden, *_, size=size: bare_gemms(hidden, head, size)
    # On a GPU, 50 turns of a large shape take half a second for the fastest variant and a minute for all. On a CPU, a
    # turn with peers takes 20 seconds.
    turns = 5 if where == "cpu" and peers else 50 if where == "cuda" and shape.tflop() > 0.1 else 300
    seconds = 0.02 if quick else 5.0 if where == "cpu" else 1.0
    times = interleaved(timed, inputs, seconds=seconds, max_turns=turns)
    # Of given sizes only: it doubles the time of a run.
    apart = times_of_passes(variants, head, inputs, seconds=seconds, max_turns=turns) if given_sizes() else {}
    peaks = {name: round(peak_mb(step, *arguments), 3) for name, step in timed.items()}
    grown = resident_memory(shape, list(variants), where, quick)

    rows = []
    for name, timing in times.items():
        variant = variants.get(name, Variant(bare_gemms, None))
        tflop, ms = shape.tflop(variant.needs_grad), timing.median_ms
        more: dict[str, Any] = {"peak_mb": peaks[name], **grown.get(name, {}), "tflop_s": round(tflop / ms * 1e3, 4)}
        more["over_eager"] = ratio(ms, times[variant.against].median_ms)
        more["memory_over_eager"] = ratio(peaks[name], peaks[variant.against])
        if grown.get(name) and grown.get(variant.against, {}).get("rss_mb"):
            more["rss_over_eager"] = ratio(grown[name]["rss_mb"], grown[variant.against]["rss_mb"])
        if "official" in times:
            more["over_official"] = ratio(ms, times["official"].median_ms)
        if variant.needs_grad:
            more["over_bare_gemms"] = ratio(ms, times["bare GEMMs"].median_ms)
        if (without := name.partition(", entropy")[0]) != name and without in times:
            more["over_without_entropy"] = ratio(ms, times[without].median_ms)
        more |= limits.metrics(limits.floor_ms(flop=tflop * 1e12), timing)
        more |= {"note": variant.note} if variant.note else {}
        more |= apart.get(name, {}) | errors_of.get(name, {})
        rows.append(row("token_logprobs", name, shape.sizes, dtype_name(dtype), timing, **more))
    return rows


def sweep(shape: Shape, where: str, dtype: torch.dtype, quick: bool) -> list[dict]:
    """Measure time and peak memory for several chunk_rows, including the default."""
    head, default = make_head(shape, where, dtype), default_rows(shape, dtype, where)
    tried = [int(default * factor) for factor in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2, 4)]
    if where == "cuda":
        tried = [*GPU_CHUNKS, default, shape.N]
    sizes = sorted({min(size, shape.N) for size in tried})
    functions = {size: functools.partial(ospo_fast.token_logprobs, chunk_rows=size) for size in sizes}
    timed = {size: make_step(variants_of.per_token(function), head) for size, function in functions.items()}
    inputs = make_inputs(shape, where, dtype)
    times, arguments = interleaved(timed, inputs, seconds=0.02 if quick else 1.0, max_turns=100), inputs()
    return [
        row(
            "token_logprobs",
            f"{size} rows" + (" (default)" if size == default else ""),
            shape.sizes,
            dtype_name(dtype),
            timing,
            peak_mb=round(peak_mb(timed[size], *arguments), 3),
            chunk_rows=size,
        )
        for size, timing in times.items()
    ]


# ---------------------------------------------------------------- goals and plot


@dataclass(frozen=True)
class Goal:
    """An upper limit of a metric of a variant, or of its ratio to that of another variant of the same case."""

    case: str
    variant: str
    key: str
    at_most: float
    over: str = ""

    def line(self, measured: Mapping[str, list[dict]]) -> str:
        """Return the goal and whether it is reached, "" if it was not measured."""
        rows = {row["variant"]: row for row in measured.get(self.case, [])}
        names = [name for name in (self.variant, self.over) if name]
        if any(name not in rows or self.key not in rows[name] for name in names):
            return ""
        value = rows[self.variant][self.key] / (rows[self.over][self.key] if self.over else 1)
        over = f" over {self.over}" if self.over else ""
        state = "reached" if round(value, 3) <= self.at_most else "missed"
        return f"{self.case}: {self.key} of {self.variant}{over}: {value:.3f}, goal ≤ {self.at_most:g}: {state}"


PER_TOKEN = f"{variants_of.TORCH}, per token"
CPU_GOALS = (
    Goal("linear", "ospo_fast", "median_ms", 0.9, "eager"),
    Goal("linear", "ospo_fast", "median_ms", 0.4, "TRL"),
    Goal("linear", "ospo_fast", "median_ms", 0.3, PER_TOKEN),
    Goal("linear, trained", "ospo_fast", "median_ms", 1.05, "eager"),
    Goal("linear, trained", "ospo_fast", "peak_mb", 0.5, "eager"),
    Goal("linear, trained", "ospo_fast", "rss_mb", 0.5, "eager"),
    Goal("linear", "ospo_fast", "rss_mb", 180),
    Goal("linear, trained", "ospo_fast", "rss_mb", 180),
    *(
        Goal("linear, entropy" + trained, f"{name}, {kind}", "median_ms", 1.05, name)
        for trained in ("", ", trained")
        for name, kind in (
            ("ospo_fast", "entropy as metric"),
            ("ospo_fast", "entropy in the loss"),
            ("ospo_fast", "entropy in the loss, keep_logits=True"),
            ("ospo_fast, no grad", "entropy"),
        )
    ),
    *(
        Goal("dispatch", f"{kind}, {head}", "overhead_us", 15)
        for kind in ("no grad", "forward", "forward and backward")
        for head in ("module", "Head")
    ),
)


def given_shapes() -> list[Shape]:
    """Return the shape of --N, --D, --V and --model, with the two-layer head of Janus; nothing without them."""
    if not (sizes := given_sizes()):
        return []
    tokens = sizes.pop("tokens")
    return [Shape("given sizes", **sizes, tokens=tokens if sizes["N"] % tokens == 0 else 0)]


def run(out: Path, quick: bool) -> None:
    where, dtype = device_and_dtype()
    given = given_shapes()
    shapes = given or shapes_of(where, quick)
    measured: dict[str, list[dict]] = {}

    def keep(case: str, rows: list[dict]) -> None:
        measured[case] = rows
        write([row for rows in measured.values() for row in rows], out, "token_logprobs")

    for shape in shapes:
        if chosen(shape.name):
            keep(shape.name, measure(shape, where, dtype, quick))
        if shape is shapes[0] and not given and chosen(f"{shape.name}, chunk_rows"):
            chunks = sweep(shape, where, dtype, quick)
            write(chunks, out, "token_logprobs_chunks")
            show(chunks)
    if not given and chosen("dispatch"):
        keep("dispatch", dispatch(where, dtype, quick))
    show([row for rows in measured.values() for row in rows])
    if where == "cpu" and not quick:
        print("\n".join(filter(None, (goal.line(measured) for goal in CPU_GOALS))))

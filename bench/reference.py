"""The official code, a checkout of KU-AGI/OSPO, next to this package: differences, times and memory on the same inputs.

    ospo-fast bench --reference PATH

Inputs are random from a fixed seed. Differences are those of this package in fp32 from the official function in fp64,
relative to its largest value, next to the difference of the official function in fp32 from itself in fp64. Token masks
and pairs are counted. The official code fixes a grid of 24 × 24, so images have 576 tokens at every size.
"""

import functools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _official as official
import _source
import torch
from _measure import (
    Prepared,
    commit,
    device,
    dtype_name,
    interleaved,
    peak_mb,
    result_path,
    row,
    write,
)
from torch import nn

import ospo_fast
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.ops.object_masks import ObjectMasks, soft_masks
from ospo_fast.ops.token_weights import spread_weights
from ospo_fast.records import write_json

ROUNDING = 2e-6  # of fp32 against fp64, relative to the largest value
TEXT = 24  # positions of the prompt before each image
TOKENS = official.GRID**2
SKIPPED = (0, 3)  # layers that the masks leave out
COEFFICIENTS = {"beta": 5.0, "gamma_beta_ratio": 0.5, "beta_cond": 3.0, "gamma_beta_ratio_cond": 0.3}
WEIGHTS = {"simpo_weight": 1.0, "sft_weight": 2.0}
RECORDS = 1000
MAX_SECONDS = 40.0  # of the timing of an operation; at least three turns
QUICK = {"N": 2 * TOKENS, "D": 16, "V": 97}


@dataclass(frozen=True)
class Check:
    """A comparison: the largest difference, or the number of different cells or pairs, and what is allowed."""

    name: str
    difference: float
    tolerance: float
    official_fp32: float | None = None  # of the official function in fp32 from itself in fp64
    unit: str = ""
    reason: str = ""  # why it could not be run

    @property
    def passed(self) -> bool:
        """Return whether the difference is within the tolerance; a NaN is not."""
        return not self.reason and self.difference <= self.tolerance

    def line(self) -> str:
        """Return the line of the table."""
        if self.reason:
            return f"{self.name:<52} FAILED: {self.reason}"
        value = f"{self.difference:g} {self.unit}" if self.unit else f"{self.difference:.1e}"
        limit = f"{self.tolerance:g}"
        theirs = "-" if self.official_fp32 is None else f"{self.official_fp32:.1e}"
        return f"{self.name:<52}{value:>18}{limit:>12}{theirs:>16}  {'ok' if self.passed else 'FAILED'}"


# ---------------------------------------------------------------- inputs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class GenerationHead(nn.Module):
    """Compute logits as the generation head of Janus does: Linear, GELU, Linear."""

    def __init__(self, D: int, V: int, random_: torch.Generator) -> None:
        super().__init__()
        shapes = ((D, D), (D,), (V, D), (V,))
        self.tensors = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=random_) * D**-0.5, requires_grad=False) for shape in shapes
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (..., V)."""
        proj, proj_bias, weight, bias = self.tensors
        features = nn.functional.gelu(nn.functional.linear(x, proj, proj_bias))
        return nn.functional.linear(features, weight, bias)

    def ours(self) -> ospo_fast.Head:
        """Return the same head for this package."""
        proj, proj_bias, weight, bias = (t.detach() for t in self.tensors)
        return ospo_fast.Head(weight, bias, proj, proj_bias)


@dataclass(frozen=True)
class Batch:
    """Hidden states (rows, S, D), labels (rows, S) unshifted, masks (rows, GRID, GRID) and a head."""

    hidden: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    head: GenerationHead

    @classmethod
    def make(cls, rows: int, D: int, V: int, seed: int = 0) -> "Batch":
        """Make random inputs on the CPU, so that every device gets the same ones."""
        g = generator(seed)
        head = GenerationHead(D, V, g)
        hidden = torch.randn(rows, TEXT + TOKENS, D, generator=g)
        labels = torch.randint(V, (rows, TEXT + TOKENS), generator=g)
        labels[:, :TEXT] = -100
        masks = torch.zeros(rows, official.GRID, official.GRID, dtype=torch.uint8)
        for mask in masks:  # an object: a rectangle; the last row has none
            top, left, height, width = torch.randint(3, 12, (4,), generator=g).tolist()
            mask[top : top + height, left : left + width] = 1
        masks[-1] = 0
        return cls(hidden, labels, masks, head)

    def to(self, device: str, dtype: torch.dtype) -> "Batch":
        """Return copies."""
        head = GenerationHead(1, 1, generator())
        head.tensors = nn.ParameterList(
            nn.Parameter(t.to(device, dtype), requires_grad=False) for t in self.head.tensors
        )
        return Batch(self.hidden.to(device, dtype, copy=True), self.labels.to(device), self.masks.to(device), head)

    def first(self, rows: int) -> "Batch":
        """Return the first rows."""
        return Batch(self.hidden[:rows], self.labels[:rows], self.masks[:rows], self.head)


@dataclass(frozen=True)
class Attention:
    """Queries and keys (layers, heads, S, D) and the columns (objects, C) of each object's tokens."""

    q: torch.Tensor
    k: torch.Tensor
    columns: torch.Tensor
    prompt: int

    @classmethod
    def make(cls, layers: int, heads: int, D: int, seed: int = 0) -> "Attention":
        """Make random queries and keys."""
        g = generator(seed)
        q, k = (torch.randn(layers, heads, TEXT + TOKENS, D, generator=g) * 1.5 for _ in range(2))
        return cls(q, k, torch.tensor([[3, 4], [7, -1], [9, 12]]), TEXT)

    def to(self, device: str) -> "Attention":
        """Return copies."""
        return Attention(self.q.to(device), self.k.to(device), self.columns.to(device), self.prompt)

    def ours(self) -> ObjectMasks:
        """Return maps, thresholds and masks of this package."""
        kept = [layer for layer in range(len(self.q)) if layer not in SKIPPED]
        maps = torch.zeros(1, len(self.columns), TOKENS, device=self.q.device)
        for layer in kept:
            q, k = self.q[layer : layer + 1], self.k[layer : layer + 1]
            ospo_fast.attention_columns(
                q, k, self.columns[None], rows=(self.prompt, TOKENS), out=maps, weight=1 / len(kept)
            )
        return ospo_fast.object_masks(maps.view(1, -1, official.GRID, official.GRID))

    def official(self, functions: Any, attentions: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return maps and masks of process_attn, which takes the attention probabilities of all layers."""
        found = [
            functions.process_attn(attentions, self.prompt, span, list(SKIPPED), official.GRID, scaler=0.8)
            for span in official.spans_of(self.columns)
        ]
        return torch.stack([maps for maps, _ in found]), torch.stack([torch.as_tensor(mask) for _, mask in found])


def vqa_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Make records in the official VQA format: 15% of the images are missing, and some scores are equal.

    As in official files, an entry has the place of its file among those that exist.
    """
    rng = random.Random(seed)

    def image(side: str, index: int) -> dict[str, Any]:
        answers = []
        for _ in range(rng.randint(1, 4)):
            p_yes = rng.choice((0.5, 1.0, rng.random(), 1 - rng.random() / 5))
            p_no = rng.choice((1 - p_yes, (1 - p_yes) * rng.random()))
            answer = "yes" if p_yes > p_no else "no" if p_yes < p_no else "tie"
            answer = answer.capitalize() if index == 1 else answer  # the official code ignores case
            answers.append({"p_yes": p_yes, "p_no": p_no, "answer": answer})
        score = sum(a["p_yes"] - a["p_no"] for a in answers) / len(answers)
        path = f"images/{side}/attribute/0000000/{index:02d}.png"
        return {
            "path": path,
            "local_score": round(score, 1) if rng.random() < 0.5 else score,
            "answer_metadata": answers,
        }

    def record() -> dict[str, Any]:
        sides = {}
        for side in ("base", "negative"):
            present = [i for i in range(3) if rng.random() < 0.85]
            sides[f"{side}_metadata"] = {f"{side}_{place}": image(side, i) for place, i in enumerate(present)}
        return {"item_id": "0000000", "negative_prompt": ["a", "b", "c"], **sides}

    return [record() for _ in range(count)]


# ---------------------------------------------------------------- parity


def largest(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest difference relative to the largest exact value."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    return float((actual - exact).abs().max() / exact.abs().max())


def check_values(name: str, ours: list[torch.Tensor], exact: list[torch.Tensor], fp32: list[torch.Tensor]) -> Check:
    """Compare tensors with those of the official function in fp64, and its own in fp32."""
    # max of torch returns a NaN that any of them has.
    differences = torch.tensor([largest(a, b) for a, b in zip(ours, exact, strict=True)], dtype=torch.float64)
    theirs = torch.tensor([largest(a, b) for a, b in zip(fp32, exact, strict=True)], dtype=torch.float64)
    return Check(name, float(differences.max()), ROUNDING, float(theirs.max()))


def gradient(values: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    coefficients = torch.linspace(-1, 1.5, values.numel(), dtype=values.dtype, device=values.device)
    return list(torch.autograd.grad((values.flatten() * coefficients).sum(), inputs))


def our_logps(batch: Batch, weighted: bool) -> torch.Tensor:
    """Return the mean log-probability of each row's image, weighted by its masks."""
    targets = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=-100)
    present = targets != -100
    logps = ospo_fast.token_logprobs(batch.hidden, batch.head.ours(), targets)
    weights = spread_weights(ospo_fast.token_weights(batch.masks), present) if weighted else None
    return ospo_fast.sequence_logprobs(logps, present, weights)


def compare_logps(checkout: official.Checkout, part: str, base: Batch, where: str) -> Iterator[Check]:
    weighted = part == "object weights"

    def theirs(dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
        batch = base.to("cpu", dtype)
        batch.hidden.requires_grad_()
        wrapper = checkout.wrapper(part)
        found = official.batch_logps(wrapper, batch.head(batch.hidden), batch.labels, batch.masks if weighted else None)
        return found, gradient(found, batch.hidden)

    batch = base.to(where, torch.float32)
    batch.hidden.requires_grad_()
    ours = our_logps(batch, weighted)
    exact, fp32 = theirs(torch.float64), theirs(torch.float32)
    name = "weighted log-probabilities" if weighted else "log-probabilities"
    yield check_values(name, [ours], [exact[0]], [fp32[0]])
    yield check_values(f"{name}, gradient", gradient(ours, batch.hidden), exact[1], fp32[1])
    if weighted:
        for gamma in (1.0, 0.5):
            exact_weights = official.object_weights(
                checkout.wrapper(part, mask_alpha=0.7, mask_gamma=gamma), base.masks
            )
            weights = ospo_fast.token_weights(base.masks.to(where), alpha=0.7, gamma=gamma)
            yield Check(f"token weights, alpha 0.7, gamma {gamma:g}", largest(weights, exact_weights), ROUNDING)


def compare_preference(checkout: official.Checkout, part: str, where: str) -> Iterator[Check]:
    conditional = part == "conditional loss"
    inputs = [-torch.rand(64, generator=generator(1)) * 5 for _ in range(3 if conditional else 2)]
    inputs = [x + torch.linspace(-0.5, 0.5, 64) * i for i, x in enumerate(inputs)]
    for smoothing in (0.0, 0.1):
        settings = {**COEFFICIENTS, "label_smoothing": smoothing}

        def theirs(
            dtype: torch.dtype, settings: dict[str, float] = settings
        ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            groups = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
            swapped = groups[2] if conditional else None
            wrapper = checkout.wrapper(part, conditional=conditional, **settings)
            terms = [t for t in official.preference(wrapper, *groups[:2], swapped) if t is not None]
            return terms, gradient(torch.stack(terms), *groups)

        groups = [x.to(where, copy=True).requires_grad_() for x in inputs]
        options = settings if conditional else {k: v for k, v in settings.items() if not k.endswith("_cond")}
        found = ospo_fast.preference_loss(*groups, **options)
        terms = [found.simpo, found.conditional] if conditional else [found.simpo]
        exact, fp32 = theirs(torch.float64), theirs(torch.float32)
        name = "SimPO and conditional terms" if conditional else "SimPO terms"
        name += f", smoothing {smoothing:g}"
        yield check_values(name, terms, exact[0], fp32[0])
        yield check_values(f"{name}, gradient", gradient(torch.stack(terms), *groups), exact[1], fp32[1])


@dataclass(frozen=True)
class Loss:
    """The total loss of a checkout: with masks or without, with the conditional term or without."""

    checkout: official.Checkout
    masked: bool
    conditional: bool

    @classmethod
    def from_checkout(cls, checkout: official.Checkout) -> "Loss":
        """Read from the arguments of its training wrapper what it has."""
        methods = vars(checkout.functions["total loss"])
        arguments = {name: methods[name].__code__.co_varnames for name in ("get_batch_logps", "simpo_loss")}
        return cls(checkout, "token_masks" in arguments["get_batch_logps"], official.SWAPPED in arguments["simpo_loss"])

    @property
    def groups(self) -> int:
        """Return the number of rows for a pair."""
        return 3 if self.conditional else 2

    @property
    def name(self) -> str:
        """Return what is in the loss."""
        terms = "SimPO, conditional, SFT" if self.conditional else "SimPO, SFT"
        return f"loss ({terms}{', object weights' if self.masked else ''})"

    @property
    def settings(self) -> dict[str, float]:
        """Return the coefficients; those of the conditional term are for both or neither."""
        kept = {k: v for k, v in COEFFICIENTS.items() if self.conditional or not k.endswith("_cond")}
        return {**kept, **WEIGHTS, **({"cond_weight": 0.5} if self.conditional else {})}

    def theirs(self, batch: Batch) -> torch.Tensor:
        """Return the official loss."""
        options = {"conditional": self.conditional, "use_mask": self.masked, **self.settings}
        wrapper = self.checkout.wrapper("total loss", batch.hidden.device, **options)
        pairs = len(batch.hidden) // self.groups
        masks = batch.masks[: 2 * pairs] if self.masked else None
        return official.total_loss(wrapper, batch.hidden, batch.labels, batch.head, masks)

    def ours(self, batch: Batch) -> torch.Tensor:
        """Return the loss of this package."""
        pairs = len(batch.hidden) // self.groups
        masks = batch.masks[: 2 * pairs] if self.masked else None
        loss = ospo_fast.OSPOLoss(ospo_fast.OSPOLossConfig(**self.settings))
        return loss(batch.hidden, batch.labels, batch.head.ours(), object_masks=masks).loss


def compare_loss(loss: Loss, base: Batch, where: str) -> Iterator[Check]:
    base = base.first(2 * loss.groups)

    def compute(
        function: Callable[[Batch], torch.Tensor], device: str, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        batch = base.to(device, dtype)
        batch.hidden.requires_grad_()
        found = function(batch)
        return [found], list(torch.autograd.grad(found, batch.hidden))

    ours = compute(loss.ours, where, torch.float32)
    exact, fp32 = (compute(loss.theirs, "cpu", dtype) for dtype in (torch.float64, torch.float32))
    yield check_values(loss.name, ours[0], exact[0], fp32[0])
    yield check_values(f"{loss.name}, gradient", ours[1], exact[1], fp32[1])


def compare_masks(checkout: official.Checkout, where: str) -> Iterator[Check]:
    functions, case = checkout.functions["object masks"], Attention.make(8, 4, 32)
    found = case.to(where).ours()
    maps, masks = case.official(functions, official.attention_maps(case.q, case.k))
    yield Check("attention maps (normalized)", largest(found.maps[0], maps), ROUNDING)
    flipped = int((found.masks[0].cpu() != masks).sum())
    yield Check(f"object masks, of {masks.numel()} cells", flipped, 0, unit="flipped")
    # From the same maps, so that thresholds and cells are those of the same values.
    given = torch.cat([maps, torch.rand(29, official.GRID, official.GRID, generator=generator(2)) ** 3])
    thresholds, cells = official.thresholds(functions, given)
    ours = ospo_fast.otsu_threshold(given.to(where)).cpu()
    yield Check(f"Otsu thresholds of {len(given)} maps", largest(ours, thresholds), 1.2e-7)
    flipped = int(((given > ours[:, None, None]) != cells.bool()).sum())
    yield Check(f"cells above them, of {cells.numel()}", flipped, 0, unit="flipped")
    if "soft masks" in checkout:
        soft = torch.stack([checkout.functions["soft masks"].attn_map_to_soft_mask(x, 0.8, 100.0) for x in maps])
        result = ospo_fast.object_masks(maps[None].to(where))
        yield Check("soft masks", largest(soft_masks(result, scaler=0.8)[0], soft), 1e-5)


def compare_pairs(checkout: official.Checkout) -> Iterator[Check]:
    select = checkout.functions["pair selection"].select_pair
    records, different, left = vqa_records(RECORDS), 0, 0
    for record in records:
        expected, found = select(record, mode="argmax_chosen"), ospo_fast.select_pair(record)
        left += expected is not None
        keys = () if expected is None or found is None else ("chosen", "rejected", "chosen_score", "rejected_score")
        different += (expected is None) != (found is None) or any(expected[k] != found[k] for k in keys)
    yield Check(f"selected pairs, {left} of {len(records)} records", different, 0, unit="different")


def parity(checkout: official.Checkout, where: str) -> Iterator[Check]:
    """Compare every function that the checkout has; one that fails is a comparison that fails."""
    base = Batch.make(6, 48, 211)
    comparisons: dict[str, Callable[[], Iterator[Check]]] = {
        "log-probabilities": lambda: compare_logps(checkout, "log-probabilities", base, where),
        "object weights": lambda: compare_logps(checkout, "object weights", base, where),
        "preference loss": lambda: compare_preference(checkout, "preference loss", where),
        "conditional loss": lambda: compare_preference(checkout, "conditional loss", where),
        "total loss": lambda: compare_loss(Loss.from_checkout(checkout), base, where),
        "object masks": lambda: compare_masks(checkout, where),
        "pair selection": lambda: compare_pairs(checkout),
    }
    for name, compare in comparisons.items():
        if name not in checkout:
            continue
        try:
            yield from compare()
        except Exception as error:  # of a version whose functions need what is not provided here
            words = " ".join(str(error).split())[:200]
            del checkout.functions[name]  # which is not timed either
            yield Check(name, float("nan"), 0, reason=f"{type(error).__name__}: {words}")


# ---------------------------------------------------------------- speed


def time_pair(
    op: str,
    variants: dict[str, Callable[..., object]],
    inputs: Callable[[], tuple[Any, ...]],
    shapes: dict[str, int],
    dtype: str,
    peaks: dict[str, float],
    quick: bool,
    **more: Any,
) -> list[dict[str, Any]]:
    """Time the variants in turns; a variant is named "ospo_fast" or "official", with its pass after a comma."""
    begin = time.perf_counter()  # of the warm-up
    for run in variants.values():
        run(*inputs())
    turns = int(MAX_SECONDS / (time.perf_counter() - begin))
    times = interleaved(variants, inputs, seconds=0.02 if quick else 1.0, warmup=0, max_turns=3 if quick else turns)
    rows = []
    for name, timing in times.items():
        who, comma, rest = name.partition(",")
        against = times[f"official{comma}{rest}"].median_ms
        memory = {"peak_mb": round(peaks[who], 3)} if who in peaks else {}
        found = {**memory, "over_official": round(timing.median_ms / against, 4), **more}
        rows.append(row(op, name, shapes, dtype, timing, **found))
    return rows


def time_loss(
    loss: Loss, sizes: dict[str, int], where: str, dtype: torch.dtype, quick: bool, reference: str
) -> list[dict[str, Any]]:
    pairs = sizes["N"] // (2 * TOKENS)
    made = Batch.make(pairs * loss.groups, sizes["D"], sizes["V"]).to(where, dtype)
    functions = {"official": loss.theirs, "ospo_fast": loss.ours}
    # Training with bf16 runs under autocast, which computes the log-softmax in fp32.
    autocast = functools.partial(torch.autocast, where, dtype, enabled=dtype == torch.bfloat16)

    def inputs() -> tuple[Batch]:
        return (Batch(made.hidden.detach().requires_grad_(), made.labels, made.masks, made.head),)

    def forward(batch: Batch, function: Callable[[Batch], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast():
            return function(batch), batch.hidden

    def backward(found: torch.Tensor, hidden: torch.Tensor) -> object:
        return torch.autograd.grad(found, hidden)

    variants: dict[str, Callable[..., object]] = {}
    for name, function in functions.items():
        run = functools.partial(forward, function=function)
        variants[f"{name}, forward"] = run
        both = variants[f"{name}, backward"] = Prepared(run, backward)
        variants[f"{name}, forward and backward"] = both.__call__
    peaks = {name: peak_mb(variants[f"{name}, forward and backward"], *inputs()) for name in functions}
    values = [float(forward(*inputs(), function=function)[0].detach()) for function in functions.values()]
    # At this size both are in the dtype of the run, so their difference is shown and not checked.
    difference = abs(values[1] - values[0]) / abs(values[0])
    more = {"reference": reference, "loss_difference": float(f"{difference:.3g}")}
    return time_pair(loss.name, variants, inputs, sizes, dtype_name(dtype), peaks, quick, **more)


def time_masks(functions: Any, where: str, quick: bool, reference: str) -> list[dict[str, Any]]:
    layers, heads, D = (4, 2, 16) if quick else (8, 8, 64)
    case = Attention.make(layers, heads, D).to(where)
    variants: dict[str, Callable[..., object]] = {
        # process_attn takes the attention maps of all layers, which eager attention makes.
        "official": lambda: case.official(functions, official.attention_maps(case.q, case.k)),
        "ospo_fast": case.ours,
    }
    peaks = {name: peak_mb(run) for name, run in variants.items()}
    shapes = {"layers": layers, "heads": heads, "S": case.q.shape[2], "D": D, "O": len(case.columns)}
    rows = time_pair("queries and keys to masks", variants, tuple, shapes, "fp32", peaks, quick, reference=reference)
    maps = torch.rand(8 if quick else 64, official.GRID, official.GRID, generator=generator(3)).to(where)
    variants = {
        "official": lambda: [functions.attn_map_to_binary(x, scaler=0.8) for x in maps],
        "ospo_fast": lambda: ospo_fast.object_masks(maps[None]),
    }
    return rows + time_pair(
        "maps to masks", variants, tuple, {"maps": len(maps)}, "fp32", {}, quick, reference=reference
    )


def time_selection(functions: Any, quick: bool, reference: str) -> list[dict[str, Any]]:
    records = vqa_records(50 if quick else RECORDS)
    variants: dict[str, Callable[..., object]] = {
        "official": lambda: [functions.select_pair(record, mode="argmax_chosen") for record in records],
        "ospo_fast": lambda: [ospo_fast.select_pair(record) for record in records],
    }
    shapes = {"records": len(records)}
    return time_pair("pair selection", variants, tuple, shapes, "-", {}, quick, reference=reference)


def speed(
    checkout: official.Checkout, sizes: dict[str, int], where: str, dtype: torch.dtype, quick: bool
) -> Iterator[list[dict[str, Any]]]:
    if "total loss" in checkout:
        yield time_loss(Loss.from_checkout(checkout), sizes, where, dtype, quick, checkout.commit)
    if "object masks" in checkout:
        yield time_masks(checkout.functions["object masks"], where, quick, checkout.commit)
    if "pair selection" in checkout:
        yield time_selection(checkout.functions["pair selection"], quick, checkout.commit)


def table(rows: list[dict[str, Any]]) -> str:
    """Return times and memory of the official function, of this package, and their ratio."""
    by_name = {(line["op"], line["variant"]): line for line in rows}
    header = ("official", "ospo_fast", "ratio", "official", "ospo_fast")
    lines = [f"{'':<66}{'ms':>24}{'':>8}{'peak MB':>24}", f"{'':<66}" + "".join(
        f"{word:>{width}}" for word, width in zip(header, (12, 12, 8, 12, 12), strict=True)
    )]  # fmt: skip
    for (op, variant), theirs in by_name.items():
        if not variant.startswith("official"):
            continue
        ours = by_name[op, variant.replace("official", "ospo_fast")]
        cells = [f"{theirs['median_ms']:>12.3f}{ours['median_ms']:>12.3f}{ours['over_official']:>8.3f}"]
        cells += [f"{line['peak_mb']:>12.2f}" if "peak_mb" in line else f"{'-':>12}" for line in (theirs, ours)]
        lines.append(f"{op + variant.removeprefix('official'):<66}{''.join(cells)}")
    return "\n".join(lines)


# ---------------------------------------------------------------- run


def describe(checkout: official.Checkout) -> str:
    """Return what was found in the checkout and what was not."""
    lines = [f"official: KU-AGI/OSPO {checkout.commit}, {checkout.root}", f"ospo_fast: {commit()}, {_source.ROOT}"]
    lines += [
        f"  {name:<18} {place}" + (", not compared here" if name == "layer selection" else "")
        for name, place in checkout.found.items()
    ]
    lines += [f"  {name:<18} missing: {reason}" for name, reason in checkout.missing.items()]
    unused = ", ".join(checkout.unused_imports) or "nothing"
    lines.append(f"  not imported, because these functions do not use them: {unused}")
    lines.append(
        "  replaced: the language model by the identity, logging by nothing, TRL's pad_to_length by a check of equal "
        "lengths, a schedule of loss weights by constants"
    )
    return "\n".join(lines)


def check_sizes(sizes: dict[str, int]) -> None:
    """Raise UsageError for an N that is not a number of whole pairs."""
    if sizes["N"] % (2 * TOKENS):
        raise UsageError(
            f"--N: got {sizes['N']}, expected a multiple of {2 * TOKENS}: the official code fixes images of {TOKENS} "
            "tokens, and a pair has two."
        )


def run(path: Path, out: Path, sizes: dict[str, int], quick: bool) -> int:
    """Compare with the checkout at `path` and print the tables. Returns 1 if a difference exceeds its tolerance.

    Raises UsageError for a folder that is not a checkout, and for a wrong N.
    """
    sizes = {name: (QUICK if quick else sizes)[name] for name in ("N", "D", "V")}
    check_sizes(sizes)
    checkout = official.open_checkout(path)
    print(describe(checkout), flush=True)
    where, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    title = "ospo_fast, fp32, from official, fp64"
    print(f"\n{title:<52}{'difference':>18}{'at most':>12}{'official fp32':>16}", flush=True)
    checks = []
    for check in parity(checkout, where):
        checks.append(check)
        print(check.line(), flush=True)
    write_json(
        result_path(out, "reference").with_name("reference-parity.json"),
        {
            "reference": checkout.commit, "commit": commit(), "device": device(), "found": checkout.found,
            "missing": checkout.missing,
            "checks": [{**vars(check), "passed": check.passed} for check in checks],
        },
    )  # fmt: skip
    shown = " ".join(f"{name}={size}" for name, size in sizes.items())
    print(f"\n{shown} {dtype_name(dtype)}, {device()}, {torch.get_num_threads()} threads, medians", flush=True)
    rows: list[dict[str, Any]] = []
    try:
        for found in speed(checkout, sizes, where, dtype, quick):
            rows += found
            written = write(rows, out, "reference")
        print(table(rows))
        if rows and "loss_difference" in rows[0]:
            print(f"difference of the loss at this size: {rows[0]['loss_difference']:.1e}, both in {dtype_name(dtype)}")
        if rows:
            print(f"results: {written}")
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        raise OspoError(f"--reference: {shown} needs more memory than there is; use a smaller --N or --V.") from error
    failed = [check.name for check in checks if not check.passed]
    if failed:
        print(f"FAILED: {'; '.join(failed)}")
    return 1 if failed else 0

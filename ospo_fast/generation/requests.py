"""What images, texts and answers share: jobs in batches that fit the memory, and failures by item."""

from __future__ import annotations

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ospo_fast.errors import OspoError, UsageError, some_failed
from ospo_fast.generation.decoder import CPU_BYTES, InferenceDecoder
from ospo_fast.models.base import UnifiedModel
from ospo_fast.oom import BatchSizeLimit

T = TypeVar("T")
R = TypeVar("R")

CPU_ROWS = 256  # beyond it larger batches gain nothing on a CPU
REMEDY = "free some, use a smaller dtype or shorter prompts"
# Sixteen items of six images. Each guided image has two rows: products of so many cost
# what reading the weights costs (on an H200 at 92 images, by the ceilings), and more of them gain nothing.
CUDA_ROWS = 96


class GenerationError(OspoError):
    """Some items failed; the others are finished.

    `results` has what the call would have returned, with None (or rows of −1 for codes) in place of the failed items;
    `failed` maps their positions to the reasons.
    """

    def __init__(self, message: str, results: Any, failed: dict[int, str]) -> None:
        super().__init__(message)
        self.results = results
        self.failed = failed

    @classmethod
    def from_failures(cls, what: str, results: Any, failed: dict[int, str]) -> GenerationError:
        """The error for `failed` items of a call; its message names the first three."""
        return cls(some_failed(what, [failed[i] for i in sorted(failed)], len(results)), results, failed)


@contextmanager
def eval_mode(model: UnifiedModel) -> Iterator[None]:
    """Evaluation mode for the time of the context: a policy in training draws without its dropout."""
    training = [module for module in model.module.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Request:
    """One row to generate: its place in the output, its prompt (S,) and its seed as int64."""

    index: int
    ids: Tensor
    seed: int


def make_requests(prompts: Sequence[Tensor], seeds: Sequence[int] | Tensor) -> list[Request]:
    """One job per prompt; UsageError unless there is one integer seed each."""
    count = len(prompts)
    if isinstance(seeds, Tensor) and seeds.dim() != 1:
        raise UsageError(f"seeds: got a tensor of shape {tuple(seeds.shape)}, expected ({count},), one for each prompt")
    try:
        values = seeds.tolist() if isinstance(seeds, Tensor) else list(seeds)
    except TypeError:
        raise UsageError(f"seeds: got {seeds!r}, expected {count} of them, one for each image or text") from None
    if len(values) != count:
        raise UsageError(f"seeds: got {len(values)} of them, expected {count}, one for each image or text")
    return [Request(i, ids, _seed(i, seed)) for i, (ids, seed) in enumerate(zip(prompts, values, strict=True))]


def _seed(place: int, value: Any) -> int:
    """A seed as int64: unsigned ones of 64 bits (hashes) are as welcome as signed ones."""
    try:
        return (operator.index(value) + 2**63) % 2**64 - 2**63
    except TypeError:
        raise UsageError(f"seeds[{place}]: got {value!r}, expected an integer") from None


def in_groups(jobs: Sequence[T], groups: Sequence[object], batch_size: int) -> list[list[T]]:
    """Batches of at most `batch_size` jobs in their order; neighbours of one group part only where they must."""
    batches: list[list[T]] = [[]]
    for _, members in itertools.groupby(range(len(jobs)), lambda i: groups[i]):
        group = [jobs[i] for i in members]
        if len(batches[-1]) + len(group) > batch_size and batches[-1]:
            batches.append([])
        for job in group:
            if len(batches[-1]) == batch_size:
                batches.append([])
            batches[-1].append(job)
    return [batch for batch in batches if batch]


def by_length(jobs: Sequence[T], length: Callable[[T], int], batch_size: int) -> list[list[T]]:
    """Batches of at most `batch_size` jobs of equal length, longest first: memory runs out early or never."""
    groups: dict[int, list[T]] = defaultdict(list)
    for job in jobs:
        groups[length(job)].append(job)
    return [
        group[i : i + batch_size]
        for _, group in sorted(groups.items(), reverse=True)
        for i in range(0, len(group), batch_size)
    ]


def full_batch(decoder: InferenceDecoder, batch_size: int | None, size: int, tokens: int = 1) -> int:
    """How many jobs products have rows for on a GPU, whatever part of them the memory and the jobs fill.

    tokens: of each job that run in one step, as for `max_batch_size`.
    """
    return max(size, batch_size or (max(1, CUDA_ROWS // tokens) if decoder.device.type == "cuda" else size))


def check_batch_size(batch_size: int | None) -> None:
    """UsageError unless batch_size is None or positive."""
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size: got {batch_size}, expected a positive number, or None to fit the memory")


def check_window(jacobi_window: int) -> None:
    """UsageError unless jacobi_window is 0 or an integer of 2 and more."""
    if type(jacobi_window) is not int or jacobi_window < 0 or jacobi_window == 1:
        raise UsageError(
            f"jacobi_window: got {jacobi_window!r}, expected an integer of 2 and more, how many codes a step may draw, "
            "or 0 to draw them one by one"
        )


def check_number(name: str, value: float, expected: str) -> None:
    """UsageError unless a number is finite and not negative."""
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"{name}: got {value}, expected {expected}")


def check_sampling(temperature: float, top_p: float, unit: str) -> None:
    """UsageError unless temperature and top_p are such as codes or tokens (`unit`) can be sampled with."""
    check_number("temperature", temperature, f"a number >= 0; 0 takes the likeliest {unit}")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p: got {top_p}, expected a number in (0, 1]; 1 keeps all {unit}s")


def max_batch_size(decoder: InferenceDecoder, bytes_per_job: int, tokens: int = 1) -> int:
    """How many jobs to run at once: as many as the free memory takes, up to where more of them gain nothing."""
    if decoder.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(decoder.device)
        unused = torch.cuda.memory_reserved(decoder.device) - torch.cuda.memory_allocated(decoder.device)
        return max(1, min(CUDA_ROWS // tokens, int(0.8 * (free + unused)) // bytes_per_job))
    return max(1, min(CPU_ROWS // tokens, CPU_BYTES // bytes_per_job))


def run_batches(
    batches: Sequence[list[T]], work: Callable[[list[T], int], R], limit: BatchSizeLimit
) -> Iterator[tuple[list[T], R]]:
    """Yield each batch with work(batch, limit.max_size); one that does not fit the memory is halved and tried again."""
    for batch in batches:

        def part_of(part: slice, batch: list[T] = batch) -> R:
            return work(batch[part], limit.max_size)

        for part, result in limit.run(len(batch), part_of):
            yield batch[part], result


def check_ids(name: str, ids: Tensor, model: UnifiedModel, needed: int) -> None:
    """UsageError unless ids is a 1-D integer prompt that leaves room for `needed` more positions."""
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UsageError(f"{name}: got {ids.dtype} {tuple(ids.shape)}, expected a 1-D tensor of token ids")
    if len(ids) == 0:
        raise UsageError(f"{name}: got no token, expected at least one")
    table: Any = model.decoder.embed_tokens
    if int(ids.min()) < 0 or int(ids.max()) >= table.num_embeddings:
        raise UsageError(
            f"{name}: got ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {table.num_embeddings - 1}, "
            f"the vocabulary of {model.name}"
        )
    if len(ids) + needed > model.max_positions:
        raise UsageError(
            f"{name}: got {len(ids)} tokens, expected at most {model.max_positions - needed} "
            f"({model.name} has {model.max_positions} positions and needs {needed} for the answer); shorten it"
        )

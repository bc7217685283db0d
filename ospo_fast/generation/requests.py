"""Requests of images and texts, and the batches that they are decoded in."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ospo_fast.errors import Failure, OspoError, UsageError, some_failed
from ospo_fast.generation.decoder import CPU_BYTES, Decoder
from ospo_fast.generation.validation import check_ids
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.layout import image_layout
from ospo_fast.ops.sample_codes import wrap_int64

T = TypeVar("T")

CPU_ROWS = 256  # larger batches gain nothing on a CPU
# 16 items of six images. With guidance these are 192 rows: on an H200, by its peak rates, their products then take as
# long as reading the weights. Larger batches gain nothing.
CUDA_ROWS = 96


class GenerationError(OspoError):
    """Some items failed; the others are finished.

    Attributes:
        results: what the call would have returned, with None (in codes: rows of −1) for the failed items.
        failed: position of each failed item → reason.

    """

    def __init__(self, message: str, results: Any, failed: dict[int, str]) -> None:
        super().__init__(message)
        self.results = results
        self.failed = failed

    @classmethod
    def from_failures(cls, items: str, results: Any, failed: dict[int, str]) -> GenerationError:
        """Return the error for `failed` items; its message names the first three."""
        return cls(some_failed(items, [failed[i] for i in sorted(failed)], len(results)), results, failed)


@dataclass(frozen=True)
class Request:
    """One image or text to generate."""

    index: int  # position in the output
    ids: Tensor  # prompt (S,) int64 on the CPU
    seed: int  # int64
    max_tokens: int


@dataclass(frozen=True)
class Completion:
    """Result of one request."""

    tokens: Tensor | Failure  # (n,) int64 on the CPU, without the stop token
    steps: int  # decoder passes, prefill included
    logps: Tensor | None = None  # (n,) fp32 on the CPU, of `tokens`


def tokenize_prompts(model: UnifiedModel, prompts: Sequence[str | Tensor]) -> list[Tensor]:
    """Return the token ids (S,) int64 on the CPU of every prompt of an image; each text is tokenized once."""
    if isinstance(prompts, (str, Tensor)):
        raise UsageError("prompts: got a single prompt, expected a list of them")
    if not isinstance(prompts, Iterable):
        raise UsageError(f"prompts: got {prompts!r}, expected a list of texts or of int64 tensors of token ids (S,)")
    tokens = image_layout(model).tokens
    tokenize = functools.cache(model.image_prompt)
    result = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str) and not prompt.strip():
            raise UsageError(f"prompts[{i}]: got an empty string, expected a description of an image")
        ids = tokenize(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(ids, Tensor):
            raise UsageError(
                f"prompts[{i}]: got {type(prompt).__name__}, expected a text or an int64 tensor of token ids (S,)"
            )
        ids = ids.cpu()
        check_ids(f"prompts[{i}]", ids, model, tokens)
        if int(ids[-1]) != model.boi_id:
            raise UsageError(f"prompts[{i}]: token ids must end in begin-of-image ({model.boi_id}), got {int(ids[-1])}")
        result.append(ids.long())
    return result


def make_requests(prompts: Sequence[Tensor], seeds: Sequence[int] | Tensor, max_tokens: Sequence[int]) -> list[Request]:
    """Return one request per prompt; UsageError unless there is one integer seed for each."""
    count = len(prompts)
    try:
        values = seeds.tolist() if isinstance(seeds, Tensor) else list(seeds)
        if len(values) != count:
            raise UsageError(f"seeds: got {len(values)} of them, expected {count}, one for each image or text")
    except TypeError:
        raise UsageError(f"seeds: got {seeds!r}, expected {count} of them, one for each image or text") from None
    seeds = [_as_int64(i, seed) for i, seed in enumerate(values)]
    return list(map(Request, range(count), prompts, seeds, max_tokens))


def _as_int64(index: int, seed: Any) -> int:
    try:
        return wrap_int64(operator.index(seed))
    except TypeError:
        raise UsageError(f"seeds[{index}]: got {seed!r}, expected an integer") from None


def plan_batches(requests: Sequence[T], groups: Sequence[Hashable] | None, max_size: int) -> list[list[T]]:
    """Split requests into batches, in order. Neighbors of one group share a batch unless the group exceeds one."""
    batches: list[list[T]] = []
    for _, members in itertools.groupby(range(len(requests)), lambda i: i if groups is None else groups[i]):
        group = [requests[i] for i in members]
        if batches and len(batches[-1]) + len(group) <= max_size:
            batches[-1] += group
        else:
            batches += [group[i : i + max_size] for i in range(0, len(group), max_size)]
    return batches


def max_batch_size(decoder: Decoder, item_bytes: int, window: int = 1) -> int:
    """Return how many items to run per batch: what fits the free memory, up to the size where throughput saturates.

    window: tokens of each item that run in one step.
    """
    if decoder.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(decoder.device)
        unused = torch.cuda.memory_reserved(decoder.device) - torch.cuda.memory_allocated(decoder.device)
        return max(1, min(CUDA_ROWS // window, int(0.8 * (free + unused)) // item_bytes))
    # Another device shares the main memory, and pads like a GPU.
    rows = CPU_ROWS if decoder.device.type == "cpu" else CUDA_ROWS
    return max(1, min(rows // window, CPU_BYTES // item_bytes))

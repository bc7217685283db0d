"""Back-off for batches that do not fit the memory: halve them and try again."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ospo_fast.errors import OspoError

logger = logging.getLogger(__name__)
R = TypeVar("R")
B = TypeVar("B", bound="Sequence[Any] | Tensor")

# Messages of Triton, the CUDA runtime, cuBLAS, cuDNN, the compiled module, MPS and torch's CPU allocator.
_MESSAGES = re.compile(
    "out of memory|_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|can't allocate memory|not enough memory",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, reports exhausted memory."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and _MESSAGES.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass
class BatchSizeLimit:
    """Largest batch size that fits the memory, halved when memory runs out.

    Attributes:
        max_size: items per batch. Every out-of-memory error lowers it for good.
        item_name: singular noun for messages, such as "image".
        remedy: what the user can do if a single item does not fit.
        fills: `function` fills every batch up to `max_size` items, so that all have one shape.

    """

    max_size: int
    item_name: str
    remedy: str = "free some, or use a smaller dtype"
    fills: bool = False

    def run(self, batches: Iterable[B], function: Callable[[B], R]) -> Iterator[tuple[B, R]]:
        """Yield each batch with function(batch).

        A batch of more than `max_size` items is split. A batch that runs out of memory is halved and tried again.
        Raises OspoError if a batch of one item does not fit.
        """
        for batch in batches:
            begin = 0
            while begin < len(batch):
                part: Any = batch[begin : begin + self.max_size]
                try:
                    result = function(part)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    if self.max_size == 1:
                        raise OspoError(
                            f"one {self.item_name} does not fit the memory ({short(error)}); {self.remedy}"
                        ) from error
                else:
                    yield part, result
                    begin += len(part)
                    continue
                # Not in the except clause: there the exception keeps the tensors of the failed attempt alive.
                release()
                failed = self.max_size if self.fills else len(part)
                tried, self.max_size = self.max_size, max(1, failed // 2)
                logger.warning(
                    "out of memory with %d %ss per batch; continuing with %d", tried, self.item_name, self.max_size
                )


def release() -> None:
    """Return the unused memory of torch's allocator to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def short(error: BaseException) -> str:
    """Return the first line of an error, cut to 160 characters; with one more, of 200, if it says only where."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()] or [type(error).__name__]
    more = f" {lines[1][:200]}" if lines[0].endswith(":") and len(lines) > 1 else ""
    return lines[0][:160] + more

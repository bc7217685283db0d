"""Work in parts that fit the memory: one that does not is halved and tried again."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from ospo_fast.errors import OspoError

logger = logging.getLogger(__name__)
T = TypeVar("T")

# How Triton, CUDA's runtime, cuBLAS, cuDNN, the compiled module and torch's allocator of the CPU say it.
_SIGNS = re.compile(
    "out of memory|_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|can't allocate memory|not enough memory",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, or one does on top of which it was raised."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and _SIGNS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass
class BatchSizeLimit:
    """How many items fit the memory at once, as far as is known: running out of it lowers `most` for good."""

    max_size: int
    item_name: str  # an item's name
    remedy: str = "free some, or use a smaller dtype"

    def run(self, count: int, work: Callable[[slice], T]) -> Iterator[tuple[slice, T]]:
        """Yield each part of `count` items, of at most `most`, with work(part).

        A part that runs out of memory is halved and tried again; OspoError where it was allowed no more than one item.
        """
        begin = 0
        while begin < count:
            part = slice(begin, min(begin + self.max_size, count))
            results: list[T] = []
            try:
                results.append(work(part))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.max_size == 1:
                    raise OspoError(
                        f"not even one {self.item_name} fits the memory ({short(error)}); {self.remedy}"
                    ) from error
            if results:
                yield part, results.pop()
                begin = part.stop
            else:
                # Outside the handler: the exception held the tensors of the failed attempt.
                release()
                tried, self.max_size = self.max_size, max(1, min(self.max_size, part.stop - begin) // 2)
                logger.warning(
                    "out of memory with %d %ss at once; going on with %d", tried, self.item_name, self.max_size
                )


def release() -> None:
    """Give the GPU back what torch's allocator keeps and nobody uses."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def short(error: BaseException) -> str:
    """The beginning of an error's first line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]

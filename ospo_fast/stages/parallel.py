"""The processes that train together: the share of each in a step, and what they agree on."""

from __future__ import annotations

import datetime as dt
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ospo_fast.errors import OspoError

T = TypeVar("T")

# An evaluation on rank 0 takes hours where images are large. A process that ends meanwhile ends the wait at once.
_TIMEOUT = dt.timedelta(days=7)


@functools.lru_cache(maxsize=1)
def _control_group(world: Any) -> Any:
    """Return a group over the CPU for a default group: the collectives of a GPU wait less long, and occupy it."""
    return dist.new_group(backend="gloo", timeout=_TIMEOUT)


class Ranks:
    """The processes of the default group of torch.distributed; a single one where none was initialized.

    Every process has to make the same calls in the same order.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.group = 0, 1, None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.group = _control_group(dist.group.WORLD)

    def first(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0 alone, and return its result on every rank. An error is raised on every rank."""
        if self.size == 1:
            return action()
        outcome = [_outcome(action) if self.rank == 0 else None]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        result: T = _result(outcome[0])
        return result

    def first_alone(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0 and then on the others, which find the files that it wrote; see `first`."""
        kept: list[T] = []
        self.first(lambda: kept.append(action()))
        return kept[0] if kept else action()

    def everywhere(self, action: Callable[[], T]) -> list[T]:
        """Run an action on every rank, and return all results by rank. The error of the first rank is raised on all."""
        if self.size == 1:
            return [action()]
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, _outcome(action), group=self.group)
        return [_result(outcome) for outcome in outcomes]

    def any(self, value: T | None) -> T | None:
        """Return the value of the first rank that has one; None if none has."""
        return next((found for found in self.everywhere(lambda: value) if found is not None), None)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        sums: list[float] = total.tolist()
        return sums

    def total_cost(self, cost: Mapping[str, Any]) -> dict[str, Any]:
        """Return a cost (`Work.cost`) of a step of this rank with the device seconds, tokens and FLOPs of all ranks."""
        names = [name for name in ("device_seconds", "tokens", "flops") if cost[name] is not None]
        return {**cost, **dict(zip(names, self.sums([cost[name] for name in names]), strict=True))}


def _outcome(action: Callable[[], T]) -> tuple[T | None, OspoError | None]:
    try:
        return action(), None
    except OspoError as error:
        return None, error
    except Exception as error:  # errors of libraries may not travel
        text = f"train: process {dist.get_rank()} of {dist.get_world_size()} failed: {type(error).__name__}: {error}"
        failed = OspoError(text)
        failed.__cause__ = error
        return None, failed


def _result(outcome: Any) -> Any:
    result, error = outcome
    if error is not None:
        raise error
    return result


def own_passes(pairs: int, batch_size: int, rank: int, ranks: int) -> list[range]:
    """Return the positions in a step of `pairs` pairs that a rank has in each of its passes of up to `batch_size`.

    The ranks have neighboring parts of the step, equal up to one pair. All have the same number of passes, so that they
    meet in the collectives of each: some may be empty. Where the number of passes of one process is a multiple of the
    ranks, each rank has whole passes of it.
    """
    bounds = [pairs * n // ranks for n in range(ranks + 1)]
    start, stop = bounds[rank], bounds[rank + 1]
    largest = max(other - one for one, other in itertools.pairwise(bounds))
    starts = range(start, start + largest, batch_size)
    return [range(min(first, stop), min(first + batch_size, stop)) for first in starts]

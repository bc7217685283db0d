"""What the workers of one launch take, do and have done, in their run folder; see `ospo_fast.workers`.

The items of a stage are divided into as many parts as there are workers. A worker does its own part first. It holds
the lock of the store of a part as long as it works on it, so that the part of a process that has ended is free at once
(of a machine that has ended, as soon as the file system gives its locks back), and another worker takes it over. A part
that is done is marked in `.workers.json`. Each worker holds the lock of a file of its own as long as it lives, so that
none waits for one that has ended.

No clock is read: a lock is held or it is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ospo_fast.errors import OspoError
from ospo_fast.records import (
    LockedError,
    lock_of,
    locked,
    only_writer,
    open_to_lock,
    read_json,
    stable_hash,
    update_json,
)
from ospo_fast.stages import Shard
from ospo_fast.workers import StrangerError, Workers

T = TypeVar("T")

_MARKS = ".workers.json"
_PATIENCE = 5.0  # seconds that a worker waits for its own lock, which others look at


def divide(items: Sequence[T], name: Callable[[T], str], count: int) -> list[list[T]]:
    """Divide items by the hash of their names into `count` parts, whose sizes differ by one at most; in order."""
    ranked = sorted(range(len(items)), key=lambda n: (stable_hash("part", name(items[n])), name(items[n])))
    parts: list[list[int]] = [sorted(ranked[number::count]) for number in range(count)]
    return [[items[n] for n in part] for part in parts]


class SharedWork:
    """The marks and locks of a worker in the run folder `out`; see `held`."""

    def __init__(self, out: Path, workers: Workers) -> None:
        self.out, self.workers = out, workers
        self._step = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[SharedWork]:
        """Hold the lock of this worker in the block. Raises UsageError if another process is the same worker."""
        workers, end = self.workers, time.monotonic() + _PATIENCE
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(only_writer(self._worker(workers.rank)))
                    break
                except LockedError:
                    if time.monotonic() > end:
                        taken = f"RANK: got {workers.rank}, which another process in {self.out} has"
                        raise StrangerError(f"{taken}; start each worker once.") from None
                    time.sleep(0.05)
            with workers.first():
                if workers.is_first:
                    marks = {"launch": workers.launch, "launcher": workers.launcher}
                    update_json(self._marks, {}, lambda before: marks)
            workers.gone = self.gone
            workers.everyone()  # before that, none of them seems to have ended
            # A worker that was started again: from here on the others wait for it, and what they do once is done.
            if self._read("arrived").get(str(workers.rank)):
                self._arrive(0)
            with self.gate():
                pass
            yield self

    def _worker(self, rank: int) -> Path:
        return self.out / f"worker-{rank}"

    @property
    def _marks(self) -> Path:
        return self.out / _MARKS

    @classmethod
    def was_begun(cls, out: Path, workers: Workers) -> bool:
        """Return whether the launcher of these workers, which starts them again, had them begin before."""
        marks = read_json(out / _MARKS, {})
        return workers.restarted and marks.get("launcher") == workers.launcher

    def gate(self) -> contextlib.AbstractContextManager[None]:
        """Let one worker at a time do the block."""
        return locked(self.out / ".shards.lock")

    # ------------------------------------------------------------------ workers

    def lives(self, rank: int) -> bool:
        """Return whether the process of a worker lives."""
        if rank == self.workers.rank:
            return True
        try:
            handle = open_to_lock(lock_of(self._worker(rank)))
        except FileNotFoundError:
            return False
        except OSError:
            return True  # not known: none takes over from a worker that may live
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: others look at the same time
        except OSError:  # it is locked, or this is not known
            return True
        finally:
            os.close(handle)
        return False

    def gone(self) -> list[int]:
        """Return the ranks of the workers whose process has ended."""
        return [rank for rank in range(self.workers.size) if not self.lives(rank)]

    def meet(self) -> None:
        """Wait until every worker that lives has called this, or `once`, as often.

        A worker that was started again calls it from the first time on, while it sees that everything is done.
        """
        self._step += 1
        self._arrive(self._step)
        left, wait = self._missing(range(self.workers.size)), _Wait()
        while left:
            self.workers.check()
            wait.sleep()
            left = self._missing(left)
        self.workers.check()

    def once(self, do: Callable[[], object]) -> None:
        """`meet`, and let one worker at a time call `do`, while every worker that lives waits for it.

        `do` finds nothing to do where another worker has done it.
        """
        self.meet()
        while True:
            with self.gate():
                if not self._missing(range(self.workers.size)):
                    do()
                    return
            self._step -= 1  # a worker was started again since
            self.meet()

    def _arrive(self, step: int) -> None:
        rank = str(self.workers.rank)
        self._mark(lambda marks: {**marks, "arrived": {**marks.get("arrived", {}), rank: step}})

    def _missing(self, ranks: Iterable[int]) -> set[int]:
        """Return which of some workers live and have not come as far as this one."""
        arrived = self._read("arrived")
        return {r for r in ranks if arrived.get(str(r), 0) < self._step and self.lives(r)}

    # ------------------------------------------------------------------ parts

    def _read(self, name: str) -> dict[str, Any]:
        marks = read_json(self._marks, {})
        found = marks.get(name, {}) if marks.get("launch") == self.workers.launch else {}
        return found if isinstance(found, dict) else {}

    def _mark(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        def checked(marks: dict[str, Any]) -> dict[str, Any]:
            if marks.get("launch") != self.workers.launch:
                raise OspoError(f"{self._marks} was changed by another process; start the workers again.")
            return change(marks)

        update_json(self._marks, {}, checked)

    def parts(self, count: int) -> list[Shard]:
        """Return `count` parts, of which each worker has others first."""
        return [Shard((self.workers.rank + n) % count, count) for n in range(count)]

    def is_done(self, stage: str, part: Shard) -> bool:
        """Return whether a part of a stage is marked as done."""
        return part.index in self._read("done").get(stage, [])

    def mark_done(self, stage: str, part: Shard) -> None:
        """Mark a part of a stage as done."""

        def change(marks: dict[str, Any]) -> dict[str, Any]:
            done = marks.get("done", {})
            return {**marks, "done": {**done, stage: sorted({*done.get(stage, []), part.index})}}

        self._mark(change)

    def do_parts(self, stage: str, count: int, do: Callable[[Shard], bool]) -> None:
        """Call `do` for each of `count` parts that is not done; it returns False if another worker works on the part.

        Returns once all parts are done, also those of workers that end meanwhile.
        """
        left, wait = self.parts(count), _Wait()
        while left:
            left = [part for part in left if not (self.is_done(stage, part) or do(part))]
            self.workers.check()
            if left:
                wait.sleep()


class _Wait:
    """Sleeps between two looks: a twentieth of the time waited until then, so that little is lost of it."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def sleep(self) -> None:
        time.sleep(min(max(0.01, (time.monotonic() - self._begun) / 20), 0.5))

"""Work that runs beside the drawing: decoding of finished codes, and writing of files."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Background(Generic[T]):
    """work(item) for each `put` item, in order, in a thread of its own; on a GPU, on a stream of its own.

    A context manager: leaving it waits until all is done. At most `depth` items wait: a `put` beyond that blocks. An
    error of `work` is raised by the next `put`, or at the end, and what waited behind it is left undone.
    """

    def __init__(self, work: Callable[[T], None], *, device: torch.device | None = None, depth: int = 4) -> None:
        self._work = work
        self._device = device
        self._items: queue.Queue[T | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ospo-fast background", daemon=True)

    def put(self, item: T) -> None:
        """Hand over an item."""
        self._raise()
        self._items.put(item)

    def __enter__(self) -> Background[T]:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what was put, also when the context ends by an error: finished work is kept."""
        self._items.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        cuda = self._device is not None and self._device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self._device)) if cuda else contextlib.nullcontext():
            while (item := self._items.get()) is not None:
                if self._error is not None:
                    continue
                try:
                    self._work(item)
                except BaseException as error:
                    self._error = error

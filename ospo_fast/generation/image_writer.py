"""Work that runs beside the drawing: decoding of finished codes, and writing of files."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from ospo_fast.models.base import UnifiedModel

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

T = TypeVar("T")
Finished = tuple[list[int], Tensor, "list[Image] | None"]


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
        self._worked = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="ospo-fast background", daemon=True)

    def put(self, item: T) -> None:
        """Hand over an item."""
        self._raise()
        self._items.put(item)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until ready(), which is asked after each item that was worked on; an error of `work` is raised."""
        with self._worked:
            while not ready():
                self._raise()
                self._worked.wait()

    def __enter__(self) -> Self:
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
                with self._worked:
                    self._worked.notify_all()


class ImageWriter(Background[Finished]):
    """save(index, codes (T,), image) in the background for images that are finished.

    Codes become pixels in batches: on a GPU in the background too, on the CPU in `take`, where a second pool of threads
    would only be in the way of the first.
    """

    def __init__(self, model: UnifiedModel, save: Callable[[int, Tensor, Image], None]) -> None:
        super().__init__(self._write, device=model.device)
        self._model, self._save = model, save

    def take(self, indices: list[int], codes: Tensor) -> None:
        """Images `indices` have codes (N, T)."""
        if indices:
            self.put((indices, codes, None if self._model.device.type == "cuda" else self._model.decode_codes(codes)))

    def _write(self, finished: Finished) -> None:
        indices, codes, images = finished
        for index, row, image in zip(indices, codes, images or self._model.decode_codes(codes), strict=True):
            self._save(index, row, image)

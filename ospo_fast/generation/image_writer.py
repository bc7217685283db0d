"""Decoding of pixels and writing of images in the background, while the next batch is generated."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ospo_fast.models.base import UnifiedModel

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

SAVERS = 4  # threads, which wait for the disk most of the time


class ImageWriter:
    """Background threads that call save(index, codes (T,) on the CPU, image) for finished images, batch after batch.

    A context manager: leaving it waits for all images, also if it is left by an error. An error of `save` is raised by
    the next call of `take` or `wait`, or at the end; images of later batches are not saved.

    Args:
        model: its VQ decoder turns codes into pixels. On a GPU it runs in the thread, on a separate stream; on a CPU in
            `take`, since two threads would compete for the cores.
        save: what to do with an image. Several threads call it, as each waits for the disk most of the time. It runs no
            operation of torch: in a forked process, the first ones of several threads race for torch's own threads.
        depth: maximum number of queued batches; `take` blocks when the queue is full.

    """

    def __init__(self, model: UnifiedModel, save: Callable[[int, Tensor, Image], None], *, depth: int = 4) -> None:
        self._model, self._save, self._depth = model, save, depth
        self._cuda = model.device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, "ospo-fast image writer", _use_own_stream, (model.device,))
        self._savers = ThreadPoolExecutor(SAVERS, "ospo-fast image saver")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def take(self, indices: list[int], codes: Tensor) -> None:
        """Save images: `indices` have codes (N, T)."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._depth):
            self._pending.popleft().result()
        if indices:
            images = None if self._cuda else self._model.decode_codes(codes)
            self._pending.append(self._pool.submit(self._write, indices, codes, images))

    def wait(self, ready: Callable[[], bool]) -> None:
        """Block until ready() is true. It is called after each batch."""
        while not ready():
            self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._pool.shutdown()
        finally:  # Ctrl-C
            self._savers.shutdown()
        if error is None:
            self.wait(lambda: not self._pending)

    def _write(self, indices: list[int], codes: Tensor, images: list[Image] | None) -> None:
        if self._failed:
            return
        try:
            images = images or self._model.decode_codes(codes)
            for saved in [self._begin(*of) for of in zip(indices, codes.cpu(), images, strict=True)]:
                if saved is not None:
                    saved.result()
        except BaseException:
            self._failed = True
            raise

    def _begin(self, index: int, codes: Tensor, image: Image) -> Future[None] | None:
        """Save an image in another thread, or in this one where that cannot begin: while the interpreter ends."""
        try:
            return self._savers.submit(self._save, index, codes, image)
        except RuntimeError:
            self._save(index, codes, image)
            return None


def _use_own_stream(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))

"""A fault at the n-th operation of a process on the files of a folder: a signal, or an error of the disk."""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
_CALLS = ("fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "ftruncate")


class Faults:
    """Counts writes, syncs, renames, deletions and new folders below `folder`, and disturbs number `at`.

    `action` is a signal, which the process sends itself, or an errno. A full disk stays full, and a read-only one stays
    read-only. An input/output error occurs once. The first half of a write that is killed or fails is written.
    """

    def __init__(
        self, folder: Path, at: int | None = None, action: int = signal.SIGKILL, *, error: bool = False
    ) -> None:
        self.folder, self.at, self.action, self.error = str(folder), at, action, error
        self.count = 0

    def _due(self, name: str) -> bool:
        self.count += 1
        if self.at is None or self.count < self.at:
            return False
        if self.count == self.at:
            return True
        full = self.action == errno.ENOSPC and name in ("write", "mkdir")
        return self.error and (full or self.action == errno.EROFS)

    def _act(self) -> None:
        if self.error:
            raise OSError(self.action, os.strerror(self.action))
        os.kill(os.getpid(), self.action)

    def before(self, name: str) -> None:
        """Count an operation that is about to begin."""
        if self._due(name):
            self._act()

    def install(self) -> None:
        """Replace the functions of this process for good."""
        for name in _CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        opened = io.open
        faults = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if faults._due("write"):
                    if faults.error or faults.action == signal.SIGKILL:  # others come before or after a write
                        with memoryview(data).cast("B") as view:
                            super().write(view[: len(view) // 2])
                    faults._act()
                return super().write(data)

        def open_(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **more: Any) -> Any:
            inside = isinstance(file, str | Path) and str(file).startswith(self.folder)
            if not inside or not set(mode) & set("wax") or "+" in mode:
                return opened(file, mode, buffering, *text, **more)
            raw = File(file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **more)

        io.open = builtins.open = open_  # type: ignore[assignment]

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            target = arguments[0]
            if isinstance(target, int) or more.get("dir_fd") is not None or str(target).startswith(self.folder):
                self.before(name)
            return function(*arguments, **more)

        return call

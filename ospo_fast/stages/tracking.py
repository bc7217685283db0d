"""Live tracking: copies of stage reports, log rows and sample images for TensorBoard, Weights & Biases or Trackio.

The trackers are those of accelerate. `stages.json`, `train/log.jsonl` and `train/samples` stay the record: a tracker
that fails is turned off with a warning and changes nothing else. Light to import.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import logging
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.config import Config, saved_values
from ospo_fast.files import no_link, read_bytes
from ospo_fast.packages import MissingPackageError
from ospo_fast.records import write_atomic
from ospo_fast.work import rates

if TYPE_CHECKING:
    from PIL.Image import Image

    from ospo_fast.stages import Shard, StageReport

logger = logging.getLogger(__name__)

PROJECT = "ospo_fast"


def check_tracker(name: str | None) -> None:
    """Raise MissingPackageError if the packages of a tracker (`track`) are not installed. Imports none of them."""
    needed = [] if name is None else [name, "accelerate"]
    missing = next((package for package in needed if importlib.util.find_spec(package) is None), None)
    if missing is not None:
        raise MissingPackageError(
            f"track: got {name!r}, which needs the package {missing}, expected one that is installed; run: "
            f"pip install {missing}.",
            name=missing,
        )


def is_first_process() -> bool:
    """Return whether this process has rank 0, of the process group or else of the launcher, or is the only one."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


class Tracker:
    """What a run sends to its tracker. No method raises an error, or does anything without `track` or on rank > 0.

    Each iteration has two tracker runs: `stages`, with a row per stage, and `train`, whose steps are those of
    training. TensorBoard's files and the ids of runs are in `tracking/` of the run folder.

    Args:
        config: `track` chooses the tracker, `out` is the run folder.
        shard: the part of the items that this process has; then its stages are a tracker run of their own.

    """

    def __init__(self, config: Config, shard: Shard | None = None) -> None:
        self._config, self._shard = config, shard
        self._folder = Path(config.out) / "tracking"
        self._off = config.track is None
        self._tracker: Any = None  # of accelerate

    def report(self, report: StageReport) -> None:
        """Send what a stage did: items, failed items, seconds, items/s, and the other numbers of its report."""
        row = {key: value for key, value in dataclasses.asdict(report).items() if key != "iteration"}
        row |= {f"drawing_{key}": value for key, value in (report.drawing or {}).items()}
        if report.seconds:
            row["items_s"] = report.items / report.seconds
        if report.cost is not None:
            counted = {key: report.cost[key] for key in ("device_seconds", "kept", "dropped")}
            row |= {**counted, **rates(report.cost, report.seconds)}
        if report.items:
            self._attempt(lambda: self._open("stages", report.iteration, resumed=True))
            self._attempt(lambda: self._tracker.log({f"{report.stage}/{key}": n for key, n in _numbers(row).items()}))
        self.close()

    def start(self, iteration: int, step: int | None) -> None:
        """Open the tracker run of training. `step`: the last one before a resumption; None: training starts over."""
        self._attempt(
            lambda: self._open("train", iteration, resumed=step is not None, first=-1 if step is None else step)
        )

    def log(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row of the training log, and the memory in use. `step` is its step."""
        self._attempt(lambda: self._tracker.log(_numbers(row) | _memory(), step=row["step"]))

    def sheet(self, image: Image, step: int) -> None:
        """Send the contact sheet of sample images."""
        self._attempt(lambda: self._send(image, step))

    def close(self) -> None:
        """Close the open tracker run. Another call opens it again."""
        if self._tracker is not None:
            self._attempt(self._tracker.finish)
            self._tracker = None

    def _attempt(self, action: Callable[[], object]) -> None:
        """Call the tracker. The first error of any kind turns it off: training must not depend on it."""
        if self._off:
            return
        try:
            # Standard output has the results of a command alone.
            with contextlib.redirect_stdout(sys.stderr):
                action()
        except Exception as error:
            self._off = True
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            logger.warning("track=%s failed (%s); the run continues without it", self._config.track, reason)

    def _open(self, part: str, iteration: int, *, resumed: bool, first: int = 0) -> None:
        if not is_first_process() and self._shard is None:
            self._off = True
            return
        self.close()
        part += f"-iter{iteration}" if iteration > 1 else ""
        part += f"-{self._shard}" if self._shard is not None else ""
        from accelerate import tracking

        # accelerate's own logger raises an error before there is a PartialState, and that would join a process group
        # and choose a device. The trackers themselves need none of it.
        tracking.logger = getattr(tracking.logger, "logger", tracking.logger)
        kind = tracking.LOGGER_TYPE_TO_CLASS[self._config.track]
        no_link(self._folder)
        if kind.requires_logging_directory:
            # TensorBoard hides what an earlier process wrote from this step on.
            options: dict[str, Any] = {"purge_step": first + 1} if part.startswith("train") else {}
            tracker = kind(part, logging_dir=no_link(self._folder / part).parent, **options)
        else:
            run_id = self._run_id(part, resumed)
            name = f"{self._folder.resolve().parent.name} {part} {run_id[:6]}"
            options = {"name": name, "resume": "allow", "config": saved_values(self._config)}
            if self._config.track == "wandb":
                self._folder.mkdir(parents=True, exist_ok=True)
                options |= {"id": run_id, "dir": str(self._folder)}
            tracker = kind(PROJECT, **options)
        tracker.main_process_only = False  # else it asks a PartialState, see above
        tracker.start()
        self._tracker = tracker

    def _run_id(self, part: str, resumed: bool) -> str:
        """Return the id of a tracker run: that of an earlier process, or a new one where a part starts over."""
        path = no_link(self._folder / f"{part}.id")
        if resumed and path.is_file() and re.fullmatch(rb"[0-9a-f]{16}", data := read_bytes(path)):
            return data.decode()
        run_id = secrets.token_hex(8)
        write_atomic(path, run_id.encode())
        return run_id

    def _send(self, image: Image, step: int) -> None:
        if self._config.track == "tensorboard":
            import numpy as np

            self._tracker.log_images({"samples": np.asarray(image)[None].transpose(0, 3, 1, 2)}, step=step)
        elif hasattr(self._tracker, "log_images"):
            self._tracker.log_images({"samples": [image]}, step=step)
        else:  # accelerate's tracker of Trackio has numbers only
            self._tracker.log({"samples": importlib.import_module("trackio").Image(image)}, step=step)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row, apart from its step. Whoever adds a key to a row has it tracked."""
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step"
    }


def _memory() -> dict[str, float]:
    import torch

    from ospo_fast.peak_memory import resident_mb

    memory = {"memory_mb": resident_mb()}
    if torch.cuda.is_initialized():
        memory["cuda_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return memory

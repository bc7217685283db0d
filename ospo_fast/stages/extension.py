"""More steps for a finished training (`train.extend`). Light to import: `ospo_fast.stages.train` imports torch.

The added steps are made in a folder of their own, which has copies of checkpoint and log, and takes the place of the
old one when it is whole. extended.json in it lists the extensions: a training can be extended again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ospo_fast.config import TrainConfig
from ospo_fast.copies import copy_folder
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.records import read_json, shown, write_folder, write_json
from ospo_fast.stages.run_files import CHECKPOINTS

SCHEDULES = ("constant", "cosine")
_LIST = "extended.json"
_RESULTS = frozenset({"adapter", "model", "done.json"})  # of a training, which its extension makes itself


@dataclass(frozen=True)
class Extension:
    """Steps that were added to a training."""

    after: int  # steps before it
    schedule: str  # one of `SCHEDULES`


def read_extensions(folder: Path) -> list[Extension]:
    """Return the extensions of the training in a folder, the first one first. Raises OspoError for a broken list."""
    rows, found = read_json(folder / _LIST, []), list[Extension]()
    for row in rows:
        after, schedule = (row.get("after"), row.get("schedule")) if isinstance(row, dict) else (None, None)
        if type(after) is not int or after <= (found[-1].after if found else 0) or schedule not in SCHEDULES:
            raise OspoError(
                f"{folder / _LIST}: got {shown(row)}, expected an extension; use --no-resume to start over."
            )
        found.append(Extension(after, schedule))
    return found


def last_schedule(folder: Path) -> str | None:
    """Return the schedule of the last extension of a training; None if it was never extended."""
    found = read_extensions(folder)
    return found[-1].schedule if found else None


def extends(folder: Path, steps: int | None, train: TrainConfig) -> bool:
    """Return whether the training in a folder is finished, and `train.extend` gives it more than its `steps`."""
    return None not in (train.extend, steps) and train.steps > (steps or 0) and (folder / "done.json").exists()


def check_extension(folder: Path, steps: int | None, train: TrainConfig) -> None:
    """Raise UsageError unless the training in a folder can get more steps, or has those that are asked for.

    steps: setting of the training that is there; None: it has none.
    """
    done, extend = read_json(folder / "done.json", {}), f"train.extend: got {train.extend}"
    if not done or steps is None:
        raise UsageError(
            f"{extend}, expected null: there is no finished training in {folder} that could get more steps; leave it "
            "out to train."
        )
    if type(done.get("step")) is not int:
        raise OspoError(f"{folder / 'done.json'}: `step` should be an integer, got {shown(done.get('step'))}.")
    if train.steps == steps:
        if last_schedule(folder) != train.extend:
            raise UsageError(
                f"{extend} with train.steps={steps}, which the training in {folder} has already, "
                f"{_described(last_schedule(folder))}; raise train.steps, or leave train.extend out."
            )
        return
    if train.steps < steps:
        raise UsageError(
            f"train.steps: got {train.steps} with train.extend={train.extend}, expected more than the {steps} steps "
            f"of the finished training in {folder}."
        )
    if done["step"] != steps:
        raise UsageError(
            f"{extend}, expected null: early stopping ended the training in {folder} at step {done['step']} of "
            f"{steps}, after which it has no more steps; train into another --out."
        )
    if not any((folder / "checkpoints").glob(CHECKPOINTS)):
        raise UsageError(
            f"{extend}, and no checkpoint in {folder / 'checkpoints'} that training could continue from; restore it, "
            "or leave train.extend out and use --no-resume."
        )


def _described(schedule: str | None) -> str:
    return "without an extension" if schedule is None else f"the last of them as train.extend={schedule}"


def begin_extension(work: Path, training: Path, train: TrainConfig, rows: Sequence[Any]) -> None:
    """Make the folder `work`, whole or not at all, in which the finished `training` gets more steps.

    rows: what stages.json has of the steps before.
    """
    before = read_json(training / "done.json", {})["step"]
    listed = [*read_extensions(training), Extension(before, str(train.extend))]

    def save(place: Path) -> None:
        copy_folder(training, place / training.name, skip=_RESULTS)
        write_json(place / training.name / _LIST, [dataclasses.asdict(extension) for extension in listed])
        write_json(place / "stages.json", list(rows))

    write_folder(work, save)


def extended_factor(
    base: Callable[[int], float], train: TrainConfig, extensions: Sequence[Extension], step: int
) -> float:
    """Return the learning rate after `step` steps, as a share of `train.learning_rate`.

    base: that of the training before its extensions. Constant steps have the rate of the last step before them, those
    of a cosine fall from `learning_rate` towards `min_learning_rate`.
    """
    end = train.steps
    for each in reversed(extensions):
        if step >= each.after and each.schedule == "constant":
            step = each.after - 1
        elif step >= each.after:
            low = train.min_learning_rate / train.learning_rate
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (step - each.after) / (end - each.after)))
        end = each.after
    return base(step)

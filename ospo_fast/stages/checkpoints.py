"""Files of checkpoints of a training run: what `torch.save` writes, and its SHA-256 as the last 32 bytes.

The checksum shows every damage. It does not prove where a file is from, so that what it holds is checked as well.
"""

import hashlib
import io
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ospo_fast.files import check_archive, read_bytes
from ospo_fast.records import os_errors, write_atomic

logger = logging.getLogger(__name__)

REMEDY = "use --no-resume to start over"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step-{step:06d}.pt"


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, those of later steps first."""
    found = [path for path in folder.glob("step-*.pt") if re.fullmatch("step-[0-9]{6,18}", path.stem)]
    return sorted(found, key=lambda path: int(path.stem[5:]), reverse=True)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; when this returns, it is on the disk. Raises OspoError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    with os_errors("write the checkpoint", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def read_checkpoint(path: Path, limit: int) -> Any:
    """Read a checkpoint of up to `limit` bytes, packed and unpacked, without running code of it.

    Raises an exception of any kind for one that is damaged; see `ospo_fast.files.reading`.
    """
    data = read_bytes(path, limit)
    data, checksum = data[:-32], data[-32:]
    if hashlib.sha256(data).digest() != checksum:
        raise ValueError("its checksum is wrong, as it is damaged or from an older version")
    check_archive(data, limit)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def delete_others(kept: Path) -> None:
    """Delete the other checkpoints in the folder. One that cannot be deleted is left, with a warning."""
    for path in checkpoint_paths(kept.parent):
        if path != kept:
            try:
                path.unlink()
            except OSError as error:
                logger.warning("cannot delete the old checkpoint %s: %s; delete it", path, error.strerror or error)


def check_tensors(what: str, tensors: Any, expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a value has the names, shapes and types of the expected tensors."""
    if not isinstance(tensors, dict) or tensors.keys() != expected.keys():
        raise ValueError(f"its {what} should have the tensors of this model")
    for name, like in expected.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise ValueError(f"its {what} should have {name} of shape {tuple(like.shape)} and type {like.dtype}")


def check_optimizer(moments: Any, parameters: list[Tensor]) -> None:
    """Raise an exception of any kind for what cannot be the state of AdamW for these parameters."""
    for index, moment in moments.items():
        like = parameters[range(len(parameters)).index(index)]
        expected = {"step": torch.zeros(()), "exp_avg": like, "exp_avg_sq": like}
        check_tensors("optimizer state", moment, expected)


def check_progress(progress: Any, names: tuple[str, ...], steps: int) -> None:
    """Raise an exception of any kind unless a value has the fields of a Trainer of these names and their types."""

    def counts(*values: Any) -> bool:
        return all(type(value) is int and value >= 0 for value in values)

    best, pairs = progress["best"], progress["skipped_pairs"]
    right = (
        progress.keys() == set(names)
        and counts(progress["step"], progress["stale"], progress["skipped_steps"], *pairs.values())
        and progress["step"] <= steps
        and type(progress["stopped"]) is bool
        and all(type(pair_id) is str for pair_id in pairs)
    )
    if right and best != {}:
        right = best.keys() == {"step", "value", "sha256"} and counts(best["step"])
        right = right and (type(best["value"]), type(best["sha256"])) == (float, str)
    if not right:
        raise ValueError(f"its progress should have {', '.join(names)} of this run")


def check_random_state(state: Any) -> None:
    """Raise an exception of any kind for states that the random number generators cannot take."""
    torch.Generator().set_state(state["cpu"])
    if not isinstance(state["cuda"], list):
        raise TypeError("its random states of GPUs should be a list")
    for each in state["cuda"]:
        if torch.cuda.is_available():
            torch.Generator("cuda").set_state(each)
        elif not isinstance(each, Tensor) or each.dtype != torch.uint8:
            raise TypeError("its random states of GPUs should be tensors of bytes")

"""Checkpoints of a training run: a file, or a folder of the shards of several processes.

A file is what `torch.save` writes, and its SHA-256 as the last 32 bytes. A folder has such a file, state.pt, which
holds the SHA-256 of the others: safetensors of torch.distributed.checkpoint, which other numbers of processes read.
A checksum shows every damage. It does not prove where a file is from, so that what it holds is checked as well.
"""

import contextlib
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ospo_fast.files import MAX_BYTES, check_archive, read_bytes, reading, regular
from ospo_fast.records import delete, os_errors, write_atomic, write_folder
from ospo_fast.stages.parallel import Ranks

logger = logging.getLogger(__name__)

REMEDY = "use --no-resume to start over"
STATE = "state.pt"  # in the folder of a checkpoint


def checkpoint_path(folder: Path, step: int, *, sharded: bool) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / (f"step-{step:06d}" if sharded else f"step-{step:06d}.pt")


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, those of later steps first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{6,18}(\.pt)?", path.name)]
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


def write_sharded(path: Path, tensors: dict[str, Any], state: dict[str, Any], ranks: Ranks) -> None:
    """Write a folder: `tensors` are those of this process, whole or DTensors, and `state` is that of rank 0.

    Every process writes its shards. The folder is there once it is whole, and on the disk. Raises OspoError on every
    process.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    partial = path.with_name(f"{path.name}.partial")

    def begin() -> None:
        with os_errors("write the checkpoint", path):
            for rest in path.parent.glob("step-*.partial"):  # of processes that were killed
                delete(rest)
            partial.mkdir(parents=True)

    def write() -> None:
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        with os_errors("write the checkpoint", path), _plain_errors():
            save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)

    ranks.first(begin)
    ranks.everywhere(write)
    names = ranks.first(lambda: sorted(file.name for file in partial.iterdir()))
    files = _digests(partial, names, ranks)

    def finish(folder: Path) -> None:
        for name in names:
            (partial / name).rename(folder / name)
        write_checkpoint(folder / STATE, {**state, "files": files})

    ranks.first(lambda: write_folder(path, finish))
    ranks.first(partial.rmdir)


def read_sharded(path: Path, limit: int, ranks: Ranks) -> dict[str, Any]:
    """Read the state of a folder and check its files, which have up to `limit` bytes together; see `read_checkpoint`.

    Every process reads some of the files, and all get an error of one.
    """

    def begin() -> tuple[dict[str, Any], list[str]]:
        with reading("checkpoint", path, REMEDY):
            state = read_checkpoint(path / STATE, MAX_BYTES)
            names = sorted(file.name for file in path.iterdir() if file.name != STATE)
            if any(re.fullmatch(r"[\w.-]+\.safetensors", name) is None for name in names):
                raise ValueError(f"it should have no other files than {STATE} and safetensors")
            if sum(regular(path / name).stat().st_size for name in names) > limit:
                raise ValueError(f"it has more than {limit} bytes")
            return state, names

    state, names = ranks.first(begin)
    if state["files"] != _digests(path, names, ranks):
        raise ValueError("its checksum is wrong, as it is damaged or from an older version")
    return state


def _digests(folder: Path, names: list[str], ranks: Ranks) -> dict[str, str]:
    """Return the SHA-256 of files, of which every process reads some."""

    def own() -> dict[str, str]:
        found = {}
        for name in names[ranks.rank :: ranks.size]:
            digest = hashlib.sha256()
            with os_errors("read the checkpoint", folder / name), (folder / name).open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            found[name] = digest.hexdigest()
        return found

    return dict(sorted(item for found in ranks.everywhere(own) for item in found.items()))


def load_shards(path: Path, tensors: dict[str, Any], ranks: Ranks) -> None:
    """Load the tensors of a folder into these, each process its shards. Raises OspoError on every process."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

    def load() -> None:
        with reading("checkpoint", path, REMEDY), _plain_errors():
            reader = HuggingFaceStorageReader(str(path))
            load_tensors(tensors, storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)
            local = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors.values())
            if not all(tensor.isfinite().all() for tensor in local):
                raise ValueError("its weights or moments are not finite")

    ranks.everywhere(load)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the first error that torch.distributed.checkpoint collects; leave out its warnings for one process."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:  # which is no Exception
            first, _ = next(iter(error.failures.values()))
            raise first from error


def delete_others(kept: Path) -> None:
    """Delete the other checkpoints in the folder. One that cannot be deleted is left, with a warning."""
    for path in checkpoint_paths(kept.parent):
        if path != kept:
            try:
                delete(path)
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

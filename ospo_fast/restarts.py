"""Start a stage, or a run, over without losing what is there before the new one is whole.

What starts over is written to a hidden folder: `.restart.<stage>` for a stage, `.restart` for all stages. The old files
stay until the new ones are complete. Then a list of the new files, `.whole.json`, is written, the new files take the
places of the old ones, and what later stages made of the old ones goes. A process that is killed before the list is
written leaves the old files as they were. After that, the next command puts the rest of the new files in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ospo_fast.errors import OspoError
from ospo_fast.files import no_link
from ospo_fast.records import (
    delete,
    discard,
    locked,
    only_user,
    only_writer,
    open_to_lock,
    os_errors,
    read_json,
    sync_folder,
    update_json,
    write_json,
)  # fmt: skip
from ospo_fast.stages import STAGES, Shard, Stage, find_stage

PREFIX = ".restart"
_LIST = ".whole.json"
_IN_USE = ".stages.lock"
_NAME = rf"\{PREFIX}(\.({'|'.join(stage.name for stage in STAGES)})(\.\d+-of-\d+)?)?"


def folder(out: Path, stage: Stage | None = None, shard: Shard | str | None = None) -> Path:
    """Return the folder in which a stage (or a shard of it) of the run folder `out`, or all of it, starts over.

    Raises OspoError for a symbolic link, by which a run folder of someone else would have other files changed.
    """
    return no_link(out / ".".join(map(str, filter(None, (PREFIX, stage and stage.name, shard)))))


def refuse_links(folder: Path) -> None:
    """Raise OspoError for a link among the folders to write to: in a run folder of someone else it leads anywhere."""
    found = [folder] if folder.is_symlink() else []
    for at, folders, _ in os.walk(folder):
        found += [path for name in folders if (path := Path(at, name)).is_symlink()]
    if found:
        raise OspoError(
            f"{found[0]} is a symbolic link, and a run folder is not written through links; put the folder itself in "
            "its place, or move the whole run folder to the other disk."
        )


def made_by(out: Path, stages: Sequence[Stage], shard: Shard | str | None = None) -> list[Path]:
    """Return the existing stores and folders of stages in a run folder; of a shard, its store alone."""
    if shard:
        return [path for stage in stages if (path := out / f"{stage.name}.{shard}.jsonl").exists()]
    names = "|".join(re.escape(stage.name) for stage in stages)
    stores = [path for path in out.glob("*.jsonl") if re.fullmatch(rf"({names})(\.\d+-of-\d+)?", path.stem)]
    return stores + [path for stage in stages if stage.folder and (path := out / stage.folder).is_dir()]


def made_by_run(out: Path) -> list[Path]:
    """Return what all stages of all iterations have made in a run folder."""
    return made_by(out, STAGES) + _iterations(out)


def _iterations(out: Path) -> list[Path]:
    return [path for path in out.glob("iter*") if re.fullmatch(r"iter\d+", path.name)]


@contextlib.contextmanager
def in_use(out: Path, *, alone: bool = False) -> Iterator[None]:
    """Hold the lock of a run folder, from before a stage reads its inputs: shared, or `alone` to start over.

    A folder in which no stage has begun has no such lock: nothing in it can be replaced. Nor has one without the lock
    that this process cannot write. Raises OspoError if another process holds the lock in a way that excludes this one.
    """
    path = _lock_path(out)
    try:
        handle = open_to_lock(path, os.O_CREAT if alone or made_by(out, STAGES) else 0)
    except (FileNotFoundError, NotADirectoryError):
        yield
        return
    except OSError as error:
        raise OspoError(f"Cannot lock {path}: {error.strerror}; delete the file.") from error
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise OspoError(f"Cannot lock {path}: {error.strerror}.") from error
            how = "in use by" if alone else "being started over by"
            raise OspoError(f"{out} is {how} another process; wait for it, or give this one another --out.") from error
        yield
    finally:
        os.close(handle)


def _lock_path(out: Path) -> Path:
    """Return the lock of a run folder, or of an iteration: next to it, as NFS deletes no folder with open files."""
    iteration = re.fullmatch(r"iter\d+", out.name) and (out.parent / "config.yaml").is_file()
    return out.with_name(f".{out.name}{_IN_USE}") if iteration else out / _IN_USE


def begin(out: Path) -> None:
    """Make the lock of a run folder in which a stage begins; see `in_use`."""
    if not out.name.startswith(PREFIX):  # no other process reads what is not in place
        with os_errors("write", out):
            os.close(open_to_lock(_lock_path(out), os.O_CREAT))


@contextlib.contextmanager
def exclusive(out: Path, stages: Sequence[Stage], shard: Shard | None = None) -> Iterator[None]:
    """Hold the locks of a run folder and of the stages' stores and training, to start over.

    A shard replaces its own store alone, so that the others run at the same time. Raises OspoError if another process
    holds one of the locks.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_use(out, alone=shard is None))
        for stage in stages:
            for path in map(no_link, made_by(out, [stage], shard)):
                if stage.counts_steps:
                    stack.enter_context(only_writer(path))
                elif path.is_file():
                    stack.enter_context(only_user(path))
        yield


def put_in_place(work: Path, out: Path, run_folder: Path) -> None:
    """Let the files of a folder that is whole take the places of those of `out`, and delete the folder.

    The caller holds the locks of `out`; see `exclusive`. run_folder: that of all iterations, which has config.yaml.
    """
    names = sorted(path.name for path in work.iterdir() if not path.name.startswith("."))
    with _one_shard(work, out):
        write_json(work / _LIST, names)
        _move(work, out, run_folder)


def finish(out: Path, run_folder: Path, shard: Shard | None = None) -> None:
    """Put in place what was whole when its process was killed; of shards, the given one or all if None."""
    for work in sorted(out.glob(f"{PREFIX}*")):
        if not (re.fullmatch(_NAME, work.name) and (no_link(work) / _LIST).exists()):
            continue
        _, of = _parts(work)
        if of and shard is not None and of != str(shard):
            continue  # its process may be alive
        with everything(out) if work.name == PREFIX else in_use(out, alone=not of), _one_shard(work, out):
            if (work / _LIST).exists():  # no other process has done it in the meantime
                _move(work, out, run_folder)


@contextlib.contextmanager
def everything(out: Path) -> Iterator[None]:
    """Hold the locks of a run folder and its iterations, to start over. Raises OspoError as `exclusive` does."""
    with contextlib.ExitStack() as locks:
        locks.enter_context(exclusive(out, STAGES))
        for folder in _iterations(out):
            if not folder.is_symlink():
                locks.enter_context(in_use(folder, alone=True))
        yield


def _one_shard(work: Path, out: Path) -> contextlib.AbstractContextManager[None]:
    """Let one process at a time put shards in place, which have the run folder in common."""
    return locked(out / ".shards.lock") if _parts(work)[1] else contextlib.nullcontext()


def _parts(work: Path) -> tuple[str, str]:
    """Return the stage and the shard in the name of a folder; both empty for that of a run."""
    _, _, stage, shard, *_ = (*work.name.split("."), "", "")
    return stage, shard


def _move(work: Path, out: Path, run_folder: Path) -> None:
    """Do what is left of `put_in_place` once the list is written. Each step can be repeated."""
    # All is read before anything is deleted.
    names = set(map(str, read_json(work / _LIST, [])))
    settings, rows = read_json(work / "settings.json", {}), read_json(work / "stages.json", [])
    for name, kind in (("settings.json", {}), ("stages.json", [])):
        read_json(out / name, kind)
    stage, shard = _parts(work)
    later = STAGES[STAGES.index(find_stage(stage)) :] if stage else STAGES
    old, new = (made_by(at, later, shard) if stage else made_by_run(at) for at in (out, work))
    for path in (*new, *(path for path in old if path.name in {each.name for each in new})):
        no_link(path)
    if not {path.name for path in new} <= names:
        raise OspoError(f"{work / _LIST} does not list the files of its folder; delete the folder {work}.")
    with os_errors("replace the files of", out):
        for path in old:
            if path.name not in names:
                delete(path)
        if shard:
            _merge_files(work, out, find_stage(stage))
        for path in new:
            if path.is_dir():
                delete(out / path.name)
            _rename(path, out / path.name)
        if (work / "settings.json").exists():
            gone = {f"{stage}.{shard}"} if shard else {each.name for each in later}
            update_json(out / "settings.json", {}, lambda before: {**_without(before, gone), **settings})
            update_json(out / "stages.json", [], lambda before: [*_kept_rows(before, gone), *rows])
            if (work / "config.yaml").exists():
                (work / "config.yaml").replace(run_folder / "config.yaml")
            (work / "settings.json").unlink()  # the mark of a folder that can be continued
        if not shard:
            for path in out.glob(f"{PREFIX}*"):  # what they would replace is gone
                if re.fullmatch(_NAME, path.name) and (path.name == PREFIX or find_stage(_parts(path)[0]) in later):
                    discard(path)
        discard(work)


def _merge_files(work: Path, out: Path, stage: Stage) -> None:
    """Move the files of a shard's items into the folder of the stage, which other shards write as well."""
    folder = work / str(stage.folder)
    if stage.folder is None or not folder.is_dir():
        return
    for path in sorted(folder.rglob("*")):
        target = out / stage.folder / path.relative_to(folder)
        if not path.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            _rename(path, target)


def _without(settings: dict[str, Any], gone: set[str]) -> dict[str, Any]:
    """Leave out the entries of settings.json of stages and their shards, or of one shard."""
    return {key: value for key, value in settings.items() if not {key, key.partition(".")[0]} & gone}


def _kept_rows(rows: list[Any], gone: set[str]) -> list[Any]:
    """Leave out the entries of stages.json of stages and their shards, or of one shard."""
    # A row of another form is for `stage_metrics` to name.
    return [
        row
        for row in rows
        if not isinstance(row, dict) or not {str(row.get("stage")), f"{row.get('stage')}.{row.get('shard')}"} & gone
    ]


def _rename(path: Path, target: Path) -> None:
    path.replace(target)
    sync_folder(target.parent)


def delete_if_empty(work: Path) -> None:
    """Delete a folder in which nothing was begun."""
    if not (work / "settings.json").exists():
        discard(work)

"""Start a stage, or a run, over without losing what is there before the new one is whole.

What starts over is written to a hidden folder: `.restart.<stage>` for a stage, `.restart` for all stages. The old files
stay until the new ones are complete. Then a list of the new files, `.whole.json`, is written, the new files take the
places of the old ones, and what later stages made of the old ones goes. A process that is killed before the list is
written leaves the old files as they were. After that, the next command puts the rest of the new files in place.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import json
import os
import random
import re
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import OspoError
from ospo_fast.files import no_link, read_bytes
from ospo_fast.records import (
    delete,
    discard,
    forget_lock,
    lock_of,
    locked,
    only_user,
    only_writer,
    open_to_lock,
    os_errors,
    parse_json,
    read_json,
    remember_lock,
    sync_folder,
    update_json,
    write_json,
)  # fmt: skip
from ospo_fast.stages import STAGES, Shard, Stage, find_stage
from ospo_fast.work_sharing import SharedWork

if TYPE_CHECKING:
    from ospo_fast.workers import Workers

PREFIX = ".restart"
_LIST = ".whole.json"
_IN_USE = ".stages.lock"
_OF_RUN = ("config.yaml", "settings.json")  # in a folder whose iterations are below it
_PATIENCE = 5.0  # seconds that a shard waits for others, which may wait for it
_OF_ITERATION = ".."  # in the list of an iteration that is not used by itself: its run folder
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
    return [path for path in out.glob("iter*") if _is_iteration(path)]


def _is_iteration(path: Path) -> bool:
    return re.fullmatch(r"iter\d+", path.name) is not None


def later_iterations(out: Path, run_folder: Path) -> list[Path]:
    """Return the folders of the iterations after that of `out`, which start from what it trains."""
    number = 1 if out == run_folder else int(out.name[4:])
    return [path for path in _iterations(run_folder) if int(path.name[4:]) > number]


def made_after(work: Path, made: Sequence[Path]) -> list[Path]:
    """Return the results, of iterations too, that were written after a start was begun or continued in `work`."""
    path = no_link(work / "config.yaml")  # is written whenever a stage begins
    if not path.exists():
        return []
    begun = path.stat().st_mtime_ns
    made = [*made, *(each for path in made if _is_iteration(path) for each in made_by(path, STAGES))]
    files = [path / "log.jsonl" if path.is_dir() else path for path in made]  # sweeping changes the time of a folder
    return [path for path in files if path.is_file() and path.stat().st_mtime_ns > begun]


class InUseError(OspoError):
    """Another process holds the lock of a run folder."""


class RunLock:
    """The lock of a run folder and its iterations: one process alone holds it, or those of shards together.

    The workers of one launch (`ospo_fast.workers`) hold it together too, once the first of them has held it alone; see
    `share`. The file says who holds it.

    It is held from before the first check of a command to its end, so that nothing changes that was checked or read.
    Where there is none, `begin` makes it before the first write, because a refused command leaves no trace, and finds
    out whether anything has changed until then. A folder that cannot be written is read under a shared lock.
    """

    def __init__(self, out: Path, *, shared: bool, workers: Workers | None = None) -> None:
        self.out, self._workers, self._launch = out, workers, ""
        place = Path(os.path.realpath(out))  # an iteration by any path has the lock of its run
        of_run = _is_iteration(place) and all((place.parent / name).is_file() for name in _OF_RUN)
        self.run_folder = place.parent if of_run else out
        self._path, self._handle = self.run_folder / _IN_USE, -1
        self.writes = not out.exists() or os.access(out, os.W_OK)
        self.shared = shared or not self.writes
        self._before: dict[Path, object] = {}
        self._stores: set[Path] = set()
        self._of_stores = contextlib.ExitStack()

    @classmethod
    @contextlib.contextmanager
    def hold(cls, out: Path, *, shared: bool, workers: Workers | None = None) -> Iterator[RunLock]:
        """Hold the lock of a run folder in the block. Raises OspoError if another process holds it.

        Of several workers the first alone holds it, until `share`.
        """
        lock = cls(out, shared=shared, workers=workers)
        try:
            try:
                if workers is None or workers.is_first:
                    lock._take(0)
            except (FileNotFoundError, NotADirectoryError):
                lock._before = _state(lock.run_folder)
            except OSError as error:
                if lock.writes:
                    remedy = "ask its owner for access" if isinstance(error, PermissionError) else "delete the file"
                    raise OspoError(f"Cannot lock {lock._path}: {error.strerror}; {remedy}.") from error
            yield lock
        finally:
            lock._release()

    def begin(self, store: Path | None = None) -> None:
        """Hold the lock, before the first write; of a shard, also that of its store, which it alone writes.

        Raises OspoError if that cannot be, or if another process has written to the folder before it was held.
        """
        self._begin()
        if store is not None and store not in self._stores:
            self._of_stores.enter_context(only_writer(store))
            self._stores.add(store)

    def _begin(self) -> None:
        if self._handle >= 0:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._take(os.O_CREAT)
        except OSError as error:
            raise OspoError(
                f"Cannot write {self.out}: {error.strerror}; choose another run folder with --out."
            ) from error
        if not self.shared and _state(self.run_folder) != self._before:
            raise OspoError(f"Another process has just written to {self.out}; run the command again.")

    def share(self, workers: Workers) -> SharedWork:
        """Hold the lock together with the other workers; all of them call this. Raises OspoError if they cannot."""
        with workers.first():
            if workers.is_first:
                self.begin()
                self._launch = workers.launch
                self._sign()
                fcntl.flock(self._handle, fcntl.LOCK_SH)
            else:
                self._join(workers)
            self.shared = True
        return self._of_stores.enter_context(SharedWork(self.run_folder, workers).held())

    def _join(self, workers: Workers) -> None:
        self.shared, self._launch = True, workers.launch
        held = False
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            held = _is_held(self._path)  # by worker 0
            self._take(0)
        if self._handle < 0 or _owner(self._path).get("launch") != workers.launch:
            raise OspoError(
                f"{self.out}: worker {workers.rank} on {socket.gethostname()} does not see the files of worker 0 "
                "there; give a run folder on a file system that all workers have in common with --out."
            )
        if not held:
            raise OspoError(
                f"{self.out}: its file system does not show the file locks (flock) of other machines, without which "
                "workers overwrite each other's files; use another file system, or mount it with locks."
            )

    def _take(self, flags: int) -> None:
        self._handle = open_to_lock(self._path, flags)
        try:
            self._wait(fcntl.LOCK_SH) if self.shared else self._lock(fcntl.LOCK_EX)
            self._sign()
            remember_lock(self._handle)
        except BaseException:  # a signal, too
            os.close(self._handle)
            self._handle = -1
            raise

    def _release(self) -> None:
        self._of_stores.close()
        self._stores.clear()
        if self._handle >= 0:
            forget_lock(self._handle)
            with contextlib.suppress(OSError):
                # A refused command leaves no trace. Of several workers, the last to leave takes the name away.
                if self._is_alone() if self._launch else _owner(self._path).get("process") == os.getpid():
                    os.ftruncate(self._handle, 0)
            with contextlib.suppress(OSError):
                fcntl.flock(self._handle, fcntl.LOCK_UN)  # of forked processes, too, which have the same open file
            os.close(self._handle)
            self._handle = -1

    def _sign(self) -> None:
        """Write who holds the lock to its file; of processes that share it, the newest.

        Raises InUseError if a shard has got the lock that the workers of a launch share.
        """
        if self.shared and not self._launch and "launch" in _owner(self._path) and not self._is_alone():
            raise InUseError(self._in_use())
        if self.shared and self._launch:
            return  # the first worker has signed for all
        command = Path(sys.argv[0]).name
        if command in ("ospo-fast", "__main__.py"):
            command = " ".join(["ospo-fast", *sys.argv[1:2]])
        owner = {"command": command, "process": os.getpid(), "host": socket.gethostname()}
        owner["since"] = dt.datetime.now().astimezone().isoformat(" ", "seconds")
        if self._launch:
            owner["launch"] = self._launch
        with contextlib.suppress(OSError):  # of a folder that can only be read
            data = json.dumps(owner).encode()
            os.pwrite(self._handle, data, 0)
            os.ftruncate(self._handle, len(data))

    def _is_alone(self) -> bool:
        """Return whether no other process shares the lock."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_SH)
        return True

    def _in_use(self) -> str:
        owner = _owner(self._path)
        names = ("command", "process", "host", "since")
        who = "" if not all(name in owner for name in names) else (
            f" ({owner['command']}, process {owner['process']} on {owner['host']}, since {owner['since']})"
        )  # fmt: skip
        return f"{self.out} is in use by another process{who}; wait for it, or give this one another --out."

    def _lock(self, how: int) -> None:
        try:
            fcntl.flock(self._handle, how | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise OspoError(f"Cannot lock {self._path}: {error.strerror}.") from error
            raise InUseError(self._in_use()) from error

    def _wait(self, how: int, needed: Callable[[], bool] = lambda: True) -> None:
        """Lock, after waiting some seconds for shards that finish what was killed, unless it is not needed any more."""
        end = time.monotonic() + _PATIENCE
        while needed():
            try:
                self._lock(how)
                break
            except InUseError:
                if time.monotonic() > end:
                    raise
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # for another shard that waits for this one
            time.sleep(random.uniform(0.01, 0.1))

    @contextlib.contextmanager
    def alone(self, needed: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Hold the lock alone in the block, unless it is not needed any more. Raises OspoError if others hold it."""
        if not self.shared:
            yield
            return
        if self._launch:
            with one_shard(self.run_folder):  # no process but the workers has the folder
                yield
            return
        try:
            self._wait(fcntl.LOCK_EX, needed)
            yield
        finally:
            try:
                self._wait(fcntl.LOCK_SH)
            except OspoError:
                self._release()
                raise


def _owner(path: Path) -> dict[str, Any]:
    """Return what the file of a lock says of who holds it, as far as it can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = parse_json(read_bytes(path, 4096))
        if isinstance(found, dict) and all(isinstance(value, str | int) for value in found.values()):
            return found
    return {}


def _is_held(path: Path) -> bool:
    """Return whether another open file holds the lock, alone or with others. Raises OSError."""
    handle = open_to_lock(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _state(out: Path) -> dict[Path, object]:
    """Return what shows that a process has written to a run folder."""
    found: dict[Path, object] = {}
    folders = [out, *_iterations(out)]
    for path in (path for folder in folders for path in (folder / "settings.json", *made_by(folder, STAGES))):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = path.lstat()
            file = stat.S_ISREG(status.st_mode)
            found[path] = (status.st_ino, status.st_size, status.st_mtime_ns) if file else None
    return found


@contextlib.contextmanager
def exclusive(out: Path, stages: Sequence[Stage], shard: Shard | None = None) -> Iterator[None]:
    """Hold the locks of the stages' stores and training, to start over, besides the `RunLock`.

    A shard replaces its own store alone, so that the others run at the same time. Raises OspoError if another process
    holds one of the locks.
    """
    with contextlib.ExitStack() as stack:
        for stage in stages:
            for path in map(no_link, made_by(out, [stage], shard)):
                if stage.counts_steps:
                    stack.enter_context(only_writer(path))
                elif path.is_file():
                    stack.enter_context(only_user(path))
        yield


def put_in_place(work: Path, out: Path, run_folder: Path, check: Callable[[], object] = lambda: None) -> None:
    """Let the files of a folder that is whole take the places of those of `out`, and delete the folder.

    The caller holds the locks of `out`; see `exclusive`. run_folder: that of all iterations, which has config.yaml.
    check: of a shard, called once no other shard begins or replaces anything.
    """
    with one_shard(out) if _parts(work)[1] else contextlib.nullcontext():
        if not (work / _LIST).exists():  # else a killed process has moved some of them
            check()
            list_whole(work, *([_OF_ITERATION] if run_folder != out else []))
        _move(work, out)


def list_whole(work: Path, *more: str) -> None:
    """Write the list of the files of a folder, which marks it as whole."""
    write_json(work / _LIST, [*sorted(path.name for path in made_by_run(work)), *more])


@contextlib.contextmanager
def reading(out: Path) -> Iterator[None]:
    """Let no process write a run folder in the block, which changes no file of it. Raises InUseError if one does."""
    lock, handle = RunLock(out, shared=True), -1
    with contextlib.suppress(FileNotFoundError):  # of a folder that was copied without hidden files
        handle = open_to_lock(lock._path)
    try:
        if handle >= 0 and not _lock_to_read(handle, lock._path):
            raise InUseError(f"{lock._in_use().partition(';')[0]}; wait for it.")
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def _lock_to_read(handle: int, path: Path) -> bool:
    """Lock a run folder together with others that read it; return whether none writes it."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(handle, fcntl.LOCK_SH)
        return True
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return not _owner(path)  # shards and workers, which share it as well, sign it
    return False


def unfinished(out: Path) -> list[Path]:
    """Return the folders whose files are whole, and not all in place."""
    found = (path for path in sorted(out.glob(f"{PREFIX}*")) if re.fullmatch(_NAME, path.name))
    return [path for path in found if (no_link(path) / _LIST).exists()]


def finish(lock: RunLock, out: Path) -> None:
    """Put in place what was whole when its process was killed."""
    for work in unfinished(out):
        lock.begin()
        # A shard whose list is there is being put in place by a process that holds the lock, or by none.
        whole = (work / _LIST).exists
        with one_shard(out) if _parts(work)[1] else lock.alone(whole):
            if whole():
                _move(work, out)


def finish_run(lock: RunLock) -> None:
    """Do `finish` in a run folder and its iterations, before its config.yaml is read, which can be replaced."""
    with os_errors("read", lock.out):
        for folder in _folders(lock.run_folder):
            finish(lock, folder)


def finish_killed(out: Path) -> None:
    """Do `finish_run` for a command that only reads: it waits for no process that uses the folder."""
    lock = RunLock(out, shared=True)
    with os_errors("read", out):
        waiting = any(unfinished(folder) for folder in _folders(lock.run_folder))
    if waiting:
        with contextlib.suppress(InUseError), RunLock.hold(out, shared=True) as lock:
            finish_run(lock)


def _folders(run_folder: Path) -> list[Path]:
    return [run_folder, *(folder for folder in _iterations(run_folder) if not folder.is_symlink())]


def one_shard(out: Path) -> contextlib.AbstractContextManager[None]:
    """Let one process at a time begin a shard or put one in place: shards have the run folder in common."""
    return locked(out / ".shards.lock")


def _parts(work: Path) -> tuple[str, str]:
    """Return the stage and the shard in the name of a folder; both empty for that of a run."""
    _, _, stage, shard, *_ = (*work.name.split("."), "", "")
    return stage, shard


def _move(work: Path, out: Path) -> None:
    """Do what is left of `put_in_place` once the list is written. Each step can be repeated."""
    out = Path(os.path.realpath(out))  # the name of an iteration has its number
    # All is read and checked before anything is deleted.
    names = set(map(str, read_json(work / _LIST, [])))
    run_folder = out.parent if _OF_ITERATION in names and _is_iteration(out) else out
    settings, rows = read_json(work / "settings.json", {}), read_json(work / "stages.json", [])
    for name, kind in (("settings.json", {}), ("stages.json", [])):
        read_json(out / name, kind)
    stage, shard = _parts(work)
    later = STAGES[STAGES.index(find_stage(stage)) :] if stage else STAGES
    later = later[:1] if shard else later  # a shard replaces nothing that a later stage has used
    old, new = (made_by(at, later, shard) if stage else made_by_run(at) for at in (out, work))
    if not shard:
        old += later_iterations(out, run_folder) if stage else []
    refuse_links(work)
    if shard:
        refuse_links(out / str(find_stage(stage).folder))
    for path, place in [(path, out / path.name) for path in new] + [(work / "config.yaml", run_folder / "config.yaml")]:
        refuse_links(place)
        if no_link(path).exists() and place.exists() and path.is_dir() != place.is_dir():
            expected, got = ("folder", "file") if path.is_dir() else ("file", "folder")
            raise OspoError(f"{place} is a {got}, expected a {expected}; delete it.")
    if not {path.name for path in new} <= names:
        raise OspoError(f"{work / _LIST} does not list the files of its folder; delete the folder {work}.")
    with os_errors("replace the files of", out):
        for path in old:
            if path.name not in names:
                delete(path)
                if not shard:  # and no other process has the run folder
                    delete(lock_of(path))
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

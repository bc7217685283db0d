"""Several processes that run one command together: those of torchrun, or of anything that sets RANK and WORLD_SIZE.

Each of them, a worker, runs the whole command. They meet in the key-value store of `torch.distributed`, compare what
they were started with, and tell each other of errors there. The stages before training need nothing else of it: which
work is taken, done and merged is seen in the run folder (`ospo_fast.work_sharing`), so that they survive the end of any
worker. Training needs all workers, as one process group.

No decision depends on the clocks of the machines.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

from ospo_fast.errors import OspoError, UsageError, printable
from ospo_fast.records import shown

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_WORKERS = 10**5
PATIENCE = 300.0  # seconds that a worker waits for the others to start
PATIENCE_TO_LOAD = 1800.0  # and to have loaded what it needs
SILENCE = 60.0  # seconds without a sign of life after which a worker has ended, before it has its lock
NOTICE = 10.0  # seconds after which it says whom it waits for
GRACE = 20.0  # seconds that a worker has to end after another has failed, where it can be inside of a library
_POLL = 0.5  # seconds between two looks for the errors of others


class PeerError(OspoError):
    """Another worker has failed, or has ended."""


class StrangerError(UsageError):
    """A process does not belong to the workers that it has found. They do not end with it."""


@dataclass
class Workers:
    """The process of a worker, and its number among those that run the command together. See `from_environment`."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    attempt: str = "0"  # of torchrun, which starts all workers again when one has ended
    local_size: int = 1  # workers on this machine
    patience: float = PATIENCE
    launch: str = ""  # of all workers, and of no other start of the command
    _store: Any = None
    _steps: int = 0  # of `first`
    _failure: str | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _signaling: threading.Lock = field(default_factory=threading.Lock)
    _training: bool = False
    _alone: bool = False  # without the store
    _agreed: bool = False
    gone: Callable[[], Sequence[int]] = lambda: ()  # the ranks of workers whose process has ended

    current: ClassVar[Workers | None] = None  # in the block of `together`

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Workers | None:
        """Return this worker as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe it.

        None for a process by itself: WORLD_SIZE is 1 or not set. Raises UsageError for values that fit no start.
        """
        if "WORLD_SIZE" not in environ and "RANK" not in environ:
            return None
        size = _number(environ, "WORLD_SIZE", 1, MAX_WORKERS)
        if size == 1 and "RANK" not in environ:
            return None
        rank = _number(environ, "RANK", 0, size - 1)
        if size == 1:
            return None
        address = environ.get("MASTER_ADDR", "")
        if not address:
            raise UsageError(
                f"MASTER_ADDR: it is not set, while WORLD_SIZE is {size}; start the workers with torchrun, or unset "
                "RANK and WORLD_SIZE for one process."
            )
        port = _number(environ, "MASTER_PORT", 0, 2**16 - 1)
        local = _number(environ, "LOCAL_RANK", 0, MAX_WORKERS) if "LOCAL_RANK" in environ else 0
        attempt = f"{environ.get('TORCHELASTIC_RUN_ID', '')}.{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        local_size = _number(environ, "LOCAL_WORLD_SIZE", 1, size) if "LOCAL_WORLD_SIZE" in environ else 1
        return cls(rank, size, local, address, port, attempt, local_size, PATIENCE)

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that does what one does for all, such as printing."""
        return self.rank == 0

    @property
    def restarted(self) -> bool:
        """Whether torchrun has started the workers again, after one of them has ended."""
        return not self.attempt.endswith(".0")

    def device(self, given: str | None) -> str | None:
        """Return the device of this worker, where the user gave none or cuda. Raises UsageError if it has no GPU."""
        import torch

        if given is not None and given.startswith("mps") and self.size > 1:
            raise UsageError(
                f"device: got {given!r} with {self.size} workers, expected 'cpu': processes that train together cannot "
                "exchange tensors of MPS; or start one process without torchrun."
            )
        if given is None and self.size > 1 and not torch.cuda.is_available():
            return "cpu"  # and not MPS, see above
        if given not in (None, "cuda") or not torch.cuda.is_available():
            return given
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UsageError(
                f"LOCAL_RANK: worker {self.rank} got {self.local_rank} on {socket.gethostname()}, expected less than "
                f"its {count} GPUs; start at most one worker for each GPU."
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def gpu(self, given: str | None) -> str | None:
        """Return what identifies the GPU of this worker among all machines, None without one."""
        import torch

        device = self.device(given)
        if device is None or not device.startswith("cuda") or not torch.cuda.is_available():
            return None
        return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"

    # ------------------------------------------------------------------ meeting

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Connect to the other workers in the block; an error of one of them ends the blocks of all.

        Raises:
            UsageError: a worker did not come.
            PeerError: another worker has failed, with its reason; or, in training, has ended.

        """
        self._connect()
        watcher = threading.Thread(target=self._watch, name="workers", daemon=True)
        watcher.start()
        Workers.current = self
        try:
            yield
            self._leave()
        except PeerError:
            self._end_watch()
            self._acknowledge()
            raise
        except BaseException as error:
            self._end_watch()
            if (reason := self._reason_of(error)) is not None:
                self._acknowledge()
                raise PeerError(reason) from error
            if isinstance(error, Exception) and self._belongs(error):
                self._fail(error)
            raise
        finally:
            self._over.set()
            Workers.current = None

    def _end_watch(self) -> None:
        """Let the watcher send no signal any more, and take one that it has just sent."""
        for _ in range(2):
            with contextlib.suppress(KeyboardInterrupt):
                with self._signaling:
                    self._over.set()
                time.sleep(0)

    def _belongs(self, error: Exception) -> bool:
        """Return whether this process is one of the workers, and not of another command with the same MASTER_PORT."""
        if isinstance(error, StrangerError):
            return False
        with contextlib.suppress(RuntimeError):
            return self._agreed or not self._store.check([self._key("agreed")])
        return False

    def _connect(self) -> None:
        """Connect to the store: that of torchrun, or else of worker 0."""
        import torch.distributed as dist

        if not dist.is_available():
            raise OspoError("This build of torch has no torch.distributed; install another, or start one process.")
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._store = self._client(hosted or self.rank > 0)

    def _client(self, client: bool) -> Any:
        """Return a connection of its own to the store, for `torch.distributed` too: a call that waits blocks it."""
        import torch.distributed as dist

        try:
            return dist.TCPStore(  # type: ignore[attr-defined]
                self.address,
                self.port,
                is_master=not client,
                timeout=dt.timedelta(seconds=self.patience),
                wait_for_workers=False,
                multi_tenant=not client,
            )
        except (RuntimeError, ValueError) as error:
            what = "connect to" if client else "open"
            raise UsageError(
                f"Worker {self.rank} of {self.size} cannot {what} {self.address}:{self.port} (MASTER_ADDR, "
                f"MASTER_PORT): {_first_line(error)}; start all {self.size} workers, and see that the address is that "
                "of worker 0 and the port is free."
            ) from error

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, ("ospo_fast", self.attempt, *parts)))

    def _tell(self, *parts: object) -> None:
        """Set a key to the last of the parts, if the store is still there."""
        *name, value = parts
        if self._alone:  # each call of a store that has ended prints a stack
            return
        try:
            self._store.set(self._key(*name, self.rank), str(value))
        except RuntimeError:
            self._alone = True

    def _wait(self, keys: Sequence[str], patience: float | None = None) -> None:
        """Wait until all keys are set. Raises PeerError if a worker fails meanwhile, UsageError after the patience."""
        start, told = time.monotonic(), False
        signs: dict[int, tuple[bytes, float]] = {}  # of life: the newest of each worker, and when it came here
        while missing := [key for key in keys if not self._has(key)]:
            self.check()
            waited = time.monotonic() - start
            for rank in {int(key.rpartition("/")[2]) for key in missing}:
                sign = self._get(self._key("alive", rank)) if self._has(self._key("alive", rank)) else None
                if sign is not None and sign != signs.get(rank, (None, 0))[0]:
                    signs[rank] = sign, time.monotonic()
                if rank in signs and time.monotonic() - signs[rank][1] > SILENCE:
                    raise PeerError(f"{_ended([rank])}; run the command again.")
            whom = ", ".join(key.rpartition("/")[2] for key in missing[:8])
            whom = f"worker{'s' * (len(missing) > 1)} {whom}{', …' * (len(missing) > 8)}"
            if waited > NOTICE and not told:
                logger.warning("worker %d of %d waits for %s", self.rank, self.size, whom)
                told = True
            if waited > (self.patience if patience is None else patience):
                raise UsageError(
                    f"WORLD_SIZE: got {self.size}, but {whom} did not come within {waited:.0f} s; start {self.size} "
                    "workers, or set WORLD_SIZE to the number that is started (torchrun sets it)."
                )
            time.sleep(min(0.2, 0.01 + waited / 10))

    def _ask(self, call: Callable[[], T]) -> T:
        """Return what a call of the store returns. Raises PeerError if the store has ended."""
        try:
            return call()
        except RuntimeError as error:
            with contextlib.suppress(RuntimeError):
                self.check()
            raise PeerError(f"worker 0 has ended; run the command again ({_first_line(error)}).") from error

    def _has(self, key: str) -> bool:
        return self._ask(lambda: bool(self._store.check([key])))

    def _get(self, key: str) -> bytes:
        return self._ask(lambda: bytes(self._store.get(key)))

    def agree(self, facts: Mapping[str, object], gpu: str | None = None) -> None:
        """Wait for all workers, and compare what they were started with. gpu: what no other worker may have.

        Raises UsageError that names the first fact that differs from that of worker 0, and its values.
        """
        own = {"WORLD_SIZE": self.size, **facts, "gpu": gpu}
        if self.is_first:
            self.launch = secrets.token_hex(4)
            own["launch"] = self.launch
        keys = [self._key("worker", rank) for rank in range(self.size)]
        if not self.is_first:
            self._wait(keys[:1])
            first = json.loads(self._get(keys[0]))
            self.launch = first["launch"]
            try:
                self._compare(self.rank, own, first)
            except UsageError as error:
                # Such as that of another launch with the same MASTER_PORT.
                if self._has(self._key("agreed")):
                    raise StrangerError(
                        f"{str(error).rstrip('.')}, or give another MASTER_PORT, if these are of another command."
                    ) from None
                raise
        self._ask(lambda: self._store.set(keys[self.rank], json.dumps(own, default=str)))
        self._wait(keys)
        if self.is_first:
            self._compare_gpus([json.loads(self._get(key)) for key in keys])
            self._ask(lambda: self._store.set(self._key("agreed"), ""))
        self._agreed = True

    @staticmethod
    def _compare_gpus(found: Sequence[Mapping[str, Any]]) -> None:
        owners: dict[str, int] = {}
        for rank, facts in enumerate(found):
            if facts["gpu"] is not None and owners.setdefault(facts["gpu"], rank) != rank:
                raise UsageError(
                    f"LOCAL_RANK: workers {owners[facts['gpu']]} and {rank} have the same GPU, {facts['gpu']}; "
                    "start one worker for each GPU, with its number on its machine as LOCAL_RANK, as torchrun does."
                )

    @staticmethod
    def _compare(rank: int, facts: Mapping[str, object], first: Mapping[str, object]) -> None:
        for name in first.keys() | facts.keys():
            if name in ("gpu", "launch"):
                continue
            value, before = facts.get(name), first.get(name)
            if json.dumps(value, default=str, sort_keys=True) != json.dumps(before, default=str, sort_keys=True):
                raise UsageError(
                    f"{name}: got {shown(value)} in worker {rank} and {shown(before)} in worker 0; start all workers "
                    "with the same command, settings, files and versions."
                )

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Let worker 0 do the block before the others do it. All workers call this in the same order."""
        self._steps += 1
        key = self._key("step", self._steps, 0)
        if not self.is_first:
            self._wait_for_first(key)
        yield
        if self.is_first:
            self._ask(lambda: self._store.set(key, ""))

    def decide(self, choose: Callable[[], bool]) -> bool:
        """Return what worker 0 chooses. All workers call this in the same order."""
        self._steps += 1
        key = self._key("step", self._steps, 0)
        if self.is_first:
            chosen = choose()
            self._ask(lambda: self._store.set(key, "yes" if chosen else "no"))
            return chosen
        self._wait_for_first(key)
        return self._get(key) == b"yes"

    def _wait_for_first(self, key: str) -> None:
        self._wait([key], PATIENCE_TO_LOAD if self._agreed else None)

    def everyone(self) -> None:
        """Wait until all workers have called this as often. Loading a model before may take long."""
        self._steps += 1
        self._tell("everyone", self._steps, "")
        self._wait([self._key("everyone", self._steps, rank) for rank in range(self.size)], PATIENCE_TO_LOAD)

    @property
    def launcher(self) -> str:
        """What identifies the process that has started this one, and that starts it again."""
        import psutil

        parent = psutil.Process(os.getppid())
        return f"{socket.gethostname()} {parent.pid} {parent.create_time()}"

    def _leave(self) -> None:
        """Keep the store of worker 0 until the others do not need it any more."""
        self._tell("done", "")
        if self.is_first:
            self._wait_quietly("done", GRACE)

    def _wait_quietly(self, name: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        keys = [self._key(name, rank) for rank in range(self.size) if rank not in (self.rank, *self.gone())]
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < end and not self._store.check(keys):
                time.sleep(0.05)

    # ------------------------------------------------------------------ errors

    def check(self) -> None:
        """Raise PeerError if another worker has failed."""
        if self._failure is None and not self._alone:
            try:
                self._look()
            except RuntimeError:  # the store has ended with its worker
                self._alone = True
        if self._failure is not None:
            raise PeerError(self._failure)

    def _look(self) -> None:
        if self._store.check([self._key("failed")]):
            self._failure = self._store.get(self._key("failed")).decode()

    def _fail(self, error: Exception) -> None:
        """Tell the others why this worker ends."""
        kind = "" if isinstance(error, OspoError) else f"{type(error).__name__}: "
        reason = f"worker {self.rank} on {socket.gethostname()} failed: {kind}{_first_line(error)}"
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(self._key("failed"), "", reason)
        self._acknowledge()

    def _acknowledge(self) -> None:
        """Tell that this worker knows why it ends. The one that has the store keeps it until the others know, too."""
        self._tell("seen", "")
        if self.is_first:
            self._wait_quietly("seen", 10.0)

    def _reason_of(self, error: BaseException) -> str | None:
        """Return why another worker has failed if that has caused an error here, or the signal that ends this one."""
        if isinstance(error, OspoError):
            return None
        caused = isinstance(error, KeyboardInterrupt) or _is_broken_connection(error)
        end = time.monotonic() + (2.0 if caused else 0.0)
        while True:
            with contextlib.suppress(PeerError):
                self.check()
                if caused and not isinstance(error, KeyboardInterrupt) and (reason := self._missing()):
                    return reason
            if self._failure is not None or time.monotonic() >= end:
                return self._failure
            time.sleep(0.1)

    def _missing(self) -> str | None:
        """Return which workers have ended, if any, and tell the others, who would see more of them end."""
        gone = [rank for rank in self.gone() if rank != self.rank]
        if not gone:
            return None
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(self._key("failed"), "", _ended(gone))
            self._look()
        return self._failure or _ended(gone)

    def _watch(self) -> None:
        """End this worker when another has failed, also where it waits inside of a library."""
        beats = 0
        self._tell("alive", beats)
        while not self._over.wait(_POLL):
            self._tell("alive", beats := beats + 1)
            with contextlib.suppress(PeerError):
                self.check()
                if self._training and (reason := self._missing()) is not None:
                    self._failure = reason
            if self._failure is not None:
                self._tell("seen", "")  # the main thread may wait for a worker that waits for this
                self._interrupt(self._failure)
                return

    def _interrupt(self, reason: str) -> None:
        """Interrupt the main thread. It may be inside of a library, which waits for the other worker without end."""
        # A signal, which also ends a sleep. Without a handler it would end the process without a word, or do nothing.
        number = next((n for n in (signal.SIGTERM, signal.SIGINT) if callable(signal.getsignal(n))), None)
        with self._signaling:
            if number is not None and not self._over.is_set():
                signal.pthread_kill(cast(int, threading.main_thread().ident), number)
        if not self._over.wait(GRACE):
            sys.stderr.write(f"ospo-fast: worker {self.rank} ends: {printable(reason)}\n")
            sys.stderr.flush()
            os._exit(1)

    # ------------------------------------------------------------------ training

    @contextlib.contextmanager
    def process_group(self, device: str, name: str) -> Iterator[None]:
        """Hold the default process group of all workers in the block: gloo, and NCCL for tensors on a GPU.

        Raises PeerError if a worker has ended.
        """
        import torch.distributed as dist

        self._tell(name, "")
        ended_at: float | None = None
        for rank in range(self.size):
            while not self._has(self._key(name, rank)):
                self.check()
                gone = self.gone()
                ended_at = (ended_at or time.monotonic()) if gone else None
                if ended_at is not None and time.monotonic() - ended_at > NOTICE:  # no scheduler starts it again
                    raise PeerError(
                        f"{_ended(gone)}, and training needs all; what was made is kept, so run the command again."
                    )
                time.sleep(0.1)
        self._training = True
        try:
            store = dist.PrefixStore(  # type: ignore[attr-defined]
                self._key(name, "group"), self._client(True)
            )
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=dt.timedelta(minutes=30)
            )
            yield
            dist.barrier()
        finally:
            self._training = False
            # NCCL would wait for the others.
            if dist.is_initialized() and (sys.exc_info()[0] is None or device != "cuda"):
                dist.destroy_process_group()


def _ended(ranks: Sequence[int]) -> str:
    names = ", ".join(map(str, ranks[:8]))
    return f"worker{'s' * (len(ranks) > 1)} {names} {'have' if len(ranks) > 1 else 'has'} ended"


def _is_broken_connection(error: BaseException) -> bool:
    """Return whether a library reports that another process is gone."""
    text = f"{type(error).__name__} {error}"
    return isinstance(error, RuntimeError) and bool(
        re.search(r"gloo|NCCL|Dist|[Cc]onnection|process group|TCPStore|timed? ?out", text)
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:400].rstrip(".")


def _number(environ: Mapping[str, str], name: str, low: int, high: int) -> int:
    text = environ.get(name)
    if text is None:
        other = "RANK" if name == "WORLD_SIZE" else "WORLD_SIZE"
        raise UsageError(
            f"{name}: it is not set, while {other} is; start the workers with torchrun, which sets both, or unset "
            f"{other} for one process."
        )
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UsageError(
            f"{name}: got {text[:60]!r}, expected an integer from {low} to {high}; start the workers with torchrun, "
            "which sets it, or unset RANK and WORLD_SIZE for one process."
        )
    return int(text)

"""Records and the JSONL store that every stage reads and appends to.

A record is one JSON object per item. The field names are those of the official implementation, so that its published
training set and VQA files load as they are; a stage only ever adds fields. A store holds one record a line. A line is
appended whole, flushed and synced, so that a stop at any point leaves at most one torn line, the last, which the next
writer cuts off.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypedDict, cast, final

from ospo_fast.errors import OspoError

logger = logging.getLogger(__name__)

VARIANTS = 3


class Answer(TypedDict):
    """One question put to one image: probabilities in [0, 1] and `"yes"`, `"no"` or `"tie"`."""

    p_yes: float
    p_no: float
    answer: str


class ImageVerdict(TypedDict, total=False):
    """What is known of one image; the value of `base_metadata["base_0"]` and its like.

    `path`, relative to the folder that holds the store, and the `prompt` that was drawn are written by the image stage,
    `kept` and `reason` by the selection stage (`reason` by the scoring stage for an image without a score), the rest by
    the scoring stage.
    """

    path: str
    prompt: str
    local_score: float
    answer_metadata: list[Answer]
    kept: bool
    reason: str


class ObjectSpan(TypedDict):
    """An object of the prompt: its text and the half-open character span inside the prompt."""

    text: str
    start: int
    end: int


class FurtherPair(TypedDict, total=False):
    """A pair of an item after its first. `iter_pairs` makes a record of it."""

    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    rejected_prompt: str
    mask_path: str
    mask_reason: str
    mask_stats: dict[str, Any]


class Record(TypedDict, total=False):
    """One item. Stage by stage: prompts, perturb, images, questions, score, select, masks."""

    item_id: str
    t2i_category: str
    sub_category: str
    prompt: str
    concepts_and_relations: str
    relation: str
    kind: str
    source: dict[str, int]
    # perturb: one entry per variant; an empty string where the variant was left out, with the reason beside it
    perturbed_method: list[str]
    negative_prompt: list[str]
    long_prompt: list[str]
    negative_long_prompt: list[str]
    variant_reasons: list[str | None]
    # questions, score
    question: list[str]
    question_reason: str
    base_metadata: dict[str, ImageVerdict]
    negative_metadata: dict[str, ImageVerdict]
    # select
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    rejected_prompt: str
    further_pairs: list[FurtherPair]  # of other images, where more than one pair of an item was wanted
    kept: bool
    reason: str
    # masks
    nouns: list[str]
    objects: list[ObjectSpan]
    mask_path: str
    mask: None
    mask_reason: str
    unmatched_objects: dict[str, str]  # nouns without a token, and why
    mask_stats: dict[str, Any]  # see stages/mask_stats.py


_TEXTS = ("t2i_category", "sub_category", "prompt", "concepts_and_relations", "relation", "kind", "chosen", "rejected")
_STRINGS = (*_TEXTS, "rejected_prompt", "question_reason", "mask_path", "reason", "mask_reason")
_STRING_LISTS = ("perturbed_method", "negative_prompt", "long_prompt", "negative_long_prompt", "question", "nouns")


def validate(record: object, where: str) -> Record:
    """The record itself when its fields have the documented types.

    Fields that are not known are left alone. Raises OspoError that starts with `where` and names the field, what it
    holds and what it should hold.
    """
    if not isinstance(record, dict):
        raise OspoError(f"{where}: a record is a JSON object, got {type(record).__name__}.")
    if not isinstance(record.get("item_id"), str) or not record["item_id"]:
        raise OspoError(f"{where}: `item_id` should be a non-empty string, got {record.get('item_id')!r}.")
    for name in _STRINGS:
        if record.get(name) is not None and not isinstance(record[name], str):
            raise OspoError(f"{where}: `{name}` should be a string, got {record[name]!r}.")
    for name in _STRING_LISTS:
        value = record.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise OspoError(f"{where}: `{name}` should be a list of strings, got {value!r}.")
    further = record.get("further_pairs")
    if further is not None and not (isinstance(further, list) and all(map(_is_pair, further))):
        raise OspoError(f"{where}: `further_pairs` should be objects with chosen and rejected, got {further!r}.")
    for name in ("base_metadata", "negative_metadata"):
        value = record.get(name)
        if value is not None and not (isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())):
            raise OspoError(f"{where}: `{name}` should map image names to objects, got {value!r}.")
    return cast(Record, record)


def _is_pair(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(side), str) for side in ("chosen", "rejected"))


def stable_hash(*parts: object) -> int:
    """A 63-bit integer that depends on the parts alone: the same in every process, order and shard."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def image_index(name: str) -> int:
    """The number in an image name such as `base_2`; `variant_index` tells whose image it is."""
    match = re.search(r"(\d+)$", name)
    if match is None:
        raise OspoError(f"The image name {name!r} should end in its number, as in base_0.")
    return int(match.group(1))


def variant_index(index: int, record: Mapping[str, Any]) -> int:
    """The variant of image `index` of an item. Of V variants, the k-th further image of variant i has index i + k·V."""
    variants = len(record.get("negative_prompt", ()))
    return index % variants if variants else index


# What an item's record says of its first pair, or of the item for all of its pairs, once.
_OF_ONE_PAIR = frozenset(FurtherPair.__annotations__) | {"further_pairs", "mask", "unmatched_objects"}


def iter_pairs(records: Iterable[Record]) -> Iterator[Record]:
    """A record for each pair: the items themselves, each followed by its further pairs with ids such as 0000012-1."""
    for record in records:
        yield record
        item = {name: value for name, value in record.items() if name not in _OF_ONE_PAIR}
        for number, pair in enumerate(record.get("further_pairs") or (), 1):
            yield cast(Record, {**item, **pair, "item_id": f"{record['item_id']}-{number}"})


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary file in the same folder, synced, then renamed over `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OspoError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """OspoError unless files can be made in the folder; leaves nothing behind but the folder itself."""
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OspoError(f"Cannot write {folder}: {error.strerror or error}.") from error


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically; numbers that are not finite become null, as JSON has none."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def finite(value: Any) -> Any:
    """The value with None in place of every float that is not finite, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def _parse(line: bytes, where: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise OspoError(f"{where}: the line is not valid JSON ({error}); mend or delete it.") from error
    return validate(value, where)


def _complete(line: bytes) -> bool:
    """Whether a line without its line end is nevertheless a whole object (a file edited by hand)."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a JSONL store, or of an official JSON array, in file order.

    A torn last line (no line end, not parsable) is skipped with a warning: it belongs to a writer that was stopped.
    Raises OspoError that names file and line for a missing or unreadable file, any other broken line, a record whose
    fields have wrong types and an `item_id` that occurs twice.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            yield from _read(file, path)
    except OSError as error:
        raise OspoError(f"Cannot read {path}: {error.strerror or error}.") from error


def _read(file: BinaryIO, path: Path) -> Iterator[Record]:
    first = file.read(1)
    file.seek(0)
    seen: dict[str, int] = {}
    for number, record in _array(file, path) if first == b"[" else _lines(file, path):
        item = record["item_id"]
        if item in seen:
            raise OspoError(f"{path}:{number}: item {item!r} is already there at {seen[item]}; delete one of the two.")
        seen[item] = number
        yield record


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if not line.endswith(b"\n") and not _complete(line):
            logger.warning("%s:%d: the last line is torn and is left out", path, number)
            return
        yield number, _parse(line, f"{path}:{number}")


def _array(file: BinaryIO, path: Path) -> Iterator[tuple[int, Record]]:
    try:
        values = json.load(file)
    except ValueError as error:
        raise OspoError(f"{path}: not valid JSON ({error}).") from error
    for number, value in enumerate(values, 1):
        yield number, validate(value, f"{path}, entry {number}")


@final
class Store:
    """The one writer of a JSONL store; a context manager.

    Opening creates the file and its folder, takes an exclusive lock, cuts off a torn last line and reads the ids that
    are there. Raises OspoError when the path cannot be written, when another process is writing it, or when a line
    other than the last is broken.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise OspoError(f"Cannot write {self.path}: {error.strerror or error}.") from error
        try:
            self._lock()
            self._repair()
            self._ids = {record["item_id"] for record in read_records(self.path)}
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OspoError(
                f"{self.path} is being written by another process; wait for it, or give this one another --out."
            ) from error

    def _repair(self) -> None:
        data = self.path.read_bytes()
        tail = data[data.rfind(b"\n") + 1 :]
        if not tail:
            return
        if _complete(tail):
            self._write(b"\n")
        else:
            logger.warning("%s: cutting off a torn last line of %d bytes", self.path, len(tail))
            self._truncate(len(data) - len(tail))

    @property
    def ids(self) -> frozenset[str]:
        """The ids of the items that are in the store."""
        return frozenset(self._ids)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def append(self, record: Record) -> None:
        """Append one record as one whole line and wait until it is on disk.

        Raises OspoError for a record of wrong types, an item that is already there, or a write that failed (the store
        is then as it was before).
        """
        validate(record, f"{self.path}: the record to append")
        item = record["item_id"]
        if item in self._ids:
            raise OspoError(f"{self.path}: item {item!r} is already there; a store holds each item once.")
        self._write(json.dumps(finite(record), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._ids.add(item)

    def extend(self, records: Iterable[Record]) -> int:
        """Append every record; the number appended."""
        count = 0
        for record in records:
            self.append(record)
            count += 1
        return count

    def _write(self, data: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._truncate(end)
            raise OspoError(f"Cannot write {self.path}: {error.strerror or error}.") from error

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._file.fileno(), size)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and give up the lock."""
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON object to a log file (no ids, no lock), flushed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(value), allow_nan=False) + "\n")
    except OSError as error:
        raise OspoError(f"Cannot write {path}: {error.strerror or error}.") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (made if missing); waits for other processes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise OspoError(f"Cannot write {path}: {error.strerror or error}.") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

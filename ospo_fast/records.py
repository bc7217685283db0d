"""Records and the JSONL stores that stages read and write.

A record is one JSON object per item, under the field names of the official implementation, so that its published
training set and VQA files load as they are. A stage only adds fields. In memory the preference pairs of an item are the
list `pairs`. On disk the first pair has its fields at the top level, as in the official files, and `further_pairs`
holds the others: `to_official` and `from_official` convert.

A store holds one record per line. Each line is appended whole, flushed and synced: an interrupted process leaves at
most one torn line, the last, and the next writer removes it.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import reprlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, TypedDict, TypeVar, cast

from ospo_fast.errors import OspoError, check_text
from ospo_fast.files import MAX_NESTING, no_link, read_bytes, reason, regular

logger = logging.getLogger(__name__)

T = TypeVar("T")
Open = TypeVar("Open", BinaryIO, int)

VARIANTS = 3  # hard negatives of a prompt
SIDES = ("chosen", "rejected")  # the images of a pair
ROLES = ("base", "negative")  # whose image: the prompt's, or its hard negative's


class Answer(TypedDict):
    """Answer to one question about one image: probabilities in [0, 1] and `"yes"`, `"no"` or `"tie"`."""

    p_yes: float
    p_no: float
    answer: str


class ImageVerdict(TypedDict, total=False):
    """One image and its scores: a value of `base_metadata` or `negative_metadata`, with keys such as `base_0`.

    The images stage writes `path` (relative to the folder of the store) and `prompt`, the score stage `local_score`,
    `answer_metadata`, and `reason` for an image without a score. The select stage writes `kept` and `reason`.
    """

    path: str
    prompt: str
    local_score: float
    answer_metadata: list[Answer]
    kept: bool
    reason: str


class ObjectSpan(TypedDict):
    """An object of the prompt: its text and its half-open character span in the prompt."""

    text: str
    start: int
    end: int


class Pair(TypedDict, total=False):
    """A preference pair: the paths of its images and their scores (select stage), and their masks (masks stage)."""

    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    rejected_prompt: str
    mask_path: str
    mask_reason: str  # why the pair has no mask
    mask_stats: dict[str, Any]  # see stages/mask_stats.py


class Record(TypedDict, total=False):
    """One item."""

    # prompts
    item_id: str
    t2i_category: str
    sub_category: str
    prompt: str
    concepts_and_relations: str
    relation: str
    kind: str
    source: dict[str, int]
    # perturb: one entry per variant; the prompts of a variant that failed are empty strings, and it has a reason
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
    # select: `pairs` where `kept`, else `reason`
    kept: bool
    reason: str
    pairs: list[Pair]
    # masks; an item without a pair has `mask` None and a `mask_reason`
    nouns: list[str]
    objects: list[ObjectSpan]
    unmatched_objects: dict[str, str]  # nouns without a token, and why
    mask: None
    mask_reason: str


# Names that Windows keeps for devices.
_RESERVED = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]")


def item_name(item_id: str) -> str:
    """Return the name of an item's files: a single path component, different for different ids.

    Ids of up to 64 of the characters a-z, 0-9 and _ are their own names. Any other id, such as `../0001` or one in
    capitals, which some file systems take for the same name as in lower case, gets what is left of it and a hash.
    """
    if re.fullmatch("[a-z0-9_]{1,64}", item_id) and not _RESERVED.fullmatch(item_id):
        return item_id
    rest = re.sub("[^a-z0-9_]+", "_", item_id[:40].lower()[:40]).strip("_")  # lower() may lengthen
    digest = hashlib.sha256(item_id.encode(errors="surrogatepass")).hexdigest()  # the report shows every record
    return f"{rest or 'id'}-{digest[:24]}"


class ItemPair(NamedTuple):
    """A pair and its item."""

    pair_id: str  # the item's id for its first pair, then 0000012-1, 0000012-2, …
    record: Record
    pair: Pair

    @property
    def name(self) -> str:
        """Name of its files; different for different pairs, which an id such as 0000012-1 could not be."""
        item_id = self.record["item_id"]
        return item_name(item_id) + self.pair_id[len(item_id) :]


def iter_pairs(records: Iterable[Record]) -> Iterator[ItemPair]:
    """Yield every pair of every item, in order."""
    for record in records:
        for number, pair in enumerate(record.get("pairs", ())):
            yield ItemPair(record["item_id"] + (f"-{number}" if number else ""), record, pair)


def image_verdicts(record: Record) -> Iterator[tuple[str, str, ImageVerdict]]:
    """Yield (role, name, entry) of every image of an item; see `ROLES`."""
    metadata: Mapping[str, Any] = record
    for role in ROLES:
        for name, verdict in (metadata.get(f"{role}_metadata") or {}).items():
            yield role, name, verdict


def map_images(record: Record, change: Callable[[str, str, ImageVerdict], ImageVerdict | None]) -> Record:
    """Return the record with `change(role, name, entry)` for the entry of every image; None removes the entry."""
    metadata: dict[str, dict[str, ImageVerdict]] = {f"{role}_metadata": {} for role in ROLES}
    for role, name, verdict in image_verdicts(record):
        if (changed := change(role, name, verdict)) is not None:
            metadata[f"{role}_metadata"][name] = changed
    return cast(Record, {**record, **metadata})


# An official record has these fields last.
_MASK_FIELDS = ("mask", "mask_path", "mask_reason", "mask_stats", "unmatched_objects")


def to_official(record: Record) -> dict[str, Any]:
    """Return the flat form of a record, as stores and the official files hold it."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if name != "pairs":
            flat[name] = value
        elif record["pairs"]:
            first, *further = record["pairs"]
            flat |= first | ({"further_pairs": further} if further else {})
            if "mask_reason" in first:
                flat["mask"] = None
    masks = {name: flat.pop(name) for name in _MASK_FIELDS if name in flat}
    return flat | masks


def from_official(flat: Mapping[str, Any]) -> Record:
    """Return the record of a flat form. It has pairs if both images are given and `kept` is not false."""
    if flat.get("kept") is False or any(flat.get(side) is None for side in SIDES):
        return cast(Record, dict(flat))
    first = {name: flat[name] for name in Pair.__annotations__ if name in flat}
    further = flat.get("further_pairs")
    moved = {*first, "further_pairs", *(["mask"] if "mask_reason" in first else [])}
    record: dict[str, Any] = {}
    for name, value in flat.items():
        if name == "chosen":
            record["pairs"] = [first, *(pair for pair in further or () if isinstance(pair, dict))]
        elif name not in moved:
            record[name] = value
    return cast(Record, record)


_STRINGS = (
    "t2i_category sub_category prompt concepts_and_relations relation kind chosen rejected rejected_prompt "
    "question_reason mask_path reason mask_reason"
)
# With one entry per variant.
_VARIANT_LISTS = "perturbed_method negative_prompt long_prompt negative_long_prompt variant_reasons"
_STRING_LISTS = "perturbed_method negative_prompt long_prompt negative_long_prompt question nouns"


def validate(flat: object, where: str) -> dict[str, Any]:
    """Return `flat` if the fields that are known have the documented types; other fields are not checked.

    Raises:
        OspoError: starts with `where` and names the field, its value and the expected type.

    """
    if not isinstance(flat, dict):
        raise OspoError(f"{where}: a record is a JSON object, got {type(flat).__name__}.")

    def check(names: str, expected: str, is_valid: Callable[[Any], bool]) -> None:
        for name in names.split():
            if flat.get(name) is not None and not is_valid(flat[name]):
                raise OspoError(f"{where}: `{name}` should be {expected}, got {shown(flat[name])}.")

    if not (isinstance(flat.get("item_id"), str) and flat["item_id"]):
        raise OspoError(f"{where}: `item_id` should be a non-empty string, got {shown(flat.get('item_id'))}.")
    if "pairs" in flat:  # no check of a pair would see it
        raise OspoError(
            f"{where}: `pairs` should not be in a file, got {shown(flat['pairs'])}; the first pair has its fields at "
            "the top level, and `further_pairs` holds the others."
        )
    check(_STRINGS, "a string", lambda value: isinstance(value, str))
    check(_STRING_LISTS, "a list of strings", lambda value: isinstance(value, list) and _all_are(str, value))
    check("variant_reasons", "a list of strings and nulls", _is_list_of(lambda value: isinstance(value, str | None)))
    check("further_pairs", "a list of pairs", _is_list_of(_is_pair))
    check("chosen_score rejected_score", "a number", _is_number)
    check("kept", "true or false", lambda value: isinstance(value, bool))
    check("objects", "a list of objects with text, start and end", _is_list_of(_is_span))
    check("unmatched_objects", "an object of strings", lambda v: isinstance(v, dict) and _all_are(str, v.values()))
    check("mask_stats", "an object as the masks stage writes it", _is_mask_stats)
    for role in ROLES:
        if flat.get(f"{role}_metadata") is not None:
            _check_images(flat[f"{role}_metadata"], f"{where}: `{role}_metadata`")
    if twice := set.intersection(*(set(flat.get(f"{role}_metadata") or ()) for role in ROLES)):
        raise OspoError(f"{where}: the image name {shown(min(twice))} occurs for both roles; each image has its own.")
    lengths = {name: len(flat[name]) for name in _VARIANT_LISTS.split() if flat.get(name) is not None}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise OspoError(f"{where}: lists with one entry per variant should have the same length, got {found}.")
    return flat


def shown(value: object) -> str:
    """Return a value of a record for a message: its repr, shortened, as a hostile one may have megabytes."""
    text = reprlib.repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _check_images(images: object, where: str) -> None:
    """Raise OspoError for an image that the stages after it could not take."""
    if not isinstance(images, dict):
        raise OspoError(f"{where} should be an object of images, got {shown(images)}.")
    for name, image in images.items():
        label = f"{where}: {shown(name)}"
        try:
            image_index(name)
        except OspoError as error:
            raise OspoError(f"{where}: {error}") from None
        if not isinstance(image, dict) or not isinstance(image.get("path"), str):
            raise OspoError(f"{label} should be an object with a string `path`, got {shown(image)}.")
        for field, expected, is_valid in _IMAGE_FIELDS:
            if image.get(field) is not None and not is_valid(image[field]):
                raise OspoError(f"{label}: `{field}` should be {expected}, got {shown(image[field])}.")
        if image.get("answer_metadata") and image.get("local_score") is None:
            raise OspoError(f"{label} has answers and no `local_score`; score it with the stage score.")


# Texts that a stage copies from its input and never changes: what it computes from them is about its own copy.
_COPIED = (
    "prompt t2i_category sub_category concepts_and_relations relation kind perturbed_method negative_prompt "
    "long_prompt negative_long_prompt"
)


def edited_text(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Compare the texts of a record with those of the record that a later stage made of it.

    Returns:
        (field, value before, value after) of a text that differs, because it was edited after the later stage had read
        it; None if all are equal. Texts that `before` does not have are not compared. The score stage leaves out
        questions that are too long, so `after` need not have all of them.

    """
    for name in _COPIED.split():
        if before.get(name) is not None and before[name] != after.get(name):
            return name, before[name], after.get(name)
    known, kept = before.get("question"), after.get("question")
    if known is not None and not set(kept or ()) <= set(known):
        return "question", known, kept
    later = {name: verdict.get("prompt") for _, name, verdict in image_verdicts(cast(Record, after))}
    for role, name, verdict in image_verdicts(cast(Record, before)):
        text = verdict.get("prompt")
        if None not in (text, later.get(name)) and text != later[name]:
            return f"{role}_metadata.{name}.prompt", text, later[name]
    return None


def _check_encodable(flat: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a record. Raise OspoError for lone surrogates, which no file can hold, and for an id with NUL."""
    try:
        _check_surrogates(flat)
    except ValueError as error:
        raise OspoError(f"{where}: {error}; delete it.") from None
    check_text(f"{where}: item_id", flat["item_id"])
    return flat


def _check_surrogates(value: object) -> None:
    """Raise ValueError for a value of JSON with a lone surrogate."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        place = error.object[max(0, error.start - 40) : error.start + 1]
        raise ValueError(f"{place!a} ends in a lone surrogate, half a character that no file can hold") from None


def _all_are(kind: type | tuple[type, ...], values: Iterable[object]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _is_list_of(is_valid: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _is_string(value: object) -> bool:
    return isinstance(value, str)


# Of numbers in records: their sums, squares and means stay finite.
_MAX_NUMBER = 1e100


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= cast(float, value) <= 1


def _is_answer(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_number(value.get("p_yes"))
        and _is_number(value.get("p_no"))
        and isinstance(value.get("answer"), str)
    )


# Of an image: field, what is expected, and the check of it.
_IMAGE_FIELDS: tuple[tuple[str, str, Callable[[object], bool]], ...] = (
    ("prompt", "a string", _is_string),
    ("reason", "a string", _is_string),
    ("kept", "true or false", lambda value: isinstance(value, bool)),
    ("local_score", "a number", _is_number),
    ("answer_metadata", "a list of answers with p_yes, p_no and answer", _is_list_of(_is_answer)),
)


def _is_span(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("text"), str)
        and all(type(value.get(end)) is int for end in ("start", "end"))
    )


def _is_pair(value: object) -> bool:
    if not isinstance(value, dict) or not _all_are(str, map(value.get, SIDES)):
        return False
    strings = all(isinstance(value.get(name), str | None) for name in ("rejected_prompt", "mask_path", "mask_reason"))
    scores = all(value.get(f"{side}_score") is None or _is_number(value[f"{side}_score"]) for side in SIDES)
    return strings and scores and (value.get("mask_stats") is None or _is_mask_stats(value["mask_stats"]))


def _is_mask_stats(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    layers, alarms = value.get("layers"), value.get("alarms")
    if not (isinstance(layers, list) and isinstance(alarms, list) and _all_are(int, layers) and _all_are(str, alarms)):
        return False
    if not ("iou" in value and (value["iou"] is None or _is_share(value["iou"]))):
        return False
    for side in map(value.get, SIDES):
        if not isinstance(side, dict) or not _is_share(side.get("coverage")):
            return False
        entropy = side.get("entropy")
        if not isinstance(entropy, list) or len(entropy) != len(layers) or not all(map(_is_number, entropy)):
            return False
    return True


def stable_hash(*parts: object) -> int:
    """Return a 63-bit integer that depends on the parts alone: the same in every process, order and shard."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def image_index(name: str) -> int:
    """Return the number in the name of an image's entry, such as `base_2`; see `image_variants`."""
    digits = name[len(name.rstrip("0123456789")) :]
    if not 1 <= len(digits) <= 9:
        raise OspoError(f"The image name {name[:60]!r} should end in its number, as in base_0.")
    return int(digits)


class ImageVariant(NamedTuple):
    """The variant of an image. An image of the prompt and one of the hard negative with equal keys may form a pair."""

    key: int | str
    number: int | None  # place of its hard negative in `negative_prompt`; None: the file name does not say


def image_variants(record: Mapping[str, Any]) -> dict[tuple[str, str], ImageVariant]:
    """Return the variant of each image of an item by its role and the name of its entry, such as ("base", "base_0").

    The images stage numbers entry and file in the same way (`base_2`, `base_2.png`): of V variants, image i + k·V is
    the k-th further one of variant i. In official records the number of an entry is the place of its file among those
    that exist, and the file name is the variant (`base_0` may be `01.png` where `00.png` is missing): images with equal
    file names form a pair (`_match_pair` in ospo/utils/step4/construct_pair.py).
    """
    paths = {(role, name): image.get("path") or "" for role, name, image in image_verdicts(cast(Record, record))}
    if all(_is_numbered(name, path) for (_, name), path in paths.items()):
        return {entry: _numbered_variant(image_index(entry[1]), record) for entry in paths}
    variants = {}
    for entry, path in paths.items():
        file = os.path.basename(path)  # noqa: PTH119 (Path.name drops a slash at the end)
        stem = file.partition(".")[0]
        number = int(stem) if re.fullmatch("[0-9]{1,9}", stem) else None
        variants[entry] = ImageVariant(file, number)
    return variants


def _is_numbered(name: str, path: str) -> bool:
    """Return whether a file has the number of its entry after a word. An official file name is a number alone."""
    found = re.search(r"[^0-9]([0-9]{1,9})$", os.path.splitext(os.path.basename(path))[0])  # noqa: PTH119, PTH122
    return found is not None and int(found[1]) == image_index(name)


def _numbered_variant(index: int, record: Mapping[str, Any]) -> ImageVariant:
    variants = len(record.get("negative_prompt") or ())
    number = index % variants if variants else index
    return ImageVariant(number, number)


def chunked(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


@contextlib.contextmanager
def os_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError into an OspoError that says that one cannot `action` (read, write) `path`.

    In place of `path` it names the file of the error, if that is known and not a temporary one, and what to do.
    """
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else ""
        named = path if not name or any(map(_TEMPORARY.fullmatch, Path(name).parts)) else name
        remedy = _REMEDIES.get(error.errno or 0, "check the path and its disk")
        raise OspoError(f"Cannot {action} {named}: {error.strerror or error}; {remedy}.") from error


_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "ask its owner for access, or choose another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, and repeat the command"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.EROFS: "choose a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary file in the same folder, synced, then renamed to `path`."""
    write_files({path: data})


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files of one folder, each whole or not at all, as `write_atomic`; the folder is synced once.

    They get their names in the order of `files`. If the machine crashes meanwhile, any of them may be missing.
    """
    with contextlib.ExitStack() as stack:
        temporaries = {}
        for path, data in files.items():
            stack.enter_context(os_errors("write", path))  # also of closing, which writes what is left in the buffer
            path.parent.mkdir(parents=True, exist_ok=True)
            temporaries[path], file = stack.enter_context(_temporary(path, _new_file))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            with os_errors("write", path):
                temporary.replace(path)
        sync_folder(path.parent)


def write_folder(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a folder whole or not at all: in a temporary one next to it, synced, which takes its place.

    Libraries read and keep what is in the folder that they save to, which can be the rest of a killed process.
    """
    with os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path, _new_folder) as (temporary, _):
            _save(save, temporary, path)
            for inner in temporary.rglob("*"):
                _sync(inner)
            delete(path)
            temporary.replace(path)
            sync_folder(path.parent)


def _save(save: Callable[[Path], object], temporary: Path, path: Path) -> None:
    try:
        save(temporary)
    except (OspoError, OSError):
        raise
    except Exception as error:  # libraries have errors of their own for a full disk
        raise OspoError(f"Cannot write {path}: {reason(error)}.") from error


_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.tmp", re.DOTALL)  # the name of every temporary file and folder


@contextlib.contextmanager
def _temporary(path: Path, new: Callable[[Path], AbstractContextManager[Open]]) -> Iterator[tuple[Path, Open]]:
    """Create what is to take the place of `path`, next to it. It is deleted if it does not.

    Its lock tells `sweep_temporary_files` that its process lives. The number of a process could not: other machines and
    containers write the same folder, and have the same numbers.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
        with new(temporary) as opened:
            try:
                with contextlib.suppress(OSError):  # a file system without locks, in which nothing is swept
                    fcntl.flock(opened, fcntl.LOCK_EX)
                if not _is_at(opened, temporary):
                    continue  # swept before it had the lock
                yield temporary, opened
                return
            finally:
                with contextlib.suppress(OSError):
                    delete(temporary)


def _new_file(path: Path) -> AbstractContextManager[BinaryIO]:
    return path.open("xb")  # never an existing file, nor through a link


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[int]:
    handle = None
    while handle is None:
        path.mkdir()
        with contextlib.suppress(FileNotFoundError):  # swept at once
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)


def _is_at(file: IO[Any] | int, path: Path) -> bool:
    """Return whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file if isinstance(file, int) else file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def delete(path: Path) -> None:
    """Delete a file, a folder, or a link without what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete a folder as a whole: a process that is killed meanwhile leaves none of it under its name."""
    gone = folder.with_name(f".{folder.name}.{os.urandom(8).hex()}.tmp")  # which is swept, once it has no lock
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, OspoError):  # a file system without locks, in which nothing is swept
            stack.enter_context(_holding(open_to_lock(folder), folder))
        try:
            folder.rename(gone)
        except FileNotFoundError:
            return
        try:
            sync_folder(folder.parent)
        finally:
            delete(gone)


def sweep_temporary_files(folder: Path, pattern: str = ".*.tmp") -> None:
    """Delete the temporary files and folders in a folder that killed processes left: those without a lock."""
    found: list[Path] = []
    with contextlib.suppress(OSError):  # another process deletes folders meanwhile
        found.extend(folder.glob(pattern))
    for path in found:
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OspoError, OSError), _holding(open_to_lock(path), path):
                delete(path)


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk: until then a crash of the machine can undo a rename."""
    _sync(folder)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync files only
            raise
    finally:
        os.close(handle)


def check_writable(folder: Path) -> None:
    """Raise OspoError if no file can be created in `folder`, which is created if missing."""
    with os_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder / "probe", _new_file) as (probe, _):
            probe.unlink()


def check_creatable(folder: Path, choose: str = "run folder with --out") -> None:
    """Raise OspoError for a folder that surely cannot be written or created. Creates nothing.

    `choose` is what the message tells to choose another one of.
    """
    found = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), Path())
    # Path.is_dir raises for closed folders.
    reason = errno.ENOTDIR if not os.path.isdir(found) else 0 if os.access(found, os.W_OK | os.X_OK) else errno.EACCES  # noqa: PTH112
    if reason:
        raise OspoError(f"Cannot write {folder}: {os.strerror(reason)}; choose another {choose}.")


def local_base(adapter: Path, name: object) -> str | None:
    """Return where the base model of a run's adapter is here: its own configuration has a name for other machines.

    None for an adapter that is not in its run folder, and for a base model that is not there any more.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        folder = Path(os.path.realpath(adapter))
        base = parse_json(read_bytes(folder.parent / "done.json"))["base_model"]
        path: str = os.path.normpath(folder.parent / str(base["folder"]))
        if folder.name == "adapter" and base["name"] == name and os.path.exists(path):  # noqa: PTH110
            return path
    return None


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically; numbers that are not finite become null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def finite(value: Any) -> Any:
    """Replace every float that is not finite by None, at any depth: JSON has neither NaN nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def parse_json(data: bytes | str, *, unique: bool = False) -> Any:
    """Parse JSON of any origin; a byte-order mark before it is ignored.

    Raises:
        ValueError: it is not valid UTF-8 or JSON, nests more than MAX_NESTING deep, or holds a number of thousands of
            digits; with `unique`, a key occurs twice in an object.

    """
    with contextlib.suppress(RecursionError):
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
        if not _is_deep(value):
            return value
    raise ValueError(f"its values are nested too deeply, more than {MAX_NESTING} deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return values


def _is_deep(value: object) -> bool:
    """Return whether a value nests more than MAX_NESTING deep: recursive functions end at depths of their own."""
    level: list[Any] = [[value]]
    for _ in range(MAX_NESTING + 1):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for each in itertools.chain.from_iterable(inner) if isinstance(each, (dict, list))]
        if not level:
            return False
    return True


def read_json(path: Path, default: Any) -> Any:
    """Return what a JSON file of a run folder holds, or `default` where there is none.

    Raises OspoError if it is a symbolic link, cannot be read, could not be written again, or holds another type than
    `default`, where that is not None.
    """
    try:
        value = parse_json(read_bytes(path)) if no_link(path).exists() else default
        _check_surrogates(value)
        if default is not None and not isinstance(value, type(default)):
            raise ValueError(f"it holds {type(value).__name__}, expected {type(default).__name__}")
    except (OSError, ValueError) as error:
        raise OspoError(f"Cannot read {path}: {error}; delete the file and run the command again.") from error
    return value


def update_json(path: Path, default: Any, change: Callable[[Any], Any]) -> None:
    """Change a JSON file that several processes write; see `read_json`."""
    with locked(path.with_name(".lock")):
        write_json(path, change(read_json(path, default)))


def _is_torn(line: bytes) -> bool:
    """Return whether a last line is the beginning of one that a `Store` writes, and nothing else that ends in no LF.

    Zero bytes at its end, which a crash of the machine leaves in some file systems, belong to it.
    """
    line = line.rstrip(b"\0")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(line)  # passes a cut character
        if not text.startswith('{"'[: len(text)]) or re.search(r"[\0-\x1f]", text):
            return False
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string") or _TORN_TOKEN.fullmatch(text, error.pos) is not None
    except (ValueError, RecursionError):
        return False
    return False  # it is whole


# What can follow the point where the parser of JSON stops in a text that is cut: nothing, or a part of a token.
_TORN_TOKEN = re.compile(r"|t|tr|tru|f|fa|fal|fals|n|nu|nul|-|\.|[eE][-+]?|u[0-9a-fA-F]{0,4}")


def read_records(
    path: str | os.PathLike[str], on_error: Callable[[OspoError], object] | None = None
) -> Iterator[Record]:
    """Yield the records of a JSONL store, or of an official JSON array, in file order.

    A torn last line (no line end, the beginning of an object) is skipped with a warning: its writer was interrupted.

    Args:
        path: the file.
        on_error: called with the error of a line that cannot be used, which is skipped; None: the error is raised.

    Raises:
        OspoError: names the file and, where it can, the line: a missing or unreadable file, an array that is not valid
            JSON and, without `on_error`, an invalid line, a field of a wrong type or an `item_id` that occurs twice.

    """
    path = Path(path)
    with os_errors("read", path), regular(path).open("rb") as file:
        is_array = _is_array(file)
        seen: dict[str, str] = {}
        for where, entry in _read_array(file, path) if is_array else _read_lines(file, path):
            try:
                value = _parse_line(entry, where) if isinstance(entry, bytes) else entry
                item = _check_encodable(validate(value, where), where)["item_id"]
                if item in seen:
                    raise OspoError(f"{where}: item {item!r} occurs already at {seen[item]}; delete one of the two.")
            except OspoError as error:
                if on_error is None:
                    raise
                on_error(error)
                continue
            seen[item] = where
            yield from_official(value)


def merge_stores(place: Path, parts: Sequence[Path], order: Sequence[str]) -> None:
    """Move the records of further stores to the store `place`, and bring it to the order of these ids.

    The lines stay as they are, byte by byte. Of an item that several stores hold the first line counts. Items that are
    not in `order` come last. A store with a line that is no record keeps its order and gets the others at its end.
    A process that is killed leaves either all stores as they were, or the merged one.

    Raises:
        OspoError: a line of a part is no record, or a store is being written.

    """
    with contextlib.ExitStack() as stack:
        for path in (place, *parts):
            stack.enter_context(Store(path, on_error=lambda error: None))  # which removes torn lines
        broken: list[OspoError] = []
        lines = dict(_identified_lines(place, broken.append))
        old = place.read_bytes()
        found: dict[str, bytes] = {}
        for path in parts:
            for name, line in _identified_lines(path):
                if name not in lines:
                    found.setdefault(name, line)
        if broken:
            data = b"".join([old, *(found[name] for name in _ordered(found, order))])
        else:
            lines |= found
            data = b"".join(lines[name] for name in _ordered(lines, order))
        if data != old:
            write_atomic(place, data)
        for path in parts:
            path.unlink()


def _ordered(names: Iterable[str], order: Sequence[str]) -> list[str]:
    place = {name: number for number, name in enumerate(order)}
    return sorted(names, key=lambda name: place.get(name, len(place)))


def _identified_lines(path: Path, on_error: Callable[[OspoError], object] | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield (item_id, line) of the records of a JSONL store; see `read_records`."""
    with os_errors("read", path), regular(path).open("rb") as file:
        lines = [(where, line) for where, line in _read_lines(file, path)]
    for where, line in lines:
        try:
            name = _check_encodable(validate(_parse_line(line, where), where), where)["item_id"]
        except OspoError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        yield name, line if line.endswith(b"\n") else line + b"\n"


def _is_array(file: BinaryIO) -> bool:
    """Return whether the first character of a file, apart from spaces and a byte-order mark, opens a JSON array."""
    blocks = iter(lambda: file.read(4096), b"")
    start = next((text for block in blocks if (text := block.lstrip(codecs.BOM_UTF8 + b" \t\r\n"))), b"")
    file.seek(0)
    return start.startswith(b"[")


def _read_lines(file: BinaryIO, path: Path) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(file, 1):
        if not line.strip() or line.strip() == codecs.BOM_UTF8:
            continue
        if not line.endswith(b"\n"):
            if _is_torn(line):
                logger.warning("%s:%d: skipping the torn last line", path, number)
                return
            line = line.rstrip(b"\0")  # of a crash of the machine
        yield f"{path}:{number}", line


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise OspoError(f"{where}: the line is not valid JSON ({error}); fix or delete it.") from error


def _read_array(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        values = parse_json(file.read())
    except ValueError as error:
        raise OspoError(f"{path}: not valid JSON ({error}); fix or delete the file.") from error
    for number, value in enumerate(values, 1):
        yield f"{path}, entry {number}", value


def open_to_lock(path: Path, flags: int = 0) -> int:
    """Open a file or a folder to lock it. Raises OSError, also for a symbolic link."""
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would block
    try:
        return os.open(path, os.O_RDWR | flags, 0o666)  # NFS locks no file that is open for reading only
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return os.open(path, os.O_RDONLY | flags & ~os.O_CREAT)


class LockedError(OspoError):
    """Another process writes a file."""


def _lock(file: IO[Any] | int, path: Path, *, wait: bool = False) -> None:
    """Lock an open file, which is that of `path`. Raises OspoError if it cannot, or would wait without `wait`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise LockedError(
            f"{path} is being written by another process; wait for it, or give this one another --out."
        ) from error
    except OSError as error:
        raise OspoError(
            f"Cannot lock {path}: {error.strerror}; use a folder of a file system with file locks (flock)."
        ) from error


# Device and inode of each file that this process has locked, and its thread, or 0 of a lock that no one waits for.
_LOCKS: list[tuple[int, int, int]] = []


def remember_lock(handle: int, thread: int = 0) -> None:
    """Remember that a file is locked, so that `locked` does not wait for its own process."""
    status = os.fstat(handle)
    _LOCKS.append((status.st_dev, status.st_ino, thread))


def forget_lock(handle: int, thread: int = 0) -> None:
    """Take back `remember_lock`, before the file is closed."""
    status = os.fstat(handle)
    _LOCKS.remove((status.st_dev, status.st_ino, thread))


@contextlib.contextmanager
def _holding(handle: int, path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file, and close it; see `_lock`."""
    thread = threading.get_ident() if wait else 0
    try:
        status = os.fstat(handle)
        if wait and any((status.st_dev, status.st_ino, by) in _LOCKS for by in (0, thread)):
            raise OspoError(f"{path} is a hard link of another lock that this process holds; delete it.")
        _lock(handle, path, wait=wait)
        remember_lock(handle, thread)
        try:
            yield
        finally:
            forget_lock(handle, thread)
    finally:
        os.close(handle)


class Store(contextlib.AbstractContextManager["Store"]):
    """The only writer of a JSONL store; a context manager.

    Opening creates the file and its folder, locks it, removes a torn last line and reads the ids that it holds.

    Raises:
        OspoError: the path cannot be written, it is a JSON array, another process writes it or, without `on_error` (see
            `read_records`), a line is invalid.

    """

    def __init__(self, path: str | os.PathLike[str], on_error: Callable[[OspoError], object] | None = None) -> None:
        self.path = Path(path)
        self._file = self._open()
        try:
            self._repair()
            self._ids = {record["item_id"] for record in read_records(self.path, on_error)}
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> io.FileIO:
        while True:
            with os_errors("write", no_link(self.path)), contextlib.ExitStack() as stack:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(regular(self.path, missing_ok=True).open("ab", buffering=0))
                sync_folder(self.path.parent)
                _lock(file, self.path)
                _unshare(self.path)
                if _is_at(file, self.path):  # else another file has taken its place
                    stack.pop_all()
                    return file

    def _repair(self) -> None:
        """Remove what a crash left at the end: a torn line, or zero bytes, after which a whole line gets its end."""
        with os_errors("read", self.path), self.path.open("rb") as file:
            if _is_array(file):
                raise OspoError(
                    f"{self.path} is a JSON array, to which no record is appended; write one object per line, as "
                    "`jq -c '.[]'` does, or use --no-resume to start over."
                )
            data = file.read()
        tail = data[data.rfind(b"\n") + 1 :]
        with os_errors("write", self.path):
            if tail and _is_torn(tail):
                logger.warning("%s: removing a torn last line of %d bytes", self.path, len(tail))
                self._truncate(len(data) - len(tail))
            elif tail:
                line = tail.rstrip(b"\0")
                if len(line) < len(tail) and b"\0" not in line:  # else it is UTF-16
                    self._truncate(len(data) - len(tail) + len(line))
                self._write(b"\n")

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def append(self, record: Record) -> None:
        """Append one record and return once it is on disk.

        Raises:
            OspoError: a field of a wrong type, an item that the store holds already, or a failed write, after which
                the store is as it was before.

        """
        line, item = encode_record(record, f"{self.path}: the record to append"), record["item_id"]
        if item in self._ids:
            raise OspoError(f"{self.path}: item {item!r} is in the store already; a store holds each item once.")
        self._write(line)
        self._ids.add(item)

    def extend(self, records: Iterable[Record]) -> None:
        """Append every record."""
        for record in records:
            self.append(record)

    def _write(self, data: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        rest = memoryview(data)
        with os_errors("write", self.path):
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except BaseException:  # a signal, too, which can come between two parts of a line
                with contextlib.suppress(OSError):
                    self._truncate(end)
                raise

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._file.fileno(), size)
        os.fsync(self._file.fileno())

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _unshare(path: Path) -> None:
    """Copy a file that has further names, such as those of `cp -al`: appending to it would change them all."""
    if path.exists() and path.stat().st_nlink > 1:
        write_atomic(path, path.read_bytes())


def encode_record(record: Record, where: str) -> bytes:
    """Return the line of a record in a store. Raises OspoError that starts with `where` for a field of a wrong type."""
    try:
        flat = finite(to_official(record))
    except RecursionError:
        flat = None
    if flat is None or _is_deep(flat):  # what could not be read again
        raise OspoError(
            f"{where}: its values are nested too deeply, more than {MAX_NESTING} deep; simplify or delete them."
        )
    _check_encodable(validate(flat, where), where)
    return json.dumps(flat, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON object to a log file, without lock or sync."""
    with os_errors("write", no_link(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _unshare(path)
        with regular(path, missing_ok=True).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(value), allow_nan=False) + "\n")


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, a hidden file next to it. Raises OspoError if another process holds it."""
    with _holding(_lock_file(lock_of(folder)), folder):
        yield


def lock_of(path: Path) -> Path:
    """Return the file that `only_writer` locks."""
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def only_user(path: Path) -> Iterator[None]:
    """Hold the lock of an existing file or folder, without another file. Raises OspoError if a process holds it."""
    with os_errors("open", path):
        handle = open_to_lock(no_link(path))
    with _holding(handle, path):
        yield


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, created if missing; blocks until other processes release it."""
    with _holding(_lock_file(path), path, wait=True):
        yield


def _lock_file(path: Path) -> int:
    """Open a file to lock it, created if missing; nothing is created through a symbolic link."""
    with os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_to_lock(regular(no_link(path), missing_ok=True), os.O_CREAT)

"""The JSONL store (whole lines, repair of a torn one, each item once, one writer), and pairs in both forms."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import stat
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.records import (
    Store,
    _is_torn,
    append_line,
    check_writable,
    chunked,
    from_official,
    image_index,
    image_variants,
    item_name,
    iter_pairs,
    locked,
    only_user,
    only_writer,
    os_errors,
    read_json,
    read_records,
    stable_hash,
    sweep_temporary_files,
    to_official,
    update_json,
    validate,
    write_atomic,
    write_files,
    write_folder,
    write_json,
)


def record(item, **fields):
    return {"item_id": item, "prompt": "a red circle", **fields}


def test_appended_records_are_read_in_order(tmp_path):
    path = tmp_path / "a" / "prompts.jsonl"
    with Store(path) as store:
        store.extend([record("1"), record("2", prompt="ein grüner Kreis ✓")])
        assert "2" in store
        assert "3" not in store
        assert len(store) == 2
    assert [r["item_id"] for r in read_records(path)] == ["1", "2"]
    assert path.read_bytes().endswith(b"\n")


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(1, 10_000))
def test_a_torn_last_line_is_cut_off(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "s.jsonl"
    with Store(path) as store:
        store.extend(record(str(i), prompt="x" * i) for i in range(5))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - cut % len(data)])
    whole = data[: len(data) - cut % len(data)].count(b"\n")
    kept = list(read_records(path))
    # A cut that takes only the line end leaves the record whole.
    assert len(kept) in (whole, whole + 1)
    with Store(path) as store:
        assert len(store) == len(kept)
        store.extend(record(str(i), prompt="x" * i) for i in range(5) if str(i) not in store)
    assert path.read_bytes() == data


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(fields=st.dictionaries(st.text(), _json, max_size=4), zeros=st.integers(0, 2), ascii_only=st.booleans())
def test_every_beginning_of_a_line_is_torn(fields, zeros, ascii_only):
    line = json.dumps({"item_id": "1", **fields}, ensure_ascii=ascii_only).encode("utf-8", "replace")
    assert all(_is_torn(line[:end] + b"\0" * zeros) for end in range(len(line)))
    assert not _is_torn(line)


_TWO = [record("1"), record("2", prompt="ein gr\u00fcner Kreis")]
_BY_HAND = {
    "array": json.dumps(_TWO).encode(),
    "array of lines": json.dumps(_TWO).replace("}, {", "},\n{").encode(),
    "indented array": json.dumps(_TWO, indent=1).encode(),
    "indented objects": "\n".join(json.dumps(each, indent=1) for each in _TWO).encode(),
    "carriage returns": "\r".join(map(json.dumps, _TWO)).encode(),
    "utf-16": "\n".join(map(json.dumps, _TWO)).encode("utf-16"),
    "utf-16, one line": json.dumps(_TWO[0]).encode("utf-16-le"),
    "a comma too much": json.dumps(_TWO[0]).encode() + b"\n" + json.dumps(_TWO[1]).encode() + b",",
    "a missing quote": b'{"item_id": "1, "prompt": "a red circle"}',
    "text": b"a red circle",
}


@pytest.mark.parametrize("kind", _BY_HAND)
def test_opening_a_store_deletes_no_line_that_someone_wrote(tmp_path, kind):
    path = tmp_path / "s.jsonl"
    path.write_bytes(_BY_HAND[kind])
    with contextlib.suppress(OspoError), Store(path):
        pass
    assert path.read_bytes().removesuffix(b"\n") == _BY_HAND[kind]
    if "array" in kind:
        assert len(list(read_records(path))) == 2
        with pytest.raises(OspoError, match="is a JSON array, to which no record is appended"):
            Store(path)
    else:
        with pytest.raises(OspoError, match=r"s\.jsonl:\d+: "):
            list(read_records(path))


def test_a_missing_last_line_end_keeps_the_record(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(record("1")))
    assert len(list(read_records(path))) == 1
    with Store(path) as store:
        store.append(record("2"))
    assert [r["item_id"] for r in read_records(path)] == ["1", "2"]


@pytest.mark.parametrize("cut", [0, 5])
def test_zero_bytes_at_the_end_are_ignored_and_removed(tmp_path, caplog, cut):
    """A crash of the machine leaves them where the size of a file reached the disk before its data."""
    path = tmp_path / "s.jsonl"
    lines = [json.dumps(record(item)).encode() for item in "12"]
    path.write_bytes(lines[0] + b"\n" + lines[1][: len(lines[1]) - cut] + bytes(8))
    whole = ["1"] if cut else ["1", "2"]
    assert [item["item_id"] for item in read_records(path)] == whole
    with Store(path) as store:
        assert len(store) == len(whole)
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines[: len(whole)])
    assert len(caplog.records) == (2 if cut else 0)


@pytest.mark.parametrize("action", ["read", "write"])
def test_a_store_that_cannot_be_repaired_is_named(tmp_path, monkeypatch, action):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"item_id')

    def refuse(*arguments, **more):
        raise PermissionError(errno.EACCES, "Permission denied")

    opened = Path.open
    if action == "read":
        monkeypatch.setattr(
            Path, "open", lambda path, mode, **more: (refuse if mode == "rb" else opened)(path, mode, **more)
        )
    else:
        monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OspoError, match=rf"^Cannot {action} .*s\.jsonl: Permission denied"):
        Store(path)


def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(record("1")) + "\n{broken\n" + json.dumps(record("2")) + "\n")
    with pytest.raises(OspoError, match=r"s\.jsonl:2: .*not valid JSON"):
        list(read_records(path))
    with pytest.raises(OspoError, match=r"s\.jsonl:2"):
        Store(path)
    errors = []
    assert [item["item_id"] for item in read_records(path, errors.append)] == ["1", "2"]
    with Store(path, errors.append) as store:
        store.append(record("3"))
    assert [str(error).partition(": ")[0] for error in errors] == [f"{path}:2"] * 2
    path.write_text(json.dumps([record("1"), record("1"), 3, record("2")]))
    errors.clear()
    assert [item["item_id"] for item in read_records(path, errors.append)] == ["1", "2"]
    assert [str(error).partition(": ")[0] for error in errors] == [f"{path}, entry 2", f"{path}, entry 3"]


def test_duplicate_item_is_refused(tmp_path):
    path = tmp_path / "s.jsonl"
    with Store(path) as store:
        store.append(record("1"))
        with pytest.raises(OspoError, match="'1' is in the store already"):
            store.append(record("1"))
    path.write_text((json.dumps(record("1")) + "\n") * 2)
    with pytest.raises(OspoError, match=r"s\.jsonl:2: item '1' occurs already at "):
        list(read_records(path))


def test_a_second_writer_is_refused(tmp_path):
    path = tmp_path / "s.jsonl"
    code = f"from ospo_fast.records import Store; Store({str(path)!r}).append({record('other')!r})"
    with Store(path) as store:
        store.append(record("1"))
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert "is being written by another process" in done.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert [r["item_id"] for r in read_records(path)] == ["1", "other"]


@pytest.mark.parametrize("hold", [only_user, only_writer, locked, Store])
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF])
def test_what_cannot_be_locked_is_not_in_use(tmp_path, monkeypatch, hold, number):
    (tmp_path / "a").touch()

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    message = rf"^Cannot lock .*a: {os.strerror(number)}; use a folder of a file system with file locks \(flock\)\.$"
    with pytest.raises(OspoError, match=message), hold(tmp_path / "a"):
        pass


@pytest.mark.parametrize("hold", [only_user, only_writer, locked, Store])
def test_files_are_open_for_writing_while_they_are_locked(tmp_path, monkeypatch, hold):
    """NFS refuses an exclusive lock on others."""
    flock, path = fcntl.flock, tmp_path / "a"
    path.touch()

    def nfs(file, operation):
        handle = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", nfs)
    with hold(path):
        if hold is not locked:  # which waits
            with pytest.raises(OspoError, match="is being written by another process"), hold(path):
                pass
    with hold(path):
        pass


@pytest.mark.parametrize(
    ("name", "hold"), [("a", only_user), (".a.lock", lambda path: only_writer(path.with_name("a"))), ("a", locked)]
)
def test_nothing_is_locked_or_created_through_a_link(tmp_path, name, hold):
    (tmp_path / name).symlink_to(tmp_path / "mine")
    for _ in range(2):
        before = (tmp_path / "mine").exists()
        refused = pytest.raises(OspoError, match=rf"{name} is a symbolic link.*copy the file in its place")
        with refused, hold(tmp_path / name):
            pass
        assert (tmp_path / "mine").exists() == before
        (tmp_path / "mine").touch()


def test_a_folder_is_tested_with_a_new_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "urandom", bytes)
    monkeypatch.setattr(os, "getpid", lambda: 1234)
    for name in (".probe.1234.tmp", f".probe.{'00' * 8}.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(OspoError, match="Cannot write"):
        check_writable(tmp_path)
    (tmp_path / name).unlink()
    check_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".probe.1234.tmp"]


def test_a_store_is_not_written_through_a_link(tmp_path):
    """In a run folder of someone else it could lead to any file, whose last line would be taken for a torn one."""
    (tmp_path / "mine.txt").write_text("no line end")
    (tmp_path / "s.jsonl").symlink_to("mine.txt")
    with pytest.raises(OspoError, match=r"s\.jsonl is a symbolic link"):
        Store(tmp_path / "s.jsonl")
    assert (tmp_path / "mine.txt").read_text() == "no line end"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_store_as_it_was(tmp_path, monkeypatch, error):
    path = tmp_path / "s.jsonl"
    with Store(path) as store:
        store.append(record("1"))
        before = path.read_bytes()

        def full(fd):
            raise error

        monkeypatch.setattr("ospo_fast.records.os.fsync", full)
        with pytest.raises(OspoError if isinstance(error, OSError) else KeyboardInterrupt):
            store.append(record("2"))
        monkeypatch.undo()
        assert path.read_bytes() == before
        store.append(record("2"))
    assert len(list(read_records(path))) == 2


def test_paths_that_cannot_be_written_or_read_are_errors(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OspoError, match="Cannot write"):
        Store(file / "s.jsonl")
    with pytest.raises(OspoError, match="Cannot write"):
        write_atomic(file / "x", b"")
    with pytest.raises(OspoError, match="Cannot read"):
        list(read_records(tmp_path / "none.jsonl"))


def test_write_atomic_leaves_no_temporary_file(tmp_path):
    write_atomic(tmp_path / "a.png", b"1")
    write_atomic(tmp_path / "a.png", b"22")
    assert (tmp_path / "a.png").read_bytes() == b"22"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def refused(path):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def save_two(folder):
    """A library that keeps what is there, as model cards of peft do."""
    for name in ("a", "b"):
        with (folder / name).open("a") as file:
            file.write(name)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder, mine = tmp_path / "adapter", tmp_path / "mine"
    folder.mkdir()
    (folder / "a").write_text("half of it")

    def fail(at):
        save_two(at)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OspoError, match=r"Cannot write .*adapter: No space left"):
        write_folder(folder, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (folder / "a").read_text() == "half of it"

    def full(at):
        save_two(at)
        raise RuntimeError("I/O error:\nNo space left on device (os error 28).")  # as of safetensors

    with pytest.raises(
        OspoError, match=r"^Cannot write .*/adapter: I/O error: No space left on device \(os error 28\)\.$"
    ):
        write_folder(folder, full)
    with pytest.raises(
        OspoError, match=r"^Cannot write .*/adapter: Permission denied; ask its owner .*\.$"
    ):  # not the temporary
        write_folder(folder, lambda at: (at / "inner").open("x").close() or refused(at / "inner"))
    with pytest.raises(UsageError, match=r"^mine$"):
        write_folder(folder, lambda at: (_ for _ in ()).throw(UsageError("mine")))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    for _ in range(2):
        write_folder(folder, save_two)
        assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "a", "b": "b"}
    folder.rename(mine)
    folder.symlink_to(mine)
    write_folder(folder, lambda at: None)
    assert not list(folder.iterdir())
    assert len(list(mine.iterdir())) == 2


ANSWER = {"p_yes": 0.9, "p_no": 0.1, "answer": "yes"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "a record is a JSON object"),
        ({}, "`item_id`"),
        ({"item_id": 3}, "`item_id`"),
        (record("1", prompt=3), "`prompt`"),
        (record("1", question="is it?"), "`question`"),
        (record("1", base_metadata={"base_0": 3}), "`base_metadata`"),
        (record("1", base_metadata={"base_0": {"path": 3}}), "`base_metadata`"),
        (
            record("1", base_metadata={"base_0": {}}),
            "`base_metadata`: 'base_0' should be an object with a string `path`",
        ),
        (record("1", base_metadata={"base": {"path": "x"}}), "`base_metadata`: The image name 'base'"),
        (record("1", base_metadata=["x"]), "`base_metadata` should be an object of images"),
        (
            record("1", base_metadata={"base_0": {"path": "x"}}, negative_metadata={"base_0": {"path": "y"}}),
            "the image name 'base_0' occurs for both roles",
        ),
        (record("1", base_metadata={"base_0": {"path": "x", "kept": "yes"}}), "'base_0': `kept` should be true or"),
        (record("1", base_metadata={"base_0": {"path": "x", "local_score": "x"}}), "`local_score` should be a number"),
        (record("1", base_metadata={"base_0": {"path": "x", "local_score": 10**400}}), "`local_score`"),
        (
            record("1", base_metadata={"base_0": {"path": "x", "answer_metadata": [{}]}}),
            "`answer_metadata` should be a",
        ),
        (
            record("1", base_metadata={"base_0": {"path": "x", "answer_metadata": [ANSWER]}}),
            "'base_0' has answers and no `local_score`",
        ),
        (
            record("1", base_metadata={"base_0": {"path": "x", "answer_metadata": [ANSWER | {"p_no": "0.1"}]}}),
            "`answer_metadata` should be a list of answers",
        ),
        (record("1", chosen_score="x"), "`chosen_score` should be a number"),
        (record("1", kept="yes"), "`kept` should be true or false"),
        (record("1", objects=[{"text": "x"}]), "`objects`"),
        (record("1", unmatched_objects=["x"]), "`unmatched_objects`"),
        (
            record("1", long_prompt=["x"], negative_long_prompt=[]),
            "per variant .* long_prompt 1, negative_long_prompt 0",
        ),
        (record("1", further_pairs=[{"chosen": "a", "rejected": "b", "chosen_score": "x"}]), "`further_pairs`"),
        (record("1", prompt=["x" * 10**6]), r"`prompt` should be a string, got \['x{1,200}.{0,200}$"),
        (
            record("1", negative_metadata={"negative_0": {"path": "x", "answer_metadata": ["yes"]}}),
            "`negative_metadata`",
        ),
        (record("1", variant_reasons={"0": "same prompt"}), "`variant_reasons`"),
        (record("1", further_pairs=[{"chosen": "a.png"}]), "`further_pairs`"),
        (record("1", further_pairs={"chosen": "a.png"}), "`further_pairs`"),
        (record("1", pairs=None), "`pairs` should not be in a file, got None; the first pair has its fields"),
        (record("1", pairs=[{"chosen": 3}], kept=False), "`pairs` should not be in a file"),
        (record("1", chosen_score=1e101), "`chosen_score` should be a number"),
    ],
)
def test_wrong_types_are_named(value, words):
    with pytest.raises(OspoError, match=f"here: .*{words}"):
        validate(value, "here")


FLAT = {
    "item_id": "7", "prompt": "a red cup", "kept": True, "chosen": "c.png", "rejected": "r.png", "chosen_score": 0.9,
    "rejected_prompt": "a blue cup", "further_pairs": [{"chosen": "c1.png", "rejected": "r1.png", "mask_reason": "x"}],
    "nouns": ["cup"], "objects": [], "mask_path": "masks/7.safetensors",
    "mask_stats": {
        "layers": [3], "iou": None, "alarms": ["chosen: empty"],
        "chosen": {"coverage": 0.0, "entropy": [1.5]}, "rejected": {"coverage": 0.25, "entropy": [2]},
    },
    "other": 3, "unmatched_objects": {"hat": "?"},
}  # fmt: skip


def refuse_statistics(path, value, further):
    stats = json.loads(json.dumps(FLAT["mask_stats"]))
    *parent, name = path.split(".")
    (stats[parent[0]] if parent else stats)[name] = value
    pair = {"chosen": "c.png", "rejected": "r.png", "mask_stats": stats}
    flat = record("7", **({"further_pairs": [pair]} if further else {"mask_stats": stats}))
    with pytest.raises(OspoError, match="`further_pairs`" if further else "`mask_stats`"):
        validate(flat, "here")


@pytest.mark.parametrize("path", ["layers", "alarms", "chosen", "chosen.coverage", "rejected.entropy"])
@pytest.mark.parametrize("value", [None, "x", [None]])
@pytest.mark.parametrize("further", [False, True])
def test_mask_statistics_have_what_the_report_reads(path, value, further):
    refuse_statistics(path, value, further)


@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("iou", [10**400, 1e308, math.inf, math.nan, -0.5, 1.5, True]),
        ("chosen.coverage", [10**400, 1e308, math.inf, math.nan, -0.5, 1.5, True]),
        ("rejected.entropy", [[10**400], [1e308], [-1e308], [math.inf], [math.nan], [True]]),
    ],
)
def test_mask_statistics_have_finite_means(path, values, further):
    for value in values:
        refuse_statistics(path, value, further)


def test_pairs_in_memory_and_on_disk(tmp_path):
    item = from_official(FLAT)
    first, second = iter_pairs([item])
    assert (first.pair_id, second.pair_id) == ("7", "7-1")
    assert first.record is second.record is item
    assert first.pair == {name: FLAT[name] for name in FLAT if name.startswith(("chosen", "rejected", "mask_"))}
    assert second.pair == FLAT["further_pairs"][0]
    assert "chosen" not in item
    assert item["unmatched_objects"] == {"hat": "?"}
    with Store(tmp_path / "a.jsonl") as store:
        store.append(item)
    assert json.loads((tmp_path / "a.jsonl").read_text()) == to_official(item) == FLAT
    assert list(read_records(tmp_path / "a.jsonl")) == [item]


@pytest.mark.parametrize(
    "flat",
    [
        record("8", further_pairs=None),
        record("8", kept=False, reason="no image", mask=None, mask_reason="the item has no pair"),
        record("8", kept=False, chosen="c.png", rejected="r.png"),
        record("8", chosen="c.png"),
    ],
)
def test_items_without_a_pair_are_the_same_in_both_forms(flat):
    assert from_official(flat) == to_official(flat) == flat
    assert list(iter_pairs([flat])) == []


def test_a_pair_without_a_mask_is_null_on_disk():
    flat = {"item_id": "9", "chosen": "c.png", "rejected": "r.png", "mask": None, "mask_reason": "no object"}
    item = from_official(flat)
    assert item == {"item_id": "9", "pairs": [{"chosen": "c.png", "rejected": "r.png", "mask_reason": "no object"}]}
    assert list(to_official(item)) == list(flat)


def test_official_files_load(tmp_path):
    """The published files are JSON arrays; unknown fields are kept."""
    vqa = {
        "item_id": "0000001", "t2i_category": "attribute", "sub_category": "attribute2", "prompt": "a b",
        "question": ["Is there an a?"], "nouns": ["a"], "chosen": "images/base/attribute/0000001/01.png",
        "base_metadata": {"base_0": {"path": "x.png", "local_score": 0.5, "answer_metadata": []}},
        "negative_metadata": {}, "something_else": 3,
    }  # fmt: skip
    path = tmp_path / "vqa_result.json"
    path.write_text(json.dumps([vqa], indent=2))
    assert list(read_records(path)) == [vqa]


def test_chunks_are_full_except_the_last():
    assert list(chunked(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]


def test_hashes_are_stable_and_image_numbers_are_read_from_names():
    assert stable_hash(42, "images", "0000001", 0) == stable_hash(42, "images", "0000001", 0)
    assert stable_hash(1, 23) != stable_hash(12, 3)
    assert 0 <= stable_hash("x") < 2**63
    assert image_index("negative_12") == 12
    for name in ("negative", "", "base_²", "9" * 5000):
        with pytest.raises(OspoError, match="base_0"):
            image_index(name)


def variants(bases, **fields):
    found = image_variants(record("a", base_metadata={name: {"path": path} for name, path in bases.items()}, **fields))
    return list(found.values())


def test_the_variant_of_an_image_is_in_its_file_name():
    # As the images stage names them: of two variants, base_2 is a further image of the first one.
    own = {f"base_{i}": f"images/a/base_{i}.png" for i in (0, 1, 2, 5)}
    assert variants(own, negative_prompt=["b", "c"]) == [(0, 0), (1, 1), (0, 0), (1, 1)]
    assert variants({"base_4": "base_4.png"}) == [(4, 4)]
    # As official files: the entry has the place among the files that exist, and images of equal file names are a pair.
    official = {"base_0": "/data/images/base/layout/1000001/01.png", "base_1": "images/base/layout/1000001/02.png"}
    assert variants(official, negative_prompt=["b", "c", "d"]) == [("01.png", 1), ("02.png", 2)]
    assert variants({"base_0": "0.png", "base_1": "x1.png"}) == [("0.png", 0), ("x1.png", None)]
    assert variants({"base_0": "a.png"}) == [("a.png", None)]
    assert variants({"base_0": "x_1.png", "base_1": "x_0.png"}) == [("x_1.png", None), ("x_0.png", None)]
    assert variants({"base_0": f"{'9' * 10}.png"}) == [(f"{'9' * 10}.png", None)]
    assert variants({}) == []


IDS = (
    "0000012", "../../escaped", "..", ".", "/etc/passwd", "a/b", "a\\b", "C:x", "con", "nul", "lpt1", "aa", "AA", "Aa",
    "x" * 64, "x" * 65, "x" * 5000, "é", "e\u0301", "0000012-1", "a.b", "-rf", "~", "\n", " aa", "🔴" * 80, "İ" * 80,
)  # fmt: skip


def test_ids_become_names_that_cannot_leave_a_folder():
    names = [item_name(item) for item in IDS]
    assert names[0] == "0000012"
    for name in names:
        assert re.fullmatch(r"[a-z0-9_]+(-[0-9a-f]{24})?", name)
        assert len(name) <= 66
        assert not PureWindowsPath(name).is_reserved()
    assert len({name.casefold() for name in names}) == len(IDS)


@given(first=st.text(max_size=8), second=st.text(max_size=8))
def test_different_ids_have_different_names(first, second):
    assert (item_name(first).casefold() == item_name(second).casefold()) == (first == second)


def test_pairs_of_different_items_have_different_files():
    pair = {"chosen": "a.png", "rejected": "b.png"}
    found = list(iter_pairs([record("x", pairs=[pair, pair]), record("x-1", pairs=[pair])]))
    assert [item.pair_id for item in found] == ["x", "x-1", "x-1"]
    assert found[0].name == "x"
    assert len({item.name for item in found}) == 3


BOM = b"\xef\xbb\xbf"
TWO = [record("1", prompt="two\u2028lines\x85or\x0bmore"), record("2")]
LINES = b"".join(json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in TWO)


@pytest.mark.parametrize("start", [b"", BOM, b"\n", b"\r\n \t", BOM + b"\r\n", b"\n" * 10_000])
@pytest.mark.parametrize("indent", [None, 1, "lines"])
def test_files_as_editors_save_them(tmp_path, start, indent):
    path = tmp_path / "records.json"
    text = LINES if indent == "lines" else json.dumps(TWO, indent=indent, ensure_ascii=False).encode()
    path.write_bytes(start + text)
    assert list(read_records(path)) == TWO


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"item_id": "1", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"item_id": "1", "x": ' + b"9" * 10_000 + b"}", "digits"),
        (b'{"item_id": "1", "prompt": "\xff"}', "not valid JSON"),
        (b'{"item_id": "1", "prompt": "a \\ud83d"}', "lone surrogate"),
        (b'{"item_id": "\\ud83d"}', "lone surrogate"),
        (b'{"item_id": "1\\u0000"}', "NUL"),
        (BOM + b'{"item_id": 1}', "non-empty string"),
    ],
)
def test_hostile_lines_are_named(tmp_path, line, words):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'\n{"item_id": "0"}\n' + line + b"\n")
    with pytest.raises(OspoError, match=f"s.jsonl:3: .*{words}"):
        list(read_records(path))


def test_a_record_that_no_file_can_hold_is_refused_and_the_store_kept(tmp_path):
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with Store(tmp_path / "s.jsonl") as store:
        store.append(record("1"))
        for wrong in (record("2", prompt="\ud83d"), record("\ud83d"), record("2", x=nested), record("2\0")):
            with pytest.raises(OspoError, match=r"s\.jsonl: the record to append"):
                store.append(wrong)
        store.append(record("2"))
    assert [r["item_id"] for r in read_records(tmp_path / "s.jsonl")] == ["1", "2"]


@pytest.mark.parametrize("depth", [99, 100, 101, 600, 990, 2000])
def test_what_is_written_can_be_read_and_what_is_read_can_be_written(tmp_path, depth):
    """The parser of JSON ends at other depths than functions that walk its values."""
    nested, text = [], "[" * depth + "]" * depth
    for _ in range(depth - 2):
        nested = [nested]
    path, rows = tmp_path / "s.jsonl", tmp_path / "stages.json"
    rows.write_text(text)
    path.write_text(f'{{"item_id": "0", "x": {text[1:-1]}}}\n')
    fits = (
        contextlib.nullcontext() if depth <= 100 else pytest.raises(OspoError, match="nested too deeply, more than 100")
    )
    with fits:
        update_json(rows, [], lambda value: value)
    assert "".join(rows.read_text().split()) == text
    with fits:
        assert len(list(read_records(path))) == 1
    with Store(tmp_path / "t.jsonl") as store, fits:
        store.append(record("1", x=nested))
    assert len(list(read_records(tmp_path / "t.jsonl"))) == (depth <= 100)


@pytest.mark.parametrize("change", [lambda path: update_json(path, [], list), lambda path: read_json(path, None)])
def test_a_file_that_could_not_be_written_again_is_refused(tmp_path, change):
    path = tmp_path / "a.json"
    for text in (r'["x \ud83d"]', r'[{"\ud83d": 1}]'):
        path.write_text(text)
        with pytest.raises(
            OspoError, match=r"Cannot read .*a\.json: .*\\ud83d' ends in a lone surrogate.*; delete the file"
        ):
            change(path)
        assert path.read_text() == text


@pytest.mark.parametrize("name", ["mine", "none"])
@pytest.mark.parametrize(
    "call",
    [
        lambda path: read_json(path, None),
        lambda path: update_json(path, {}, dict),
        lambda path: append_line(path, {}),
        Store,
    ],
)
def test_a_file_of_a_run_folder_is_no_link(tmp_path, call, name):
    """In a run folder of someone else it could lead to any file."""
    (tmp_path / "mine").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / name)
    with pytest.raises(OspoError, match=r"link is a symbolic link, .*; copy the file in its place"):
        call(tmp_path / "link")
    assert (tmp_path / "mine").read_text() == "{}"
    assert not (tmp_path / "none").exists()


def append_one(path):
    with Store(path) as store:
        store.append(record("2"))


@pytest.mark.parametrize("append", [append_one, lambda path: append_line(path, record("2"))])
def test_a_copy_by_hard_links_is_not_changed(tmp_path, append):
    path, copy = tmp_path / "s.jsonl", tmp_path / "copy.jsonl"
    append_line(path, record("1"))
    os.link(path, copy)
    before = copy.read_bytes()
    append(path)
    assert copy.read_bytes() == before
    assert [item["item_id"] for item in read_records(path)] == ["1", "2"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["copy.jsonl", "s.jsonl"]


def test_a_store_that_is_replaced_before_it_is_locked_is_opened_again(tmp_path, monkeypatch):
    path, flock, calls = tmp_path / "s.jsonl", fcntl.flock, []
    append_line(path, record("1"))

    def late(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            write_atomic(path, json.dumps(record("3")).encode())
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    append_one(path)
    assert [item["item_id"] for item in read_records(path)] == ["3", "2"]


def test_errors_of_the_system_name_the_file(tmp_path):
    (tmp_path / "file").touch()
    for name, shown in (
        ("file/inner/a", "file/inner"),
        ("file/a", "file"),
        ("x" * 300, "x" * 300),
        ("x" * 250, "x" * 250),
    ):
        with pytest.raises(OspoError, match=rf"^Cannot write {tmp_path / shown}: "):
            write_atomic(tmp_path / name, b"")
    with pytest.raises(OspoError, match=r"^Cannot read .*file: "), os_errors("read", tmp_path):
        (tmp_path / "file").mkdir()
    with pytest.raises(OspoError, match=f"^Cannot read {tmp_path}: "), os_errors("read", tmp_path):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_folder_is_synced_where_the_file_system_can(tmp_path, monkeypatch, number, fails):
    sync, folders = os.fsync, []

    def fsync(handle):
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            return sync(handle)
        folders.append(handle)
        raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", fsync)
    if fails:
        with pytest.raises(OspoError, match="Cannot write"):
            write_atomic(tmp_path / "a", b"x")
    else:
        write_atomic(tmp_path / "a", b"x")
    assert len(folders) == 1
    assert (tmp_path / "a").read_bytes() == b"x"


def test_files_of_a_folder_get_their_names_once_all_are_on_disk(tmp_path, monkeypatch):
    seen = []

    def fsync(handle):
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        names = sorted(path.name for path in tmp_path.iterdir() if path.name in "ab")
        seen.append(("folder" if folder else Path(f"/proc/self/fd/{handle}").read_bytes(), names))

    monkeypatch.setattr(os, "fsync", fsync)
    write_files({tmp_path / "a": b"x", tmp_path / "b": b"y"})
    assert seen == [(b"x", []), (b"y", []), ("folder", ["a", "b"])]


def test_files_are_written_together_or_the_first_one_is_named_that_is_not(tmp_path):
    (tmp_path / "c").mkdir()
    with pytest.raises(OspoError, match=f"^Cannot write {tmp_path / ('x' * 300)}: "):
        write_files({tmp_path / "a": b"x", tmp_path / ("x" * 300): b"y"})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    with pytest.raises(OspoError, match=f"^Cannot write {tmp_path / 'c'}: "):
        write_files({tmp_path / "a": b"x", tmp_path / "c": b"y"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


@pytest.mark.parametrize("size", [5000, 50000])  # less and more than the buffer of a file
@pytest.mark.parametrize("second", [False, True])
def test_a_full_disk_names_the_file(tmp_path, size, second):
    """What is left in a buffer is written again when the file is closed, which fails again."""
    code = (
        "import pathlib, resource, sys; from ospo_fast import records\n"
        "from ospo_fast.errors import OspoError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "folder, size, second = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])\n"
        "try: records.write_files({folder / 'a': b'x' * (1 if second else size), folder / 'b': b'x' * size})\n"
        "except OspoError as error: print(error)"
    )
    arguments = [str(tmp_path), str(size), str(int(second))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"Cannot write {tmp_path / ('b' if second else 'a')}: ")
    assert not list(tmp_path.iterdir())


def test_temporary_files_of_killed_processes_are_swept(tmp_path):
    code = (
        "import os, pathlib, signal, sys; from ospo_fast import records\n"
        "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "records.write_atomic(pathlib.Path(sys.argv[1]) / 'a.png', b'x')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    [left] = tmp_path.iterdir()
    (tmp_path / ".model.0123456789abcdef.tmp" / "inner").mkdir(parents=True)  # of write_folder
    others = [".a.png.1234.tmp", ".a.png.host-1234.tmp", ".a.png.0123456789ABCDEF.tmp", "b.0123456789abcdef.tmp"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".c.0123456789abcdef.tmp").symlink_to(others[0])
    sweep_temporary_files(tmp_path)
    assert left.name not in others
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, ".c.0123456789abcdef.tmp"])


def test_a_folder_that_is_deleted_while_others_are_swept(tmp_path, monkeypatch):
    (tmp_path / ".a.0123456789abcdef.tmp").touch()

    def glob(folder, pattern):
        yield from folder.iterdir()
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(Path, "glob", glob)
    sweep_temporary_files(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("locks", [True, False])
def test_temporary_files_in_use_are_not_swept(tmp_path, monkeypatch, locks):
    """By any process, also one of another machine or container; without locks of the file system, none is."""
    sync, flock, seen = os.fsync, fcntl.flock, []

    def fsync(handle):
        sweep_temporary_files(tmp_path)
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        sync(handle)

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fcntl, "flock", flock if locks else no_locks)
    write_atomic(tmp_path / "a", b"x")
    write_folder(tmp_path / "b", save_two)
    assert (tmp_path / "a").read_bytes() == b"x"
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert re.fullmatch(r"\.a\.[0-9a-f]{16}\.tmp", seen[0][0])


@pytest.mark.parametrize("write", [lambda path: write_atomic(path, b"x"), lambda path: write_folder(path, save_two)])
def test_a_temporary_file_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch, write):
    flock, calls = fcntl.flock, []

    def late(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            sweep_temporary_files(tmp_path)
            assert not list(tmp_path.iterdir())
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_temporary_file_is_a_new_one(tmp_path, monkeypatch):
    """Neither one of another process, nor one that a link leads to."""
    monkeypatch.setattr(os, "urandom", bytes)
    (tmp_path / "mine").write_text("mine")
    name = f".a.{'00' * 8}.tmp"
    for make in ((tmp_path / name).symlink_to, lambda target: os.link(tmp_path / target, tmp_path / name)):
        make("mine")
        with pytest.raises(OspoError, match="Cannot write"):
            write_atomic(tmp_path / "a", b"x")
        assert (tmp_path / "mine").read_text() == "mine"
        (tmp_path / name).unlink()


def test_numbers_that_are_not_finite_become_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    with Store(tmp_path / "a.jsonl") as store:
        store.append(
            {
                "item_id": "a",
                "pairs": [{"chosen": "c", "rejected": "r", "chosen_score": nan}],
                "base_metadata": {"base_0": {"path": "x.png", "local_score": -inf}},
            }
        )
    write_json(tmp_path / "b.json", {"x": [nan, 1.5, (inf, "y")]})
    append_line(tmp_path / "c.jsonl", {"loss": nan})
    (record,) = read_records(tmp_path / "a.jsonl")
    assert record["pairs"][0]["chosen_score"] is None
    assert record["base_metadata"]["base_0"]["local_score"] is None
    assert json.loads((tmp_path / "b.json").read_text()) == {"x": [None, 1.5, [None, "y"]]}
    assert json.loads((tmp_path / "c.jsonl").read_text()) == {"loss": None}


def test_a_json_file_without_end_is_not_read(tmp_path):
    """A sparse file takes no disk and would fill the memory."""
    path = tmp_path / "settings.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OspoError, match=r"Cannot read .*settings\.json: it has 1099511627776 bytes, expected 1 to"):
        read_json(path, {})

"""The soak's own checks: what it reports about a run folder, and the faults that it makes."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
from soak.faults import Faults

from ospo_fast.records import Store, write_atomic


def store(*ids: str) -> bytes:
    return "".join(json.dumps({"item_id": item}) + "\n" for item in ids).encode()


@pytest.mark.usefixtures("omegaconf")
def test_differences_are_named(tmp_path: Path) -> None:
    from soak.runs import differences, half_written

    whole = {"prompts.jsonl": store("a", "b"), "images/a/base_0.png": b"1", "config.yaml": b"2"}
    assert not differences(whole, dict(whole))
    found = {"prompts.jsonl": store("a", "a"), "images/a/base_0.png": b"3", ".x.tmp": b""}
    assert differences(whole, found) == [
        "lost: b of prompts.jsonl",
        "doubled: a of prompts.jsonl",
        "lost: config.yaml",
        "left over: .x.tmp",
        "different: prompts.jsonl",
        "different: images/a/base_0.png",
    ]
    (tmp_path / ".x.tmp").touch()
    (tmp_path / "prompts.jsonl").write_bytes(store("a") + b"{")
    assert sorted(half_written(tmp_path)) == ["half written: .x.tmp", "half written: prompts.jsonl"]


@pytest.mark.usefixtures("omegaconf")
def test_a_torn_training_log_is_compared(tmp_path: Path) -> None:
    from soak.runs import contents

    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "seconds": 2}\n{"step": 2, "los')
    assert contents(tmp_path) == {"log.jsonl": [{"step": 1}, b'{"step": 2, "los']}


def disturbed(folder: Path, faults: Faults) -> int:
    """Write a file and append a record in a forked process with faults; return how it ended."""
    process = os.fork()
    if process == 0:
        code = 3
        try:
            faults.install()
            write_atomic(folder / "file", b"12345678")
            with Store(folder / "store.jsonl") as opened:
                opened.append({"item_id": "a"})
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_faults_at_the_operations(tmp_path: Path) -> None:
    faults = Faults(tmp_path, at=2)
    assert disturbed(tmp_path, faults) == -signal.SIGKILL
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"1234"]  # operation 1 is the folder
    assert disturbed(tmp_path, Faults(tmp_path, at=2, action=errno.EIO, error=True)) == 3
    assert not (tmp_path / "file").exists()
    assert disturbed(tmp_path, Faults(tmp_path, at=10**6)) == 0
    assert (tmp_path / "file").read_bytes() == b"12345678"
    assert (tmp_path / "store.jsonl").read_bytes() == store("a")

"""Errors reach another process with all that they hold, and texts without an encoding are refused."""

import concurrent.futures
import importlib
import multiprocessing
import pickle
import re
from pathlib import Path

import pytest
import torch

import ospo_fast
from ospo_fast.errors import OpError, OspoError, UsageError, check_text
from ospo_fast.generation.requests import GenerationError
from ospo_fast.stages import Shard

WORKER = """
import torch
from ospo_fast.generation.requests import GenerationError

def fail():
    raise GenerationError("1 of 2 images failed", [torch.tensor([1, 2]), None], {1: "not finite"})
"""


def error_classes():
    """Every error of the package. Modules without one are not imported: some need packages that are optional."""
    root = Path(ospo_fast.__file__).parent
    for path in root.rglob("*.py"):
        if re.search(r"^class \w+\(.*\b(\w*Error|Exception)\b.*\):", path.read_text(encoding="utf-8"), re.MULTILINE):
            importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))
    found = [OspoError]
    for kind in found:
        found += [sub for sub in kind.__subclasses__() if sub not in found]
    return found


def test_every_error_is_pickled_with_its_attributes():
    kinds = error_classes()
    assert {OspoError, UsageError, OpError, GenerationError} <= set(kinds)
    for kind in kinds:
        error = kind.__new__(kind)
        error.args, error.failed, error.results = ("words", 3), {1: "reason"}, [None]
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.args, vars(again)) == (kind, error.args, vars(error))
    assert str(pickle.loads(pickle.dumps(OpError("bins: got 0")))) == "bins: got 0"


def test_an_error_of_a_worker_process_reaches_its_parent(tmp_path, monkeypatch):
    (tmp_path / "ospo_failing_worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    fail = importlib.import_module("ospo_failing_worker").fail
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        with pytest.raises(GenerationError, match="1 of 2 images failed") as caught:
            pool.submit(fail).result(timeout=120)
        with pytest.raises(UsageError, match="i/n"):
            pool.submit(Shard.parse, "2/2").result(timeout=120)
        assert torch.equal(caught.value.results[0], torch.tensor([1, 2]))
        assert (caught.value.results[1], caught.value.failed) == (None, {1: "not finite"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "got NoneType, expected a text"),
        (b"a", "got bytes"),
        ("a \ud83d cup", r"'a \\ud83d cup' holds a lone surrogate \(U\+D83D at character 2\)"),
        ("a\0", "NUL"),
    ],
)
def test_texts_that_no_file_can_take(text, words):
    with pytest.raises(UsageError, match=f"^prompt: .*{words}") as caught:
        check_text("prompt", text)
    assert str(caught.value).encode()  # the message itself can be written
    assert check_text("prompt", "a 🐱\n") == "a 🐱\n"

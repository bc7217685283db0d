"""Prompt files as editors save them: every line keeps its number, and a bad one is named."""

import codecs
import os

import pytest

from ospo_fast.errors import UsageError
from ospo_fast.stages.prompt_files import numbered_prompts, prompt_key

SPACES = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"  # where str.splitlines would split


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (codecs.BOM_UTF8 + b"a cup\na hat\n", [(1, "a cup"), (2, "a hat")]),
        (codecs.BOM_UTF8 + b"\r\n\r\na cup\r\na hat", [(3, "a cup"), (4, "a hat")]),
        (b"a cup\ra hat\r", [(1, "a cup"), (2, "a hat")]),
        (b"\n \n\ta cup \n", [(3, "a cup")]),
        # Two files that were joined, each with its mark.
        (codecs.BOM_UTF8 + b"a cup\n" + codecs.BOM_UTF8 + b"a hat", [(1, "a cup"), (2, "a hat")]),
        (f"{SPACES}\na hat".encode(), [(1, SPACES), (2, "a hat")]),
    ],
)
def test_lines_and_their_numbers(tmp_path, data, expected):
    (tmp_path / "p.txt").write_bytes(data)
    assert numbered_prompts(tmp_path / "p.txt") == expected


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("a cup\na hat".encode("utf-16"), r"p\.txt is not UTF-8 \(line 1: .*save it with the encoding UTF-8"),
        ("a cup\na hat".encode("utf-16-le"), r"p\.txt:1: prompt: .*NUL character"),
        ("a cup\na h\xe4t\n".encode("latin-1"), r"p\.txt is not UTF-8 \(line 2"),
        (b"a cup\n\na \0hat\n", r"p\.txt:3: prompt: .*NUL character"),
        (codecs.BOM_UTF8 + b"\n", "holds no prompt"),
    ],
)
def test_files_that_are_refused(tmp_path, data, words):
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(UsageError, match=words):
        numbered_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("name", ["", "none.txt", "a\0b", "a" * 5000])
def test_paths_that_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match="Cannot read the prompt file"):
        numbered_prompts(f"{tmp_path}/{name}")


def test_a_pipe_is_refused_with_what_to_do(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"no regular file; expected a text file with one prompt per line, .* save to"):
        numbered_prompts(tmp_path / "pipe")


def test_keys_ignore_case_spaces_and_full_stop(seconds):
    assert prompt_key(" A  red\ncup. ") == prompt_key("a red cup") == "a red cup"
    for unit in (" ", ".", " .", "A ", "\u2028"):
        assert seconds(prompt_key, unit * 100_000) < 10

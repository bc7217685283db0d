"""Prompt files as editors save them: every line keeps its number, and a bad one is named."""

import codecs
import os

import pytest

from ospo_fast.errors import Failure, UsageError
from ospo_fast.stages.prompt_files import MAX_NAMED, MAX_RANGES, numbered_prompts, prompt_key, refuse_lines

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
        ("a cup\na hat".encode("utf-16"), r"line 1: it is not UTF-8 \(.*save the file with the encoding UTF-8"),
        ("a cup\na hat".encode("utf-16-le"), r"p\.txt: 2 lines cannot be used: line 1: .*NUL character"),
        ("a cup\na h\xe4t\n".encode("latin-1"), r"p\.txt:2: it is not UTF-8 \(.*encoding UTF-8\.$"),
        (
            "h\xe4t\na cup\r\nr\xe9d\r".encode("latin-1"),
            r"2 lines .*line 1: it is not UTF-8.*, line 3: it is not UTF-8",
        ),
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


def failures(count, reason="'a {n}' is unknown; use words"):
    return [(n, Failure(reason.format(n=n))) for n in range(1, count + 1)]


def test_one_bad_line_is_named_by_its_place():
    with pytest.raises(UsageError) as caught:
        refuse_lines("p.txt", [(1, None), (2, Failure("prompt: 'x' is unknown; use words"))])
    assert str(caught.value) == "p.txt:2: prompt: 'x' is unknown; use words."
    refuse_lines("p.txt", [(1, None), (2, "ok")])


def test_all_bad_lines_are_named_with_what_to_do_once():
    with pytest.raises(UsageError) as caught:
        refuse_lines("p.txt", [*failures(2), (7, Failure("prompt: 'left' names no object; name one"))])
    assert str(caught.value) == (
        "p.txt: 3 lines cannot be used: line 1: 'a 1' is unknown, line 2: 'a 2' is unknown; use words; "
        "line 7: 'left' names no object; name one."
    )


def test_of_many_bad_lines_the_later_ones_have_numbers_only():
    with pytest.raises(UsageError) as caught:
        refuse_lines("p.txt", failures(MAX_NAMED + 3))
    assert f"{MAX_NAMED + 3} lines cannot be used" in str(caught.value)
    assert f"line {MAX_NAMED}: " in str(caught.value)
    assert f"line {MAX_NAMED + 1}: " not in str(caught.value)
    assert str(caught.value).endswith(f"; and lines {MAX_NAMED + 1}-{MAX_NAMED + 3}.")


def test_numbers_of_bad_lines_are_bounded():
    every_second = [(2 * line, failure) for line, failure in failures(MAX_NAMED + MAX_RANGES + 5)]
    with pytest.raises(UsageError) as caught:
        refuse_lines("p.txt", every_second)
    first, last = 2 * (MAX_NAMED + 1), 2 * (MAX_NAMED + MAX_RANGES)
    assert f"; and lines {first}, {first + 2}, " in str(caught.value)
    assert str(caught.value).endswith(f", {last}, and more up to line {last + 10}.")


def test_all_lines_that_no_tokenizer_can_take_are_named(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a \0cup\na hat\na \0coat\n")
    with pytest.raises(UsageError, match=r"2 lines cannot be used: line 1: .*, line 3: .* holds a NUL character; rem"):
        numbered_prompts(tmp_path / "p.txt")

"""Prompt files of public benchmarks, and the folders of images that their official scorers read.

Read for the formats, without any of their code or data: `evaluation/evaluate_images.py` and the README of
djghosh13/geneval; `evaluation.py` and the README of facebookresearch/GenEval2; `dpg_bench/compute_dpg_bench.py` of
TencentQQGYLab/ELLA; `BLIPvqa_eval`, `UniDet_eval`, `CLIPScore_eval` and `3_in_1_eval` of Karine-Huang/T2I-CompBench.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ospo_fast.errors import Failure, OspoError, UsageError, attempt, check_text
from ospo_fast.files import open_image, read_bytes, reason
from ospo_fast.records import parse_json
from ospo_fast.stages.prompt_files import numbered_prompts, refuse_lines

MAX_FILES = 10**5  # of a folder of prompts
MAX_NAME = 255  # bytes of a file name
_CSV_FIELDS = {"item_id", "text"}


@dataclass(frozen=True)
class Entry:
    """A prompt of a benchmark: its place in the file, its text, and what the scorer gets with it."""

    line: int
    prompt: str
    name: str = ""  # DPG-Bench: the name of its images, without the suffix
    metadata: dict[str, Any] = field(default_factory=dict)  # GenEval: the line of the file


Images = list[list[Path]]
"""The images of each entry, in order."""


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark.

    `read` returns the entries of a prompt file of this kind. `write` fills a new folder with the images; its last
    argument is where the folder will be.
    """

    title: str
    file: str
    source: str
    default: int  # images of a prompt, if the user names no number
    accepted: tuple[int, ...]  # numbers of images of a prompt; empty: all
    read: Callable[[Path], list[Entry]]
    write: Callable[[Sequence[Entry], Images, Path, Path], None]


def read_lines(path: Path, option: str = "--prompts") -> list[tuple[int, dict[str, Any]]]:
    """Read (line, object) from a JSON array or JSON lines, one object each; of an array the line is the place.

    option: what names the file.

    Raises UsageError for a file that cannot be read or holds anything else.
    """
    try:
        data = read_bytes(path)
        if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            rows = list(enumerate(parse_json(data), 1))
        else:
            lines = enumerate(data.split(b"\n"), 1)
            rows = [(number, attempt(_parse_line, line)) for number, line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{option}: cannot read {str(path)[:300]}: {reason(error)}; expected JSON lines, or a JSON array, of "
            "objects."
        ) from error
    wrong = Failure("it is no JSON object; write one object on each line")
    rows = [(number, row if isinstance(row, (dict, Failure)) else wrong) for number, row in rows]
    refuse_lines(path, rows)
    return rows


def _parse_line(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise OspoError(f"it is no JSON ({reason(error)}); write one object on each line") from error


def check_prompt_text(prompt: object) -> str:
    """Return a prompt without spaces around it. Raises UsageError for an empty one, or what is no text."""
    text = check_text("prompt", prompt).strip()
    if not text:
        raise UsageError("prompt: it is empty; write what the image should show")
    return text


def _entries(path: Path, rows: Sequence[tuple[int, Any]], make: Callable[[int, Any], Entry]) -> list[Entry]:
    results = [(line, attempt(make, line, row)) for line, row in rows]
    refuse_lines(path, results)
    entries = [entry for _, entry in results if isinstance(entry, Entry)]
    if not entries:
        raise UsageError(f"The prompt file {path} holds no prompt; download it again.")
    return entries


# Each kind: what tells it, how it is read, and the folder of its scorer.


def _read_geneval(path: Path) -> list[Entry]:
    def make(line: int, row: dict[str, Any]) -> Entry:
        missing = [key for key in ("tag", "include", "prompt") if key not in row]
        if missing:
            raise UsageError(f"{', '.join(missing)} is missing, which the scorer reads; download the file again")
        return Entry(line, check_prompt_text(row["prompt"]), metadata=row)

    return _entries(path, read_lines(path), make)


def _write_geneval(entries: Sequence[Entry], images: Images, folder: Path, _: Path) -> None:
    for number, (entry, paths) in enumerate(zip(entries, images, strict=True)):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(entry.metadata) + "\n", encoding="utf-8")
        for n, path in enumerate(paths):
            _place(path, samples / f"{n:05d}.png")


def _read_geneval2(path: Path) -> list[Entry]:
    places: dict[str, int] = {}

    def make(line: int, row: dict[str, Any]) -> Entry:
        prompt = check_text("prompt", row.get("prompt"))  # the scorer looks it up as it is
        check_prompt_text(prompt)
        if (first := places.setdefault(prompt, line)) != line:
            raise UsageError(f"prompt: it is that of line {first}, and the scorer has one image of each; delete it")
        return Entry(line, prompt)

    return _entries(path, read_lines(path), make)


def _write_geneval2(entries: Sequence[Entry], images: Images, folder: Path, final: Path) -> None:
    places = {}
    for number, (entry, paths) in enumerate(zip(entries, images, strict=True)):
        _place(paths[0], folder / f"{number:05d}.png")
        places[entry.prompt] = str(final.resolve() / f"{number:05d}.png")
    (folder / "image_paths.json").write_text(json.dumps(places, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _read_dpg(path: Path) -> list[Entry]:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        return _entries(path, list(enumerate(files, 1)), _read_dpg_file)
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(path).decode("utf-8-sig"))))
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"--prompts: cannot read {str(path)[:300]}: {reason(error)}; download it again.") from error
    found: dict[str, Entry] = {}
    results: list[tuple[int, object]] = []
    for line, row in enumerate(rows, 2):
        entry = attempt(_dpg_entry, line, row["item_id"], row["text"])
        if isinstance(entry, Entry) and (first := found.setdefault(entry.name, entry)).prompt != entry.prompt:
            entry = Failure(f"item_id {entry.name[:60]!r} has another text than in row {first.line}; download it again")
        results.append((line, entry))
    refuse_lines(path, results)
    return _entries(path, [(entry.line, entry) for entry in found.values()], lambda _, entry: entry)


def _read_dpg_file(line: int, path: Path) -> Entry:
    return _dpg_entry(line, path.stem, " ".join(text for _, text in numbered_prompts(path)))


def _dpg_entry(line: int, name: object, text: object) -> Entry:
    name = check_text("item_id", name)
    # The scorer takes the name up to its first dot for the item.
    if not name or name != Path(name).name or "." in name or len(name.encode()) > MAX_NAME - len(".png"):
        raise UsageError(f"item_id: got {name[:60]!r}, expected a file name without a dot; rename it")
    return Entry(line, check_prompt_text(text), name=name)


def _write_dpg(entries: Sequence[Entry], images: Images, folder: Path, _: Path) -> None:
    from PIL import Image

    for entry, paths in zip(entries, images, strict=True):
        if len(paths) == 1:
            _place(paths[0], folder / f"{entry.name}.png")
            continue
        parts = [open_image(path) for path in paths]
        width, height = parts[0].size
        grid = Image.new("RGB", (2 * width, 2 * height))
        for n, part in enumerate(parts):
            grid.paste(part, (n % 2 * width, n // 2 * height))
        grid.save(folder / f"{entry.name}.png", compress_level=1)


def _read_t2i(path: Path) -> list[Entry]:
    def make(line: int, prompt: str) -> Entry:
        prompt = prompt.partition("\t")[0].strip()  # as the official generator
        for sign in "/_":
            if sign in prompt:
                raise UsageError(
                    f"prompt: {prompt[:60]!r} holds {sign!r}, and the scorers read the prompt from the file name up to "
                    "'_'; rewrite it"
                )
        if len(prompt.encode()) > MAX_NAME - len("_000000.png"):
            raise UsageError(f"prompt: {prompt[:60]!r} is too long for a file name, which the scorers read; shorten it")
        return Entry(line, check_prompt_text(prompt))

    return _entries(path, numbered_prompts(path), make)


def _write_t2i(entries: Sequence[Entry], images: Images, folder: Path, _: Path) -> None:
    samples, number = folder / "samples", 0
    samples.mkdir()
    for entry, paths in zip(entries, images, strict=True):
        for path in paths:
            _place(path, samples / f"{entry.prompt}_{number:06d}.png")
            number += 1


def _place(image: Path, target: Path) -> None:
    """Give an image a second name, which takes no space; copy it where the file system has one name for a file."""
    try:
        target.hardlink_to(image)
    except OSError:
        shutil.copyfile(image, target)


BENCHMARKS = {
    "geneval2": Benchmark(
        "GenEval 2", "geneval2_data.jsonl", "github.com/facebookresearch/GenEval2",
        1, (1,), _read_geneval2, _write_geneval2,
    ),
    "geneval": Benchmark(
        "GenEval", "prompts/evaluation_metadata.jsonl", "github.com/djghosh13/geneval",
        4, (), _read_geneval, _write_geneval,
    ),
    "dpg": Benchmark(
        "DPG-Bench", "the folder dpg_bench/prompts or dpg_bench/dpg_bench.csv", "github.com/TencentQQGYLab/ELLA",
        4, (1, 4), _read_dpg, _write_dpg,
    ),
    "t2i-compbench": Benchmark(
        "T2I-CompBench++", "one text file of examples/dataset, such as color_val.txt",
        "github.com/Karine-Huang/T2I-CompBench", 10, (), _read_t2i, _write_t2i,
    ),
}  # fmt: skip


def identify(path: Path) -> tuple[str | None, str]:
    """Return the benchmark that a file or folder of prompts seems to be of, None for no known one, and what it holds.

    Raises UsageError if it cannot be read.
    """
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises for long names)
        files = sorted(path.glob("*.txt"))[: MAX_FILES + 1]
        if not files or len(files) > MAX_FILES:
            return None, f"a folder with {'no' if not files else f'more than {MAX_FILES}'} .txt file"
        if any(len(numbered_prompts(file)) > 1 for file in files):
            return None, "a folder of text files with several prompts each"
        return "dpg", "a folder of text files with one prompt each"
    try:
        data = read_bytes(path)
        text = data.decode("utf-8-sig").lstrip()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--prompts: cannot read {str(path)[:300]}: {reason(error)}; name the prompt file of the benchmark."
        ) from error
    if text.startswith(("{", "[")):
        rows = read_lines(path)
        keys = rows[0][1].keys() if rows else set()
        holds = f"JSON objects with {', '.join(map(str, keys))[:120] or 'no key'}"
        if "vqa_list" in keys:
            return "geneval2", holds
        return "geneval" if {"tag", "include"} <= keys else None, holds
    header = next(csv.reader([text.split("\n", 1)[0].strip()[:10_000]]), [])
    if set(header) >= _CSV_FIELDS:
        return "dpg", f"CSV with the columns {','.join(header)[:120]}"
    if path.suffix == ".csv":
        return None, f"CSV with the columns {','.join(header)[:120]}"
    return "t2i-compbench", "text with one prompt on each line"


def read_benchmark(name: str, path: Path) -> list[Entry]:
    """Read the prompt file of a benchmark.

    Raises UsageError for a file of another kind, with what it seems to be, or one that the scorer could not use.
    """
    benchmark = BENCHMARKS[name]
    found, holds = identify(path)
    if found != name:
        seems = f"seems to be of {BENCHMARKS[found].title}: " if found else "is of no known benchmark: "
        other = f", or name --benchmark {found}" if found else ""
        raise UsageError(
            f"--prompts: {path} {seems}{holds}; expected the file of {benchmark.title}: {benchmark.file} of "
            f"{benchmark.source}; give that one{other}."
        )
    return benchmark.read(path)

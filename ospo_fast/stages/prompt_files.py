"""Image prompts: files of them, when two are the same, and whether a model can take one."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ospo_fast.config import Config
from ospo_fast.errors import Failure, UsageError, attempt, check_text
from ospo_fast.files import regular
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.layout import image_layout

if TYPE_CHECKING:
    from torch import Tensor

MAX_NAMED = 10  # lines of a file in an error with their reasons; the others have their numbers only
MAX_RANGES = 100  # of these numbers


def prompt_key(prompt: str) -> str:
    """Return what identifies a prompt: its text without case, repeated spaces and full stop."""
    return " ".join(prompt.casefold().split()).rstrip(" .")


def numbered_prompts(path: str | Path, *, pipe: bool = False) -> list[tuple[int, str]]:
    """Read (line number, prompt) from a UTF-8 text file with one prompt per line; blank lines are skipped.

    Only LF, CR LF and CR end a line. Byte-order marks are ignored. pipe: the user names the file for this call, and it
    may be a pipe, such as `<(command)`.

    Raises:
        UsageError: a missing or empty file, one that is not UTF-8, or a line with a NUL character.

    """
    try:
        data = (Path(path) if pipe else regular(Path(path))).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"Cannot read the prompt file {path}: {reason}; expected a text file with one prompt per line"
            + ("." if pipe else ", which each command reads again, so save to one what a pipe gives.")
        ) from error
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")  # str.splitlines splits at more characters
    results = [(number, _read_line(line)) for number, line in enumerate(lines, 1)]
    refuse_lines(path, results)
    prompts = [(number, str(prompt)) for number, prompt in results if prompt]
    if not prompts:
        raise UsageError(f"The prompt file {path} holds no prompt; write one prompt per line.")
    return prompts


def _read_line(line: bytes) -> str | Failure:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Failure(f"it is not UTF-8 ({error.reason}); save the file with the encoding UTF-8")
    # A mark can also be inside the file, after files were joined. UTF-16 without one is read as NUL characters.
    return attempt(check_text, "prompt", text.replace("\ufeff", "").strip())


def refuse_lines(path: str | Path, results: Sequence[tuple[int, object]]) -> None:
    """Raise one UsageError that names the lines of a file whose result is a Failure, the first ones with reasons.

    Args:
        path: the file.
        results: (line number, result) of its lines. The reason of a Failure ends with a semicolon and what to do.

    """
    failed = [(line, result.reason.rstrip(".")) for line, result in results if isinstance(result, Failure)]
    if len(failed) == 1:
        raise UsageError(f"{path}:{failed[0][0]}: {failed[0][1]}.")
    if failed:
        by_remedy: dict[str, list[str]] = {}
        for line, reason in failed[:MAX_NAMED]:
            problem, _, remedy = reason.removeprefix("prompt: ").rpartition("; ")
            by_remedy.setdefault(remedy, []).append(f"line {line}: {problem}")
        named = "; ".join(f"{', '.join(problems)}; {remedy}" for remedy, problems in by_remedy.items())
        more = f"; and {_ranges([line for line, _ in failed[MAX_NAMED:]])}" if len(failed) > MAX_NAMED else ""
        raise UsageError(f"{path}: {len(failed)} lines cannot be used: {named}{more}.")


def _ranges(lines: Sequence[int]) -> str:
    """Name lines by their numbers, in ascending order: "lines 3, 5-9"."""
    runs: list[tuple[int, int]] = []
    for line in lines:
        if runs and line == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], line
        else:
            runs.append((line, line))
    named = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs[:MAX_RANGES])
    more = f", and more up to line {lines[-1]}" if len(runs) > MAX_RANGES else ""
    return f"{'line' if len(lines) == 1 else 'lines'} {named}{more}"


def normalized(model: UnifiedModel, prompt: str) -> str:
    """Return a prompt in the form that records and settings keep, so that all stages read the same text.

    A model with a closed vocabulary ignores case; for other models it is the prompt.
    """
    normalize = getattr(model, "normalize_prompt", None)
    return prompt if normalize is None else str(normalize(prompt))


def excluded_prompts(config: Config) -> frozenset[str]:
    """Return the keys of the prompts that must never be produced (`prompts.exclude`)."""
    if config.prompts.exclude is None:
        return frozenset()
    return frozenset(prompt_key(prompt) for _, prompt in numbered_prompts(config.prompts.exclude))


def image_prompt_ids(model: UnifiedModel, prompt: str) -> Tensor | Failure:
    """Tokenize an image prompt to ids (S,); a Failure for unknown words, control tokens or too many tokens."""
    ids = attempt(model.image_prompt, prompt)
    return ids if isinstance(ids, Failure) else check_length(model, prompt, ids) or ids


def check_length(model: UnifiedModel, prompt: str, ids: Tensor) -> Failure | None:
    """Return a Failure if the ids (S,) of an image prompt leave no positions for an image."""
    limit = model.max_positions - image_layout(model).tokens
    if len(ids) <= limit:
        return None
    return Failure(f"prompt: {prompt[:60]!r} has {len(ids)} tokens, at most {limit} fit; shorten it")


def divide_kinds(counts: Mapping[str, int], parts: int) -> list[dict[str, int]]:
    """Divide the kinds into parts of nearly the same number of prompts: the largest kinds first."""
    found: list[list[str]] = [[] for _ in range(parts)]
    sizes = [(0, number) for number in range(parts)]
    for kind in sorted(counts, key=lambda kind: -counts[kind]):
        size, number = heapq.heappop(sizes)
        found[number].append(kind)
        heapq.heappush(sizes, (size + counts[kind], number))
    return [{kind: counts[kind] for kind in counts if kind in kinds} for kinds in found]

"""Image prompts: files of them, when two are the same, and whether a model can take one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ospo_fast.config import Config
from ospo_fast.errors import Failure, UsageError, attempt, check_text
from ospo_fast.files import regular
from ospo_fast.models.base import UnifiedModel


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
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"The prompt file {path} is not UTF-8 (line {line}: {error.reason}); save it with the encoding UTF-8."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"Cannot read the prompt file {path}: {reason}; expected a text file with one prompt per line"
            + ("." if pipe else ", which each command reads again, so save to one what a pipe gives.")
        ) from error
    # A mark can also be inside the file, after files were joined. str.splitlines would split at more characters.
    lines = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    prompts = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    for number, prompt in prompts:
        check_text(f"{path}:{number}: prompt", prompt)  # UTF-16 without a byte-order mark is read as NUL characters
    if not prompts:
        raise UsageError(f"The prompt file {path} holds no prompt; write one prompt per line.")
    return prompts


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
    limit = model.max_positions - model.grid[0] * model.grid[1]
    if len(ids) <= limit:
        return None
    return Failure(f"prompt: {prompt[:60]!r} has {len(ids)} tokens, at most {limit} fit; shorten it")

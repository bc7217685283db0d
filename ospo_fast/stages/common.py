"""What several stages share: chunks, text sampling, prompt files, and the codes that lie beside an image."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ospo_fast.config import Config, TextConfig
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.records import Record, write_atomic
from ospo_fast.stages.object_tokens import extract_nouns
from ospo_fast.stages.templates import TemplateSet, load_templates

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel

T = TypeVar("T")
# What zipfile raises for a damaged archive: a wrong checksum, another compression, a bit that says "encrypted".
_BROKEN_ARCHIVE = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


def chunked(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def load_model_templates(model: UnifiedModel, config: Config) -> TemplateSet:
    """The template set of the configuration, or else of the model."""
    return load_templates(config.templates or model.templates)


class NoAnswer(str):
    """The empty answer of an item whose text failed; `reason` says why."""

    __slots__ = ("reason",)
    reason: str

    @staticmethod
    def because(reason: str) -> NoAnswer:
        """An empty answer with a reason."""
        answer = NoAnswer()
        answer.reason = reason
        return answer


def why_silent(answer: str) -> str | None:
    """The reason of a `NoAnswer`; None for an answer that the model gave."""
    return answer.reason if isinstance(answer, NoAnswer) else None


def sample_text(
    model: UnifiedModel,
    templates: TemplateSet,
    stage: str,
    settings: TextConfig,
    variables: Sequence[dict[str, Any]],
    seeds: Sequence[int],
) -> list[str]:
    """One answer of the model for each dict of template variables, sampled as the template set says.

    Settings that are not None take precedence over those of the template set. An item that fails (its chat is too long
    or holds a control token, its logits are not finite) has a `NoAnswer` and does not trouble the others.
    """
    from ospo_fast.generation import GenerationError, generate_text

    if not variables:
        return []
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 512} | templates.sampling(stage)
    for name in sampling:
        if getattr(settings, name, None) is not None:
            sampling[name] = getattr(settings, name)
    answers: list[str] = [""] * len(variables)
    prompts: dict[int, Tensor] = {}
    for n, values in enumerate(variables):
        chat = chat_or_reason(model, templates.messages(stage, **values))
        if isinstance(chat, str):
            answers[n] = NoAnswer.because(chat)
        else:
            prompts[n] = chat
    numbers = list(prompts)
    reasons: dict[int, str] = {}
    try:
        texts: list[str | None] = list(
            generate_text(
                model,
                list(prompts.values()),
                seeds=[seeds[n] for n in numbers],
                batch_size=settings.batch_size,
                progress=False,
                **sampling,
            )
        )
    except GenerationError as error:
        texts, reasons = error.results, error.failed
    for position, (n, text) in enumerate(zip(numbers, texts, strict=True)):
        answers[n] = NoAnswer.because(reasons.get(position, "the text failed")) if text is None else text
    return answers


def chat_or_reason(model: UnifiedModel, messages: list[Any], *, image: bool = False) -> Tensor | str:
    """The ids (S,) of a chat, or why the model cannot answer it."""
    try:
        ids = model.chat(messages, image=image)
    except UsageError as error:
        return str(error)
    if len(ids) >= model.max_positions:
        return f"{len(ids)} tokens leave no room for an answer in the model's {model.max_positions} positions"
    return ids


def describe(record: Record) -> dict[str, str]:
    """The template variables that a record gives."""
    return {
        "prompt": record["prompt"],
        "kind": record.get("kind", ""),
        "sub_category": record.get("sub_category", ""),
        "concepts": record.get("concepts_and_relations", ""),
        "relation": record.get("relation", ""),
    }


def prompt_key(prompt: str) -> str:
    """What makes two prompts the same: letters without case, single spaces, no full stop at the end."""
    return " ".join(prompt.casefold().split()).rstrip(" .")


def numbered_prompts(path: str | Path) -> list[tuple[int, str]]:
    """(line, prompt) of a text file, one a line, blank lines left out; UsageError for a missing or empty file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read the prompt file {path}: {getattr(error, 'strerror', None) or error}.") from error
    prompts = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UsageError(f"The prompt file {path} holds no prompt; write one prompt a line.")
    return prompts


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line, blank lines left out; UsageError for a missing or empty file."""
    return [prompt for _, prompt in numbered_prompts(path)]


def prompt_error(model: UnifiedModel, prompt: str) -> str | None:
    """Why the model cannot draw a prompt: unknown words, control tokens, too long; None for one that it can."""
    try:
        length = len(model.image_prompt(prompt))
    except UsageError as error:
        return str(error)
    room = model.max_positions - model.grid[0] * model.grid[1]
    return f"prompt: {prompt[:60]!r} has {length} tokens, at most {room} fit; shorten it" if length > room else None


def unusable(model: UnifiedModel, prompt: str) -> str | None:
    """Why a user's prompt is refused: the model cannot draw it, or it names no object; None for a good one."""
    why = prompt_error(model, prompt)
    if why is None and not extract_nouns({"prompt": prompt}):
        return f"prompt: {prompt[:60]!r} names no object; say what is to be seen"
    return why


def excluded(config: Config) -> frozenset[str]:
    """Keys of the prompts that must never be produced (`prompts.exclude`)."""
    if config.prompts.exclude is None:
        return frozenset()
    return frozenset(prompt_key(prompt) for prompt in read_prompts(config.prompts.exclude))


def locate(path: str, out: Path | None) -> Path:
    """The file behind a path of a record: relative paths start at the run folder."""
    return Path(path) if out is None else out / path


def save_codes(path: Path, codes: Tensor, **settings: Any) -> None:
    """Write codes (T,) and the settings that drew them to an .npz, atomically."""
    largest = int(codes.max()) if codes.numel() else 0
    buffer = io.BytesIO()
    array = codes.cpu().numpy().astype(np.int16 if largest < 2**15 else np.int32)
    np.savez(buffer, codes=array, **settings)
    write_atomic(path, buffer.getvalue())


def load_codes(path: Path) -> dict[str, Any]:
    """The codes (T,) int64 and settings of an .npz; OspoError when it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            values: dict[str, Any] = {name: file[name] for name in file.files}
            values["codes"] = torch.from_numpy(values["codes"].astype(np.int64))
    except (*_BROKEN_ARCHIVE, OSError, ValueError, KeyError, EOFError) as error:
        raise OspoError(f"Cannot read the codes {path}: {error}.") from error
    return {name: value.item() if getattr(value, "shape", None) == () else value for name, value in values.items()}


def png(image: Any) -> bytes:
    """An image as a PNG file, compressed in a third of the time that the usual level takes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def open_image(path: Path) -> Any:
    """An RGB image; OspoError when it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise OspoError(f"Cannot read the image {path}: {getattr(error, 'strerror', None) or error}.") from error


def image_or_reason(path: Path) -> Any:
    """An RGB image, or the text of why it cannot be read."""
    try:
        return open_image(path)
    except OspoError as error:
        return str(error)


def image_codes(model: UnifiedModel, paths: Sequence[Path]) -> list[Tensor | str]:
    """Codes (T,) int64 of each image: those stored beside it, or else the image encoded; or why there are none.

    An image has none when it (or the file of its codes) cannot be read, or when its codes do not fit the model's grid
    or codebook.
    """
    found: dict[Path, Tensor | str] = {}
    images: dict[Path, Any] = {}
    for path in dict.fromkeys(paths):
        if path.with_suffix(".npz").exists():
            found[path] = _stored_codes(path, model)
        elif isinstance(image := image_or_reason(path), str):
            found[path] = image
        else:
            images[path] = image
    if images:
        found |= zip(images, model.encode_images(list(images.values())).cpu(), strict=True)
    return [found[path] for path in paths]


def pair_codes(model: UnifiedModel, records: Sequence[Record], out: Path | None) -> list[Tensor | str]:
    """Codes (2, T) of each record's chosen and rejected image, or why there are none."""
    paths = [locate(path, out) for record in records for path in (record["chosen"], record["rejected"])]
    found = image_codes(model, paths)
    pairs: list[Tensor | str] = []
    for chosen, rejected in zip(found[::2], found[1::2], strict=True):
        if isinstance(chosen, str) or isinstance(rejected, str):
            pairs.append("; ".join(part for part in (chosen, rejected) if isinstance(part, str)))
        else:
            pairs.append(torch.stack((chosen, rejected)))
    return pairs


def _stored_codes(path: Path, model: UnifiedModel) -> Tensor | str:
    try:
        codes: Tensor = load_codes(path.with_suffix(".npz"))["codes"]
    except OspoError as error:
        return str(error)
    size = model.grid[0] * model.grid[1]
    if codes.shape != (size,) or int(codes.min()) < 0 or int(codes.max()) >= model.num_codes:
        reach = f" and reach {int(codes.max())}" if codes.numel() else ""
        return (
            f"{path}: the codes have shape {tuple(codes.shape)}{reach}; the model draws {size} codes below "
            f"{model.num_codes}. Were they made by another model?"
        )
    return codes

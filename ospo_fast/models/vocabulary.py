"""Models that know single words only, such as the embedded one, and what a model folder says about prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ospo_fast.config import model_family
from ospo_fast.errors import UsageError, check_text, is_panic
from ospo_fast.files import read_bytes
from ospo_fast.records import parse_json


class ClosedVocabulary:
    """The words of a word-level tokenizer (of the package `tokenizers`)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._unknown_id = tokenizer.token_to_id(tokenizer.model.unk_token)
        words = (token.lstrip("▁") for token in tokenizer.get_vocab(with_added_tokens=False))
        self.words = sorted({word for word in words if word.isalpha() and word.islower()})

    def unknown(self, text: str) -> list[tuple[int, int]]:
        """Return the half-open character spans of the words that it lacks; none where the tokenizer fails."""
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            if is_panic(error):  # the adapter, which tokenizes next, names it
                return []
            raise
        spans = [span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i == self._unknown_id]
        return [(end - len(text[start:end].lstrip()), end) for start, end in spans]

    def normalize(self, text: str) -> str:
        """Return a text with the words that it lacks in lower case, where it has those. The length is the same."""
        for start, end in self.unknown(text):
            lower = text[start:end].lower()
            if len(lower) == end - start and not self.unknown(lower):
                text = text[:start] + lower + text[end:]
        return text


def find_vocabulary(tokenizer: Any) -> ClosedVocabulary | None:
    """Return the vocabulary of a tokenizer (of the package `tokenizers`), None if it splits words into parts."""
    closed = type(getattr(tokenizer, "model", None)).__name__ == "WordLevel"
    return ClosedVocabulary(tokenizer) if closed and tokenizer.model.unk_token else None


def check_words(name: str, prompt: str, unknown: Sequence[str], vocabulary: ClosedVocabulary | None) -> None:
    """Raise UsageError if a prompt holds words that the model `name` does not know."""
    if unknown:
        known = "" if vocabulary is None else f": {', '.join(vocabulary.words)}"
        raise UsageError(
            f"prompt: {prompt[:60]!r} holds words that {name} does not know "
            f"({', '.join(map(repr, dict.fromkeys(unknown)))}); use words that it knows{known}"
        )


class UnloadedModel:
    """What a model folder says about prompts, without torch and the weights.

    It has those members of `UnifiedModel` that checks of prompts use, and refuses less.
    """

    max_positions, grid = 2**62, (0, 0)  # the number of tokens depends on the chat template

    def __init__(self, name: str, templates: str, vocabulary: ClosedVocabulary | None) -> None:
        self.name, self.templates, self._vocabulary = name, templates, vocabulary

    @classmethod
    def find(cls, name: str) -> UnloadedModel | None:
        """Read what the folder of a model says. None for a name on the hub, and for a folder that cannot be read."""
        try:
            folder = base_folder(name)
            return (
                None if isinstance(folder, str) else cls(name, model_family(name) or "janus", _read_vocabulary(folder))
            )
        except BaseException as error:  # damaged files raise many; loading the model names what is wrong
            if isinstance(error, Exception) or is_panic(error):
                return None
            raise

    def image_prompt(self, prompt: str) -> Sequence[int]:
        """Raise UsageError for an empty prompt, or one with unknown words. The ids are not known."""
        if not check_text("prompt", prompt).strip():
            raise UsageError("prompt: got an empty string, expected a description of an image")
        prompt = self.normalize_prompt(prompt)
        if self._vocabulary is not None:
            unknown = [prompt[slice(*span)] for span in self._vocabulary.unknown(prompt)]
            check_words(self.name, prompt, unknown, self._vocabulary)
        return ()

    def normalize_prompt(self, prompt: str) -> str:
        """Return a prompt as `JanusUnifiedModel.normalize_prompt` does."""
        return prompt if self._vocabulary is None else self._vocabulary.normalize(prompt)


def base_folder(name: str) -> Path | str:
    """Return the folder of a model, of an adapter that of its base model; the name of a model on the hub.

    Raises many errors for damaged ones.
    """
    from ospo_fast.models import find_base, find_model, has_base

    folder = find_model(name)  # refuses adapters that are bases of each other
    while folder is not None and has_base(folder):
        name = find_base(folder)
        folder = find_model(name)
    return name if folder is None else folder


def _read_vocabulary(folder: Path) -> ClosedVocabulary | None:
    path = folder / "tokenizer.json"
    if parse_json(read_bytes(path))["model"]["type"] != "WordLevel":
        return None
    from tokenizers import Tokenizer

    return find_vocabulary(Tokenizer.from_file(str(path)))

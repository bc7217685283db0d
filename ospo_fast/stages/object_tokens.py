"""Objects of a prompt: their nouns, where they stand in the prompt, and which tokens they are."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

from ospo_fast.records import ObjectSpan, Record

logger = logging.getLogger(__name__)

_PLACES = (
    "left right top bottom side row rows column columns front behind range middle center centre corner edge above "
    "below background foreground"
)
PLACE_WORDS = frozenset(_PLACES.split())
# Words that end a noun phrase when there is nothing but the prompt to go by.
_CLOSED = (
    "a an the this that these those some its his her their my your our and or but with without of in on at to from by "
    "for into onto off over under above below behind beside near next between against around along inside outside "
    "through across as while is are was were be being has have it they he she there up down out who which each other "
    "one two three four five six seven eight nine ten left right front hidden"
)
_BREAKS = frozenset(_CLOSED.split())
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_WORD_OR_MARK = re.compile(_WORD.pattern + r"|[^\w\s]")
_LEADING = re.compile(r"^(?:an?|the|some|one|two|three|four|five|six|seven|eight|nine|ten)\s+", re.IGNORECASE)


def extract_nouns(record: Record) -> list[str]:
    """The objects of an item's prompt, in order.

    Where the record has `nouns`, those. Else from the model's own analysis: of each concept the longest ending that a
    relation names as one of its terms ("red ceiling fan", "(ceiling fan, red)" → "ceiling fan"), or its last word. Else
    from the prompt alone: its nouns as spaCy tags them, where spaCy and a model of it are installed, or the last word
    of each run of words between articles, prepositions, numbers and the like. Words of place are no objects.
    """
    if record.get("nouns"):
        found = list(record["nouns"])
    else:
        concepts = re.split(r"[,;]", record.get("concepts_and_relations", ""))
        found = [noun for concept in concepts if (noun := _head(concept, _terms(record.get("relation", ""))))]
        if not any(find_spans(noun, record["prompt"]) for noun in found):
            found = _by_spacy(record["prompt"]) or _from_prompt(record["prompt"])
    unique: dict[str, str] = {}
    for noun in found:
        unique.setdefault(noun.casefold(), noun)
    return [noun for key, noun in unique.items() if key not in PLACE_WORDS]


def _terms(relation: str) -> set[str]:
    groups = re.findall(r"\(([^()]*)\)", relation)
    return {_LEADING.sub("", term.strip()).casefold() for group in groups for term in group.split(",")}


def _head(concept: str, terms: set[str]) -> str:
    words: list[str] = _WORD.findall(concept)
    if not words or any(word.casefold() in ("is", "are", "was", "were") for word in words):
        return ""
    for start in range(1 if len(words) > 1 else 0, len(words)):
        if " ".join(words[start:]).casefold() in terms:
            return " ".join(words[start:])
    return words[-1]


@functools.cache
def _spacy() -> Any | None:
    """The small English pipeline; None where spaCy or the pipeline is missing."""
    try:
        import spacy

        return spacy.load("en_core_web_sm", disable=["ner", "lemmatizer"])
    except (ImportError, OSError) as error:
        logger.debug("nouns are found without spaCy: %s", error)
        return None


def _by_spacy(prompt: str) -> list[str]:
    """The nouns of a prompt with those compounded to them ("ceiling fan"), by spaCy's tags."""
    pipeline = _spacy()
    if pipeline is None:
        return []
    found, run = [], ""
    for token in pipeline(prompt):
        if token.pos_ not in ("NOUN", "PROPN"):
            continue
        run = f"{run} {token.text}".strip()
        if token.dep_ != "compound":
            found.append(run)
            run = ""
    return [*found, run] if run else found


def _from_prompt(prompt: str) -> list[str]:
    found, run = [], ""
    for match in _WORD_OR_MARK.finditer(prompt):
        word = match.group()
        if word.casefold() in _BREAKS or not word[0].isalpha():
            found.append(run)
            run = ""
        elif not (run and word.casefold().endswith("ing")):
            run = word
    return [noun for noun in [*found, run] if noun]


_IRREGULAR = (
    ("man", "men"), ("child", "children"), ("person", "people"), ("mouse", "mice"), ("goose", "geese"),
    ("foot", "feet"), ("tooth", "teeth"), ("ox", "oxen"),
)  # fmt: skip


def _forms(noun: str) -> list[str]:
    """The noun and its plural and singular, regular or one of the common irregular ones."""
    low = noun.casefold()
    forms = [low, low + "s", low + "es"]
    if low.endswith("y"):
        forms.append(low[:-1] + "ies")
    if low.endswith("ies"):
        forms.append(low[:-3] + "y")
    if low.endswith("f"):
        forms.append(low[:-1] + "ves")
    if low.endswith("fe"):
        forms.append(low[:-2] + "ves")
    if low.endswith("ves"):
        forms += [low[:-3] + "f", low[:-3] + "fe"]
    if low.endswith("es"):
        forms.append(low[:-2])
    if low.endswith("s") and not low.endswith("ss"):
        forms.append(low[:-1])
    # As endings ("policeman"): a form that is no word of the language is none of the prompt either.
    for one, many in _IRREGULAR:
        forms += [low[: -len(a)] + b for a, b in ((one, many), (many, one)) if low.endswith(a)]
    return sorted((form for form in forms if len(form) > 1 or form == low), key=len, reverse=True)


def find_spans(noun: str, prompt: str) -> list[tuple[int, int]]:
    """Half-open character spans of a noun in the prompt: whole words, any case, singular or plural."""
    if not noun.strip():
        return []
    pattern = "|".join(re.escape(form).replace(r"\ ", r"\s+") for form in _forms(noun.strip()))
    return [match.span() for match in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", prompt, re.IGNORECASE)]


def find_tokens(noun: str, prompt: str, offsets: Sequence[tuple[int, int] | None]) -> list[int]:
    """Indices of the tokens that share a character with one of the noun's spans.

    `offsets` gives per token its characters of the prompt, None for tokens of the chat template.
    """
    spans = find_spans(noun, prompt)
    return [
        i
        for i, token in enumerate(offsets)
        if token is not None and any(token[0] < end and start < token[1] for start, end in spans)
    ]


def tokens_by_substring(pieces: Sequence[str], tokens: Sequence[str]) -> list[int]:
    """The official match, kept for parity: the tokens that hold any token of the noun, so that "car" finds "carpet".

    `pieces` are the texts of the noun's own tokens, in lower case; `tokens` those of the whole sequence.
    """
    parts = [piece.strip().lower() for piece in pieces if piece.strip()]
    return [i for i, token in enumerate(tokens) if any(part in token for part in parts)]


def object_spans(nouns: Sequence[str], prompt: str) -> list[ObjectSpan]:
    """The first span of every noun that the prompt holds."""
    found = [(noun, find_spans(noun, prompt)) for noun in nouns]
    return [{"text": noun, "start": spans[0][0], "end": spans[0][1]} for noun, spans in found if spans]

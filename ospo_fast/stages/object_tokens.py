"""Objects of a prompt: their nouns, their spans in the prompt, and their tokens."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ospo_fast.errors import Failure, attempt
from ospo_fast.models.base import UnifiedModel
from ospo_fast.records import ObjectSpan, Record

logger = logging.getLogger(__name__)

_PLACES = (
    "left right top bottom side row rows column columns front behind range middle center centre corner edge above "
    "below background foreground"
)
PLACE_WORDS = frozenset(_PLACES.split())
# Words that end a noun phrase where only the prompt is known.
_CLOSED_CLASS = (
    "a an the this that these those some its his her their my your our and or but with without of in on at to from by "
    "for into onto off over under above below behind beside near next between against around along inside outside "
    "through across as while is are was were be being has have it they he she there up down out who which each other "
    "one two three four five six seven eight nine ten left right front hidden"
)
_CLOSED_CLASS_WORDS = frozenset(_CLOSED_CLASS.split())
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_WORD_OR_MARK = re.compile(_WORD.pattern + r"|[^\w\s]")
_DETERMINER = re.compile(r"^(?:an?|the|some|one|two|three|four|five|six|seven|eight|nine|ten)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class ObjectTokens:
    """The objects of an item that have tokens in its prompt."""

    nouns: list[str]  # all nouns of the item
    spans: list[ObjectSpan]  # of each object
    columns: list[list[int]]  # of each object: the indices of its tokens in the prompt's ids
    unmatched: dict[str, str]  # nouns without a token, and why


def find_objects(record: Record, model: UnifiedModel, match: str) -> ObjectTokens | Failure:
    """Find the objects of a record's prompt and their tokens.

    Args:
        record: see `extract_nouns`.
        model: its tokenizer decides.
        match: "offsets" aligns tokens by character offsets; "substring" is the official match (`tokens_by_substring`).

    Returns:
        A Failure if the model cannot tokenize the prompt or no object has a token.

    """
    prompt, nouns = record["prompt"], extract_nouns(record)
    if not nouns:
        return Failure("the prompt names no object")
    tokenized = attempt(model.image_prompt_offsets, prompt)
    if isinstance(tokenized, Failure):
        return tokenized
    ids, offsets = tokenized
    found = ObjectTokens(nouns, [], [], {})
    tokens = [model.detokenize([i]) for i in ids.tolist()] if match == "substring" else []
    for noun in nouns:
        spans, reason = find_spans(noun, prompt), Failure("no token of the prompt stands for it")
        if match == "substring":  # which needs no whole word of the prompt
            pieces = attempt(_pieces, noun, model)
            if isinstance(pieces, Failure):
                columns, reason = [], pieces
            else:
                columns = tokens_by_substring(pieces, tokens)
            spans = spans or [span for i in columns if (span := offsets[i]) is not None]
        else:
            columns = find_tokens(noun, prompt, offsets)
            reason = reason if spans else Failure("the prompt does not hold it as a word")
        if columns and spans:
            found.spans.append({"text": noun, "start": spans[0][0], "end": spans[0][1]})
            found.columns.append(columns)
        else:
            found.unmatched[noun] = reason.reason
    if not found.columns:
        return Failure(f"no token of the prompt matches {', '.join(repr(noun) for noun in nouns)}")
    return found


def _pieces(noun: str, model: UnifiedModel) -> list[str]:
    """The texts of a noun's own tokens, in lower case."""
    ids, offsets = model.image_prompt_offsets(noun.lower())
    return [model.detokenize([i]) for i, offset in zip(ids.tolist(), offsets, strict=True) if offset is not None]


def extract_nouns(record: Record) -> list[str]:
    """Return the objects of an item's prompt, in order, without words of place.

    The first of these sources that applies:

    1. `nouns` of the record.
    2. The model's own analysis: of each concept the longest ending that is a term of a relation, or its last word. From
       "red ceiling fan" and "(ceiling fan, red)" comes "ceiling fan".
    3. The nouns that spaCy finds in the prompt, if spaCy and its small English pipeline are installed.
    4. The last word of each run of words between articles, prepositions, numbers and similar words of the prompt.
    """
    if record.get("nouns"):
        found = list(record["nouns"])
    else:
        concepts, terms = record.get("concepts_and_relations", ""), _terms(record.get("relation", ""))
        found = [noun for concept in re.split(r"[,;]", concepts) if (noun := _concept_noun(concept, terms))]
        if not any(find_spans(noun, record["prompt"]) for noun in found):
            found = _nouns_by_spacy(record["prompt"]) or _nouns_by_runs(record["prompt"])
    unique: dict[str, str] = {}
    for noun in found:
        unique.setdefault(noun.casefold(), noun)
    return [noun for key, noun in unique.items() if key not in PLACE_WORDS]


def _terms(relation: str) -> set[str]:
    groups = re.findall(r"\(([^()]*)\)", relation)
    return {_DETERMINER.sub("", term.strip()).casefold() for group in groups for term in group.split(",")}


def _concept_noun(concept: str, terms: set[str]) -> str:
    words: list[str] = _WORD.findall(concept)
    if not words or any(word.casefold() in ("is", "are", "was", "were") for word in words):
        return ""
    endings = (" ".join(words[start:]) for start in range(1 if len(words) > 1 else 0, len(words)))
    return next((ending for ending in endings if ending.casefold() in terms), words[-1])


@functools.cache
def _spacy() -> Any | None:
    """The small English pipeline; None if spaCy or the pipeline is not installed."""
    try:
        import spacy

        return spacy.load("en_core_web_sm", disable=["ner", "lemmatizer"])
    except (ImportError, OSError) as error:
        logger.debug("nouns are found without spaCy: %s", error)
        return None


def _nouns_by_spacy(prompt: str) -> list[str]:
    """The nouns of a prompt, each with those compounded to it ("ceiling fan")."""
    pipeline = _spacy()
    found, run = [], ""
    for token in pipeline(prompt) if pipeline is not None else ():
        if token.pos_ in ("NOUN", "PROPN"):
            run = f"{run} {token.text}".strip()
            if token.dep_ != "compound":
                found.append(run)
                run = ""
    return [*found, run] if run else found


def _nouns_by_runs(prompt: str) -> list[str]:
    found, run = [], ""
    for word in _WORD_OR_MARK.findall(prompt):
        if word.casefold() in _CLOSED_CLASS_WORDS or not word[0].isalpha():
            found.append(run)
            run = ""
        elif not (run and word.casefold().endswith("ing")):
            run = word
    return [noun for noun in [*found, run] if noun]


# (singular, plural) endings. The irregular ones are endings too, as in "policeman": a form that is no word of the
# language does not occur in a prompt either.
_ENDINGS = (
    ("", "s"), ("", "es"), ("y", "ies"), ("f", "ves"), ("fe", "ves"), ("man", "men"), ("child", "children"),
    ("person", "people"), ("mouse", "mice"), ("goose", "geese"), ("foot", "feet"), ("tooth", "teeth"), ("ox", "oxen"),
)  # fmt: skip


def _forms(noun: str) -> list[str]:
    """Return a noun with its possible plurals and singulars, the longest first."""
    noun = noun.casefold()
    forms = {noun}
    for singular, plural in _ENDINGS:
        for old, new in ((singular, plural), (plural, singular)):
            if noun.endswith(old) and not (old == "s" and noun.endswith("ss")):
                forms.add(noun.removesuffix(old) + new)
    return sorted((form for form in forms if len(form) > 1 or form == noun), key=lambda form: (-len(form), form))


def find_spans(noun: str, prompt: str) -> list[tuple[int, int]]:
    """Find the half-open character spans of a noun in the prompt: whole words, any case, singular or plural."""
    if not noun.strip():
        return []
    pattern = "|".join(re.escape(form).replace(r"\ ", r"\s+") for form in _forms(noun.strip()))
    return [match.span() for match in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", prompt, re.IGNORECASE)]


def find_tokens(noun: str, prompt: str, offsets: Sequence[tuple[int, int] | None]) -> list[int]:
    """Find the tokens that share a character with a span of the noun.

    Args:
        noun: see `find_spans`.
        prompt: the prompt.
        offsets: of each token its characters in the prompt; None for tokens of the chat template.

    Returns:
        Indices into `offsets`.

    """
    spans = find_spans(noun, prompt)
    return [
        i
        for i, token in enumerate(offsets)
        if token is not None and any(token[0] < end and start < token[1] for start, end in spans)
    ]


def tokens_by_substring(pieces: Sequence[str], tokens: Sequence[str]) -> list[int]:
    """Find the tokens that contain any token of the noun: the official match, by which "car" finds "carpet".

    Args:
        pieces: the texts of the noun's own tokens, in lower case.
        tokens: the texts of the prompt's tokens.

    Returns:
        Indices into `tokens`.

    """
    parts = [piece.strip().lower() for piece in pieces if piece.strip()]
    return [i for i, token in enumerate(tokens) if any(part in token for part in parts)]

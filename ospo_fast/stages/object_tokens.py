"""Objects of a prompt: their nouns, their spans in the prompt, and their tokens."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ospo_fast.errors import Failure, OspoError, attempt
from ospo_fast.models.base import UnifiedModel
from ospo_fast.records import ObjectSpan, Record
from ospo_fast.stages.prompt_files import check_length, image_prompt_ids

if TYPE_CHECKING:
    from torch import Tensor

_PLACES = (
    "left right top bottom side row rows column columns front behind range middle center centre corner edge above "
    "below background foreground"
)
PLACE_WORDS = frozenset(_PLACES.split())
# The words that the official code leaves out (ospo/attention/extract_object_v2.py).
_EXCEPTIONS = "left right bottom top side row rows column columns front behind range"
_OFFICIAL_EXCEPTIONS = frozenset(_EXCEPTIONS.split())
WITHOUT_VERBS = ("shapes", "shapes-large")  # template sets whose prompts have no verbs
SPACY_MODEL = "en_core_web_sm"  # of the official code
MAX_OBJECTS = 100  # per prompt; with MAX_NOUN it bounds the time that a record can take
MAX_NOUN = 200  # characters
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


# Terms of a relation as a tree of their words, the last word first. The key None marks the first word of a term.
Terms: TypeAlias = "dict[str | None, Terms]"


@dataclass(frozen=True)
class ObjectTokens:
    """A tokenized prompt and its objects."""

    ids: Tensor  # (S,) of the prompt
    nouns: list[str]  # all nouns of the item
    spans: list[ObjectSpan]  # of each object that has tokens
    columns: list[list[int]]  # of each such object: the indices of its tokens in `ids`
    unmatched: dict[str, str]  # nouns without a token, and why


def find_objects(record: Record, model: UnifiedModel, match: str, source: str = "concepts") -> ObjectTokens | Failure:
    """Find the objects of a record's prompt (`extract_nouns`) and their tokens.

    match: "offsets" aligns tokens by character offsets, "substring" is the official match (`tokens_by_substring`).
    """
    nouns = attempt(extract_nouns, record, source, verbs=model.templates not in WITHOUT_VERBS)
    if isinstance(nouns, Failure):
        return nouns
    prompt = record["prompt"]
    if not nouns:
        return Failure("the prompt names no object")
    if len(nouns) > MAX_OBJECTS:
        return Failure(f"the prompt names {len(nouns)} objects, expected at most {MAX_OBJECTS}; shorten it")
    tokenized = attempt(model.image_prompt_offsets, prompt)
    if isinstance(tokenized, Failure):
        return tokenized
    ids, offsets = tokenized
    if (failure := check_length(model, prompt, ids)) is not None:
        return failure
    found = ObjectTokens(ids, nouns, [], [], {})
    tokens = [_without_marks(token) for token in model.tokens(ids)] if match == "substring" else []
    for noun in nouns:
        spans, columns, reason = find_spans(noun, prompt), [], "no token of the prompt stands for it"
        if len(noun) > MAX_NOUN:
            reason = f"it has {len(noun)} characters, expected at most {MAX_NOUN}"
        elif match == "offsets":
            columns = find_tokens(noun, prompt, offsets)
            reason = reason if spans else "the prompt does not hold it as a word"
        else:  # needs no whole word of the prompt, and takes tokens of the chat template, too
            columns = tokens_by_substring(map(_without_marks, model.tokens(noun.lower().strip())), tokens)
            spans = spans or [span for i in columns if (span := offsets[i]) is not None] or [(0, 0)]
        if columns and spans:
            found.spans.append({"text": noun, "start": spans[0][0], "end": spans[0][1]})
            found.columns.append(columns)
        else:
            found.unmatched[noun] = reason
    if not found.columns:
        return Failure(f"no token of the prompt matches {', '.join(repr(noun) for noun in nouns)}")
    return found


def _without_marks(token: str) -> str:
    """Return the text of a token without the marks of tokenizers for spaces and line ends."""
    return token.replace("\u0120", " ").replace("\u010a", "\n").replace("\u2581", " ").strip()


def extract_nouns(record: Record, source: str = "concepts", *, verbs: bool = True) -> list[str]:
    """Return the objects of an item's prompt, in order, without words of place.

    The first of these sources that applies:

    1. `nouns` of the record.
    2. The model's own analysis: of each concept the longest ending that is a term of a relation, or its last word. From
       "red ceiling fan" and "(ceiling fan, red)" comes "ceiling fan".
    3. Where a prompt can have verbs: the heads of its noun phrases by spaCy. Else the last word of each run of words
       between articles, prepositions, numbers and similar words: a run of other prompts can end in a verb.

    With the source "spacy" 2 and 3 are replaced by the official choice: every noun and proper noun that spaCy finds.
    Words of place are then those that the official code leaves out of these.

    Raises:
        OspoError: spaCy or its model is needed and not installed, so that the objects are unknown.

    """
    if record.get("nouns"):
        found = _unique(record["nouns"])
        if source == "spacy":
            return found
    elif source == "spacy":
        words = _parse(record["prompt"])
        return _unique(w.text for w in words if w.pos_ in ("NOUN", "PROPN") and w.text not in _OFFICIAL_EXCEPTIONS)
    else:
        concepts, terms = record.get("concepts_and_relations") or "", _terms(record.get("relation") or "")
        found = _unique(noun for concept in re.split(r"[,;]", concepts) if (noun := _concept_noun(concept, terms)))
        if not any(find_spans(noun, record["prompt"]) for noun in found[:MAX_OBJECTS]):
            chunks = (chunk.root for chunk in _parse(record["prompt"]).noun_chunks) if verbs else ()
            by_phrases = (root.text for root in chunks if root.pos_ in ("NOUN", "PROPN"))
            found = _unique(by_phrases if verbs else _nouns_by_runs(record["prompt"]))
    return [noun for noun in found if noun.casefold() not in PLACE_WORDS]


def check_spacy() -> None:
    """Raise OspoError unless spaCy and its model are installed. Imports neither."""
    if missing := [name for name in ("spacy", SPACY_MODEL) if importlib.util.find_spec(name) is None]:
        raise OspoError(
            f"the objects of the prompt are unknown, since {' and '.join(missing)} are not installed: run `pip install "
            f"'ospo-fast[nouns]'` and `python -m spacy download {SPACY_MODEL}`, or give the record `nouns`"
        )


@functools.cache
def _load_spacy() -> Any:
    check_spacy()
    import spacy

    return spacy.load(SPACY_MODEL)


def _parse(prompt: str) -> Any:
    return _load_spacy()(prompt)


def _unique(nouns: Iterable[str]) -> list[str]:
    unique: dict[str, str] = {}
    for noun in nouns:
        unique.setdefault(noun.casefold(), noun)
    return list(unique.values())


def _terms(relation: str) -> Terms:
    terms: Terms = {}
    for group in re.findall(r"\(([^()]*)\)", relation):
        for term in group.split(","):
            node = terms
            for word in reversed(_DETERMINER.sub("", term.strip()).casefold().split(" ")):
                node = node.setdefault(word, {})
            node[None] = {}
    return terms


def _concept_noun(concept: str, terms: Terms) -> str:
    words: list[str] = _WORD.findall(concept)
    if not words or any(word.casefold() in ("is", "are", "was", "were") for word in words):
        return ""
    first, node = len(words) - 1, terms
    for start in range(len(words) - 1, min(1, len(words) - 1) - 1, -1):
        if (word := words[start].casefold()) not in node:
            break
        node = node[word]
        if None in node:
            first = start
    return " ".join(words[first:])


def _nouns_by_runs(prompt: str) -> list[str]:
    found, run = [], ""
    for word in _WORD_OR_MARK.findall(prompt):
        if word.casefold() in _CLOSED_CLASS_WORDS or not word[0].isalpha():
            found.append(run)
            run = ""
        elif not (run and word.casefold().endswith("ing")):
            run = word
    return [noun for noun in [*found, run] if noun]


# (singular, plural) endings; irregular plurals are matched as endings, too ("policeman"). A form that is not a word
# matches nothing.
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
    """Find the half-open character spans of a noun in the prompt: whole words, any case, singular or plural.

    A noun of more than MAX_NOUN characters has none.
    """
    noun = " ".join(noun.split())  # a pattern with several \\s+ in a row takes exponential time
    if not 0 < len(noun) <= MAX_NOUN:
        return []
    pattern = "|".join(re.escape(form).replace(r"\ ", r"\s+") for form in _forms(noun))
    return [match.span() for match in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", prompt, re.IGNORECASE)]


def find_tokens(noun: str, prompt: str, offsets: Sequence[tuple[int, int] | None]) -> list[int]:
    """Find the indices of the tokens that share a character with a span of the noun.

    offsets: of each token its characters in the prompt; None for tokens of the chat template.
    """
    covered = bytearray(len(prompt))
    for start, end in find_spans(noun, prompt):
        covered[start:end] = b"\1" * (end - start)
    return [i for i, token in enumerate(offsets) if token is not None and any(covered[slice(*token)])]


def tokens_by_substring(pieces: Iterable[str], tokens: Sequence[str]) -> list[int]:
    """Find the indices of the tokens that contain any piece of the noun: the official match (`extract_target_span`).

    By it "car" finds "carpet". The pieces are the tokens of the noun by itself, in lower case and without a space
    before it; the tokens are those of the prompt. Both are without marks for spaces.
    """
    parts = set(filter(None, pieces))
    lengths = sorted(set(map(len, parts)))  # few, however many pieces there are
    return [
        i
        for i, token in enumerate(tokens)
        if any(token[start : start + n] in parts for n in lengths for start in range(len(token) - n + 1))
    ]


def check_prompt(model: UnifiedModel, prompt: str) -> Failure | None:
    """Return why a user's prompt is refused: the model cannot take it, or it names no object. None: it is accepted."""
    if isinstance(ids := image_prompt_ids(model, prompt), Failure):
        return ids
    nouns = extract_nouns({"prompt": prompt}, verbs=False)  # not fewer than it has
    if not nouns:
        return Failure(f"prompt: {prompt[:60]!r} names no object; name what the image should show")
    if len(nouns) > MAX_OBJECTS:
        return Failure(
            f"prompt: {prompt[:60]!r} names {len(nouns)} objects, expected at most {MAX_OBJECTS}; shorten it"
        )
    return None

"""The data of the pair inspector: which items it shows, and what it shows of each."""

from __future__ import annotations

import bisect
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import Failure
from ospo_fast.records import (
    ROLES,
    SIDES,
    ObjectSpan,
    Pair,
    Record,
    image_index,
    image_variants,
    image_verdicts,
    item_name,
)
from ospo_fast.report.load import MAX_ENTRIES, Item, Run, number
from ospo_fast.report.masks import encode_masks
from ospo_fast.stages.object_tokens import find_spans

if TYPE_CHECKING:
    from ospo_fast.report.images import Album
    from ospo_fast.report.masks import Arrays


def reason_group(reason: str) -> str:
    """Replace the numbers in a reason by "…", so that equal reasons are counted together.

    "no base image passed: local score 0.41 below 0.6; local score -0.20 below 0.6" becomes
    "no base image passed: local score … below 0.6".
    """
    head, colon, tail = reason.rpartition(": ")
    parts = (re.sub(r"(?<![\w.])[-+\u2212]?\d+\.\d+", "…", part, count=1) for part in tail.split("; "))
    return head + colon + "; ".join(sorted(set(parts)))


def margin(pair: Pair) -> float | None:
    """Score of the chosen image minus that of the rejected one; None if a score is missing."""
    chosen, rejected = number(pair.get("chosen_score")), number(pair.get("rejected_score"))
    return None if chosen is None or rejected is None else chosen - rejected


def sample(items: list[Item], limit: int) -> list[Item]:
    """Return at most `limit` items in their order, balanced over status and kind, evenly spaced in each group."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[item.status, item.kind].append(index)
    shares = dict.fromkeys(sorted(groups), 0)
    left = min(limit, len(items))
    while left:
        for key in shares:
            if left and shares[key] < len(groups[key]):
                shares[key] += 1
                left -= 1
    sampled = [groups[key][n * len(groups[key]) // share] for key, share in shares.items() for n in range(share)]
    return [items[index] for index in sorted(sampled)]


def describe(item: Item, run: Run, album: Album, masks: Arrays | Failure | None) -> dict[str, Any]:
    """One item as the page's script reads it. `masks`: those of its first pair; None without a pair."""
    record = item.record
    images = _images(item, run, album)
    pairs = record.get("pairs") or []
    first: Pair = pairs[0] if pairs else {}
    names = {verdict.get("path"): name for _, name, verdict in image_verdicts(record)}
    return {
        "id": item.record["item_id"],
        "kind": item.kind,
        "sub": record.get("sub_category") or "",
        "status": item.status,
        "reason": item.reason,
        "group": reason_group(item.reason),
        "prompt": record.get("prompt") or "",
        "concepts": record.get("concepts_and_relations") or "",
        "relation": record.get("relation") or "",
        "pairs": [[names.get(pair[side], pair[side]) for side in SIDES] for pair in pairs],  # type: ignore[literal-required]
        "chosenScore": number(first.get("chosen_score")),
        "rejectedScore": number(first.get("rejected_score")),
        "rejectedPrompt": first.get("rejected_prompt") or "",
        "margin": margin(first),
        "variants": _variants(record, images),
        "questions": record.get("question") or [],
        "images": images,
        "masks": None if masks is None else _masks(record, first, masks),
    }


def _images(item: Item, run: Run, album: Album) -> dict[str, dict[str, Any]]:
    images = {}
    for _, name, verdict in image_verdicts(item.record):
        source = album.add(verdict.get("path"), f"images/{item_name(item.record['item_id'])}/{name}.png")
        images[name] = {
            "source": None if isinstance(source, Failure) else source,
            "failure": str(source) if isinstance(source, Failure) else "",
            "prompt": verdict.get("prompt") or "",
            "score": number(verdict.get("local_score")),
            "kept": verdict.get("kept"),
            "reason": verdict.get("reason") or "",
            "answers": [
                [number(answer.get("p_yes")), number(answer.get("p_no")), answer.get("answer")]
                for answer in verdict.get("answer_metadata") or []
            ],
        }
    return images


def _variants(record: Mapping[str, Any], images: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The hard negatives of an item, each with the prompts and the names of its images."""
    columns: dict[str, list[str | None]] = {
        "method": record.get("perturbed_method") or [],
        "prompt": record.get("negative_prompt") or [],
        "dense": record.get("long_prompt") or [],
        "denseNegative": record.get("negative_long_prompt") or [],
        "reason": record.get("variant_reasons") or [],
    }
    numbers = {name: found.number for (_, name), found in image_variants(record).items()}
    variant = {
        name: image_index(name) if (number := numbers[name]) is None or number >= MAX_ENTRIES else number
        for name in images
    }
    count = max([0, *map(len, columns.values()), *(index + 1 for index in variant.values())])
    variants: list[dict[str, Any]] = []
    for index in range(count):
        own = [name for name in images if variant[name] == index]
        roles = {role: [name for name in own if name.startswith(role)] for role in ROLES}
        texts = {key: values[index] or "" if index < len(values) else "" for key, values in columns.items()}
        for role, key in zip(ROLES, ("dense", "denseNegative"), strict=True):  # the prompts of the generated images
            texts[key] = next((images[name]["prompt"] for name in roles[role]), "") or texts[key]
        variants.append({**texts, **roles})
    return variants


def _masks(record: Record, pair: Pair, masks: Arrays | Failure) -> dict[str, Any]:
    """The masks as the page shows them, or why there are none. `notes`: alarms, and objects without a mask."""
    notes = [f"{noun}: {reason}" for noun, reason in (record.get("unmatched_objects") or {}).items()]
    if isinstance(masks, Failure):
        return {"reason": masks.reason, "notes": notes}
    encoded = encode_masks(masks)
    spans = (record.get("objects") or [])[: len(encoded["chosen"]["maps"])]
    alarms = [f"mask of the {alarm}" for alarm in (pair.get("mask_stats") or {}).get("alarms", [])]
    objects = [span["text"] for span in spans]
    objects += [f"object {index + 1}" for index in range(len(objects), len(encoded["chosen"]["maps"]))]
    words = {
        "prompt": mark_objects(record.get("prompt") or "", spans, own_spans=True),
        "rejectedPrompt": mark_objects(pair.get("rejected_prompt") or "", spans, own_spans=False),
    }
    return {"notes": alarms + notes, "objects": objects, "words": words, **encoded}


def mark_objects(text: str, objects: Sequence[ObjectSpan], *, own_spans: bool) -> list[tuple[str, int | None]]:
    """Split a text into parts, each with the index of the object that it names, or None.

    Args:
        text: a prompt.
        objects: the objects that have maps, in order.
        own_spans: the spans of the objects are places in this text.

    A noun's other places in the text name the object, too, because its map is the mean over all of them. A noun of more
    than one object names none of them outside of their spans.

    """
    nouns = Counter(span["text"] for span in objects)
    places: list[tuple[int, int, int]] = []
    if own_spans:
        places += [(span["start"], span["end"], index) for index, span in enumerate(objects) if _fits(span, text)]
    for index, span in enumerate(objects):
        if nouns[span["text"]] == 1:
            places += [(start, end, index) for start, end in find_spans(span["text"], text)]
    accepted: list[tuple[int, int, int]] = []  # in their order in the text, without overlap
    # The longest first: "fan" within "ceiling fan" is a part of that object's name.
    for start, end, index in sorted(places, key=lambda place: place[0] - place[1]):
        place = bisect.bisect(accepted, (start, end, index))
        before, after = accepted[max(0, place - 1) : place], accepted[place : place + 1]
        if all(other[1] <= start for other in before) and all(end <= other[0] for other in after):
            accepted.insert(place, (start, end, index))
    parts: list[tuple[str, int | None]] = []
    done = 0
    for start, end, index in accepted:
        parts += [(text[done:start], None), (text[start:end], index)]
        done = end
    return [part for part in (*parts, (text[done:], None)) if part[0]]


def _fits(span: ObjectSpan, text: str) -> bool:
    start, end = span.get("start"), span.get("end")
    return isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)

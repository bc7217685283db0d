"""What the pair inspector shows of each item, and which items it shows where there are too many for one page."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ospo_fast.report.load import entries, kind_of, mapping, number, text
from ospo_fast.report.masks import drawable

if TYPE_CHECKING:
    from ospo_fast.report.images import Album
    from ospo_fast.report.load import Record, Run

KEPT, DROPPED, UNFINISHED = "kept", "dropped", "unfinished"


def status_of(record: Record, reached: str) -> str:
    """kept: the item gave a pair; dropped: selection took none; unfinished: it never came as far as selection."""
    if record.get("chosen") and record.get("rejected") and record.get("kept") is not False:
        return KEPT
    if record.get("kept") is False or reached in {"select", "masks"}:
        return DROPPED
    return UNFINISHED


def reason_of(record: Record, reached: str) -> str:
    """Why an item has no pair; empty for a kept one."""
    status = status_of(record, reached)
    if status == KEPT:
        return ""
    given = text(record.get("reason"))
    if status == UNFINISHED and not given:
        return f"came as far as the {reached} stage"
    return given or "no reason recorded"


def general(reason: str) -> str:
    """A reason without the figure of the single case, so that equal reasons can be counted together.

    "no base image passed: local score 0.41 below 0.6; local score -0.20 below 0.6" becomes
    "no base image passed: local score … below 0.6".
    """
    head, colon, tail = reason.rpartition(": ")
    parts = (re.sub(r"(?<![\w.])[-+\u2212]?\d+\.\d+", "…", part, count=1) for part in tail.split("; "))
    return head + colon + "; ".join(sorted(set(parts)))


def margin_of(record: Record) -> float | None:
    """Score of the chosen image less that of the rejected one; None where there is no pair."""
    chosen, rejected = number(record.get("chosen_score")), number(record.get("rejected_score"))
    return None if chosen is None or rejected is None else chosen - rejected


def sample(run: Run, limit: int) -> list[Record]:
    """At most `limit` items, balanced over status and kind, spread evenly over each group, in the run's order."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, record in enumerate(run.items):
        groups[status_of(record, run.reached[str(record["item_id"])]), kind_of(record)].append(index)
    shares = dict.fromkeys(sorted(groups), 0)
    left = min(limit, len(run.items))
    while left:
        for key in shares:
            if left and shares[key] < len(groups[key]):
                shares[key] += 1
                left -= 1
    taken: list[int] = []
    for key, share in shares.items():
        members = groups[key]
        taken += [members[position * len(members) // share] for position in range(share)]
    return [run.items[index] for index in sorted(taken)]


def describe(record: Record, run: Run, album: Album, masks: dict[str, Any] | str) -> dict[str, Any]:
    """One item as the page's script reads it; `masks` as load_masks gives them. Absent fields are empty or None."""
    item_id = str(record["item_id"])
    reached = run.reached[item_id]
    images = _images(record, run, album)
    questions = [text(question) for question in entries(record.get("question"))]
    return {
        "id": item_id,
        "kind": kind_of(record),
        "sub": text(record.get("sub_category")),
        "status": status_of(record, reached),
        "reason": reason_of(record, reached),
        "group": general(reason_of(record, reached)),
        "prompt": text(record.get("prompt")),
        "concepts": text(record.get("concepts_and_relations")),
        "relation": text(record.get("relation")),
        "chosen": image_key(record.get("chosen"), "base"),
        "rejected": image_key(record.get("rejected"), "negative"),
        "chosenScore": number(record.get("chosen_score")),
        "rejectedScore": number(record.get("rejected_score")),
        "rejectedPrompt": text(record.get("rejected_prompt")),
        "further": [
            [image_key(pair.get("chosen"), "base"), image_key(pair.get("rejected"), "negative")]
            for pair in entries(record.get("further_pairs"))
            if isinstance(pair, dict)
        ],
        "margin": margin_of(record),
        "variants": _variants(record, images),
        "questions": questions,
        "images": images,
        "masks": _masks(record, masks) if status_of(record, reached) == KEPT else None,
    }


def image_key(value: object, side: str) -> str | None:
    """The metadata key ("base_1") of a chosen or rejected image, which a record names by path, file name or index."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return f"{side}_{value}"
    found = re.findall(r"(?:base|negative)_\d+", str(value))
    return found[-1] if found else None


def _images(record: Record, run: Run, album: Album) -> dict[str, dict[str, Any]]:
    images = {}
    for side in ("base", "negative"):
        metadata = record.get(f"{side}_metadata")
        for key, entry in sorted(metadata.items(), key=_in_order) if isinstance(metadata, dict) else ():
            if not isinstance(entry, dict):
                continue
            source = album.add(entry.get("path"), run.root / "images" / str(record["item_id"]) / f"{key}.png")
            answers = [answer if isinstance(answer, dict) else {} for answer in entries(entry.get("answer_metadata"))]
            images[str(key)] = {
                "source": source if isinstance(source, int) else None,
                "fault": source if isinstance(source, str) else "",
                "prompt": text(entry.get("prompt")),
                "score": number(entry.get("local_score")),
                "kept": entry.get("kept") if isinstance(entry.get("kept"), bool) else None,
                "reason": text(entry.get("reason")),
                "answers": [
                    [number(answer.get("p_yes")), number(answer.get("p_no")), text(answer.get("answer"))]
                    for answer in answers
                ],
            }
    return images


def _in_order(entry: tuple[str, Any]) -> tuple[int, str]:
    return len(entry[0]), entry[0]


def _variants(record: Record, images: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each variant with the names of its images: the first pair of them, and further base images, which count on."""
    columns = {
        "method": entries(record.get("perturbed_method")),
        "prompt": entries(record.get("negative_prompt")),
        "dense": entries(record.get("long_prompt")),
        "denseNegative": entries(record.get("negative_long_prompt")),
        "reason": entries(record.get("variant_reasons")),
    }
    numbers: dict[str, int] = dict.fromkeys(("base", "negative"), -1)
    for key in images:
        side, _, number = key.rpartition("_")
        if side in numbers and number.isdigit():
            numbers[side] = max(numbers[side], int(number))
    last = max(numbers.values())
    count = max(*map(len, columns.values()), numbers["negative"] + 1) or last + 1
    variants: list[dict[str, Any]] = [
        {name: text(values[index]) if index < len(values) else "" for name, values in columns.items()}
        for index in range(count)
    ]
    for index, variant in enumerate(variants):
        variant["dense"] = images.get(f"base_{index}", {}).get("prompt") or variant["dense"]
        variant["denseNegative"] = images.get(f"negative_{index}", {}).get("prompt") or variant["denseNegative"]
        again = (f"base_{further}" for further in range(index + count, last + 1, count))
        variant["again"] = [key for key in again if key in images]
    return variants


def _masks(record: Record, masks: dict[str, Any] | str) -> dict[str, Any]:
    """The masks as the page draws them, or why there are none; `notes`: alarms, and objects without a mask."""
    alarms = [text(alarm) for alarm in entries(mapping(record.get("mask_stats")).get("alarms"))]
    lost = [f"{noun}: {text(why)}" for noun, why in mapping(record.get("unmatched_objects")).items()]
    if isinstance(masks, str):
        return {"reason": masks, "notes": lost}
    names = [text(entry.get("text") if isinstance(entry, dict) else entry) for entry in entries(record.get("objects"))]
    drawn = drawable(masks)
    count = len(drawn["chosen"]["maps"])
    objects = (names + [f"object {index + 1}" for index in range(len(names), count)])[:count]
    return {"notes": [*(f"mask of the {alarm}" for alarm in alarms), *lost], "objects": objects, **drawn}

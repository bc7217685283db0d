"""Stage 5, second part: where the objects of a prompt lie in the chosen and in the rejected image.

The base prompt and an image's codes go through the decoder once; the attention that the image's tokens pay to an
object's tokens is its map, Otsu's threshold makes it a mask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ospo_fast.config import Config, MasksConfig
from ospo_fast.errors import OspoError
from ospo_fast.records import ObjectSpan, Record, write_atomic
from ospo_fast.stages.common import chunked, image_codes, locate
from ospo_fast.stages.forward import hidden_states, teacher_forced
from ospo_fast.stages.objects import nouns_of, object_spans, tokens_by_substring, tokens_of

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel
    from ospo_fast.ops import ObjectMasks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """The objects of one item and the columns of their tokens."""

    nouns: list[str]
    objects: list[ObjectSpan]
    columns: list[list[int]]


def find_objects(record: Record, model: UnifiedModel, match: str) -> Target | str:
    """The objects of a record's base prompt and their tokens, or why there is none."""
    nouns = nouns_of(record)
    if not nouns:
        return "the prompt names no object"
    spans = object_spans(nouns, record["prompt"])
    ids, offsets = model.image_prompt_offsets(record["prompt"])
    columns = []
    for span in spans:
        if match == "substring":
            noun_ids, noun_offsets = model.image_prompt_offsets(span["text"].lower())
            own = [i for i, offset in zip(noun_ids.tolist(), noun_offsets, strict=True) if offset is not None]
            pieces = [model.detokenize([i]) for i in own]
            columns.append(tokens_by_substring(pieces, [model.detokenize([i]) for i in ids.tolist()]))
        else:
            columns.append(tokens_of(span["text"], record["prompt"], offsets))
    found = [n for n, tokens in enumerate(columns) if tokens]
    if not found:
        return f"no token of the prompt matches {', '.join(repr(noun) for noun in nouns)}"
    return Target(nouns, [spans[n] for n in found], [columns[n] for n in found])


@torch.no_grad()
def attention_masks(
    model: UnifiedModel,
    prompts: Sequence[str],
    codes: Tensor,
    columns: Sequence[Sequence[Sequence[int]]],
    settings: MasksConfig,
) -> ObjectMasks:
    """Maps and masks of the objects of N images, one forward pass; codes (N, T), columns per image and object.

    Images with fewer objects than the others have empty masks in the places that are left.
    """
    from ospo_fast.models.capture import AttentionCapture
    from ospo_fast.ops import object_masks

    batch = teacher_forced(model, [model.image_prompt(prompt) for prompt in prompts], codes)
    most = max(len(item) for item in columns)
    valid = torch.tensor([[o < len(item) for o in range(most)] for item in columns], device=model.device)
    capture = AttentionCapture(
        model,
        columns=columns,
        rows=(batch.lengths, codes.shape[1]),
        layers=settings.layers,
        skip=settings.skip_layers,
        stop_early=True,
    )
    with capture:
        hidden_states(model, batch.embeds)
    return object_masks(capture.maps, valid=valid, scaler=settings.scaler)


def run(records: Iterable[Record], model: UnifiedModel, config: Config, *, out: Path | None = None) -> Iterator[Record]:
    """Every record with `objects` and `mask_path`, or with `mask` null and a `mask_reason`.

    The file holds, for chosen and rejected: `*_maps` (O, H, W) f32 in [0, 1], `*_thresholds` (O,) f32, `*_masks`
    (O, H, W) u8, `*_union` (H, W) u8.

    Raises:
        OspoError: no run folder was given, or it cannot be written.

    """
    if out is None:
        raise OspoError("masks: got no run folder; give `out`, where the masks go.")
    settings = config.masks
    for chunk in chunked(records, settings.batch_size):
        found: dict[str, Target] = {}
        reasons: dict[str, str] = {}
        for record in chunk:
            if not record.get("kept", "chosen" in record):
                reasons[record["item_id"]] = "the item has no pair"
                continue
            target = find_objects(record, model, settings.match)
            if isinstance(target, str):
                reasons[record["item_id"]] = target
                log.info("%s: no mask: %s", record["item_id"], target)
            else:
                found[record["item_id"]] = target
        pairs = [record for record in chunk if record["item_id"] in found]
        paths = _write(pairs, found, model, settings, out) if pairs else {}
        for record in chunk:
            item = record["item_id"]
            if item in found:
                yield {**record, "nouns": found[item].nouns, "objects": found[item].objects, "mask_path": paths[item]}
            else:
                yield {**record, "mask": None, "mask_reason": reasons[item]}


def _write(
    pairs: list[Record], found: dict[str, Target], model: UnifiedModel, settings: MasksConfig, out: Path
) -> dict[str, str]:
    from safetensors.torch import save

    sides = ("chosen", "rejected")
    images = [locate(record[side], out) for side in sides for record in pairs]  # type: ignore[literal-required]
    columns = [found[record["item_id"]].columns for record in pairs] * 2
    prompts = [record["prompt"] for record in pairs] * 2
    result = attention_masks(model, prompts, image_codes(model, images), columns, settings)
    paths = {}
    for n, record in enumerate(pairs):
        objects = len(columns[n])
        tensors = {}
        for side, row in zip(sides, (n, n + len(pairs)), strict=True):
            tensors[f"{side}_maps"] = result.maps[row, :objects].float()
            tensors[f"{side}_thresholds"] = result.thresholds[row, :objects].float()
            tensors[f"{side}_masks"] = result.masks[row, :objects]
            tensors[f"{side}_union"] = result.union[row]
        path = f"masks/{record['item_id']}.safetensors"
        write_atomic(out / path, save({name: value.cpu().contiguous() for name, value in tensors.items()}))
        paths[record["item_id"]] = path
    return paths


def load_unions(record: Record, out: Path | None) -> Tensor:
    """The union masks (2, H, W) float of the chosen and the rejected image; OspoError when the file is unreadable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = locate(record["mask_path"], out)
    try:
        tensors = load_file(path)
        return torch.stack([tensors["chosen_union"], tensors["rejected_union"]]).float()
    except (OSError, SafetensorError, KeyError) as error:
        raise OspoError(f"Cannot read the masks {path}: {error}.") from error

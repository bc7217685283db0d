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
from ospo_fast.stages.common import chunked, locate, pair_codes, undrawable
from ospo_fast.stages.forward import hidden_states, teacher_forced
from ospo_fast.stages.objects import nouns_of, object_spans, tokens_by_substring, tokens_of

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel
    from ospo_fast.ops import ObjectMasks

log = logging.getLogger(__name__)

NO_PAIR = "the item has no pair"


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

    An item fails alone: one whose prompt is too long for the model or names no object, or whose images cannot be read.
    The file holds, for chosen and rejected: `*_maps` (O, H, W) f32 in [0, 1], `*_thresholds` (O,) f32, `*_masks`
    (O, H, W) u8, `*_union` (H, W) u8.

    Raises:
        OspoError: no run folder was given, or it cannot be written.

    """
    if out is None:
        raise OspoError("masks: got no run folder; give `out`, where the masks go.")
    settings = config.masks
    for chunk in chunked(records, settings.batch_size):
        targets = [_target(record, model, settings.match) for record in chunk]
        named = [n for n, target in enumerate(targets) if isinstance(target, Target)]
        codes = dict(zip(named, pair_codes(model, [chunk[n] for n in named], out), strict=True))
        tasks = [
            _Task(record["item_id"], record["prompt"], target, pair)
            for n, (record, target) in enumerate(zip(chunk, targets, strict=True))
            if isinstance(target, Target) and isinstance(pair := codes[n], Tensor)
        ]
        paths = _write(tasks, model, settings, out) if tasks else {}
        for n, (record, target) in enumerate(zip(chunk, targets, strict=True)):
            if isinstance(target, Target) and (path := paths.get(record["item_id"])) is not None:
                yield {**record, "nouns": target.nouns, "objects": target.objects, "mask_path": path}
            else:
                reason = target if isinstance(target, str) else str(codes[n])
                if reason != NO_PAIR:
                    log.info("%s: no mask: %s", record["item_id"], reason)
                yield {**record, "mask": None, "mask_reason": reason}


@dataclass(frozen=True)
class _Task:
    item_id: str
    prompt: str
    target: Target
    codes: Tensor  # (2, T): chosen, rejected


def _target(record: Record, model: UnifiedModel, match: str) -> Target | str:
    if not record.get("kept", "chosen" in record):
        return NO_PAIR
    return undrawable(model, record["prompt"]) or find_objects(record, model, match)


def _write(tasks: list[_Task], model: UnifiedModel, settings: MasksConfig, out: Path) -> dict[str, str]:
    from safetensors.torch import save

    columns = [task.target.columns for task in tasks] * 2
    codes = torch.stack([task.codes for task in tasks], dim=1).flatten(0, 1)
    result = attention_masks(model, [task.prompt for task in tasks] * 2, codes, columns, settings)
    paths = {}
    for n, task in enumerate(tasks):
        objects = len(columns[n])
        tensors = {}
        for side, row in (("chosen", n), ("rejected", n + len(tasks))):
            tensors[f"{side}_maps"] = result.maps[row, :objects].float()
            tensors[f"{side}_thresholds"] = result.thresholds[row, :objects].float()
            tensors[f"{side}_masks"] = result.masks[row, :objects]
            tensors[f"{side}_union"] = result.union[row]
        path = f"masks/{task.item_id}.safetensors"
        write_atomic(out / path, save({name: value.cpu().contiguous() for name, value in tensors.items()}))
        paths[task.item_id] = path
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

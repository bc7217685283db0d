"""Stage 5, second part: where the objects of a prompt lie in the chosen and in the rejected image.

The base prompt and an image's codes go through the decoder once, up to the last layer that counts; the attention that
the image's tokens pay to an object's tokens is its map, Otsu's threshold makes it a mask.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ospo_fast.config import Config, MasksConfig
from ospo_fast.errors import Failure, OspoError, UsageError
from ospo_fast.ops._transfer import to_device_packed
from ospo_fast.records import FurtherPair, ObjectSpan, Record, iter_pairs, locked, write_atomic, write_json
from ospo_fast.stages import StageContext
from ospo_fast.stages.common import chunked, locate, pair_codes, prompt_error
from ospo_fast.stages.mask_stats import SIDES, item_stats, map_entropy
from ospo_fast.stages.object_tokens import extract_nouns, find_tokens, object_spans, tokens_by_substring
from ospo_fast.stages.teacher_forcing import Batch, hidden_states, teacher_forced

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel
    from ospo_fast.models.capture import AttentionCapture
    from ospo_fast.ops import ObjectMasks

logger = logging.getLogger(__name__)

NO_PAIR = "the item has no pair"
Columns = Sequence[Sequence[Sequence[int]]]  # of each image, of each object: the positions of its tokens
AUTO_PAIRS = 64  # spread over all, that the layer is chosen on
_CHOSEN_BY = ("choose", "heads", "rows", "reduce", "match")  # settings that the choice hangs on
WINDOW = 8  # batches whose items are sorted by length, so that a batch has little padding


@dataclass(frozen=True)
class Target:
    """The objects of one item, the columns of their tokens, and the nouns that have none, with the reason."""

    nouns: list[str]
    objects: list[ObjectSpan]
    columns: list[list[int]]
    unmatched: dict[str, str]


def find_objects(record: Record, model: UnifiedModel, match: str) -> Target | str:
    """The objects of a record's base prompt and their tokens, or why there is none."""
    nouns = extract_nouns(record)
    if not nouns:
        return "the prompt names no object"
    prompt = record["prompt"]
    try:
        ids, offsets = model.image_prompt_offsets(prompt)
    except UsageError as error:  # a prompt that this model cannot draw
        return str(error)
    tokens = [model.detokenize([i]) for i in ids.tolist()] if match == "substring" else []
    unmatched, spans, columns = {}, [], []
    for noun in nouns:
        own, reason = object_spans([noun], prompt), "no token of the prompt stands for it"
        if match == "substring":  # needs no whole word
            try:
                found = tokens_by_substring(_pieces(noun, model), tokens)
            except UsageError as error:
                found, reason = [], str(error)
            places = [place for i in found if (place := offsets[i]) is not None]
            own = own or [{"text": noun, "start": start, "end": end} for start, end in places[:1]]
        else:
            found = find_tokens(noun, prompt, offsets)
            reason = reason if own else "the prompt does not hold it as a word"
        if found and own:
            spans += own
            columns.append(found)
        else:
            unmatched[noun] = reason
    if not columns:
        return f"no token of the prompt matches {', '.join(repr(noun) for noun in nouns)}"
    return Target(nouns, spans, columns, unmatched)


def _pieces(noun: str, model: UnifiedModel) -> list[str]:
    """The texts of a noun's own tokens, in lower case."""
    ids, offsets = model.image_prompt_offsets(noun.lower())
    return [model.detokenize([i]) for i, offset in zip(ids.tolist(), offsets, strict=True) if offset is not None]


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of N images with at most O objects each, and how they came about."""

    found: ObjectMasks  # (N, O, …)
    soft: Tensor | None  # (N, H, W) soft unions, where the settings ask for them
    entropies: Tensor  # (L, N, O) of the attention of each layer
    layers: tuple[int, ...]  # the L layers
    picked: Tensor | None  # (N, O) indices into `layers`, where one is chosen for each object
    scores: Tensor | None  # (L, N, O) by which it was chosen
    finite: Tensor  # (N,) bool: False where the attention holds NaN or infinity, and the masks are empty

    @property
    def weights(self) -> Tensor:
        """(N, H, W): what the loss weights tokens by."""
        return self.found.union if self.soft is None else self.soft

    def cpu(self) -> Masks:
        """The same on the CPU."""
        found = dataclasses.replace(self.found, **_on_cpu(self.found))
        return dataclasses.replace(self, found=found, **_on_cpu(self))


def _on_cpu(figures: object) -> dict[str, Any]:
    return {name: value.cpu() for name, value in vars(figures).items() if isinstance(value, Tensor)}


def mask_capture(
    model: UnifiedModel,
    columns: Columns,
    lengths: Tensor,
    tokens: int,
    settings: MasksConfig,
    *,
    stop_early: bool,
) -> AttentionCapture:
    """The capture that `compute_masks` reads: prompts of `lengths` (N,), on the CPU, each followed by the tokens of an
    image.

    Where the layers are "auto", not found yet, all are captured; with `heads` "auto" their heads are kept apart.
    """
    from ospo_fast.models.capture import AttentionCapture

    if settings.choose is not None:  # every token by itself
        width = _widths(columns)[1]
        columns = [[[c] for o in item for c in [*o, *[-1] * (width - len(o))]] for item in columns]
    starts = lengths - int(settings.rows == "predicting")
    capture_type = AttentionCapture
    if settings.heads == "auto":
        from ospo_fast.experimental.head_capture import HeadCapture

        capture_type = HeadCapture
    return capture_type(
        model,
        columns=columns,
        rows=(starts, tokens),
        layers=None if settings.layers == "auto" else settings.layers,
        skip=0 if settings.layers == "auto" else settings.skip_layers,
        heads=None if settings.heads == "auto" else settings.heads,
        stop_early=stop_early,
    )


def compute_masks(
    capture: AttentionCapture, columns: Columns, settings: MasksConfig, features: Tensor | None = None
) -> Masks:
    """The masks that a finished capture gives. Where an image has fewer objects than others, they are empty.

    features (N, T, E): what the tokens of the images show; read where `choose` is "contrast".
    """
    from ospo_fast.ops import object_masks
    from ospo_fast.ops.layer_choice import choose_layers
    from ospo_fast.ops.object_masks import soft_masks

    layer_maps, picked, scores = capture.layer_maps, None, None
    if settings.heads == "auto":  # each head as if a layer of its own
        layer_maps = capture.head_maps.flatten(0, 1)  # type: ignore[attr-defined]
    L, N, _, H, W = layer_maps.shape
    most, width = _widths(columns)
    table = torch.tensor([[len(o) for o in item] + [0] * (most - len(item)) for item in columns])
    [sizes] = to_device_packed([table.view(N, most)], layer_maps.device)
    finite = layer_maps.isfinite().movedim(1, 0).flatten(1).all(1)
    layer_maps = torch.where(finite.view(1, N, 1, 1, 1), layer_maps, 0)
    if settings.choose is None:
        maps = layer_maps.mean(0)
    else:
        by_token = layer_maps.view(L, N, most, width, H, W)
        used = torch.arange(width, device=sizes.device) < sizes[..., None]
        shown = features.view(N, H, W, -1) if features is not None and settings.choose == "contrast" else None
        choice = choose_layers(by_token, used, rule=settings.choose, reduce=settings.reduce, features=shown)
        maps, picked, scores = choice.maps, choice.layers, choice.scores
        layer_maps = by_token.sum(3) / sizes.clamp(min=1)[..., None, None]
    found = object_masks(maps, valid=(sizes > 0) & finite[:, None], scaler=settings.scaler)
    soft = None
    if settings.soft:
        cells = soft_masks(found, scaler=settings.scaler) * (sizes > 0)[..., None, None]
        soft = cells.amax(1) if most else cells.sum(1)
    return Masks(found, soft, map_entropy(layer_maps), capture.layers, picked, scores, finite)


def _widths(columns: Columns) -> tuple[int, int]:
    """The most objects of an image, and the most tokens of an object."""
    return max((len(item) for item in columns), default=0), max((len(o) for item in columns for o in item), default=0)


@torch.no_grad()
def attention_masks(
    model: UnifiedModel, prompts: Sequence[str], codes: Tensor, columns: Columns, settings: MasksConfig
) -> Masks:
    """Maps and masks of the objects of N images, one forward pass; codes (N, T), columns per image and object."""
    batch = teacher_forced(model, [model.image_prompt(prompt) for prompt in prompts], codes)
    with mask_capture(model, columns, batch.lengths, codes.shape[1], settings, stop_early=True) as capture:
        hidden_states(model, batch.embeds)
    return compute_masks(capture, columns, settings, code_embeddings(batch, codes.shape[1], settings))


def code_embeddings(batch: Batch, tokens: int, settings: MasksConfig) -> Tensor | None:
    """The embeddings (N, T, D) of the images' codes, where layers are chosen by them."""
    if settings.choose != "contrast":
        return None
    [index] = to_device_packed([batch.lengths[:, None] + torch.arange(tokens)], batch.embeds.device)
    return batch.embeds.detach().gather(1, index[..., None].expand(-1, -1, batch.embeds.shape[2])).float()


def resolve_auto_layers(
    settings: MasksConfig, records: Iterable[Record], model: UnifiedModel, out: Path | None
) -> MasksConfig:
    """The settings with what was found in place of "auto": on some pairs, once for a run folder and its settings.

    `out`/masks/layers.json keeps it, with the mean score of every layer, or of every head as "layer.head".
    Raises OspoError without a run folder, without a pair that has an object, and where the file is broken.
    """
    if settings.layers != "auto":
        return settings
    if out is None:
        raise OspoError("masks.layers=auto: got no run folder; give `out`, where the choice is kept.")
    path, asked = out / "masks" / "layers.json", {name: getattr(settings, name) for name in _CHOSEN_BY}
    with locked(out / ".lock"):
        try:
            kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if kept.get("asked") != asked:
                kept = {"asked": asked, **_choose_for_all(settings, records, model, out)}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, kept)
            layers = [int(layer) for layer in kept["layers"]]
            heads = settings.heads
            if heads == "auto":
                heads = [int(head) for head in kept["heads"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OspoError(f"Cannot read {path}: {error}; remove it to have the layer chosen again.") from error
    logger.info("masks: layers %s%s", layers, "" if heads is None else f", heads {heads}")
    return dataclasses.replace(settings, layers=layers, heads=heads, choose=None)


def _spread(records: list[Record], most: int) -> Iterator[Record]:
    """All records, first `most` or more from all over: a store has its kinds of prompts one after the other."""
    step = max(len(records) // most, 1)
    for first in range(step):
        yield from records[first::step]


def _choose_for_all(
    settings: MasksConfig, records: Iterable[Record], model: UnifiedModel, out: Path
) -> dict[str, object]:
    from ospo_fast.ops.layer_choice import best_layers

    decoder: Any = model.decoder
    everything = list(range(len(decoder.layers)))
    heads = int(decoder.config.num_attention_heads) if settings.heads == "auto" else 1
    names = [
        f"{layer}.{head}" if settings.heads == "auto" else str(layer) for layer in everything for head in range(heads)
    ]
    rule = settings.choose or "contrast"
    every = dataclasses.replace(settings, choose=rule, soft=False)
    pairs = ((record, _target(record, model, settings.match)) for record in _spread(list(records), AUTO_PAIRS))
    named = islice(((record, target) for record, target in pairs if isinstance(target, Target)), AUTO_PAIRS)
    scores: list[Tensor] = []
    for part in chunked(named, settings.batch_size):
        codes = pair_codes(model, [record for record, _ in part], out)
        fine = [(*task, pair) for task, pair in zip(part, codes, strict=True) if isinstance(pair, Tensor)]
        if fine:
            prompts = [record["prompt"] for record, *_ in fine for _ in SIDES]
            columns = [target.columns for _, target, _ in fine for _ in SIDES]
            result = attention_masks(model, prompts, torch.cat([pair for *_, pair in fine]), columns, every).cpu()
            assert result.scores is not None
            sizes = torch.tensor([len(item) for item in columns])
            there = (torch.arange(result.scores.shape[2]) < sizes[:, None]) & result.finite[:, None]
            scores.append(result.scores[:, there])
    found = torch.cat(scores, dim=1) if scores else torch.zeros(len(names), 0)
    if not found.shape[1]:
        raise OspoError("masks.layers=auto: no pair with an object to choose by; name the layers, as in [10,12].")
    mean = {name: round(float(value), 6) for name, value in zip(names, found.double().mean(1), strict=True)}
    [best] = best_layers(found[..., None], torch.ones(found.shape[1], 1, dtype=torch.bool), rule=rule)
    choice = {"layers": [best // heads]} | ({"heads": [best % heads]} if settings.heads == "auto" else {})
    return {**choice, "rule": rule, "scores": mean, "objects": found.shape[1]}


def run(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Every record with `objects`, `mask_path` and `mask_stats`, or with `mask` null and a `mask_reason`.

    An item fails alone: one whose prompt is too long for the model or names no object, or whose images cannot be read.
    The file holds, for chosen and rejected: `*_maps` (O, H, W) f32 in [0, 1], `*_thresholds` (O,) f32, `*_masks`
    (O, H, W) u8, `*_union` (H, W) u8 and, with `masks.soft`, `*_soft` (H, W) f32. Nouns without a token are in
    `unmatched_objects`, with the reason. The entries of `further_pairs` get a `mask_path` or a `mask_reason` likewise.

    Raises:
        OspoError: no run folder was given, or it cannot be written.

    """
    if out is None:
        raise OspoError("masks: got no run folder; give `out`, where the masks go.")
    settings = config.masks
    if settings.official is not None:
        yield from import_official(records, Path(settings.official), out)
        return
    if settings.layers == "auto":
        records = list(records)
        settings = resolve_auto_layers(settings, iter_pairs(records), model, out)
    yield from _items(_masked(iter_pairs(records), model, settings, out))


def _items(masked: Iterator[Record]) -> Iterator[Record]:
    """The items again, from their records of `iter_pairs`: what was found of a further pair goes into its entry."""
    for record in masked:
        if record.get("further_pairs"):
            record["further_pairs"] = [_with_mask(pair, next(masked)) for pair in record["further_pairs"]]
        yield record


def _with_mask(pair: FurtherPair, record: Record) -> FurtherPair:
    if "mask_path" in record:
        return {**pair, "mask_path": record["mask_path"], "mask_stats": record["mask_stats"]}
    return {**pair, "mask_reason": record["mask_reason"]}


def _masked(records: Iterable[Record], model: UnifiedModel, settings: MasksConfig, out: Path) -> Iterator[Record]:
    for window in chunked(records, settings.batch_size * WINDOW):
        targets = [_target(record, model, settings.match) for record in window]
        named = [n for n, target in enumerate(targets) if isinstance(target, Target)]
        codes = dict(zip(named, pair_codes(model, [window[n] for n in named], out), strict=True))
        tasks = [
            _Task(record, target, pair)
            for n, (record, target) in enumerate(zip(window, targets, strict=True))
            if isinstance(target, Target) and isinstance(pair := codes[n], Tensor)
        ]
        tasks.sort(key=lambda task: len(model.image_prompt(task.record["prompt"])))
        results: dict[str, Record] = {}
        for batch in chunked(tasks, settings.batch_size):
            results |= _write(batch, model, settings, out)
        for n, (record, target) in enumerate(zip(window, targets, strict=True)):
            if record["item_id"] in results:
                yield results[record["item_id"]]
            else:
                reason = target if isinstance(target, str) else str(codes[n])
                if reason != NO_PAIR:
                    logger.info("%s: no mask: %s", record["item_id"], reason)
                yield {**record, "mask": None, "mask_reason": reason}


@dataclass(frozen=True)
class _Task:
    record: Record
    target: Target
    codes: Tensor  # (2, T): chosen, rejected


def _target(record: Record, model: UnifiedModel, match: str) -> Target | str:
    if not record.get("kept", "chosen" in record):
        return NO_PAIR
    return prompt_error(model, record["prompt"]) or find_objects(record, model, match)


def _write(tasks: list[_Task], model: UnifiedModel, settings: MasksConfig, out: Path) -> dict[str, Record]:
    from safetensors.torch import save

    columns = [task.target.columns for task in tasks] * 2
    prompts = [task.record["prompt"] for task in tasks] * 2
    codes = torch.stack([task.codes for task in tasks], dim=1).flatten(0, 1)
    result = attention_masks(model, prompts, codes, columns, settings).cpu()
    entropies, masks = result.entropies, result.found
    results: dict[str, Record] = {}
    for n, task in enumerate(tasks):
        record, target, both = task.record, task.target, [n, n + len(tasks)]
        item, objects = record["item_id"], len(target.columns)
        if not bool(result.finite[both].all()):
            reason = "the attention of the model holds NaN or infinity"
            results[item] = {**record, "mask": None, "mask_reason": reason}
            continue
        tensors = {}
        for side, row in zip(SIDES, both, strict=True):
            tensors[f"{side}_maps"] = masks.maps[row, :objects].float()
            tensors[f"{side}_thresholds"] = masks.thresholds[row, :objects].float()
            tensors[f"{side}_masks"] = masks.masks[row, :objects]
            tensors[f"{side}_union"] = masks.union[row]
            if result.soft is not None:
                tensors[f"{side}_soft"] = result.soft[row]
        path = f"masks/{item}.safetensors"
        write_atomic(out / path, save({name: value.contiguous() for name, value in tensors.items()}))
        picked = None if result.picked is None else result.picked[both, :objects]
        stats = item_stats(masks.union[both], entropies[:, both, :objects], list(result.layers), picked)
        results[item] = {
            **record, "nouns": target.nouns, "objects": target.objects, "mask_path": path, "mask_stats": stats,
        }  # fmt: skip
        if target.unmatched:
            results[item]["unmatched_objects"] = target.unmatched
    return results


def load_unions(record: Record, out: Path | None) -> Tensor:
    """The masks (2, H, W) float of the chosen and the rejected image, the soft ones where the file has them.

    Raises OspoError when the file is unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = locate(record["mask_path"], out)
    try:
        tensors = load_file(path)
        kind = "soft" if "chosen_soft" in tensors else "union"
        return torch.stack([tensors[f"{side}_{kind}"] for side in SIDES]).float()
    except (OSError, SafetensorError, KeyError) as error:
        raise OspoError(f"Cannot read the masks {path}: {error}.") from error


def import_official(records: Iterable[Record], folder: Path, out: Path) -> Iterator[Record]:
    """Records with the masks of the official implementation, stored in `out` as those of this stage are.

    folder: its mask folder, which holds base/CATEGORY/ITEM/NAME_mask.pt and negative/CATEGORY/ITEM/NAME_mask.pt, NAME
    that of the chosen image: each an (H, W) tensor of 0 and 1. Nothing is unpickled but tensors. A file has the unions
    alone: no maps and no objects. A pair without its files has `mask` null and a `mask_reason`.

    Raises OspoError for a file that holds something else.
    """
    pairs = ((pair, record["item_id"]) for record in records for pair in iter_pairs([record]))
    yield from _items(_imported(pair, item, folder, out) for pair, item in pairs)


def _imported(record: Record, item: str, folder: Path, out: Path) -> Record:
    from safetensors.torch import save

    if not record.get("kept", "chosen" in record):
        return {**record, "mask": None, "mask_reason": NO_PAIR}
    name = f"{Path(record['chosen']).stem}_mask.pt"
    paths = [folder / kind / record.get("t2i_category", "") / item / name for kind in ("base", "negative")]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        return {**record, "mask": None, "mask_reason": f"there is no {absent[0]}"}
    unions = [_official(path) for path in paths]
    tensors: dict[str, Tensor] = {}
    for side, union in zip(SIDES, unions, strict=True):
        H, W = union.shape
        tensors |= {
            f"{side}_union": union,
            f"{side}_maps": torch.zeros(0, H, W),
            f"{side}_masks": torch.zeros(0, H, W, dtype=torch.uint8),
            f"{side}_thresholds": torch.zeros(0),
        }
    path = f"masks/{record['item_id']}.safetensors"
    write_atomic(out / path, save(tensors))
    stats = item_stats(torch.stack(unions), torch.zeros(0, 2, 0), [], None)
    return {**record, "objects": [], "mask_path": path, "mask_stats": stats}


def _official(path: Path) -> Tensor:
    import pickle

    try:
        mask = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise OspoError(f"{path} is no mask of the official implementation: {str(error).splitlines()[0]}") from error
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        shape = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise OspoError(f"{path} holds {shape}, expected an (H, W) tensor of 0 and 1")
    return mask.to(torch.uint8).contiguous()


def failure(record: Record) -> Failure | None:
    """Return why a pair of an item has no mask; None where all have one, and for an item without a pair."""
    if not record.get("kept", "chosen" in record):
        return None
    reasons = (pair.get("mask_reason") for pair in iter_pairs([record]))
    return next((Failure(reason) for reason in reasons if reason), None)

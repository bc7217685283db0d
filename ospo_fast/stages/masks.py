"""Stage 5, second part: object masks of the chosen and the rejected image.

The base prompt and the codes of an image run through the decoder once, up to the last layer that counts. The attention
that the image's tokens pay to the tokens of an object is the object's map. Otsu's threshold makes it a mask.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ospo_fast.config import Config, MasksConfig
from ospo_fast.errors import Failure, OspoError, attempt
from ospo_fast.files import MAX_PIXELS, check_archive, load_tensors, locate, read_bytes, reading
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.capture import AttentionCapture
from ospo_fast.ops._transfer import to_device_packed
from ospo_fast.records import ROLES, SIDES, ItemPair, Pair, Record, chunked, iter_pairs, write_atomic
from ospo_fast.stages import StageContext
from ospo_fast.stages.image_files import pair_codes
from ospo_fast.stages.mask_stats import pair_stats
from ospo_fast.stages.object_tokens import ObjectTokens, find_objects
from ospo_fast.stages.teacher_forcing import (
    Batch,
    equal_batches,
    fill,
    hidden_states,
    padded_length,
    teacher_forced,
)

if TYPE_CHECKING:
    from ospo_fast.ops import ObjectMasks

logger = logging.getLogger(__name__)

WINDOW = 8  # batches whose pairs are sorted by length, so that batches are full
Columns = Sequence[Sequence[Sequence[int]]]  # of each image, of each object: the positions of its tokens


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of N images with up to O objects each."""

    found: ObjectMasks  # (N, O, …); empty for an object that an image does not have
    soft: Tensor | None  # (N, H, W) soft unions, with `masks.soft`
    entropies: Tensor  # (L, N, O) of the attention of each layer
    layers: tuple[int, ...]  # the L layers
    finite: Tensor  # (N,) bool: False where the attention holds NaN or infinity, and the masks are empty
    selected: Tensor | None = None  # (N, O) indices into `layers`, where a search selected one for each object
    scores: Tensor | None = None  # (L, N, O) by which it was selected

    @property
    def weights(self) -> Tensor:
        """(N, H, W): the masks that the loss weights tokens by."""
        return self.found.union if self.soft is None else self.soft

    def cpu(self) -> Masks:
        """Return a copy on the CPU."""
        masks: Masks = dataclasses.replace(_to_cpu(self), found=_to_cpu(self.found))
        return masks


def _to_cpu(values: Any) -> Any:
    return dataclasses.replace(values, **{n: v.cpu() for n, v in vars(values).items() if isinstance(v, Tensor)})


class MaskExtractor:
    """Masks from the attention of a forward pass: `capture` around the pass, then `compute`."""

    capture_type: type[AttentionCapture] = AttentionCapture

    def __init__(self, settings: MasksConfig) -> None:
        self.settings = settings

    def capture(self, model: UnifiedModel, columns: Columns, batch: Batch, *, stop_early: bool) -> AttentionCapture:
        """Return the context manager for the forward pass of a batch from `teacher_forced`; see `AttentionCapture`."""
        settings = self.settings
        return self.capture_type(
            model,
            columns=columns,
            rows=(batch.lengths - int(settings.rows == "predicting"), batch.tokens),
            layers=settings.layers,
            skip=settings.skip_layers,
            heads=settings.heads,
            stop_early=stop_early,
        )

    def compute(self, capture: AttentionCapture, columns: Columns, batch: Batch) -> Masks:
        """Compute the masks after the forward pass."""
        maps, finite = finite_maps(capture.layer_maps)
        # Layer by layer: the order of the sum that mean(0) takes depends on the position in the tensor.
        total = functools.reduce(torch.add, maps.unbind())
        return self.threshold(total / len(maps), maps, finite, capture.layers, object_sizes(columns, maps.device))

    def threshold(
        self, maps: Tensor, layer_maps: Tensor, finite: Tensor, layers: tuple[int, ...], sizes: Tensor
    ) -> Masks:
        """Make masks of the maps (N, O, H, W) of objects with `sizes` (N, O) tokens; see `Masks` for the others."""
        from ospo_fast.ops import object_masks
        from ospo_fast.ops.object_masks import soft_masks, spatial_entropy

        found = object_masks(maps, valid=(sizes > 0) & finite[:, None], scaler=self.settings.scaler)
        soft = None
        if self.settings.soft:
            cells = soft_masks(found, scaler=self.settings.scaler) * (sizes > 0)[..., None, None]
            soft = cells.amax(1) if sizes.shape[1] else cells.sum(1)
        return Masks(found, soft, spatial_entropy(layer_maps), layers, finite)


def finite_maps(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps (L, N, O, H, W) with zeros for images whose maps hold NaN or infinity, and (N,) bool: the others."""
    finite = maps.isfinite().movedim(1, 0).flatten(1).all(1)
    return torch.where(finite.view(1, -1, 1, 1, 1), maps, 0), finite


def object_sizes(columns: Columns, device: torch.device) -> Tensor:
    """Return the number of tokens of each object, (N, O) with zeros where an image has fewer objects."""
    count = max((len(item) for item in columns), default=0)
    table = torch.tensor([[len(o) for o in item] + [0] * (count - len(item)) for item in columns])
    [sizes] = to_device_packed([table.view(len(columns), count)], device)
    return sizes


def build_extractor(
    settings: MasksConfig,
    pairs: Iterable[ItemPair],
    model: UnifiedModel,
    out: Path | None,
    read_from: Sequence[str] = (),
    writes: Path | None = None,
) -> MaskExtractor:
    """Return the extractor that the settings ask for.

    Layers or heads "auto" are searched once for a run folder `out`, on some of the `pairs`; `read_from`: see `locate`,
    `writes`: see `StageContext`.
    """
    if settings.layers != "auto" and settings.choose is None:
        return MaskExtractor(settings)
    from ospo_fast.experimental.layer_search import build_searched_extractor

    return build_searched_extractor(settings, pairs, model, out, read_from, writes)


@torch.no_grad()
def extract_masks(
    extractor: MaskExtractor, model: UnifiedModel, prompts: Sequence[Tensor], codes: Tensor, columns: Columns
) -> Masks:
    """Compute the masks of N images in one forward pass; prompts: N × ids (S,), codes (N, T).

    Those of an image do not depend on the others if all have one `padded_length`.
    """
    batch = teacher_forced(model, prompts, codes, length=max(padded_length(model, ids) for ids in prompts))
    with extractor.capture(model, columns, batch, stop_early=True) as capture:
        hidden_states(model, batch.embeds, layers=max(capture.layers) + 1, positions=batch.positions)
    return extractor.compute(capture, columns, batch)


@dataclass(frozen=True)
class MaskTask:
    """A pair to compute masks of."""

    item: ItemPair
    objects: ObjectTokens
    codes: Tensor  # (2, T): chosen, rejected


def mask_tasks(
    pairs: Sequence[ItemPair],
    model: UnifiedModel,
    settings: MasksConfig,
    out: Path | None,
    read_from: Sequence[str] = (),
) -> list[MaskTask | Failure]:
    """Find the objects of the prompts and read the codes of the images."""
    tasks: list[MaskTask | Failure] = []
    for item, codes in zip(pairs, pair_codes(model, [item.pair for item in pairs], out, read_from), strict=True):
        objects = find_objects(item.record, model, settings.match, settings.nouns)
        if isinstance(objects, Failure):
            tasks.append(objects)
        elif isinstance(codes, Failure):
            tasks.append(codes)
        else:
            tasks.append(MaskTask(item, objects, codes))
    return tasks


def mask_batches(tasks: Iterable[MaskTask], model: UnifiedModel, batch_size: int) -> Iterator[list[MaskTask]]:
    """Split tasks into batches in which the masks of a task do not depend on the others."""
    return equal_batches(tasks, lambda task: padded_length(model, task.objects.ids), batch_size)


def run(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Add `objects`, and to each pair `mask_path` and `mask_stats`, or `mask_reason` if it has no mask.

    A pair fails if the model cannot tokenize its prompt, if no object has a token, or if its images cannot be read.
    The file of a pair holds for chosen and rejected: `*_maps` (O, H, W) f32 in [0, 1], `*_thresholds` (O,) f32,
    `*_masks` (O, H, W) u8, `*_union` (H, W) u8 and, with `masks.soft`, `*_soft` (H, W) f32. `unmatched_objects` has the
    nouns without a token. An item without a pair gets `mask` None and a `mask_reason`.

    Raises:
        OspoError: no run folder was given, or it cannot be written.

    """
    if out is None:
        raise OspoError("masks: got no run folder; give `out`, where the masks go.")
    items = list(records)
    context = context or StageContext()
    target = context.writes or out
    results: Iterator[_Result]
    if config.masks.official is not None:
        results = (_import_masks(pair, Path(config.masks.official), target) for pair in iter_pairs(items))
    elif not any(record.get("pairs") for record in items):
        results = iter(())  # a search of layers would find nothing to search on
    else:
        # A layer that one shard selected would depend on which of them came first.
        searched = context.inputs if context.inputs is not None else items if context.shard is None else []
        extractor = build_extractor(config.masks, iter_pairs(searched), model, out, config.read_from, target)
        results = _compute_masks(items, model, extractor, out, config.read_from, target)
    for record in items:
        if not record.get("pairs"):
            yield {**record, "mask": None, "mask_reason": "the item has no pair"}
            continue
        found = [next(results) for _ in record["pairs"]]
        pairs = [cast(Pair, {**pair, **result[0]}) for pair, result in zip(record["pairs"], found, strict=True)]
        yield cast(Record, {**record, "pairs": pairs, **found[0][1]})  # the objects are those of the first pair


# The fields to add to a pair, and those to add to its item if the pair is its first.
_Result = tuple[dict[str, Any], dict[str, Any]]


def _failed(item: ItemPair, failure: Failure) -> _Result:
    logger.info("%s: no mask: %s", item.pair_id, failure)
    return {"mask_reason": failure.reason}, {}


def _compute_masks(
    records: Sequence[Record],
    model: UnifiedModel,
    extractor: MaskExtractor,
    out: Path,
    read_from: Sequence[str],
    target: Path,
) -> Iterator[_Result]:
    settings = extractor.settings
    for pairs in chunked(iter_pairs(records), settings.batch_size * WINDOW):
        tasks = mask_tasks(pairs, model, settings, out, read_from)
        results: dict[str, _Result] = {}
        ready = [task for task in tasks if isinstance(task, MaskTask)]
        for batch in mask_batches(ready, model, settings.batch_size):
            results |= _write_masks(batch, model, extractor, target)
        for pair, task in zip(pairs, tasks, strict=True):
            yield _failed(pair, task) if isinstance(task, Failure) else results[pair.name]


def _write_masks(tasks: list[MaskTask], model: UnifiedModel, extractor: MaskExtractor, out: Path) -> dict[str, _Result]:
    from safetensors.torch import save

    # The chosen and the rejected image of a task are neighbors.
    filled = [task for task in fill(tasks, extractor.settings.batch_size, model.device) for _ in SIDES]
    codes = torch.cat([task.codes for task in filled[::2]])
    columns = [task.objects.columns for task in filled]
    result = extract_masks(extractor, model, [task.objects.ids for task in filled], codes, columns).cpu()
    masks = result.found
    results: dict[str, _Result] = {}
    for n, task in enumerate(tasks):
        name, objects, both = task.item.name, task.objects, [2 * n, 2 * n + 1]
        count = len(objects.columns)
        if not bool(result.finite[both].all()):
            results[name] = _failed(task.item, Failure("the attention of the model holds NaN or infinity"))
            continue
        tensors = {}
        for side, row in zip(SIDES, both, strict=True):
            tensors[f"{side}_maps"] = masks.maps[row, :count].float()
            tensors[f"{side}_thresholds"] = masks.thresholds[row, :count].float()
            tensors[f"{side}_masks"] = masks.masks[row, :count]
            tensors[f"{side}_union"] = masks.union[row]
            if result.soft is not None:
                tensors[f"{side}_soft"] = result.soft[row]
        path = f"masks/{name}.safetensors"
        write_atomic(out / path, save({name: value.contiguous() for name, value in tensors.items()}))
        selected = None if result.selected is None else result.selected[both, :count]
        stats = pair_stats(masks.union[both], result.entropies[:, both, :count], list(result.layers), selected)
        fields: dict[str, Any] = {"nouns": objects.nouns, "objects": objects.spans}
        if objects.unmatched:
            fields["unmatched_objects"] = objects.unmatched
        results[name] = {"mask_path": path, "mask_stats": stats}, fields
    return results


def load_unions(
    pair: Pair,
    out: Path | None,
    read_from: Sequence[str] = (),
    *,
    grid: tuple[int, int] | None = None,
    soft: bool = True,
) -> Tensor:
    """Load the masks (2, H, W) float in [0, 1] of the chosen and the rejected image.

    Args:
        pair: with its `mask_path`.
        out: the run folder.
        read_from: see `locate`.
        grid: (H, W) of the model. None: any.
        soft: load the soft masks if the file has them.

    Raises:
        OspoError: the path leads elsewhere, or the file cannot be read or holds no such masks.

    """
    path = locate(pair.get("mask_path"), out, read_from)
    remedy = "run the stage masks with --no-resume"
    tensors = load_tensors("masks", path, remedy)
    with reading("masks", path, remedy):
        kind = "soft" if soft and "chosen_soft" in tensors else "union"
        names = [f"{side}_{kind}" for side in SIDES]
        if missing := [name for name in names if name not in tensors]:
            raise ValueError(f"it has no {', '.join(missing)}")
        shapes = [tuple(tensors[name].shape) for name in names]
        if len(shapes[0]) != 2 or shapes != 2 * [grid or shapes[0]]:
            raise ValueError(f"its masks have shapes {shapes[0]} and {shapes[1]}, expected twice {grid or '(H, W)'}")
        unions = torch.stack([tensors[name] for name in names])
        valid = (unions >= 0) & (unions <= 1) if kind == "soft" else (unions == 0) | (unions == 1)
        if not bool(valid.all()):  # NaN, too
            raise ValueError(f"its masks hold values other than {'those from 0 to 1' if kind == 'soft' else '0 and 1'}")
        return unions.float()


def _import_masks(item: ItemPair, folder: Path, out: Path) -> _Result:
    """Import the masks of the official implementation for a pair.

    Its mask folder holds base/CATEGORY/ITEM/NAME_mask.pt and negative/CATEGORY/ITEM/NAME_mask.pt, each an (H, W) tensor
    of 0 and 1, with the name of the chosen image. They are unions: the file written has no maps and no objects.
    """
    from safetensors.torch import save

    record, name = item.record, f"{Path(item.pair['chosen']).stem}_mask.pt"
    paths = [Path(role, record.get("t2i_category") or "", record["item_id"], name) for role in ROLES]
    loaded = [attempt(_load_official, path, folder) for path in paths]
    if (failed := next((mask for mask in loaded if isinstance(mask, Failure)), None)) is not None:
        return _failed(item, failed)
    unions = [mask for mask in loaded if isinstance(mask, Tensor)]
    if unions[0].shape != unions[1].shape:
        shapes = " and ".join(str(tuple(union.shape)) for union in unions)
        return _failed(item, Failure(f"the masks {paths[0]} and {paths[1]} have shapes {shapes}, expected equal ones"))
    tensors: dict[str, Tensor] = {}
    for side, union in zip(SIDES, unions, strict=True):
        tensors |= {
            f"{side}_union": union,
            f"{side}_maps": torch.zeros(0, *union.shape),
            f"{side}_masks": torch.zeros(0, *union.shape, dtype=torch.uint8),
            f"{side}_thresholds": torch.zeros(0),
        }
    path = f"masks/{item.name}.safetensors"
    write_atomic(out / path, save(tensors))
    stats = pair_stats(torch.stack(unions), torch.zeros(0, 2, 0), [], None)
    return {"mask_path": path, "mask_stats": stats}, {"objects": []}


def _load_official(path: Path, folder: Path) -> Tensor:
    path = locate(str(path), folder)
    with reading("mask of the official implementation", path, "correct masks.official"):
        if not path.exists():
            raise ValueError("there is no such file")
        data = read_bytes(path)
        if zipfile.is_zipfile(io.BytesIO(data)):
            check_archive(data)
        mask = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # unpickles nothing but tensors
        # With strides of 0, a few bytes hold a tensor of any size.
        small = isinstance(mask, Tensor) and mask.dim() == 2 and 0 < mask.numel() <= MAX_PIXELS
        if not small or not bool(((mask == 0) | (mask == 1)).all()):
            found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"it holds {found}, expected an (H, W) tensor of 0 and 1")
        result: Tensor = mask.to(torch.uint8).contiguous()
        return result


def failure(record: Record) -> Failure | None:
    """Return why a pair of an item has no mask; None where all have one, and for an item without a pair."""
    reasons = (pair.get("mask_reason") for pair in record.get("pairs", ()))
    return next((Failure(reason) for reason in reasons if reason), None)

"""Search for the layer, or the head, whose attention makes the best object masks.

`masks.choose` selects a layer for each object by a rule without ground truth. `masks.layers=auto` selects the layer of
the best mean score over many objects, and with `masks.heads=auto` the head.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ospo_fast.config import MasksConfig
from ospo_fast.errors import OspoError
from ospo_fast.experimental.head_capture import HeadCapture
from ospo_fast.experimental.layer_selection import best_layer, choose_layers
from ospo_fast.files import no_link, read_bytes
from ospo_fast.ops._transfer import to_device_packed
from ospo_fast.records import ItemPair, chunked, locked, parse_json, shown, write_json
from ospo_fast.stages.masks import (
    Columns,
    MaskExtractor,
    Masks,
    MaskTask,
    extract_masks,
    finite_maps,
    mask_batches,
    mask_tasks,
    object_sizes,
)

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel
    from ospo_fast.models.capture import AttentionCapture
    from ospo_fast.stages.teacher_forcing import Batch

logger = logging.getLogger(__name__)

SEARCH_PAIRS = 64  # pairs from all over the store that the layer is selected on
_SEARCH_SETTINGS = ("choose", "heads", "rows", "match")  # that the selection depends on


class LayerSearch(MaskExtractor):
    """Extractor of masks from one layer for each object, selected by `masks.choose`.

    With `by_head` each head of a layer counts as a layer.
    """

    def __init__(self, settings: MasksConfig, *, by_head: bool = False) -> None:
        super().__init__(settings)
        if by_head:
            self.capture_type = HeadCapture

    def capture(self, model: UnifiedModel, columns: Columns, batch: Batch, *, stop_early: bool) -> AttentionCapture:
        """Capture the maps of each token of an object."""
        width = _max_tokens(columns)
        tokens = [[[c] for o in item for c in [*o, *[-1] * (width - len(o))]] for item in columns]
        return super().capture(model, tokens, batch, stop_early=stop_early)

    def compute(self, capture: AttentionCapture, columns: Columns, batch: Batch) -> Masks:
        """Select the layers, then compute the masks."""
        layer_maps = capture.head_maps.flatten(0, 1) if isinstance(capture, HeadCapture) else capture.layer_maps
        layer_maps, finite = finite_maps(layer_maps)
        sizes = object_sizes(columns, layer_maps.device)
        L, N, _, H, W = layer_maps.shape
        width = _max_tokens(columns)
        token_maps = layer_maps.view(L, N, sizes.shape[1], width, H, W)
        used = torch.arange(width, device=sizes.device) < sizes[..., None]
        features = (
            _code_embeddings(batch, capture.cells).view(N, H, W, -1) if self.settings.choose == "contrast" else None
        )
        choice = choose_layers(token_maps, used, rule=str(self.settings.choose), features=features)
        layer_maps = token_maps.sum(3) / sizes.clamp(min=1)[..., None, None]
        masks = self.threshold(choice.maps, layer_maps, finite, capture.layers, sizes)
        return dataclasses.replace(masks, selected=choice.layers, scores=choice.scores)


def _max_tokens(columns: Columns) -> int:
    return max((len(tokens) for item in columns for tokens in item), default=0)


def _code_embeddings(batch: Batch, cells: Sequence[int] | None) -> Tensor:
    """The embeddings (N, H·W, D) of the images' codes: what each cell of the image shows."""
    places = torch.arange(batch.tokens) if cells is None else torch.tensor(cells)
    [index] = to_device_packed([batch.lengths[:, None] + places], batch.embeds.device)
    return batch.embeds.detach().gather(1, index[..., None].expand(-1, -1, batch.embeds.shape[2])).float()


def build_searched_extractor(
    settings: MasksConfig,
    pairs: Iterable[ItemPair],
    model: UnifiedModel,
    out: Path | None,
    read_from: Sequence[str] = (),
    writes: Path | None = None,
) -> MaskExtractor:
    """Return the extractor for `masks.choose`, or for the layers that replace "auto"."""
    if settings.layers != "auto":
        return LayerSearch(settings)
    return MaskExtractor(resolve_auto_layers(settings, pairs, model, out, read_from, writes))


def resolve_auto_layers(
    settings: MasksConfig,
    pairs: Iterable[ItemPair],
    model: UnifiedModel,
    out: Path | None,
    read_from: Sequence[str] = (),
    writes: Path | None = None,
) -> MasksConfig:
    """Return the settings with the layers and heads that replace "auto".

    They are selected once for a run folder, by the rule `choose` ("contrast" by default), and kept in
    `out`/masks/layers.json with the mean score of every layer, or of every head as "layer.head".

    Raises:
        OspoError: no run folder, no pair with an object, or a file that cannot be read.

    """
    if out is None:
        raise OspoError("masks.layers=auto: got no run folder; give `out`, where the selection is kept.")
    path, asked = (
        (writes or out) / "masks" / "layers.json",
        {name: getattr(settings, name) for name in _SEARCH_SETTINGS},
    )
    decoder: Any = model.decoder
    with locked(out / ".lock"):
        try:
            kept = parse_json(read_bytes(no_link(path))) if os.path.lexists(path) else {}
            # Ignore settings of older versions: config.py refuses values of them that would change the selection.
            if {name: kept.get("asked", {}).get(name, ...) for name in asked} != asked:
                kept = {"asked": asked, **_search(settings, list(pairs), model, out, read_from)}
                write_json(path, kept)
            layers = _indices(kept, "layers", len(decoder.layers))
            heads = settings.heads
            if heads == "auto":
                heads = _indices(kept, "heads", int(decoder.config.num_attention_heads))
        except (OSError, ValueError, AttributeError) as error:
            raise OspoError(f"Cannot read {path}: {error}; remove it to select the layer again.") from error
    logger.info("masks: layers %s%s", layers, "" if heads is None else f", heads {heads}")
    return dataclasses.replace(settings, layers=layers, heads=heads, choose=None)


def _indices(kept: dict[str, Any], name: str, count: int) -> list[int]:
    """Return the list `name` of a selection, if each is one of `count` layers or heads. Raises ValueError."""
    found = kept.get(name)
    if not (isinstance(found, list) and found and all(type(i) is int and 0 <= i < count for i in found)):
        raise ValueError(f"`{name}` should be a list of integers from 0 to {count - 1}, got {shown(found)}")
    return found


def _search(
    settings: MasksConfig, pairs: Sequence[ItemPair], model: UnifiedModel, out: Path, read_from: Sequence[str]
) -> dict[str, object]:
    decoder: Any = model.decoder
    layers = list(range(len(decoder.layers)))
    by_head = settings.heads == "auto"
    heads = int(decoder.config.num_attention_heads) if by_head else 1
    names = [f"{layer}.{head}" if by_head else str(layer) for layer in layers for head in range(heads)]
    rule = settings.choose or "contrast"
    changes: dict[str, Any] = {"layers": layers, "choose": rule, "soft": False} | ({"heads": None} if by_head else {})
    search = LayerSearch(dataclasses.replace(settings, **changes), by_head=by_head)
    scores: list[Tensor] = []
    for tasks in mask_batches(_select_tasks(pairs, model, settings, out, read_from), model, settings.batch_size):
        prompts = [task.objects.ids for task in tasks for _ in range(2)]
        columns = [task.objects.columns for task in tasks for _ in range(2)]
        masks = extract_masks(search, model, prompts, torch.cat([task.codes for task in tasks]), columns).cpu()
        assert masks.scores is not None
        sizes = torch.tensor([len(item) for item in columns])
        exists = (torch.arange(masks.scores.shape[2]) < sizes[:, None]) & masks.finite[:, None]
        scores.append(masks.scores[:, exists])
    found = torch.cat(scores, dim=1) if scores else torch.zeros(len(names), 0)
    if not found.shape[1]:
        raise OspoError(
            "masks.layers=auto: no pair with an object to select by, expected one (a shard of the pairs selects none); "
            "run the stage without --shard, or name the layers, as in [10,12]."
        )
    mean = {name: round(float(value), 6) for name, value in zip(names, found.double().mean(1), strict=True)}
    best = best_layer(found[..., None], torch.ones(found.shape[1], 1, dtype=torch.bool), rule=rule)
    selected = {"layers": [best // heads]} | ({"heads": [best % heads]} if by_head else {})
    return {**selected, "rule": rule, "scores": mean, "objects": found.shape[1]}


def _select_tasks(
    pairs: Sequence[ItemPair], model: UnifiedModel, settings: MasksConfig, out: Path, read_from: Sequence[str]
) -> list[MaskTask]:
    """Up to `SEARCH_PAIRS` tasks of pairs from all over the store, which has its kinds of prompts one after another."""
    step = max(len(pairs) // SEARCH_PAIRS, 1)
    spread = [pair for first in range(step) for pair in pairs[first::step]]
    tasks: list[MaskTask] = []
    for part in chunked(spread, settings.batch_size):
        if len(tasks) >= SEARCH_PAIRS:
            break
        found = mask_tasks(part, model, settings, out, read_from)
        tasks += [task for task in found if isinstance(task, MaskTask)]
    return tasks[:SEARCH_PAIRS]

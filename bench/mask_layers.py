"""Which layer's attention shows where the objects lie: IoU of masks with the true objects of the Shapes world.

Pairs of one run on training prompts. For the rows of the image's own tokens and for those that predict them: the masks
of every layer alone, of every head alone, of the mean of all layers, of the layer that a rule without ground truth
chooses for each object, and of the layer or head that `masks.layers=auto` (and `masks.heads=auto`) chooses for all;
beside them a mask of ones and random masks of like size.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _measure as measure
import numpy as np
import torch
from PIL import Image

from ospo_fast.config import Config, MasksConfig, load_config
from ospo_fast.models import load_model
from ospo_fast.models.base import UnifiedModel
from ospo_fast.ops.layer_choice import RULES
from ospo_fast.pipeline import STAGES, Pipeline, read_stage
from ospo_fast.records import iter_pairs
from ospo_fast.shapes import demo
from ospo_fast.stages.common import chunked, pair_codes
from ospo_fast.stages.masks import SIDES, attention_masks, find_objects, resolve_auto_layers

PAIRS = 300
QUICK = "prompts.counts={color1: 2, shape1: 2, color2: 6, 2D_spatial: 4, numeracy1: 2, numeracy2: 4}"


def _variants(layers: int, heads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for layer in range(layers):
        yield f"layer {layer}", {"layers": [layer]}
        for head in range(heads):
            yield f"layer {layer}, head {head}", {"layers": [layer], "heads": [head]}
    everything = list(range(layers))
    yield "mean of all layers", {"layers": everything}
    for rule in RULES:
        yield f"a layer for each object, by {rule}", {"layers": everything, "choose": rule}
        yield f"auto, by {rule}", {"layers": "auto", "choose": rule}
        yield f"auto, heads too, by {rule}", {"layers": "auto", "heads": "auto", "choose": rule}


class Pairs:
    """The kept pairs of a run: prompts, codes and columns of chosen and rejected, and where their objects truly lie."""

    def __init__(self, model: UnifiedModel, config: Config, most: int) -> None:
        self.model, self.config, self.out = model, config, Path(config.out)
        self.records = [record for record in iter_pairs(read_stage(self.out, "select")) if record["kept"]]
        # A spread over all kinds; the store is in their order.
        spread = np.linspace(0, len(self.records) - 1, min(most, len(self.records))).round().astype(int)
        self.records = [self.records[n] for n in spread]
        self.truth: list[np.ndarray | None] = []
        for record in self.records:
            for side in SIDES:
                self.truth.append(demo.object_cells(Image.open(self.out / str(record[side])), model.grid))

    def ious(self, settings: MasksConfig) -> np.ndarray:
        """IoU of each image in which the checker sees an object."""
        found: list[np.ndarray] = []
        for part in chunked(self.records, 32):
            codes = torch.cat(
                [pair for pair in pair_codes(self.model, part, self.out) if isinstance(pair, torch.Tensor)]
            )
            columns = []
            for record in part:
                target = find_objects(record, self.model, settings.match)
                assert not isinstance(target, str), target
                columns += [target.columns] * 2
            prompts = [record["prompt"] for record in part for _ in SIDES]
            masks = attention_masks(self.model, prompts, codes, columns, settings)
            found += list(masks.found.union.bool().cpu().numpy())
        return self.compare(found)

    def compare(self, found: list[np.ndarray]) -> np.ndarray:
        """IoU of masks of all images, with those that the checker sees."""
        pairs = [(mask, cells) for mask, cells in zip(found, self.truth, strict=True) if cells is not None]
        return np.array([(mask & cells).sum() / max((mask | cells).sum(), 1) for mask, cells in pairs])

    def ones(self) -> np.ndarray:
        """Of the whole image."""
        return self.compare([np.ones(self.model.grid, bool)] * len(self.truth))

    def random(self) -> np.ndarray:
        """Of as many cells as are true."""
        rng = np.random.default_rng(0)
        none = np.zeros(self.model.grid, bool)
        shuffled = [rng.permutation((none if cells is None else cells).ravel()) for cells in self.truth]
        return self.compare([cells.reshape(self.model.grid) for cells in shuffled])


def run(out: Path, quick: bool) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = load_config([f"out={folder}", *([QUICK] if quick else [])], family="shapes")
        model = load_model("shapes")
        Pipeline(config, progress=False, model=model).run(STAGES[: STAGES.index("masks")])
        pairs = Pairs(model, config, PAIRS)
        measured: list[tuple[str, str, np.ndarray, float, dict[str, Any]]] = [
            ("none", "mask of ones", pairs.ones(), 0.0, {}),
            ("none", "random", pairs.random(), 0.0, {}),
        ]
        text = model.module.config.get_text_config()
        for attention in ("image", "predicting"):
            for name, changes in _variants(text.num_hidden_layers, text.num_attention_heads):
                settings = dataclasses.replace(config.masks, rows=attention, **changes)
                started = time.perf_counter()
                (pairs.out / "masks" / "layers.json").unlink(missing_ok=True)
                settings = resolve_auto_layers(settings, pairs.records, model, pairs.out)
                chosen = {"layers": settings.layers, "heads": settings.heads}
                measured.append((attention, name, pairs.ious(settings), time.perf_counter() - started, chosen))
        dtype = measure.dtype_name(model.dtype)
        for attention, name, ious, seconds, chosen in measured:
            once = measure.Timing(seconds * 1e3, seconds * 1e3, seconds * 1e3, 1)
            error = float(ious.std() / np.sqrt(len(ious)))
            figures = {"rows": attention, "iou": round(float(ious.mean()), 4), "iou_std": round(error, 4)}
            rows.append(measure.row("mask_layers", name, {"images": len(ious)}, dtype, once, **figures, **chosen))
            found = " ".join(f"{key} {value}" for key, value in chosen.items() if value)
            print(f"{attention:<11} {name:<42} {ious.mean():.3f} ± {error:.3f}  {found}", flush=True)
    measure.write(rows, out, "mask_layers")

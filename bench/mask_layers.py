"""IoU of the masks of each attention layer and head with the true objects of a Shapes world.

    python bench/mask_layers.py [--world shapes-large]

The pairs are of one run on training prompts. For the rows of the image tokens and for the rows that predict them, it
measures the masks of every layer, of every head, of the mean of all layers, of the layer that a rule chooses for each
object without ground truth, and of the layer or head that `masks.layers=auto` (and `masks.heads=auto`) chooses for all
objects. Baselines are a mask of ones and random masks of the same size.
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

from ospo_fast.config import Config, load_config
from ospo_fast.experimental.layer_selection import RULES
from ospo_fast.models import load_model
from ospo_fast.models.base import UnifiedModel
from ospo_fast.ops.object_masks import mask_iou
from ospo_fast.pipeline import Pipeline, read_stage
from ospo_fast.records import SIDES, chunked, iter_pairs
from ospo_fast.shapes import demo, evaluate
from ospo_fast.stages import STAGE_NAMES
from ospo_fast.stages.masks import MaskExtractor, MaskTask, build_extractor, extract_masks, mask_tasks
from ospo_fast.stats import standard_error

PAIRS = 300
QUICK = "prompts.counts={color1: 2, shape1: 2, color2: 6, 2D_spatial: 4, numeracy1: 2, numeracy2: 4}"


def _variants(layers: int, heads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield names and settings; all set both layers and heads, of which a world has its own."""
    for layer in range(layers):
        yield f"layer {layer}", {"layers": [layer], "heads": None}
        for head in range(heads):
            yield f"layer {layer}, head {head}", {"layers": [layer], "heads": [head]}
    all_layers = list(range(layers))
    yield "mean of all layers", {"layers": all_layers, "heads": None}
    for rule in RULES:
        yield f"a layer for each object, by {rule}", {"layers": all_layers, "heads": None, "choose": rule}
        yield f"auto, by {rule}", {"layers": "auto", "heads": None, "choose": rule}
        yield f"auto, heads too, by {rule}", {"layers": "auto", "heads": "auto", "choose": rule}


class Pairs:
    """Kept pairs of a run, with the true cells of the objects in both images."""

    def __init__(self, model: UnifiedModel, config: Config, limit: int) -> None:
        self.model, self.config, self.out = model, config, Path(config.out)
        self.pairs = list(iter_pairs(read_stage(self.out, "select")))
        # Evenly spaced, to include all kinds: the records are ordered by kind.
        indices = np.linspace(0, len(self.pairs) - 1, min(limit, len(self.pairs))).round().astype(int)
        self.pairs = [self.pairs[n] for n in indices]
        self.truth: list[np.ndarray | None] = []
        for item in self.pairs:
            for path in (item.pair["chosen"], item.pair["rejected"]):
                image = Image.open(self.out / path)
                self.truth.append(demo.object_cells(image, model.grid, evaluate.world_of(model)))
        numbers: dict[str, int] = {}
        owners = [numbers.setdefault(item.record["item_id"], len(numbers)) for item in self.pairs for _ in SIDES]
        # Of each IoU the number of its prompt, whose images are not independent.
        self.prompts = [number for number, cells in zip(owners, self.truth, strict=True) if cells is not None]

    def ious(self, extractor: MaskExtractor) -> np.ndarray:
        """Return the IoU of each image in which the checker detects an object."""
        unions: list[np.ndarray] = []
        for part in chunked(self.pairs, 32):
            tasks = mask_tasks(part, self.model, extractor.settings, self.out)
            ready = [task for task in tasks if isinstance(task, MaskTask)]
            assert len(ready) == len(part), tasks
            codes = torch.cat([task.codes for task in ready])
            columns = [task.objects.columns for task in ready for _ in SIDES]
            prompts = [task.objects.ids for task in ready for _ in SIDES]
            masks = extract_masks(extractor, self.model, prompts, codes, columns)
            unions += list(masks.found.union.bool().cpu().numpy())
        return self.compare(unions)

    def compare(self, masks: list[np.ndarray]) -> np.ndarray:
        """Return the IoU of one mask per image with the objects that the checker detects."""
        pairs = [(mask, cells) for mask, cells in zip(masks, self.truth, strict=True) if cells is not None]
        return np.array([mask_iou(torch.from_numpy(mask), torch.from_numpy(cells)) or 0.0 for mask, cells in pairs])

    def ones(self) -> np.ndarray:
        """Return the IoU of masks of ones."""
        return self.compare([np.ones(self.model.grid, bool)] * len(self.truth))

    def random(self) -> np.ndarray:
        """Return the IoU of random masks with the size of the true ones."""
        rng = np.random.default_rng(0)
        empty = np.zeros(self.model.grid, bool)
        shuffled = [rng.permutation((empty if cells is None else cells).ravel()) for cells in self.truth]
        return self.compare([cells.reshape(self.model.grid) for cells in shuffled])


def run(out: Path, quick: bool) -> None:
    _measure(out, quick, "shapes")


def _measure(out: Path, quick: bool, world: str) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = load_config([f"model={world}", f"out={folder}", *([QUICK] if quick else [])], family=world)
        model = load_model(world)
        Pipeline(config, progress=False, model=model).run(STAGE_NAMES[: STAGE_NAMES.index("masks")])
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
                extractor = build_extractor(settings, pairs.pairs, model, pairs.out)
                chosen = {"layers": extractor.settings.layers, "heads": extractor.settings.heads}
                measured.append((attention, name, pairs.ious(extractor), time.perf_counter() - started, chosen))
        dtype = measure.dtype_name(model.dtype)
        for attention, name, ious, seconds, chosen in measured:
            once = measure.timing_of([seconds * 1e3])
            error = standard_error(ious, pairs.prompts)
            metrics = {"rows": attention, "iou": round(float(ious.mean()), 4), "iou_std": round(error, 4)}
            rows.append(measure.row("mask_layers", name, {"images": len(ious)}, dtype, once, **metrics, **chosen))
            layers = " ".join(f"{key} {value}" for key, value in chosen.items() if value)
            print(f"{attention:<11} {name:<42} {ious.mean():.3f} ± {error:.3f}  {layers}", flush=True)
    measure.write(rows, out, world.replace("shapes", "mask_layers", 1))


if __name__ == "__main__":
    measure.of_world(__doc__, _measure)

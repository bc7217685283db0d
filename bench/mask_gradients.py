"""What object masks change in a training step of a Shapes world: token weights, gradients and log-probabilities.

    python bench/mask_gradients.py [--world shapes-large]

The pairs are of one run on training prompts, the weights those before training. For each kind of mask and each height
alpha of the token weights it measures

* the share of the token weights that is on codes of objects,
* the cosine between the gradients of the same batch with and without masks, of each term that masks weight and of the
  whole loss. The cosine between the gradients of two batches says how much of a gradient is noise.

And without masks, for the codes of objects and for the other codes:

* the mean −log p of the chosen images,
* the mean difference of log p between the prompt and the hard negative, and the share of the objects in its sum.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _measure as measure
import numpy as np
import torch
from ablations import QUICK, replace_masks
from PIL import Image
from torch import Tensor

from ospo_fast.config import Config, load_config
from ospo_fast.loss import OSPOLoss
from ospo_fast.models import load_model
from ospo_fast.models.base import UnifiedModel
from ospo_fast.ops import IGNORE_INDEX, token_logprobs, token_weights
from ospo_fast.pipeline import Pipeline, read_stage
from ospo_fast.records import SIDES, ItemPair, iter_pairs
from ospo_fast.shapes import demo
from ospo_fast.shapes.scenes import WORLDS, World
from ospo_fast.stages import STAGE_NAMES
from ospo_fast.stages.teacher_forcing import hidden_states
from ospo_fast.stages.train import Example, Trainer, load_examples, make_batch
from ospo_fast.stages.train_settings import loss_config

BATCH, BATCHES = 16, 24
KINDS = ("attention", "random", "true", "ones")  # random masks are permutations of the attention's
HEIGHTS = {
    "alpha 1": {},
    "alpha 1, no blur": {"mask_blur": 1},
    "alpha 31, no blur": {"mask_alpha": 31.0, "mask_blur": 1},
}
TERMS = ("simpo", "conditional", "loss")


class Gradients:
    """Batches of pairs, the gradients of the terms of their loss, and the cells of their objects."""

    def __init__(self, model: UnifiedModel, config: Config, batches: int) -> None:
        self.model, self.config, self.out = model, config, Path(config.out)
        self.world: World = WORLDS[config.model]
        pairs = list(iter_pairs(read_stage(self.out, "masks")))
        # Evenly spaced, then in random order, so that a batch has all kinds: the records are ordered by kind.
        chosen = np.linspace(0, len(pairs) - 1, min(batches * BATCH, len(pairs))).round().astype(int)
        self.pairs = [pairs[n] for n in np.random.default_rng(0).permutation(chosen)]
        examples = self.examples()
        self.trainer = Trainer(model, examples, config, self.out / "train")
        self.count = max(2, len(examples) // BATCH)
        self.objects = torch.stack([self._cells(item) for item in self.pairs])

    def _cells(self, item: ItemPair) -> Tensor:
        """The cells (2, H, W) of the objects of both images."""
        found = []
        for side in SIDES:
            cells = demo.object_cells(Image.open(self.out / str(item.pair[side])), self.model.grid, self.world)
            found.append(torch.zeros(self.model.grid) if cells is None else torch.from_numpy(cells).float())
        return torch.stack(found)

    def examples(self) -> list[Example]:
        """Load the pairs with the masks that the files have now."""
        examples, failures = load_examples(self.pairs, self.model, self.config, self.out)
        assert not failures, failures
        return examples

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Split rows, one of each pair, in `count` batches."""
        size = len(rows) // self.count
        for start in range(0, size * self.count, size):
            yield rows[start : start + size]

    def gradients(self, examples: Sequence[Example], **changes: Any) -> Iterator[dict[str, Tensor]]:
        """Yield the gradients of `TERMS` of each batch, flat, for a loss with these changes of its coefficients."""
        self.trainer.loss = OSPOLoss(dataclasses.replace(loss_config(self.config), **changes))
        for batch in self.batches(examples):
            output = self.trainer.forward(batch)
            yield {term: self._flat(getattr(output, term)) for term in TERMS if getattr(output, term) is not None}

    def _flat(self, loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, self.trainer.parameters, retain_graph=True, allow_unused=True)
        return torch.cat([part.flatten() for part in found if part is not None])

    def object_share(self, examples: Sequence[Example], **changes: Any) -> float:
        """The share of the token weights that is on objects, mean over images with objects."""
        config = dataclasses.replace(loss_config(self.config), **changes)
        masks = torch.cat([example.masks for example in examples if example.masks is not None])
        weights = token_weights(masks, alpha=config.mask_alpha, gamma=config.mask_gamma, blur_size=config.mask_blur)
        cells = self.objects.flatten(0, 1).flatten(1)
        shares = (weights * cells).sum(1) / weights.sum(1)
        return float(shares[cells.any(1)].mean())

    @torch.no_grad()
    def log_probabilities(self, examples: Sequence[Example]) -> dict[str, float]:
        """−log p of the chosen images and what the hard negative changes of it, of objects and of other codes."""
        own, swapped = [], []
        for batch in self.batches(examples):
            rows, _ = make_batch(self.model, batch, swapped=True)
            codes = torch.stack([example.codes[side] for side in (0, 1) for example in batch])
            hidden = hidden_states(self.model, rows.embeds, positions=rows.positions)
            hidden, head = self.trainer._guided(hidden, codes, [*range(len(codes)), *range(len(batch))], rows)
            targets = torch.nn.functional.pad(rows.labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            logps = token_logprobs(hidden, head, targets)[targets != IGNORE_INDEX].view(3, len(batch), -1)
            own.append(logps[0])
            swapped.append(logps[2])
        cells = self.objects[: sum(map(len, own)), 0].flatten(1).bool()
        chosen, difference = torch.cat(own), torch.cat(own) - torch.cat(swapped)
        return {
            "objects_of_codes": float(cells.float().mean()),
            "nll_objects": float(-chosen[cells].mean()),
            "nll_others": float(-chosen[~cells].mean()),
            "prompt_objects": float(difference[cells].mean()),
            "prompt_others": float(difference[~cells].mean()),
            "prompt_share_of_objects": float(difference[cells].sum() / difference.sum()),
        }


def cosines(left: Sequence[dict[str, Tensor]], right: Sequence[dict[str, Tensor]], name: str) -> dict[str, float]:
    """Return the mean cosine of each term, with the standard deviation over batches."""
    found: dict[str, float] = {}
    for term in left[0]:
        values = [float(torch.cosine_similarity(a[term], b[term], dim=0)) for a, b in zip(left, right, strict=True)]
        found |= {f"{name}_{term}": float(np.mean(values)), f"{name}_{term}_std": float(np.std(values))}
    return found


def run(out: Path, quick: bool) -> None:
    _measure(out, quick, "shapes")


def _measure(out: Path, quick: bool, world: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = load_config([f"model={world}", f"out={folder}", *(QUICK[:1] if quick else [])], family=world)
        model = load_model(world)
        Pipeline(config, progress=False, model=model).run(STAGE_NAMES[: STAGE_NAMES.index("train")])
        started = time.perf_counter()
        found = Gradients(model, config, 2 if quick else BATCHES)
        plain = list(found.gradients(found.examples(), mask_alpha=0.0))
        measured: list[tuple[str, dict[str, Any]]] = [
            ("no mask", found.log_probabilities(found.examples()) | cosines(plain, plain[1:] + plain[:1], "next"))
        ]
        for kind in KINDS:
            if kind != "attention":
                replace_masks(found.out, kind, found.world)
            examples = found.examples()
            for name, changes in HEIGHTS.items():
                share = {"weight_on_objects": found.object_share(examples, **changes)}
                masked = list(found.gradients(examples, **changes))
                measured.append((f"{kind}, {name}", share | cosines(masked, plain, "no_mask")))
        once = measure.timing_of([(time.perf_counter() - started) * 1e3])
    shapes = {"pairs": len(found.pairs), "batches": found.count}
    rows = []
    for name, metrics in measured:
        metrics = {key: round(value, 4) for key, value in metrics.items()}
        rows.append(measure.row("mask_gradients", name, shapes, measure.dtype_name(model.dtype), once, **metrics))
        print(f"{name:<28}", "  ".join(f"{k} {v}" for k, v in metrics.items() if not k.endswith("_std")), flush=True)
    measure.write(rows, out, world.replace("shapes", "mask_gradients", 1))


if __name__ == "__main__":
    measure.of_world(__doc__, _measure)

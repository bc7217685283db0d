"""Ablations of the method in a Shapes world, with the same prompts and seeds for all variants.

Each training seed has one run of stages 1 to 4, which the variants share. They differ in selection, masks and training.
Alignment is that of `ospo_fast.shapes.evaluate`, at the guidance scale that is best for the base model on validation
prompts. `run` measures all variants of `TABLE` on test prompts and plots their gains.

    python bench/ablations.py NAME --table [--seeds 42] [--folder RUNS]    measure one variant of the table, or all
    python bench/ablations.py NAME --table methods                         the same with other methods (`METHODS`)
    python bench/ablations.py all --plot                                   print and plot the existing rows
    python bench/ablations.py NAME [KEY=VALUE ...] [--seeds 1 2 3]         try settings on validation prompts

`--world shapes-large` measures in the world of small objects, where `all` is `MASKS`: the variants of the masks. Its
results are in ablations-large.jsonl.

Each row is written as soon as it is measured. Rows of the same commit and settings are not measured again, so an
interrupted table resumes. KEY is one of the configuration; settings of stages 1 to 4 need a run of their own. Trials
are appended to OUT/WORLD/trials.jsonl with all their settings.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _comparison
import _measure as measure
import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from ospo_fast.config import Config, load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import load_model
from ospo_fast.models.base import UnifiedModel
from ospo_fast.pipeline import Pipeline, read_stage, stage_metrics, store_paths
from ospo_fast.records import iter_pairs, stable_hash
from ospo_fast.shapes import demo, evaluate
from ospo_fast.shapes.checker import UNKNOWN, detect
from ospo_fast.shapes.scenes import KINDS, SHAPES_WORLD, WORLDS, World, write_held_out_prompts
from ospo_fast.stages import STAGE_NAMES, STAGES
from ospo_fast.stages.train_settings import loss_config

SEEDS = (42, 43, 44)
SAMPLING = (0, 1)
DENSE = 120  # test prompts with scenery of each kind
PER_KIND = 150  # test prompts of each headline kind, or all if there are fewer
SHARED = STAGE_NAMES[: STAGE_NAMES.index("select")]
LATER = ("preset", *STAGE_NAMES[len(SHARED) :])  # sections of the configuration that do not affect the shared stages


# Of the later settings those that the shared stages depend on, too: how images are scored, and whether there are any.
EARLY = LIKELIEST, GRPO = "select.rule=likeliest", "preset=grpo"


@dataclass(frozen=True)
class Variant:
    """One variant of the demo.

    Attributes:
        name: its name in the rows of the results.
        settings: what it changes in the configuration.
        masks: masks in place of the model's: "true" (objects that the checker detects), "ones", or "random" (of the
            same size).

    """

    name: str
    settings: tuple[str, ...] = ()
    masks: str | None = None

    @property
    def shared(self) -> tuple[str, ...]:
        """Return the settings that stages 1 to 4 depend on."""
        return tuple(s for s in self.settings if s in EARLY or s.split("=")[0].split(".")[0] not in LATER)


PUBLISHED = (  # settings of pairs and loss; optimizer, LoRA and guidance of the images stay those of the demo
    "images.prompts=dense",
    "images.draws=1",
    "select.rejected=negative",
    "select.pairs=1",
    "train.guidance_scale=1",
)
GROUPS = (
    "train.batch_size=8",
    "train.loss.group_size=8",
    "train.loss.kl_weight=0",
    "train.learning_rate=2e-3",  # tried on validation prompts (trials.jsonl)
    "train.steps=181",
)  # images of the demo
STEPS_1000 = ("train.steps=1000", "train.schedule=cosine", "train.eval_every=100", "train.save_every=100")
LONGER = "train.steps=470"
HEAVY = ("train.loss.mask_alpha=31", "train.loss.mask_blur=1")  # with alpha 1 masks hardly change a gradient
TABLE = (
    Variant("demo"),
    Variant("no mask", ("masks.enabled=false",)),
    Variant("ground-truth masks", masks="true"),
    Variant("masks of ones", masks="ones"),
    Variant("random masks of the same size", masks="random"),
    Variant("masks of all layers", ("masks.layers=[0,1,2,3,4]",)),
    Variant("masks of the layer of lowest entropy", ("masks.layers=auto", "masks.choose=entropy")),
    Variant("masks of the head of highest contrast", ("masks.layers=auto", "masks.heads=auto")),
    Variant(
        "SimPO alone",
        (
            "train.loss.simpo_weight=1",
            "train.loss.sft_weight=0",
            "train.loss.cond_weight=0",
        ),
    ),
    Variant("SFT alone", ("train.loss.simpo_weight=0", "train.loss.cond_weight=0")),
    Variant("no conditional term", ("train.loss.cond_weight=0",)),
    Variant("the prompt's own distribution trained", ("train.guidance_scale=1",)),
    Variant("images of dense prompts", ("images.prompts=dense",)),
    Variant("one image per variant", ("images.draws=1",)),
    Variant("one pair per prompt", ("select.pairs=1",)),
    Variant("hard negatives rejected", ("select.rejected=negative",)),
    Variant("preset v3 as published", ("preset=v3", *PUBLISHED)),
    Variant("preset full as published", ("preset=full", *PUBLISHED)),
    Variant("hard negatives rejected, no filter", ("select.rule=random", "select.rejected=negative")),
    Variant("hard negatives rejected, rule v2", ("select.rule=v2", "select.rejected=negative")),
    Variant("two iterations", ("iterations=2",)),
    Variant("three iterations", ("iterations=3",)),
)
MASKS = (
    *TABLE[:5],
    Variant("32 times the weight on masks", HEAVY),
    Variant("32 times the weight on ground-truth masks", HEAVY, masks="true"),
)
# Other methods with the images of the demo, its optimizer and its number of steps (docs/methods.md).
METHODS = (
    Variant("demo"),
    Variant("OSPO v1", ("preset=v1",)),
    Variant("OSPO v2", ("preset=v2",)),
    Variant("OSPO v3", ("preset=v3",)),
    Variant("OSPO full", ("preset=full",)),
    Variant("DPO", ("preset=dpo",)),
    Variant("SFT on best images", ("preset=sft",)),
    Variant("SUDER", ("preset=suder", LIKELIEST)),
    Variant("GRPO", (GRPO, *GROUPS)),
    # As many operations as the demo, whose step has the conditional term and thus 1.34 times those of the others. A
    # step of SFT runs the rejected images for their metrics alone: they do not count.
    Variant("OSPO v1, equal compute", ("preset=v1", LONGER)),
    Variant("OSPO v3, equal compute", ("preset=v3", LONGER)),
    Variant("DPO, equal compute", ("preset=dpo", LONGER)),
    Variant("SFT on best images, equal compute", ("preset=sft", "train.steps=940")),
    Variant("SUDER, equal compute", ("preset=suder", LIKELIEST, LONGER)),
    Variant("GRPO, equal compute", (GRPO, *GROUPS[:-1], "train.steps=203")),
    # Five times the operations of the demo. Each iteration generates its images, by the newest model.
    Variant("five iterations", ("iterations=5",)),
    Variant("GRPO, 1000 steps", (GRPO, *GROUPS[:-1], *STEPS_1000)),
    # With plain prompts alone, prompts with scenery of one attribute get worse. Chosen on validation prompts, too.
    Variant("GRPO, 1000 steps, plain and dense prompts", (GRPO, *GROUPS[:-1], *STEPS_1000, "images.prompts=both")),
)
NO_MASK = "no mask"  # the variant that the others are compared with, prompt by prompt


@dataclass(frozen=True)
class Table:
    """A table of results: its file, its variants, and the one that the others are compared with prompt by prompt."""

    name: str
    variants: tuple[Variant, ...]
    reference: str


ABLATIONS = Table("ablations", TABLE, "demo")
TABLES = {
    "shapes": {"ablations": ABLATIONS, "methods": Table("methods", METHODS, "demo")},
    "shapes-large": {
        "ablations": Table("ablations-large", MASKS, NO_MASK),
        "methods": Table("methods-large", METHODS, "demo"),
    },
}
DETAILED = ("demo", "GRPO, 1000 steps, plain and dense prompts")  # variants that are measured on further prompts, too
ONE_ATTRIBUTE = "on one attribute"  # plain prompts of the kinds that are not in the headline
QUICK = (
    "prompts.counts={color1: 2, shape1: 2, color2: 4, 2D_spatial: 4, numeracy1: 2, numeracy2: 4}",
    "train.steps=2",
    "train.eval_every=0",
    "train.early_stopping=null",
)


class Bench:
    """Runs of several seeds in `folder`, and the results of the base model that every variant is compared with."""

    def __init__(
        self,
        folder: Path,
        *,
        split: str,
        per_kind: int,
        extra: tuple[str, ...] = (),
        sampling: tuple[int, ...] = SAMPLING,
        world: World = SHAPES_WORLD,
    ) -> None:
        self.folder, self.split, self.per_kind, self.extra, self.sampling = folder, split, per_kind, extra, sampling
        self.world = world
        measure.commit()  # of the code that is loaded now, before anything changes
        folder.mkdir(parents=True, exist_ok=True)
        write_held_out_prompts(folder / "held_out.txt", world)
        self.base = load_model(world.name)
        self.scale, self.scales = self._kept("guidance", lambda: self.choose_guidance(self.base))
        self.before = {scale: self.evaluate_headline(self.base, scale) for scale in sorted({1.0, self.scale})}
        self._dense_before: evaluate.AlignmentResult | None = None  # of the base model, on first use
        self.further_before: dict[str, evaluate.AlignmentResult] | None = None  # of the base model, on first use

    def _kept(self, name: str, make: Any) -> Any:
        path = self.folder / f"{name}-{self.per_kind}-{measure.commit()}.json"
        if not path.exists():
            path.write_text(json.dumps(make()))
        return json.loads(path.read_text())

    def choose_guidance(self, model: UnifiedModel) -> tuple[float, dict[float, dict[str, float]]]:
        """Return a model's best guidance scale on validation prompts, and the headline at every scale of the demo."""
        scales = load_config(family=self.world.name).evaluate.guidance_scales
        return evaluate.choose_guidance(model, scales, per_kind=self.per_kind, seeds=SAMPLING, progress=False)

    def evaluate_headline(self, model: UnifiedModel, scale: float) -> evaluate.AlignmentResult:
        """Evaluate a model on the prompts of the headline kinds."""
        return evaluate.evaluate_alignment(
            model,
            split=self.split,
            per_kind=self.per_kind,
            guidance_scale=scale,
            seeds=self.sampling,
            kinds=evaluate.HEADLINE,
            progress=False,
        )

    def evaluate_dense(self, model: UnifiedModel) -> evaluate.AlignmentResult:
        """Evaluate a model on prompts of all kinds with scenery, see `evaluate.py`."""
        return evaluate.evaluate_alignment(
            model,
            split="dense" if self.split == "test" else "dense-validation",
            per_kind=DENSE if self.per_kind == PER_KIND else self.per_kind,
            guidance_scale=self.scale,
            seeds=self.sampling,
            progress=False,
        )

    @property
    def dense_before(self) -> evaluate.AlignmentResult:
        """The results of the base model on these prompts."""
        if self._dense_before is None:
            self._dense_before = self.evaluate_dense(self.base)
        return self._dense_before

    def evaluate_further(self, model: UnifiedModel) -> dict[str, evaluate.AlignmentResult]:
        """Evaluate a model on test prompts outside the table, which no setting can have been chosen on.

        Two attributes have none without scenery, so theirs have new seeds. Prompts of one attribute are few: each has
        many images.
        """
        seeds, full = tuple(seed + len(self.sampling) for seed in self.sampling), self.per_kind == PER_KIND

        def images(kinds: Sequence[str], *, number: int, skip: int = 0, split: str = self.split, seeds: Any = seeds):
            return evaluate.evaluate_alignment(
                model,
                split=split,
                per_kind=number if full else self.per_kind,
                guidance_scale=self.scale,
                seeds=seeds,
                kinds=kinds,
                skip=skip,
                progress=False,
            )

        two, others = evaluate.HEADLINE[:1], evaluate.HEADLINE[1:]
        parts = images(two, number=1000), images(others, number=1000, skip=PER_KIND)
        plain = replace(
            parts[0],
            kinds=parts[0].kinds + parts[1].kinds,
            prompts=parts[0].prompts + parts[1].prompts,
            images=parts[0].images + parts[1].images,
            correct=np.concatenate([part.correct for part in parts]),
        )
        dense = "dense" if self.split == "test" else "dense-validation"
        many = tuple(range(seeds[0], seeds[0] + (24 if full else 2)))  # images of a prompt
        return {
            "on further prompts": plain,
            "on further prompts with scenery": images(evaluate.HEADLINE, number=2 * DENSE, skip=DENSE, split=dense),
            ONE_ATTRIBUTE: images([kind for kind in KINDS if kind not in evaluate.HEADLINE], number=1000, seeds=many),
        }

    def further(self, model: UnifiedModel) -> dict[str, Any]:
        """Compare the models each at its own best guidance on validation prompts, and on further test prompts."""
        own, scales = self.choose_guidance(model)
        best = self.evaluate_headline(model, own)
        if self.further_before is None:
            self.further_before = self.evaluate_further(self.base)
        further = self.evaluate_further(model)
        return {
            "validation_before": {str(scale): headline for scale, headline in self.scales.items()},
            "validation": {str(scale): headline for scale, headline in scales.items()},
            "at its own best": _compare(self.before[self.scale], best) | {"guidance_scale": own},
            **{
                name: (_compare_kinds if name == ONE_ATTRIBUTE else _compare)(self.further_before[name], result)
                | {"seeds": list(result.seeds)}
                for name, result in further.items()
            },
        }

    def config(self, settings: Sequence[str], seed: int, out: Path) -> Config:
        """Load the configuration of the demo with these settings."""
        fixed = (
            f"model={self.world.name}",
            f"out={out}",
            f"seed={seed}",
            f"prompts.exclude={self.folder / 'held_out.txt'}",
        )
        return load_config([*settings, *self.extra, *fixed], family=self.world.name)

    def shared_run(self, variant: Variant, seed: int) -> Path:
        """Run stages 1 to 4 of a variant, unless another one has; return the run folder."""
        settings = [s for s in variant.shared if not s.startswith("iterations=")]
        folder = self.folder / f"run-{seed}-{stable_hash(measure.commit(), *settings, *self.extra) % 16**6:06x}"
        config = self.config(settings, seed, folder)
        stages = [stage.name for stage in STAGES if stage.name in SHARED and stage.in_run(config)]
        Pipeline(config, progress=False).run(stages)
        return folder

    def trained(self, variant: Variant, seed: int) -> tuple[Path, UnifiedModel, float]:
        """Run the other stages in a copy; return its folder, the tuned model and the seconds of these stages."""
        shared = self.shared_run(variant, seed)
        folder = self.folder / f"variant-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(shared, folder)
        started = time.perf_counter()
        config = self.config(variant.settings, seed, folder)
        pipeline = Pipeline(config, progress=False, evaluation=evaluate.build_validation(config.evaluate, self.scale))
        for iteration in range(1, config.iterations + 1):
            for stage in [stage.name for stage in STAGES if stage.in_run(config)]:
                pipeline.stage(stage, iteration)
                if stage == "masks" and variant.masks:
                    replace_masks(pipeline.folder(iteration), variant.masks, self.world)
        return folder, pipeline.model(config.iterations + 1), time.perf_counter() - started

    def measured(self, variant: Variant, seed: int, row: dict[str, Any]) -> bool:
        """Return whether `row` has the commit and the settings that `measure` would have now."""
        commit = measure.commit()
        known = commit != "unknown" and not commit.endswith("+")  # uncommitted changes are not in the row
        return known and row["commit"] == commit and self.same_settings(variant, seed, row)

    def same_settings(self, variant: Variant, seed: int, row: dict[str, Any]) -> bool:
        """Return whether `row` has the settings of the variant.

        A setting that is newer than the row had its default. Ignored are settings that were removed since, and sections
        that the row lacks.
        """
        if (row["split"], row["masks_given"]) != (self.split, variant.masks):
            return False
        expected = json.loads(json.dumps(_resolved(self.config(variant.settings, seed, self.folder))))
        defaults = json.loads(json.dumps(_resolved(Config())))
        had = row["resolved"]
        for section in had.keys() & expected.keys():
            value = expected[section]
            if not isinstance(value, dict):
                if had[section] != value:
                    return False
            elif any(
                _without_none(had[section].get(name, defaults[section][name])) != _without_none(setting)
                for name, setting in value.items()
            ):
                return False
        return True

    def same_base(self, row: dict[str, Any]) -> bool:
        """Return whether `row` compares with the same results of the base model."""
        before = {f"at {scale:g}": result.headline() for scale, result in self.before.items()}
        return all(scale in row and row[scale]["before"] == headline for scale, headline in before.items())

    def measure(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Train a variant with one seed; return a row with its gains and the metrics of its pairs and masks.

        The rows of `DETAILED` also have the comparisons of `further`.
        """
        folder, model, seconds = self.trained(variant, seed)
        compared: dict[str, Any] = {
            f"at {scale:g}": _compare(before, self.evaluate_headline(model, scale))
            for scale, before in self.before.items()
        }
        compared[_comparison.SCENERY] = _compare(self.dense_before, self.evaluate_dense(model))
        if variant.name in DETAILED and self.split == "test":
            compared |= self.further(model)
        config = self.config(variant.settings, seed, folder)
        folders = [Pipeline(config, progress=False).folder(n) for n in range(1, config.iterations + 1)]
        last = folders[-1]
        selected = read_stage(last, "select") if store_paths(last, "select") else []
        pairs = demo.pair_metrics(selected, last, self.world)
        masked = (last / "masks.jsonl").exists()
        masks = demo.mask_metrics(read_stage(last, "masks"), last, self.world) if masked else {}
        done = json.loads((last / "train" / "done.json").read_text())
        log = [json.loads(line) for line in (last / "train" / "log.jsonl").read_text().splitlines()]
        watched = [[line["step"], round(line["alignment"], 4)] for line in log if "alignment" in line]
        budget = _budget(config, folders)
        shutil.rmtree(folder)
        once = measure.timing_of([seconds * 1e3])
        return measure.row(
            "ospo",
            variant.name,
            {"per_kind": self.per_kind, "pairs": pairs["pairs"]},
            measure.dtype_name(model.dtype),
            once,
            settings=list(variant.settings),
            masks_given=variant.masks,
            resolved=_resolved(config),
            split=self.split,
            seed=seed,
            sampling=list(self.sampling),
            guidance_scale=self.scale,
            best_step=done["best_step"],
            **budget,
            watched=watched,
            **compared,
            **pairs,
            **masks,
        )


def _budget(config: Config, folders: Sequence[Path]) -> dict[str, float]:
    """Return the images that were generated for training, and the operations of all stages that the method needs."""
    needed = [stage.name for stage in STAGES if stage.in_run(config) and stage.enabled(config)]
    metrics = stage_metrics(*folders)
    images = int(metrics["images"].get("images") or 0) if "images" in needed else 0
    if group := loss_config(config).group_size:
        images = metrics["train"]["items"] * config.train.batch_size * config.train.accumulation * group
    return {"train_images": images, "tflop": round(sum(metrics[name].get("flops") or 0 for name in needed) / 1e12, 2)}


def _compare(before: evaluate.AlignmentResult, after: evaluate.AlignmentResult) -> dict[str, Any]:
    return {
        "before": before.headline(),
        "after": after.headline(),
        "gain": after.gain(before),
        **_compare_kinds(before, after),
    }


def _compare_kinds(before: evaluate.AlignmentResult, after: evaluate.AlignmentResult) -> dict[str, Any]:
    return {
        "kinds_gain": after.gain_by_kind(before),
        "unreadable_before": _unreadable(before),
        "unreadable": _unreadable(after),
        "kinds_before": {kind: value["alignment"] for kind, value in before.by_kind().items()},
        "kinds": {kind: value["alignment"] for kind, value in after.by_kind().items()},
        "right": {kind: after.correct[rows].sum(1).tolist() for kind, rows in _rows(after).items()},
        "meanings": {kind: after.clusters(kind) for kind in _rows(after)},
    }


def _rows(result: evaluate.AlignmentResult) -> dict[str, list[int]]:
    """Return the numbers of the prompts of each kind."""
    return {kind: [n for n, k in enumerate(result.kinds) if k == kind] for kind in dict.fromkeys(result.kinds)}


def _unreadable(result: evaluate.AlignmentResult) -> float:
    """Return the share of images with a shape that the checker does not know, noise included."""
    world = next(world for world in WORLDS.values() if (world.image_size,) * 2 == result.images[0].size)
    found = [any(thing.shape == UNKNOWN for thing in detect(image, world).objects) for image in result.images]
    return round(float(np.mean(found)), 4)


def _resolved(config: Config) -> dict[str, Any]:
    """The sections that variants differ in, with defaults."""
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in (*STAGE_NAMES, "evaluate")}
    del sections["prompts"]["exclude"]
    return {"preset": config.preset, "iterations": config.iterations, **sections}


def _without_none(value: Any) -> Any:
    """A mapping without unset entries; any other value unchanged."""
    return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, dict) else value


def replace_masks(folder: Path, kind: str, world: World) -> None:
    """Replace the unions in the mask files of a run."""
    for pair_id, _, pair in iter_pairs(read_stage(folder, "masks")):
        if not pair.get("mask_path"):
            continue
        path = folder / pair["mask_path"]
        tensors = load_file(path)
        rng = np.random.default_rng(stable_hash(pair_id))
        for side in ("chosen", "rejected"):
            union = tensors[f"{side}_union"]
            if kind == "true":
                cells = demo.object_cells(Image.open(folder / str(pair[side])), union.shape, world)
                mask = np.zeros_like(union) if cells is None else cells
            elif kind == "ones":
                mask = np.ones_like(union)
            else:
                mask = rng.permutation(union.ravel()).reshape(union.shape)
            tensors[f"{side}_union"] = np.ascontiguousarray(mask, dtype=union.dtype)
        save_file(tensors, path)


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def run(out: Path, quick: bool) -> None:
    _table(TABLE[:3] if quick else TABLE, SEEDS[:1] if quick else SEEDS, out, quick=quick)


def _table(
    table: Sequence[Variant],
    seeds: Sequence[int],
    out: Path,
    *,
    quick: bool = False,
    kept: Path | None = None,
    world: World = SHAPES_WORLD,
    of: Table = ABLATIONS,
) -> None:
    """Measure the variants of a table with every seed; their rows replace older ones in the results.

    Rows of other variants stay if they compare with the same results of the base model and have the current settings
    of their variant. `kept` is the folder of the runs; None: a temporary one.
    """
    name = of.name + "-quick" * quick
    path = measure.result_path(out, name)
    with _folder(kept) as folder:
        bench = Bench(
            folder, split="test", per_kind=2 if quick else PER_KIND, extra=QUICK if quick else (), world=world
        )
        rows = _comparison.read_rows(path) if path.exists() else []
        variants = {variant.name: variant for variant in of.variants}
        rows = _in_order(
            (
                row
                for row in rows
                if row["variant"] in variants
                and bench.same_base(row)
                and bench.same_settings(variants[row["variant"]], row["seed"], row)
            ),
            of,
        )
        for variant in table:
            for seed in seeds:
                older = [row for row in rows if (row["variant"], row["seed"]) == (variant.name, seed)]
                if any(bench.measured(variant, seed, row) for row in older):
                    continue
                others = [row for row in rows if row not in older]
                rows = _in_order([*others, bench.measure(variant, seed)], of)
                measure.write(rows, out, name)
    _show(rows, of, path)


def _in_order(rows: Iterable[dict[str, Any]], table: Table) -> list[dict[str, Any]]:
    """Rows of the table's variants, in its order; rows of other variants are dropped."""
    names = [variant.name for variant in table.variants]
    return sorted(
        (row for row in rows if row["variant"] in names), key=lambda r: (names.index(r["variant"]), r["seed"])
    )


def _show(rows: list[dict[str, Any]], table: Table, path: Path) -> None:
    """Print and plot rows of a table."""
    _comparison.check(rows, path)
    best = f"at {rows[0]['guidance_scale']:g}"
    print(*_comparison.gains(rows), sep="\n")
    print("", *_comparison.table(rows, table.reference, best), sep="\n")
    for key in (best, _comparison.SCENERY):
        print(
            f"\n{key}, gain of each kind; minus {table.reference}",
            *_comparison.kinds(rows, table.reference, key),
            sep="\n",
        )
    _comparison.plot(rows, path.with_suffix(".png"), emphasis=TABLE[0].name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of a variant of the table (or all), or of a trial")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE of the configuration")
    parser.add_argument(
        "--table",
        nargs="?",
        const="ablations",
        choices=("ablations", "methods"),
        help="measure variant NAME of a table, or all, on test prompts",
    )
    parser.add_argument("--plot", action="store_true", help="print and plot the existing rows; NAME is all")
    parser.add_argument("--masks", choices=("true", "ones", "random"), help="masks in place of the model's")
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds (table: 42 43 44, trial: 42)")
    parser.add_argument(
        "--per-kind", type=int, default=100, help="validation prompts of each headline kind, for a trial"
    )
    parser.add_argument("--sampling", type=int, help="number of sampling seeds of a trial (6); the table has two")
    parser.add_argument("--folder", type=Path, help="folder to keep the runs of stages 1 to 4 in")
    parser.add_argument("--world", choices=WORLDS, default="shapes", help="the world, and its embedded model")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    world = WORLDS[options.world]
    table = TABLES[world.name][options.table or "ablations"]
    if options.plot:
        if options.name != "all" or options.settings or options.masks or options.sampling or options.seeds:
            parser.error("--plot: expected the name all, and no settings, --masks, --sampling or --seeds")
        path = measure.result_path(options.out, table.name)
        if not path.exists():
            parser.error(f"--plot: {path} does not exist; measure with --table first")
        rows = _in_order(_comparison.read_rows(path), table)
        if not rows:
            raise UsageError(f"{path} has no rows of this table; measure them with --table.")
        _show(rows, table, path)
        return
    if options.table:
        named = [variant for variant in table.variants if options.name in (variant.name, "all")]
        if not named or options.settings or options.masks or options.sampling:
            known = ", ".join(repr(variant.name) for variant in table.variants)
            parser.error(
                f"--table: got {options.name!r}, expected all or one of {known}, and no settings, --masks or --sampling"
            )
        _table(named, options.seeds or SEEDS, options.out, kept=options.folder, world=world, of=table)
        return
    if options.sampling is not None and options.sampling < 1:
        parser.error(f"--sampling: got {options.sampling}, expected 1 or more")
    variant = replace(Variant(options.name), settings=tuple(options.settings), masks=options.masks)
    load_config(variant.settings, family=world.name)  # wrong ones are refused before anything is measured
    with _folder(options.folder) as folder:
        sampling = tuple(range(6 if options.sampling is None else options.sampling))
        bench = Bench(folder, split="validation", per_kind=options.per_kind, sampling=sampling, world=world)
        rows = []
        trials = options.out / world.name / "trials.jsonl"
        trials.parent.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds or SEEDS[:1]:
            rows.append(bench.measure(variant, seed))
            with trials.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    for line in _comparison.gains(rows):
        print(line)


if __name__ == "__main__":
    try:
        main()
    except OspoError as error:
        sys.exit(str(error))

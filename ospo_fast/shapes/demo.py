"""`ospo-fast demo`: all of OSPO in the Shapes world, evaluated before and after by the rule of `evaluate.py`.

The stages run through `pipeline`, as in any other run. This module evaluates the model before and after them and writes
the summary. Finished work is kept in the run folder, so that an interrupted demo resumes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ospo_fast import restarts
from ospo_fast.config import Config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.files import locate, no_link, open_image, regular
from ospo_fast.generation import ImageGenerator
from ospo_fast.models import open_model
from ospo_fast.models.base import UnifiedModel
from ospo_fast.ops.object_masks import mask_iou
from ospo_fast.pipeline import Pipeline, read_stage, stage_metrics
from ospo_fast.records import (
    Record,
    delete,
    discard,
    iter_pairs,
    os_errors,
    parse_json,
    read_json,
    shown,
    sweep_temporary_files,
    sync_folder,
    write_atomic,
    write_json,
)
from ospo_fast.report import write_report
from ospo_fast.shapes import evaluate
from ospo_fast.shapes.checker import detect, satisfies
from ospo_fast.shapes.commands import saved_held_out_prompts
from ospo_fast.shapes.evaluate import HEADLINE, AlignmentResult
from ospo_fast.shapes.scenes import SHAPES_WORLD, World, parse
from ospo_fast.stages import STAGE_NAMES
from ospo_fast.stages.image_files import encode_png
from ospo_fast.stages.masks import load_unions
from ospo_fast.stats import standard_error
from ospo_fast.versions import run_versions

SEEDS_NOTE = (
    "evaluation uses the sampling seeds, evaluate.seeds, and never the training seed, so that runs of different seeds "
    "are compared image by image"
)
GALLERY = 6  # prompts of each headline kind in the gallery
MAX_LINE = 2**20  # bytes of the first line of a training log
# bench/results/amd-epyc/demo.jsonl: 316.6 s on an idle machine, where 11588 images took 61.8 s of the images stage.
DEMO_IMAGES = 316.6 / 61.8 * 11588  # images that could be generated in the time of the default demo
DEMO_MB = 120  # of its finished run folder, by du -sb
CALIBRATION = 96  # images: about half a second on that machine


def run(
    config: Config,
    *,
    resume: bool = True,
    progress: bool = True,
    lock: restarts.RunLock | None = None,
    announce: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Evaluate the base model, run the stages, evaluate the tuned model. Writes summary.json and report/.

    `alignment_std` is the standard error of the gain. `iterations` has the metrics of pairs, masks and stages of every
    iteration. At the top level, metrics of pairs and masks are those of the last iteration, and those of the stages are
    sums over all iterations (maxima of memory).

    The guidance scale of the comparison is the best one of `evaluate.guidance_scales` for the base model on validation
    prompts. Both models are also evaluated without guidance, at scale 1.

    Args:
        config: of a run on a model of the Shapes world. `prompts.exclude` is set, in place, to the held-out prompts.
        resume: continue from the content of the run folder. False: start over; the old results go when the new ones are
            whole. A demo that starts over and was interrupted is continued by the same call with `resume=True`.
        progress: show progress bars on stderr.
        lock: that of the run folder, if the caller holds it.
        announce: called once with the expected time and disk space, before the first evaluation.

    Returns:
        The content of summary.json.

    Raises:
        UsageError: another `evaluate.split` than test, or training in the run folder was validated at another scale.
        OspoError, UsageError: as the stages do.

    """
    started = time.perf_counter()
    if config.evaluate.split != "test":
        raise UsageError(
            f"evaluate.split: got {config.evaluate.split!r}, expected 'test'; the demo chooses the guidance scale on "
            "validation prompts and compares on test prompts, so delete the setting or use `ospo-fast evaluate`."
        )
    with os_errors("read", Path(config.out)):
        base = open_model(config)
        pipeline = Pipeline(config, resume=resume, progress=progress, model=base, lock=lock)
        pipeline.evaluation = evaluate.build_validation(config.evaluate, 1.0)  # its scale is chosen below
        pipeline.prepare(stages=STAGE_NAMES)  # a wrong request fails before anything is written
        with pipeline.using() as held:  # two demos would delete each other's evaluations
            if announce is not None:
                announce(estimate(base, config))
            held.begin()
            return _run(pipeline, base, started)


def estimate(model: UnifiedModel, config: Config) -> str:
    """Say how long a demo with the default settings takes here, and the disk space of its run folder.

    The time is that of generating images, measured twice, times a constant of a recorded run.
    """
    world = evaluate.world_of(model)
    prompts = evaluate.select_prompts("validation", CALIBRATION, world=world)[:CALIBRATION]
    ids = [model.image_prompt(description.text) for _, description in prompts]
    generator = ImageGenerator(model, batch_size=config.images.batch_size)
    seconds = []
    with torch.random.fork_rng():
        for _ in range(2):
            started = time.perf_counter()
            generator.generate(ids, seeds=range(len(ids)), output="codes", progress=False, on_error="skip")
            seconds.append(time.perf_counter() - started)
    minutes = max(1, round(min(seconds) / len(ids) * DEMO_IMAGES / 60))
    bound = "at most about" if (Path(config.out) / "config.yaml").exists() else "about"  # what is finished is kept
    unit = "minute" if minutes == 1 else "minutes"
    return (
        f"The demo with its default settings takes {bound} {minutes} {unit} on this machine and {DEMO_MB} MB in "
        f"{config.out}."
    )


def _run(pipeline: Pipeline, base: UnifiedModel, started: float) -> dict[str, Any]:
    config, out = pipeline.config, pipeline.folder()
    with saved_held_out_prompts(out / "held_out.txt", config.model):
        config.prompts.exclude = str(out / "held_out.txt")
        pipeline.prepare()
        over = pipeline.check_run(STAGE_NAMES)  # before an unfinished start is deleted
    if not pipeline.resume:
        pipeline.begin_over()
    results = _Evaluations(pipeline, over=over)
    pipeline.resume = pipeline.resume or over  # which has begun: a process that is killed from here on is continued
    scale, scales = results.guidance("base", base)
    folders = [pipeline.folder(n) for n in range(1, config.iterations + 1)]
    if not over:  # else these folders have the training that is replaced
        _check_validation_scale(folders, scale)
    before = results.alignment("base", base, sorted({1.0, scale}))
    vqa = results.get("vqa_rendered", base, lambda: evaluate.evaluate_answers(base, progress=pipeline.progress))
    own = results.get(
        "vqa_own", base, lambda: evaluate.evaluate_own_answers(base, before[scale], progress=pipeline.progress)
    )

    pipeline.evaluation = evaluate.build_validation(config.evaluate, scale)
    pipeline.run(STAGE_NAMES)  # masks are measured even where training uses those of the policy

    tuned = pipeline.model(config.iterations + 1)
    own_scale, own_scales = results.guidance("tuned", tuned)
    after = results.alignment("tuned", tuned, sorted({1.0, scale, own_scale}))
    old, new, gain = before[scale].headline(), after[scale].headline(), after[scale].gain(before[scale])
    world = evaluate.world_of(base)
    iterations = [
        {"iteration": n, **stage_outcome(folder, world, masks=config.masks.enabled), "stages": stage_metrics(folder)}
        for n, folder in enumerate(folders, 1)
    ]
    summary = {
        "alignment_before": old["alignment"],
        "alignment_after": new["alignment"],
        "alignment_std": gain["standard_error"],
        "alignment_gain": gain["alignment"],
        "alignment_before_std": old["standard_error"],
        "alignment_after_std": new["standard_error"],
        "seeds": {"training": [config.seed], "sampling": list(config.evaluate.seeds), "note": SEEDS_NOTE},
        "vqa_accuracy": vqa["all"],
        "vqa_by_kind": {kind: vqa[kind] for kind in evaluate.QUESTION_KINDS},
        "vqa_accuracy_own_drawings": own["all"],
        **{name: value for name, value in iterations[-1].items() if name not in ("iteration", "stages")},
        "iterations": iterations,
        "evaluation": {
            "rule": " ".join((evaluate.__doc__ or "").split()),
            "headline_kinds": list(HEADLINE),
            "guidance_scale": scale,
            "validation": {"before": scales, "after": own_scales},
            "before": {str(s): result.headline() for s, result in before.items()},
            "after": {str(s): result.headline() for s, result in after.items()},
            "each_at_its_best": {
                "guidance_before": scale,
                "guidance_after": own_scale,
                "before": old["alignment"],
                "after": after[own_scale].headline()["alignment"],
            },
            "by_kind": _by_kind(before[scale], after[scale]),
        },
        "stages": stage_metrics(*folders),
        "versions": run_versions(),
    }
    write_gallery(results.folder, before[scale], after[scale])
    summary["seconds"] = round(results.add_seconds(time.perf_counter() - started), 1)
    results.put_in_place()
    write_json(out / "summary.json", summary)
    write_report(out)
    return summary


def _check_validation_scale(folders: Sequence[Path], scale: float) -> None:
    """Raise UsageError if training in one of the folders was validated, for early stopping, at another scale."""
    for path in (folder / "train" / "log.jsonl" for folder in folders):
        try:
            with regular(no_link(path)).open("rb") as file:
                before = parse_json(file.readline(MAX_LINE))["guidance_scale"]
        except (OSError, ValueError, KeyError, TypeError):  # no training yet, none with an evaluation, or a torn line
            continue
        if not _is_number(before):
            raise OspoError(
                f"{path}, line 1: `guidance_scale` should be a number of 0 or more, got {shown(before)}; start over "
                "with --no-resume."
            )
        if before != scale:
            raise UsageError(
                f"evaluate.guidance_scales: got scales of which {scale:g} is best for the base model, expected scales "
                f"of which {before:g} is, because training in {path.parent} selected its best step at that scale; use "
                "the same scales, use another --out, or start over with --no-resume. (`ospo-fast train` selects at "
                "images.guidance_scale.)"
            )


_UNFINISHED = "config.yaml"  # in a folder of evaluations that starts over


class _Evaluations:
    """Results of evaluations, kept in `evaluation/` so that a resumed demo does not compute them again.

    The name of a file ends in a digest of the weights and settings that it belongs to. A demo that starts over writes
    to a hidden folder, which takes the place of `evaluation/` at the end; its config.yaml tells who continues it.

    Raises OspoError for a broken file and for links among the folders.
    """

    def __init__(self, pipeline: Pipeline, *, over: bool) -> None:
        settings, out = pipeline.config.evaluate, pipeline.folder()
        self.scales = [float(scale) for scale in settings.guidance_scales]
        self.options: dict[str, Any] = {
            "per_kind": settings.per_kind, "seeds": list(settings.seeds), "batch_size": settings.batch_size
        }  # fmt: skip
        self.progress = pipeline.progress
        self._place, work = out / "evaluation", out / f"{restarts.PREFIX}.evaluation"
        for folder in (self._place, work):
            restarts.refuse_links(folder)
            sweep_temporary_files(folder, "**/.*.tmp")
        (self._place / _UNFINISHED).unlink(missing_ok=True)  # of a process that was killed in `put_in_place`
        continues = pipeline.resume and pipeline.continues(work)
        begins = not continues and (over or not pipeline.resume)  # or a process was killed before it did
        self.starts_over = continues or (begins and (over or self._place.exists()))
        self.folder = work if self.starts_over else self._place
        if begins:
            discard(work)
        for path in sorted(self.folder.glob("*.json")):  # a broken one is found before anything is evaluated
            self._read(path)
        if self.starts_over and not work.exists():
            pipeline.save_config(work)

    def put_in_place(self) -> None:
        """Let the results of a demo that starts over, which are whole, replace the old ones."""
        if self.starts_over:
            with os_errors("replace", self._place):
                self.folder.stat()  # the old results stay where there are no new ones
                delete(self._place)  # a process that is killed here leaves the new results, to be continued
                self.folder.replace(self._place)
                sync_folder(self._place.parent)
                delete(self._place / _UNFINISHED)
            self.folder, self.starts_over = self._place, False

    @staticmethod
    def _read(path: Path) -> Any:
        """Return the content of a JSON file. Raises OspoError unless it has the form that its name tells."""
        value, name = read_json(path, None), path.stem.rpartition("-")[0] or path.stem
        known = next((form for ending, form in _FORMS.items() if name.endswith(ending)), None)
        if known is not None and not known[1](value):
            raise OspoError(f"{path}: got {shown(value)}, expected {known[0]}; delete the file to evaluate again.")
        return value

    def _path(self, name: str, model: UnifiedModel, ending: str) -> Path:
        # The guidance scales decide at which of them the model's own images are made that it answers questions about.
        digest = hashlib.sha256(repr((self.scales, self.options)).encode())
        for key, tensor in sorted(model.module.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return self.folder / f"{name}-{digest.hexdigest()[:12]}.{ending}"

    def get(self, name: str, model: UnifiedModel, compute: Callable[[], Any]) -> Any:
        """Return a result that JSON can hold."""
        path = self._path(name, model, "json")
        if path.exists():
            return self._read(path)
        write_json(path, compute())
        return read_json(path, None)

    def guidance(self, name: str, model: UnifiedModel) -> tuple[float, dict[str, dict[str, float]]]:
        """Return the model's best guidance scale on validation prompts, and the headline at every scale."""
        best, found = self.get(
            f"{name}_guidance",
            model,
            lambda: evaluate.choose_guidance(model, self.scales, **self.options, progress=self.progress),
        )
        return best, found

    def alignment(self, name: str, model: UnifiedModel, scales: Sequence[float]) -> dict[float, AlignmentResult]:
        """Return the results on test prompts at each guidance scale."""
        world = evaluate.world_of(model)
        selected = evaluate.select_prompts("test", self.options["per_kind"], world=world)
        kinds, prompts = zip(*((kind, description.text) for kind, description in selected), strict=True)
        expected = "test", tuple(self.options["seeds"]), kinds, prompts
        found = {}
        for scale in scales:
            path = self._path(f"{name}_{scale}", model, "npz")
            if not no_link(path).exists():
                result = evaluate.evaluate_alignment(
                    model, guidance_scale=scale, **self.options, progress=self.progress
                )
                result.save(path)
            result = AlignmentResult.load(path)
            if (result.split, result.seeds, result.kinds, result.prompts, result.guidance_scale) != (*expected, scale):
                raise OspoError(
                    f"{path} holds an evaluation of other prompts, seeds or guidance than its name tells, or of other "
                    "kinds of prompts; delete the file to evaluate again."
                )
            found[scale] = result
        return found

    def add_seconds(self, seconds: float) -> float:
        """Return the seconds of this call and of those before it."""
        path = self.folder / "seconds.json"
        before = self._read(path) if path.exists() else 0.0
        write_json(path, before + seconds)
        return float(before + seconds)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e15


def _are_metrics(value: object, names: Sequence[str]) -> bool:
    """Return whether all of `names` are numbers. A mean of nothing is saved as null."""
    return isinstance(value, dict) and all(name in value for name in names) and all(
        inner is None or _is_number(inner) for inner in value.values()
    )  # fmt: skip


def _is_guidance(value: object) -> bool:
    if not (isinstance(value, list) and len(value) == 2 and _is_number(value[0]) and isinstance(value[1], dict)):
        return False
    best, scales = value
    return str(float(best)) in scales and all(_are_metrics(row, ["alignment"]) for row in scales.values())


# What a file of `evaluation/` whose name ends so holds, in words and as a check.
_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "_guidance": ("the best guidance scale and the metrics at every scale", _is_guidance),
    "vqa_rendered": (
        "the accuracy of all answers and of each kind",
        lambda value: _are_metrics(value, ["all", *evaluate.QUESTION_KINDS]),
    ),
    "vqa_own": ("the accuracy of all answers", lambda value: _are_metrics(value, ["all"])),
    "seconds": ("a number of seconds", _is_number),
}


def _by_kind(before: AlignmentResult, after: AlignmentResult) -> dict[str, dict[str, float]]:
    old, new = before.by_kind(), after.by_kind()
    return {
        kind: {
            "before": old[kind]["alignment"],
            "after": new[kind]["alignment"],
            "before_std": old[kind]["standard_error"],
            "after_std": new[kind]["standard_error"],
            "n": int(old[kind]["prompts"]),
        }
        for kind in old
    }


def stage_outcome(folder: Path, world: World = SHAPES_WORLD, *, masks: bool) -> dict[str, Any]:
    """Return the metrics of the pairs and masks of an iteration's folder, and which weights training kept."""
    pairs = pair_metrics(read_stage(folder, "select"), folder, world)
    found = mask_metrics(read_stage(folder, "masks"), folder, world) if masks else {"mask_iou": None}
    return {**pairs, **found, "kept": read_json(folder / "train" / "done.json", {}).get("kept")}


def pair_metrics(records: Sequence[Record], out: Path, world: World = SHAPES_WORLD) -> dict[str, Any]:
    """Return the number of pairs, and the shares of them that the checker finds right.

    `pair_purity`: chosen right and rejected wrong. A prompt that is not of the Shapes grammar counts as impure.
    """
    pairs = [(number, pair) for number, record in enumerate(records) for pair in iter_pairs([record])]
    right = [_satisfied(locate(pair["chosen"], out), record["prompt"], world) for _, (_, record, pair) in pairs]
    wrong = [not _satisfied(locate(pair["rejected"], out), record["prompt"], world) for _, (_, record, pair) in pairs]
    pure, items = [r and w for r, w in zip(right, wrong, strict=True)], [number for number, _ in pairs]
    return {
        "pairs": len(pairs),
        "pair_purity": _mean(pure),
        "pair_purity_std": standard_error(pure, items) if pure else None,
        "chosen_right": _mean(right),
        "rejected_wrong": _mean(wrong),
    }


def _satisfied(path: Path, prompt: str, world: World) -> bool:
    return parse(prompt, world) is not None and satisfies(open_image(path), prompt, world)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def object_cells(image: Image.Image, grid: tuple[int, int], world: World = SHAPES_WORLD) -> np.ndarray | None:
    """Return the cells (H, W) of `grid` (rows, columns) that detected objects cover to an eighth or more, or None.

    A small object in the middle of its board position is on the corner of four cells and covers a fifth of each. With a
    limit of a quarter it would have no cell.
    """
    masks = [thing.mask for thing in detect(image, world).objects]
    if not masks:
        return None
    pixels = np.any(masks, axis=0)
    (rows, columns), (height, width) = grid, pixels.shape
    if height % rows or width % columns:
        raise OspoError(
            f"object_cells: the image has {width} x {height} pixels, expected a multiple of {columns} x {rows}; give "
            "an image and masks of the same model."
        )
    covered: np.ndarray = pixels.reshape(rows, height // rows, columns, width // columns).mean(axis=(1, 3)) >= 0.125
    return covered


def mask_metrics(records: Sequence[Record], out: Path, world: World = SHAPES_WORLD) -> dict[str, Any]:
    """Return the mean IoU of the chosen images' masks with the true objects, and that of masks of the whole image."""
    ious, ones, items = [], [], []
    for number, item in enumerate(records):
        for _, _, pair in iter_pairs([item]):
            if not pair.get("mask_path"):
                continue
            union = load_unions(pair, out, soft=False)[0]
            image = open_image(locate(pair["chosen"], out))
            cells = object_cells(image, (union.shape[0], union.shape[1]), world)
            if cells is None:
                continue
            ious.append(mask_iou(union, torch.from_numpy(cells)) or 0.0)
            ones.append(cells.mean())
            items.append(number)
    return {
        "mask_iou": _mean(ious),
        "mask_iou_std": standard_error(ious, items) if ious else None,
        "mask_iou_all_ones": _mean(ones),
    }


def write_gallery(folder: Path, before: AlignmentResult, after: AlignmentResult) -> None:
    """Write gallery.jsonl and its images to a folder that is, or will be, `evaluation/` of a run folder.

    It holds the first prompts of each kind, with the first seed.
    """
    lines = []
    taken: dict[str, int] = {}
    for index, (kind, prompt) in enumerate(zip(before.kinds, before.prompts, strict=True)):
        taken[kind] = taken.get(kind, 0) + 1
        if taken[kind] > (GALLERY if kind in HEADLINE else 2):
            continue
        line: dict[str, Any] = {"prompt": prompt, "kind": kind}
        for name, result in (("before", before), ("after", after)):
            path = f"images/{index:04d}_{name}.png"
            write_atomic(folder / path, encode_png(result.images[index * len(result.seeds)]))
            line[name] = {"path": f"evaluation/{path}", "correct": bool(result.correct[index, 0])}
        lines.append(json.dumps(line))
    write_atomic(folder / "gallery.jsonl", ("\n".join(lines) + "\n").encode())

"""`ospo-fast demo`: all of OSPO in the Shapes world, measured before and after by the rule of `evaluate.py`.

The stages are those of any other run, through `pipeline`; this module evaluates around them and sums up. Whatever is
finished is kept in the run folder, so a stopped demo goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

from ospo_fast._version import __version__
from ospo_fast.config import Config, EvaluateConfig
from ospo_fast.models import load_model
from ospo_fast.models.base import UnifiedModel
from ospo_fast.pipeline import Pipeline, read_stage, stage_metrics
from ospo_fast.records import Record, iter_pairs, write_atomic, write_json
from ospo_fast.report import write_report
from ospo_fast.shapes import evaluate
from ospo_fast.shapes.checker import detect, satisfies
from ospo_fast.shapes.evaluate import HEADLINE, AlignmentResult
from ospo_fast.shapes.scenes import held_out_prompts, parse
from ospo_fast.stages import STAGE_NAMES
from ospo_fast.stages.image_files import encode_png, open_image

logger = logging.getLogger(__name__)

SEEDS = (
    "evaluation draws with the sampling seeds, evaluate.seeds, whatever the training seed, so that runs are compared "
    "drawing by drawing"
)
GALLERY = 6  # drawings of each headline kind shown before and after


def run(config: Config, *, resume: bool = True, progress: bool = True) -> dict[str, Any]:
    """Base evaluation, the stages, tuned evaluation; writes summary.json and report/, returns the summary.

    `alignment_std` is the standard error of the gain; those of before and after stand beside them. `iterations` has the
    figures of pairs, masks and stages of every iteration; those of pairs and masks at the top are the last one's, those
    of the stages the sums (of memory, the largest) over all. Evaluation draws with `evaluate.seeds` whatever the seed
    of the run is.

    Args:
        config: of a run; `model` must be one of the Shapes world. `prompts.exclude` is set to the held-out prompts, in
            place.
        resume: go on with what the run folder holds.
        progress: bars on stderr.

    Raises:
        OspoError, UsageError: as the stages do.

    """
    started = time.perf_counter()
    out = Path(config.out)
    base = load_model(config.model, device=config.device, dtype=config.dtype)
    pipeline = Pipeline(config, resume=resume, progress=progress, model=base)
    pipeline.prepare()  # what is asked for wrongly is said before anything is drawn or written
    write_atomic(out / "held_out.txt", ("\n".join(held_out_prompts()) + "\n").encode())
    config.prompts.exclude = str(out / "held_out.txt")
    pipeline.prepare()
    figures = _Figures(out / "evaluation", config.evaluate, resume=resume)
    scale, scales = figures.guidance("base", base, progress)
    before = figures.drawings("base", base, sorted({1.0, scale}), progress)
    vqa = figures.get("vqa_rendered", base, lambda: evaluate.evaluate_answers(base, progress=progress))
    own = figures.get("vqa_own", base, lambda: evaluate.evaluate_own_answers(base, before[scale], progress=progress))

    pipeline.evaluation = evaluate.build_validation(config.evaluate, scale)
    pipeline.run(STAGE_NAMES)  # the figures of the masks are wanted even where training takes its own

    tuned = pipeline.model(config.iterations + 1)
    own_scale, own_scales = figures.guidance("tuned", tuned, progress)
    after = figures.drawings("tuned", tuned, sorted({1.0, scale, own_scale}), progress)
    base_own = before[scale]
    folders = [pipeline.folder(n) for n in range(1, config.iterations + 1)]
    iterations = [
        {"iteration": n, **stage_outcome(folder, masks=config.masks.enabled), "stages": stage_metrics(folder)}
        for n, folder in enumerate(folders, 1)
    ]
    summary = {
        "alignment_before": before[scale].headline()["alignment"],
        "alignment_after": after[scale].headline()["alignment"],
        "alignment_std": after[scale].gain(before[scale])["standard_error"],
        "alignment_gain": after[scale].gain(before[scale])["alignment"],
        "alignment_before_std": before[scale].headline()["standard_error"],
        "alignment_after_std": after[scale].headline()["standard_error"],
        "seeds": {"training": [config.seed], "sampling": list(config.evaluate.seeds), "note": SEEDS},
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
            "before": {str(s): d.headline() for s, d in before.items()},
            "after": {str(s): d.headline() for s, d in after.items()},
            "each_at_its_best": {
                "guidance_before": scale,
                "guidance_after": own_scale,
                "before": base_own.headline()["alignment"],
                "after": after[own_scale].headline()["alignment"],
            },
            "by_kind": _by_kind(before[scale], after[scale]),
        },
        "stages": stage_metrics(*folders),
        "versions": _versions(),
    }
    write_gallery(out, before[scale], after[scale])
    summary["seconds"] = round(figures.add_seconds(time.perf_counter() - started), 1)
    write_json(out / "summary.json", summary)
    write_report(out)
    return summary


class _Figures:
    """Results of evaluations, kept in a folder so that a resumed demo does not draw again.

    A file's name ends in a digest of the weights and of the settings, so that it is used for nothing else.
    """

    def __init__(self, folder: Path, settings: EvaluateConfig, *, resume: bool) -> None:
        self.folder, self.settings = folder, settings
        if not resume:
            for path in folder.glob("*.*"):
                path.unlink()

    def _path(self, name: str, model: UnifiedModel, ending: str) -> Path:
        digest = hashlib.sha256(repr((self.settings.per_kind, list(self.settings.seeds))).encode())
        for key, tensor in sorted(model.module.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return self.folder / f"{name}-{digest.hexdigest()[:12]}.{ending}"

    def get(self, name: str, model: UnifiedModel, make: Callable[[], Any]) -> Any:
        path = self._path(name, model, "json")
        if not path.exists():
            write_json(path, make())
        return json.loads(path.read_text(encoding="utf-8"))

    def guidance(self, name: str, model: UnifiedModel, progress: bool) -> tuple[float, dict[str, dict[str, float]]]:
        """The model's best guidance scale on validation prompts, and the headline at each."""

        def make() -> list[Any]:
            best, found = evaluate.choose_guidance(
                model, per_kind=self.settings.per_kind, seeds=self.settings.seeds, progress=progress
            )
            return [best, {str(scale): figures for scale, figures in found.items()}]

        best, found = self.get(f"{name}_guidance", model, make)
        return best, found

    def drawings(
        self, name: str, model: UnifiedModel, scales: Sequence[float], progress: bool
    ) -> dict[float, AlignmentResult]:
        """Test prompts drawn at each guidance scale."""
        found = {}
        for scale in scales:
            path = self._path(f"{name}_{scale}", model, "npz")
            if not path.exists():
                settings = self.settings
                evaluate.evaluate_alignment(
                    model, per_kind=settings.per_kind, guidance_scale=scale, seeds=settings.seeds, progress=progress
                ).save(path)
            found[scale] = AlignmentResult.load(path)
        return found

    def add_seconds(self, seconds: float) -> float:
        """The seconds of this call and of those before it."""
        path = self.folder / "seconds.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else 0.0
        write_json(path, before + seconds)
        return float(before + seconds)


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


def stage_outcome(folder: Path, *, masks: bool) -> dict[str, Any]:
    """The figures of the pairs and of the masks that lie in the folder of an iteration."""
    pairs = pair_figures(read_stage(folder, "select"), folder)
    return pairs | (mask_figures(read_stage(folder, "masks"), folder) if masks else {"mask_iou": None})


def pair_figures(records: Sequence[Record], out: Path) -> dict[str, Any]:
    """`pairs`; `pair_purity`: chosen right and rejected wrong, by the checker; the shares of either by itself.

    A pair whose prompt is no prompt of the Shapes grammar counts as impure.
    """
    kept = list(iter_pairs(records))
    items = [number for number, record in enumerate(records) for _ in iter_pairs([record])]
    right = [_shows(out / item.pair["chosen"], item.record["prompt"]) for item in kept]
    wrong = [not _shows(out / item.pair["rejected"], item.record["prompt"]) for item in kept]
    pure = [r and w for r, w in zip(right, wrong, strict=True)]
    return {
        "pairs": len(kept),
        "pair_purity": float(np.mean(pure)) if kept else None,
        "pair_purity_std": _standard_error(pure, items),
        "chosen_right": float(np.mean(right)) if kept else None,
        "rejected_wrong": float(np.mean(wrong)) if kept else None,
    }


def _shows(path: Path, prompt: str) -> bool:
    return parse(prompt) is not None and satisfies(open_image(path), prompt)


def object_cells(image: Image.Image, grid: tuple[int, int]) -> np.ndarray | None:
    """The cells of `grid` (rows, columns) that objects, as the checker sees them, cover to an eighth or more, (H, W).

    A small object in the middle of its place on the board lies on the corner of four cells and covers a fifth of each,
    so a share of a quarter would leave it without a cell. None where the checker sees no object.
    """
    seen = [thing.mask for thing in detect(image).objects]
    if not seen:
        return None
    pixels = np.any(seen, axis=0)
    (rows, columns), (height, width) = grid, pixels.shape
    covered: np.ndarray = pixels.reshape(rows, height // rows, columns, width // columns).mean(axis=(1, 3)) >= 0.125
    return covered


def mask_figures(records: Sequence[Record], out: Path) -> dict[str, Any]:
    """`mask_iou`: mean overlap of the chosen images' masks with the true objects (`object_cells`).

    `mask_iou_all_ones` is what a mask of the whole image would have.
    """
    found, ones, items = [], [], []
    for number, item in enumerate(records):
        for _, _, pair in iter_pairs([item]):
            if not pair.get("mask_path"):
                continue
            union = load_file(out / pair["mask_path"])["chosen_union"].astype(bool)
            cells = object_cells(open_image(out / pair["chosen"]), union.shape)
            if cells is None:
                continue
            found.append((union & cells).sum() / max((union | cells).sum(), 1))
            ones.append(cells.mean())
            items.append(number)
    return {
        "mask_iou": float(np.mean(found)) if found else None,
        "mask_iou_std": _standard_error(found, items),
        "mask_iou_all_ones": float(np.mean(ones)) if ones else None,
    }


def _standard_error(values: Sequence[float], items: Sequence[int]) -> float | None:
    """Of the mean of `values`, where those of one item are no independent ones; None of nothing."""
    if not len(values):
        return None
    away = np.asarray(values, float) - np.mean(values)
    return float(np.sqrt((np.bincount(items, away) ** 2).sum()) / len(values))


def write_gallery(out: Path, before: AlignmentResult, after: AlignmentResult) -> None:
    """evaluation/gallery.jsonl and its images: the first prompts of each kind, first seed, whatever came of them."""
    lines = []
    taken: dict[str, int] = {}
    for index, (kind, prompt) in enumerate(zip(before.kinds, before.prompts, strict=True)):
        taken[kind] = taken.get(kind, 0) + 1
        if taken[kind] > (GALLERY if kind in HEADLINE else 2):
            continue
        line: dict[str, Any] = {"prompt": prompt, "kind": kind}
        for name, drawn in (("before", before), ("after", after)):
            path = f"evaluation/images/{index:04d}_{name}.png"
            write_atomic(out / path, encode_png(drawn.images[index * len(drawn.seeds)]))
            line[name] = {"path": path, "correct": bool(drawn.correct[index, 0])}
        lines.append(json.dumps(line))
    write_atomic(out / "evaluation" / "gallery.jsonl", ("\n".join(lines) + "\n").encode())


def _versions() -> dict[str, str]:
    import peft
    import transformers

    return {
        "ospo_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "numpy": np.__version__,
    }

"""Alignment and answer accuracy of a model in its Shapes world, judged by the checker on held-out prompts.

The rule, fixed before any result was known:

* *Alignment* of a kind is the share of images that satisfy their prompt, over the held-out prompts of the kind, with
  one image of each prompt for each sampling seed. The headline is the mean over the kinds with at least 20 held-out
  prompts (`HEADLINE`). The other kinds have too few prompts for a general statement and are reported only by kind.
* The guidance scale is the best one of `evaluate.guidance_scales` for the base model on `validation` prompts. Base and
  tuned model are compared at that scale on `test` prompts with the same seeds. Also reported: each model at its own
  best scale, and both at 1.
* The rule is the same in both worlds. In the world of small objects masks are compared: none, true objects, the
  attention's, ones, and random ones of the same size, with 3 training seeds, by kind. Each has its gain over the base
  model and, with the same prompts and seeds, its difference to no mask.
* Standard errors are over prompts, after averaging the seeds of each prompt. Those of differences are paired.
* The split `dense` has test prompts with scenery, such as `a small red circle at the top left on a white background`.
  No model generated images of them before a method was compared on them; GRPO with `images.prompts=both` came later,
  after a row of GRPO on them. Kinds with few test prompts have more: in the first world 115 of one color or shape and
  48 of one count, where there are 4 and 8 without scenery, and thus 4 and 8 meanings. As for all
  prompts, scenery is not judged. Prompts of one meaning, without their scenery, count together in standard errors.
  `dense-validation` has validation prompts with scenery, to choose settings by.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ospo_fast.config import EvaluateConfig
from ospo_fast.errors import UsageError
from ospo_fast.files import load_npz, reading
from ospo_fast.generation import ImageGenerator, answer_questions
from ospo_fast.models.base import UnifiedModel
from ospo_fast.records import parse_json, write_atomic
from ospo_fast.shapes import grammar
from ospo_fast.shapes.checker import DetectedScene, detect, matches
from ospo_fast.shapes.commands import VALIDATION_METRICS
from ospo_fast.shapes.render import render
from ospo_fast.shapes.scenes import (
    KINDS,
    SHAPES_WORLD,
    WORLDS,
    Description,
    World,
    parse,
    prompts,
    random_scene,
)
from ospo_fast.stages.templates import load_templates
from ospo_fast.stages.train import Evaluation
from ospo_fast.stats import standard_error

DENSE = 60  # forms of a prompt with scenery
DENSE_SPLITS = {"dense": "test", "dense-validation": "validation"}  # and the prompts that get scenery
HEADLINE = ("color2", "2D_spatial", "numeracy2")
QUESTION_KINDS = ("existence", "count", "total", "relation")


@dataclass(frozen=True)
class AlignmentResult:
    """Held-out prompts, the images generated for them, and which images satisfy their prompt."""

    split: str
    guidance_scale: float
    seeds: tuple[int, ...]
    kinds: tuple[str, ...]  # one for each prompt
    prompts: tuple[str, ...]
    images: tuple[Any, ...] = field(repr=False)  # (prompts * seeds,), the seeds of a prompt one after the other
    correct: np.ndarray = field(repr=False)  # (prompts, seeds) bool

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Return alignment, standard error and number of prompts of each kind."""
        return {kind: self._summary(kind, self._rates(kind)) for kind in dict.fromkeys(self.kinds)}

    def headline(self) -> dict[str, float]:
        """Return the mean alignment of the headline kinds and its standard error."""
        return _combine([self._summary(kind, self._rates(kind)) for kind in HEADLINE])

    def gain(self, base: AlignmentResult) -> dict[str, float]:
        """Return the headline minus that of `base` (same prompts and seeds), with the paired standard error."""
        if base.prompts != self.prompts or base.seeds != self.seeds:
            raise ValueError("base: expected a result of the same prompts and the same seeds")
        return _combine(list(self.gain_by_kind(base, HEADLINE).values()))

    def gain_by_kind(self, base: AlignmentResult, kinds: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
        """Return the gain over `base` of each kind; see `gain`."""
        return {
            kind: self._summary(kind, self._rates(kind) - base._rates(kind))
            for kind in kinds or dict.fromkeys(self.kinds)
        }

    def clusters(self, kind: str) -> list[int]:
        """Return a number for each prompt of a kind: those of one meaning have the same with scenery."""
        own = [prompt for prompt, other in zip(self.prompts, self.kinds, strict=True) if other == kind]
        if self.split not in DENSE_SPLITS:
            return list(range(len(own)))
        meanings = [_meaning(prompt) for prompt in own]
        known = list(dict.fromkeys(meanings))
        return [known.index(meaning) for meaning in meanings]

    def _summary(self, kind: str, rates: np.ndarray) -> dict[str, float]:
        error = standard_error(rates, self.clusters(kind) if self.split in DENSE_SPLITS else None)
        return {"alignment": float(rates.mean()), "standard_error": error, "prompts": len(rates)}

    def _rates(self, kind: str) -> np.ndarray:
        rows = [i for i, other in enumerate(self.kinds) if other == kind]
        return np.asarray(self.correct[rows].mean(axis=1))

    def save(self, path: Path) -> None:
        """Write everything to one npz file."""
        about = {"split": self.split, "guidance_scale": self.guidance_scale, "seeds": self.seeds}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            about=np.array(json.dumps(about)),
            kinds=np.array(self.kinds),
            prompts=np.array(self.prompts),
            images=np.stack([np.asarray(image) for image in self.images]),
            correct=self.correct,
        )
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> AlignmentResult:
        """Read a file of `save`. Raises OspoError if it is none."""
        what, remedy = "evaluation", "delete it to evaluate again"
        arrays = load_npz(what, path, remedy)
        with reading(what, path, remedy):
            if missing := [name for name in ("about", "kinds", "prompts", "images", "correct") if name not in arrays]:
                raise ValueError(f"it has no {', '.join(missing)}")
            about = parse_json(str(arrays["about"]))
            split, scale, seeds = str(about["split"]), float(about["guidance_scale"]), tuple(map(int, about["seeds"]))
            kinds, prompts = tuple(map(str, arrays["kinds"])), tuple(map(str, arrays["prompts"]))
            images, correct = arrays["images"], arrays["correct"]
            shape = (len(prompts), len(seeds))
            fits = len(kinds) == len(prompts) and correct.shape == shape and len(images) == len(prompts) * len(seeds)
            if not fits or correct.dtype != bool or images.dtype != np.uint8:
                raise ValueError(
                    f"it holds {len(kinds)} kinds, {len(prompts)} prompts, {len(seeds)} seeds, {images.dtype} images "
                    f"{images.shape} and {correct.dtype} judgments {correct.shape}, which do not fit together"
                )
            return cls(split, scale, seeds, kinds, prompts, tuple(map(Image.fromarray, images)), correct)


def _meaning(prompt: str) -> str:
    """Return the meaning of a prompt of any world without its scenery."""
    found = (parse(prompt, world) for world in WORLDS.values())
    return next((description.key for description in found if description is not None), prompt)


def _combine(parts: list[dict[str, float]]) -> dict[str, float]:
    error = float(np.sqrt(sum(part["standard_error"] ** 2 for part in parts))) / len(parts)
    mean = float(np.mean([part["alignment"] for part in parts]))
    return {"alignment": mean, "standard_error": error, "prompts": sum(part["prompts"] for part in parts)}


def world_of(model: UnifiedModel) -> World:
    """Return the world of a model. Raises UsageError for a model of none."""
    if model.templates not in WORLDS:
        raise UsageError(f"model: {model.name} is of no Shapes world; use 'shapes', 'shapes-large' or a copy of them")
    return WORLDS[model.templates]


def select_prompts(
    split: str, per_kind: int, kinds: Sequence[str] = tuple(KINDS), *, skip: int = 0, world: World = SHAPES_WORLD
) -> list[tuple[str, Description]]:
    """Select up to `per_kind` prompts of each kind in `split`, after the first `skip` of a fixed random order."""
    selected = []
    for number, kind in enumerate(kinds):
        available = _dense_prompts(kind, split, world) if split in DENSE_SPLITS else prompts(kind, split, world)
        order = np.random.default_rng([number, 20260101]).permutation(len(available))
        selected += [(kind, available[i]) for i in order[skip : skip + per_kind]]
    return selected


def _dense_prompts(kind: str, split: str, world: World) -> list[Description]:
    """List prompts with scenery, up to `DENSE` of each meaning, in a fixed order."""
    rng = np.random.default_rng(20261129)
    plain = prompts(kind, DENSE_SPLITS[split], world)
    dense = [grammar.densify(description, description, rng)[0] for description in plain * DENSE]
    return list({description.text: description for description in dense}.values())


def evaluate_alignment(
    model: UnifiedModel,
    *,
    split: str = "test",
    per_kind: int = 50,
    guidance_scale: float = 1.0,
    seeds: Sequence[int] = (0,),
    kinds: Sequence[str] = tuple(KINDS),
    skip: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> AlignmentResult:
    """Generate images of held-out prompts (`select_prompts`) and check each of them.

    The image seeds depend on `seeds` and the position of the prompt, so that results of two models are paired.

    Args:
        model: the model to evaluate.
        split: "test", "validation", "dense" or "dense-validation".
        per_kind: limit of prompts of each kind.
        guidance_scale: of the images.
        seeds: sampling seeds; one image of each prompt for each of them.
        kinds: kinds of prompts, of `KINDS`.
        skip: number of prompts of each kind to skip.
        batch_size: of `ImageGenerator`.
        progress: show a progress bar on stderr.

    Returns:
        The images and which of them satisfy their prompt.

    """
    world = world_of(model)
    selected = select_prompts(split, per_kind, kinds, skip=skip, world=world)
    texts = [description.text for _, description in selected]
    image_seeds = [int(np.random.default_rng([seed, i]).integers(2**31)) for i in range(len(texts)) for seed in seeds]
    images = ImageGenerator(model, batch_size=batch_size).generate(
        texts,
        seeds=image_seeds,
        num_images=len(seeds),
        guidance_scale=guidance_scale,
        progress=progress,
    )
    correct = [matches(detect(image, world), selected[i // len(seeds)][1]) for i, image in enumerate(images)]
    return AlignmentResult(
        split,
        guidance_scale,
        tuple(seeds),
        tuple(kind for kind, _ in selected),
        tuple(texts),
        tuple(images),
        np.array(correct, bool).reshape(len(texts), len(seeds)),
    )


def choose_guidance(
    model: UnifiedModel,
    scales: Sequence[float],
    *,
    per_kind: int = 50,
    seeds: Sequence[int] = (0,),
    batch_size: int | None = None,
    progress: bool = True,
) -> tuple[float, dict[float, dict[str, float]]]:
    """Return the guidance scale with the best headline on validation prompts, and the headline at each scale."""
    headlines = {
        scale: evaluate_alignment(
            model,
            split="validation",
            per_kind=per_kind,
            guidance_scale=scale,
            seeds=seeds,
            kinds=HEADLINE,
            batch_size=batch_size,
            progress=progress,
        ).headline()
        for scale in scales
    }
    return max(headlines, key=lambda scale: headlines[scale]["alignment"]), headlines


def build_validation(settings: EvaluateConfig, guidance_scale: float) -> Evaluation:
    """Build the evaluation for early stopping: the headline on `watch_per_kind` validation prompts of each kind."""

    def validate(model: UnifiedModel, _step: int) -> dict[str, float]:
        result = evaluate_alignment(
            model,
            split="validation",
            per_kind=settings.watch_per_kind,
            guidance_scale=guidance_scale,
            seeds=settings.seeds,
            kinds=HEADLINE,
            batch_size=settings.batch_size,
            progress=False,
        )
        return {**result.headline(), "guidance_scale": guidance_scale}

    validate.metrics = VALIDATION_METRICS  # type: ignore[attr-defined]
    return validate


def evaluate_answers(model: UnifiedModel, *, count: int = 200, progress: bool = True) -> dict[str, float]:
    """Return the share of correct answers about `count` rendered random scenes, one question of each kind per scene."""
    rng, world = np.random.default_rng([0, 20260102]), world_of(model)
    scenes = [random_scene(rng, world) for _ in range(count)]
    questions = [[grammar.sample_question(scene, kind, rng) for kind in QUESTION_KINDS] for scene in scenes]
    texts = [[question.text for question in row] for row in questions]
    answers = _answers(model, [render(scene) for scene in scenes], texts, progress)
    correct: dict[str, list[bool]] = {kind: [] for kind in QUESTION_KINDS}
    for row, answered in zip(questions, answers, strict=True):
        for question, answer in zip(row, answered, strict=True):
            correct[question.kind].append(answer["answer"] == ("yes" if question.answer else "no"))
    by_kind = {kind: float(np.mean(values)) for kind, values in correct.items()}
    pooled = [value for values in correct.values() for value in values]
    return {"all": float(np.mean(pooled)), **by_kind, "questions": len(pooled)}


def true_answer(question: str, scene: DetectedScene) -> bool | None:
    """Answer a question from the detected objects; None if it is not a question of their world."""
    world = scene.world
    words = question.rstrip("?").strip()
    looks = [(obj.color, obj.shape) for obj in scene.objects]
    if grammar.TOTALS.get(words, len(world.counts) + 1) <= len(world.counts):
        return len(looks) == grammar.TOTALS[words]
    for opening in ("is there ", "are there "):
        if words.startswith(opening):
            description = parse(words.removeprefix(opening).replace("one ", "a ", 1), world)
            if description is None or len(description.groups) != 1:
                return None
            group = description.groups[0]
            count = looks.count((group.color, group.shape))
            exact = not words.startswith("is there a ")
            return count == group.count if exact else count >= 1
    description = parse(words.removeprefix("is ").replace("the ", "a "), world)
    if description is None or description.relation is None:
        return None
    first, second = ((group.color, group.shape) for group in description.groups)
    return grammar.positions_related(
        [(obj.y, obj.x) for obj in scene.objects if (obj.color, obj.shape) == first],
        description.relation,
        [(obj.y, obj.x) for obj in scene.objects if (obj.color, obj.shape) == second],
        margin=world.cell / 2,
    )


def evaluate_own_answers(model: UnifiedModel, generated: AlignmentResult, *, progress: bool = True) -> dict[str, float]:
    """Return the share of correct answers to the questions of each prompt, about the model's own images of it."""
    per_prompt, world = len(generated.seeds), world_of(model)
    images = list(generated.images)
    questions = [grammar.questions_for(_parsed(generated.prompts[i // per_prompt], world)) for i in range(len(images))]
    answers = _answers(model, images, questions, progress)
    correct = []
    for image, row, answered in zip(images, questions, answers, strict=True):
        scene = detect(image, world)
        for question, answer in zip(row, answered, strict=True):
            expected = true_answer(question, scene)
            if expected is not None:
                correct.append(answer["answer"] == ("yes" if expected else "no"))
    return {"all": float(np.mean(correct)), "questions": len(correct)}


def evaluate_model(model: UnifiedModel, settings: EvaluateConfig, *, progress: bool = True) -> dict[str, Any]:
    """Return what `ospo-fast evaluate` reports: alignment at every guidance scale, and answer accuracy."""
    scales = []
    for scale in settings.guidance_scales:
        result = evaluate_alignment(
            model,
            split=settings.split,
            per_kind=settings.per_kind,
            guidance_scale=scale,
            seeds=settings.seeds,
            batch_size=settings.batch_size,
            progress=progress,
        )
        scales.append({"guidance_scale": scale, **result.headline(), "kinds": result.by_kind()})
    answering = evaluate_answers(model, progress=progress)
    return {"split": settings.split, "seeds": settings.seeds, "scales": scales, "answering": answering}


def _parsed(text: str, world: World) -> Description:
    description = parse(text, world)
    if description is None:
        raise ValueError(f"prompt: got {text!r}, expected a prompt of the Shapes world")
    return description


def _answers(
    model: UnifiedModel, images: list[Any], questions: list[list[str]], progress: bool
) -> list[list[dict[str, Any]]]:
    templates = load_templates(model.templates)
    return answer_questions(
        model,
        images,
        questions,
        template=lambda question: templates.messages("vqa", question=question),
        progress=progress,
    )

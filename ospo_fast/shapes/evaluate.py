"""How well a model draws and answers in the Shapes world, by the checker, on prompts that nothing else may use.

The rule, fixed before any figure was looked at:

* *Alignment* of a kind is the share of its held-out prompts that are drawn fully right, each prompt drawn once per
  sampling seed. The headline is the mean over the kinds with at least 20 held-out prompts (`HEADLINE`); the other
  kinds are shown, but their few prompts make no claim about prompts in general.
* The guidance scale is chosen on the `validation` prompts, among `GUIDANCE`, for the base model; base and tuned model
  are then both drawn at it, on the `test` prompts, with the same seeds. Beside it: each at its own best, both at 1.
* Standard errors are over prompts (the seeds of a prompt are averaged first). For a difference they are paired.
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
from ospo_fast.generation import ImageGenerator, answer_questions
from ospo_fast.models.base import UnifiedModel
from ospo_fast.records import write_atomic
from ospo_fast.shapes import grammar
from ospo_fast.shapes.checker import DetectedScene, holds, read
from ospo_fast.shapes.render import render
from ospo_fast.shapes.scenes import KINDS, Description, parse, prompts, random_scene
from ospo_fast.stages.templates import load_templates
from ospo_fast.stages.train import Evaluation

GUIDANCE = (1.0, 1.5, 2.0, 3.0)
HEADLINE = ("color2", "2D_spatial", "numeracy2")
QUESTION_KINDS = ("existence", "count", "total", "relation")


@dataclass(frozen=True)
class Drawings:
    """The held-out prompts that were drawn, what came out, and which drawings are right."""

    split: str
    guidance_scale: float
    seeds: tuple[int, ...]
    kinds: tuple[str, ...]  # of each prompt
    prompts: tuple[str, ...]
    images: tuple[Any, ...] = field(repr=False)  # prompt by prompt, seed by seed
    correct: np.ndarray = field(repr=False)  # (prompts, seeds) bool

    def by_kind(self) -> dict[str, dict[str, float]]:
        """For each kind its alignment, standard error and number of prompts."""
        return {kind: _summary(self._rates(kind)) for kind in dict.fromkeys(self.kinds)}

    def headline(self) -> dict[str, float]:
        """Alignment and standard error of the mean over the headline kinds."""
        return _combine([_summary(self._rates(kind)) for kind in HEADLINE])

    def gain(self, base: Drawings) -> dict[str, float]:
        """Alignment less that of `base`, the same prompts and seeds, with the paired standard error."""
        if base.prompts != self.prompts or base.seeds != self.seeds:
            raise ValueError("base: expected drawings of the same prompts with the same seeds")
        return _combine([_summary(self._rates(kind) - base._rates(kind)) for kind in HEADLINE])

    def _rates(self, kind: str) -> np.ndarray:
        rows = [i for i, other in enumerate(self.kinds) if other == kind]
        return np.asarray(self.correct[rows].mean(axis=1))

    def save(self, path: Path) -> None:
        """Everything, in one npz file."""
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
    def load(cls, path: Path) -> Drawings:
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            return cls(
                about["split"],
                about["guidance_scale"],
                tuple(about["seeds"]),
                tuple(map(str, file["kinds"])),
                tuple(map(str, file["prompts"])),
                tuple(Image.fromarray(image) for image in file["images"]),
                file["correct"],
            )


def _summary(rates: np.ndarray) -> dict[str, float]:
    spread = float(rates.std(ddof=1) / np.sqrt(len(rates))) if len(rates) > 1 else float("nan")
    return {"alignment": float(rates.mean()), "standard_error": spread, "prompts": len(rates)}


def _combine(parts: list[dict[str, float]]) -> dict[str, float]:
    error = float(np.sqrt(sum(part["standard_error"] ** 2 for part in parts))) / len(parts)
    mean = float(np.mean([part["alignment"] for part in parts]))
    return {"alignment": mean, "standard_error": error, "prompts": sum(part["prompts"] for part in parts)}


def held_out_prompts(
    split: str, per_kind: int, kinds: Sequence[str] = tuple(KINDS), *, skip: int = 0
) -> list[tuple[str, Description]]:
    """Up to `per_kind` prompts of each kind in `split`, after the first `skip`; the same ones at every call."""
    chosen = []
    for number, kind in enumerate(kinds):
        everything = prompts(kind, split)
        order = np.random.default_rng([number, 20260101]).permutation(len(everything))
        chosen += [(kind, everything[i]) for i in order[skip : skip + per_kind]]
    return chosen


def draw(
    model: UnifiedModel,
    *,
    split: str = "test",
    per_kind: int = 50,
    guidance_scale: float = 1.0,
    seeds: Sequence[int] = (0,),
    kinds: Sequence[str] = tuple(KINDS),
    skip: int = 0,
    temperature: float = 1.0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Drawings:
    """Draws held-out prompts (as of `held_out_prompts`) and has the checker look at every drawing."""
    chosen = held_out_prompts(split, per_kind, kinds, skip=skip)
    texts = [description.text for _, description in chosen]
    image_seeds = [int(np.random.default_rng([seed, i]).integers(2**31)) for i in range(len(texts)) for seed in seeds]
    images = ImageGenerator(model, batch_size=batch_size).generate(
        texts,
        seeds=image_seeds,
        num_images=len(seeds),
        guidance_scale=guidance_scale,
        temperature=temperature,
        progress=progress,
    )
    right = [holds(read(image), chosen[i // len(seeds)][1]) for i, image in enumerate(images)]
    return Drawings(
        split,
        guidance_scale,
        tuple(seeds),
        tuple(kind for kind, _ in chosen),
        tuple(texts),
        tuple(images),
        np.array(right, bool).reshape(len(texts), len(seeds)),
    )


def best_guidance(
    model: UnifiedModel, *, per_kind: int = 50, seeds: Sequence[int] = (0,), progress: bool = True
) -> tuple[float, dict[float, dict[str, float]]]:
    """The guidance scale of `GUIDANCE` with the highest headline on validation prompts, and all of them."""
    found = {
        scale: draw(
            model,
            split="validation",
            per_kind=per_kind,
            guidance_scale=scale,
            seeds=seeds,
            kinds=HEADLINE,
            progress=progress,
        ).headline()
        for scale in GUIDANCE
    }
    return max(found, key=lambda scale: found[scale]["alignment"]), found


def watcher(settings: EvaluateConfig, guidance_scale: float) -> Evaluation:
    """What training watches to stop early: the headline on `watch_per_kind` validation prompts of each kind in it."""

    def watch(model: UnifiedModel, _step: int) -> dict[str, float]:
        drawn = draw(
            model,
            split="validation",
            per_kind=settings.watch_per_kind,
            guidance_scale=guidance_scale,
            seeds=settings.seeds,
            kinds=HEADLINE,
            batch_size=settings.batch_size,
            progress=False,
        )
        return {**drawn.headline(), "guidance_scale": guidance_scale}

    return watch


def answering(model: UnifiedModel, *, count: int = 200, seed: int = 0, progress: bool = True) -> dict[str, float]:
    """Share of right answers on rendered pictures of fresh random scenes: one question of each kind a scene."""
    rng = np.random.default_rng([seed, 20260102])
    scenes = [random_scene(rng) for _ in range(count)]
    asked = [[grammar.ask(scene, kind, rng) for kind in QUESTION_KINDS] for scene in scenes]
    answers = _answers(model, [render(scene) for scene in scenes], [[q.text for q in row] for row in asked], progress)
    right: dict[str, list[bool]] = {kind: [] for kind in QUESTION_KINDS}
    for row, answered in zip(asked, answers, strict=True):
        for question, answer in zip(row, answered, strict=True):
            right[question.kind].append(answer["answer"] == ("yes" if question.answer else "no"))
    figures = {kind: float(np.mean(values)) for kind, values in right.items()}
    everything = [value for values in right.values() for value in values]
    return {"all": float(np.mean(everything)), **figures, "questions": len(everything)}


def truth(question: str, reading: DetectedScene) -> bool | None:
    """What the checker answers to a question of the Shapes world about a picture, None where it cannot tell."""
    words = question.rstrip("?").strip()
    seen = [(thing.color, thing.shape) for thing in reading.objects]
    if words in grammar.TOTALS:
        return len(seen) == grammar.TOTALS[words]
    for opening in ("is there ", "are there "):
        if words.startswith(opening):
            description = parse(words.removeprefix(opening).replace("one ", "a ", 1))
            if description is None or len(description.groups) != 1:
                return None
            group = description.groups[0]
            found = seen.count((group.color, group.shape))
            exact = not words.startswith("is there a ")
            return found == group.count if exact else found >= 1
    description = parse(words.removeprefix("is ").replace("the ", "a "))
    if description is None or description.relation is None:
        return None
    first, second = ((group.color, group.shape) for group in description.groups)
    return grammar.related_places(
        [(thing.y, thing.x) for thing in reading.objects if (thing.color, thing.shape) == first],
        description.relation,
        [(thing.y, thing.x) for thing in reading.objects if (thing.color, thing.shape) == second],
        least=8.0,
    )


def answering_own(model: UnifiedModel, drawings: Drawings, *, progress: bool = True) -> dict[str, float]:
    """Share of right answers (by the checker) to the questions that a prompt calls for, on the model's own drawings."""
    per_prompt = len(drawings.seeds)
    images = list(drawings.images)
    questions = [grammar.questions_for(_parsed(drawings.prompts[i // per_prompt])) for i in range(len(images))]
    answers = _answers(model, images, questions, progress)
    right = []
    for image, row, answered in zip(images, questions, answers, strict=True):
        reading = read(image)
        for question, answer in zip(row, answered, strict=True):
            expected = truth(question, reading)
            if expected is not None:
                right.append(answer["answer"] == ("yes" if expected else "no"))
    return {"all": float(np.mean(right)), "questions": len(right)}


def _parsed(text: str) -> Description:
    description = parse(text)
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

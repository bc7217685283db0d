"""Stage 3: for each variant images of the prompt, and one of its hard negative, from dense or plain prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ospo_fast.config import Config
from ospo_fast.errors import Failure, OspoError, attempt
from ospo_fast.models.base import UnifiedModel
from ospo_fast.records import ROLES, ImageVerdict, Record, chunked, item_name, stable_hash
from ospo_fast.stages import StageContext
from ospo_fast.stages.image_files import ImageFiles, is_finished
from ospo_fast.stages.prompt_files import image_prompt_ids

CHUNK = 32  # items between two writes to the store; of six images each, they fill two batches on a GPU


@dataclass(frozen=True)
class PlannedImage:
    """One image to generate: its variant, name, path (relative to the run folder), prompt and seed."""

    variant: int
    name: str
    path: str
    prompt: str
    seed: int

    def settings(self, sampling: dict[str, Any]) -> dict[str, Any]:
        """Return everything that the image depends on, apart from the model."""
        return {"prompt": self.prompt, "seed": self.seed, **sampling}


def plan_images(record: Record, seed: int, draws: int = 1, prompts: str = "dense") -> list[PlannedImage]:
    """Plan the images of an item: for each variant `draws` of its prompt, and one of the hard negative.

    The first image of the prompt has the seed of that of the hard negative, so that they differ in little else.

    Raises:
        OspoError: the prompts of the variants are not as many as their hard negatives, or plain ones are missing.

    """
    bases, negatives = record.get("long_prompt") or [], record.get("negative_long_prompt") or []
    if len(bases) != len(negatives):
        raise OspoError(
            f"Item {record['item_id']} has {len(bases)} long_prompt and {len(negatives)} negative_long_prompt, "
            "expected as many; run the stage perturb with --no-resume."
        )
    dense = list(zip(bases, negatives, strict=True))
    plan = []
    for index in range(draws * len(dense)):
        variant = index % len(dense)
        pair = dense[variant]
        if not all(pair):
            continue
        if prompts == "plain":
            if len(record.get("negative_prompt") or []) != len(dense):
                raise OspoError(
                    f"Item {record['item_id']} has no negative_prompt for each long_prompt, which images.prompts=plain "
                    "needs; use records of the stage perturb, or images.prompts=dense."
                )
            pair = record["prompt"], record["negative_prompt"][variant]
        image_seed = stable_hash(seed, "images", record["item_id"], index)
        for role, prompt in zip(ROLES, pair, strict=True):
            if role == "base" or index == variant:
                path = f"images/{item_name(record['item_id'])}/{role}_{index}.png"
                plan.append(PlannedImage(variant, f"{role}_{index}", path, prompt, image_seed))
    return plan


def run(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Add `base_metadata` and `negative_metadata`, which name the images that were generated.

    Each PNG has an .npz next to it with `codes` (T,), prompt, seed and sampling settings. Finished images are not
    generated again. Images are written in the background while the next chunk is generated, so records come out one
    chunk late, once their images are on disk. `context.report.drawing` is the throughput of all images so far.

    Raises:
        OspoError: no run folder was given, or it cannot be written; with `context.remake`, an image differs from the
            PNG or the codes that are left of it.

    """
    if out is None:
        raise OspoError("images: got no run folder; give `out`, where the images go.")
    settings, context = config.images, context or StageContext()
    out = context.writes or out
    previous: list[Record] = []  # the records of the chunk before
    awaited: list[Path] = []  # the files that they need
    with ImageFiles(model, settings, remake=context.remake) as files:
        for chunk in chunked(records, CHUNK):
            found = [attempt(plan_images, record, config.seed, settings.draws, settings.prompts) for record in chunk]
            plans = [[] if isinstance(plan, Failure) else plan for plan in found]
            chunk = [_with_reason(record, plan) for record, plan in zip(chunk, found, strict=True)]
            planned = [(image, image.settings(files.sampling)) for plan in plans for image in plan]
            missing = [image for image, values in planned if not is_finished(out / image.path, values)]
            ids: dict[str, Any] = {p: image_prompt_ids(model, p) for p in {image.prompt for image in missing}}
            invalid = {i.path: ids[i.prompt] for i in missing if isinstance(ids[i.prompt], Failure)}
            todo = {out / image.path: image for image in missing if image.path not in invalid}
            failed = files.generate(
                [ids[image.prompt] for image in todo.values()],
                {path: image.settings(files.sampling) for path, image in todo.items()},
                groups=[path.parent for path in todo],  # the images of an item
            )
            failures = {todo[path].path: reason for path, reason in failed.items()}
            if files.throughput is not None:
                context.report.drawing = files.throughput.metrics()
            files.wait_for(awaited)
            yield from previous
            previous = [_add_images(record, plan, invalid, failures) for record, plan in zip(chunk, plans, strict=True)]
            awaited = list(todo)
        files.wait_for(awaited)
        yield from previous


def _with_reason(record: Record, plan: list[PlannedImage] | Failure) -> Record:
    """Give every variant of an item that cannot be planned the reason."""
    if not isinstance(plan, Failure):
        return record
    variants = len(record.get("long_prompt") or record.get("negative_long_prompt") or [None])
    return {**record, "variant_reasons": [plan.reason] * variants}


def _add_images(
    record: Record, plan: list[PlannedImage], invalid: dict[str, Failure], failures: dict[str, Failure]
) -> Record:
    """Add the images of an item: none of a variant with an invalid prompt, and all but those that failed of others."""
    skipped = {image.variant for image in plan if image.path in invalid}
    variants = record.get("long_prompt") or record.get("negative_prompt") or []
    reasons = list(record.get("variant_reasons") or [None] * len(variants))
    for image in plan:
        if (failed := invalid.get(image.path, failures.get(image.path))) is not None:
            reasons[image.variant] = failed.reason
    base, negative = (
        {
            image.name: ImageVerdict(path=image.path, prompt=image.prompt)
            for image in plan
            if image.variant not in skipped and image.path not in failures and image.name.startswith(role)
        }
        for role in ROLES
    )
    return {**record, "base_metadata": base, "negative_metadata": negative, "variant_reasons": reasons}


def failure(record: Record) -> Failure | None:
    """Return why images of an item are missing; None where all variants with dense prompts have theirs."""
    prompts = record.get("long_prompt") or []
    if len(prompts) != len(record.get("negative_long_prompt") or []):
        return Failure(record["variant_reasons"][0] or "the variants lack prompts")
    reasons = (record["variant_reasons"][variant] for variant, prompt in enumerate(prompts) if prompt)
    return next((Failure(reason) for reason in reasons if reason), None)

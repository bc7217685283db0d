"""Stage 3: for each variant images of the prompt, and one of its hard negative, from dense or plain prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.config import Config, ImagesConfig
from ospo_fast.errors import Failure, OspoError
from ospo_fast.models.base import UnifiedModel
from ospo_fast.records import ROLES, ImageVerdict, Record, chunked, stable_hash
from ospo_fast.stages import StageContext
from ospo_fast.stages.image_files import is_finished, save_image
from ospo_fast.stages.prompt_files import image_prompt_ids

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ospo_fast.generation import Throughput

CHUNK = 32  # items between two writes to the store; of six images each, they fill two batches on a GPU


@dataclass(frozen=True)
class PlannedImage:
    """One image to generate: its variant, name, path (relative to the run folder), prompt and seed."""

    variant: int
    name: str
    path: str
    prompt: str
    seed: int


def plan_images(record: Record, seed: int, draws: int = 1, prompts: str = "dense") -> list[PlannedImage]:
    """Plan the images of an item: for each variant `draws` of its prompt, and one of the hard negative.

    The first image of the prompt has the seed of that of the hard negative, so that they differ in little else.
    """
    dense = list(zip(record.get("long_prompt", []), record.get("negative_long_prompt", []), strict=True))
    plan = []
    for index in range(draws * len(dense)):
        variant = index % len(dense)
        pair = dense[variant]
        if not all(pair):
            continue
        if prompts == "plain":
            if "negative_prompt" not in record:
                raise OspoError(f"Item {record['item_id']} has no negative_prompt, which images.prompts=plain needs.")
            pair = record["prompt"], record["negative_prompt"][variant]
        image_seed = stable_hash(seed, "images", record["item_id"], index)
        for role, prompt in zip(ROLES, pair, strict=True):
            if role == "base" or index == variant:
                path = f"images/{record['item_id']}/{role}_{index}.png"
                plan.append(PlannedImage(variant, f"{role}_{index}", path, prompt, image_seed))
    return plan


def sampling_settings(config: ImagesConfig) -> dict[str, Any]:
    """Return the settings that an image depends on besides its prompt and seed."""
    return {name: getattr(config, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}


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
    chunk late, once their images are on disk.

    Args:
        records: with `long_prompt` and `negative_long_prompt`.
        model: generates the images.
        config: section `images`.
        out: the run folder.
        context: `report.drawing` is set after each chunk to the throughput of all images so far.

    Raises:
        OspoError: no run folder was given, or it cannot be written.

    """
    from ospo_fast.generation import GeneratedBatch, ImageGenerator, ImageWriter

    if out is None:
        raise OspoError("images: got no run folder; give `out`, where the images go.")
    folder, settings, context = out, config.images, context or StageContext()
    sampling = sampling_settings(settings)
    generator = ImageGenerator(model, batch_size=settings.batch_size, jacobi_window=settings.jacobi_window)
    throughput: Throughput | None = None
    unwritten: dict[int, PlannedImage] = {}  # by running number
    finished: list[Record] = []  # of the chunk before, whose images have the numbers `awaited`
    awaited = range(0)

    def npz_settings(image: PlannedImage) -> dict[str, Any]:
        return {"prompt": image.prompt, "seed": image.seed, **sampling}

    def save(number: int, codes: Tensor, image: Image) -> None:
        planned = unwritten[number]
        save_image(folder / planned.path, image, codes, npz_settings(planned))
        del unwritten[number]

    with ImageWriter(model, save) as writer:

        def when_written(finished: list[Record], numbers: range) -> list[Record]:
            writer.wait(lambda: unwritten.keys().isdisjoint(numbers))
            return finished

        for chunk in chunked(records, CHUNK):
            plans = [plan_images(record, config.seed, settings.draws, settings.prompts) for record in chunk]
            todo = [image for plan in plans for image in plan if not is_finished(out / image.path, npz_settings(image))]
            ids: dict[str, Any] = {prompt: image_prompt_ids(model, prompt) for prompt in {i.prompt for i in todo}}
            failures = {i.path: ids[i.prompt] for i in todo if isinstance(ids[i.prompt], Failure)}
            todo = [image for image in todo if image.path not in failures]
            numbers = range(awaited.stop, awaited.stop + len(todo))
            unwritten.update(zip(numbers, todo, strict=True))

            def take(batch: GeneratedBatch, numbers: range = numbers) -> None:
                writer.take([numbers[n] for n in batch.indices], batch.codes)

            if todo:
                codes = generator.generate(
                    [ids[image.prompt] for image in todo],
                    seeds=[image.seed for image in todo],
                    output="codes",
                    callback=take,
                    progress=False,
                    on_error="skip",
                    groups=[image.path.rsplit("/", 1)[0] for image in todo],  # the images of an item
                    **sampling,
                )
                for n in (codes < 0).any(1).nonzero().flatten().tolist():
                    failures[unwritten.pop(numbers[n]).path] = Failure("the model's logits were not finite")
                if generator.throughput is not None:
                    throughput = generator.throughput if throughput is None else throughput + generator.throughput
                    context.report.drawing = throughput.figures()
            yield from when_written(finished, awaited)
            finished = [_add_images(record, plan, failures) for record, plan in zip(chunk, plans, strict=True)]
            awaited = numbers
        yield from when_written(finished, awaited)


def _add_images(record: Record, plan: list[PlannedImage], failures: dict[str, Failure]) -> Record:
    """Add the images of an item; a variant with an image that failed has none."""
    failed = {image.variant: failures[image.path] for image in plan if image.path in failures}
    reasons = list(record.get("variant_reasons", [None] * len(record.get("long_prompt", []))))
    for variant, reason in failed.items():
        reasons[variant] = reason.reason
    base, negative = (
        {
            image.name: ImageVerdict(path=image.path, prompt=image.prompt)
            for image in plan
            if image.variant not in failed and image.name.startswith(role)
        }
        for role in ROLES
    )
    return {**record, "base_metadata": base, "negative_metadata": negative, "variant_reasons": reasons}


def failure(record: Record) -> Failure | None:
    """Return why images of an item are missing; None where all variants with dense prompts have theirs."""
    for variant, prompt in enumerate(record.get("long_prompt", [])):
        reason = record["variant_reasons"][variant]
        if prompt and reason and f"base_{variant}" not in record["base_metadata"]:
            return Failure(reason)
    return None

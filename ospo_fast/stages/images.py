"""Stage 3: for each variant images of the prompt, and one of its near miss, both dense or both plain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.config import Config, ImagesConfig
from ospo_fast.errors import Failure, OspoError
from ospo_fast.records import ImageVerdict, Record, stable_hash, write_atomic
from ospo_fast.stages import StageContext
from ospo_fast.stages.common import chunked, load_codes, open_image, png, prompt_error, save_codes

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ospo_fast.generation import ImageGenerator, ImageWriter, Throughput
    from ospo_fast.models.base import UnifiedModel

SIDES = ("base", "negative")

CHUNK = 32  # items between two writes to the store; of six images each, they fill two batches on a GPU


@dataclass(frozen=True)
class Drawing:
    """One image to draw: whose it is, where it goes (relative to the run folder), what it shows and its seed."""

    variant: int
    name: str
    path: str
    prompt: str
    seed: int


def drawings(record: Record, seed: int, draws: int = 1, prompts: str = "dense") -> list[Drawing]:
    """The images of an item: of each variant `draws` of its prompt, and one of the near miss.

    The first and that of the near miss share their seed, so that they differ in little else.
    """
    variants: list[tuple[str, str]] = list(
        zip(record.get("long_prompt", []), record.get("negative_long_prompt", []), strict=True)
    )
    plan = []
    for index in range(draws * len(variants)):
        variant = index % len(variants)
        pair = variants[variant]
        if not all(pair):
            continue
        if prompts == "plain":
            if "negative_prompt" not in record:
                raise OspoError(f"Item {record['item_id']} has no negative_prompt, which images.prompts=plain needs.")
            pair = record["prompt"], record["negative_prompt"][variant]
        draw_seed = stable_hash(seed, "images", record["item_id"], index)
        for side, prompt in zip(SIDES, pair, strict=True):
            if side == "base" or index == variant:
                path = f"images/{record['item_id']}/{side}_{index}.png"
                plan.append(Drawing(variant, f"{side}_{index}", path, prompt, draw_seed))
    return plan


def _settings(drawing: Drawing, config: ImagesConfig) -> dict[str, Any]:
    names = ("guidance_scale", "temperature", "top_k", "top_p")
    return {"prompt": drawing.prompt, "seed": drawing.seed} | {name: getattr(config, name) for name in names}


def finished(path: Path, settings: dict[str, Any]) -> bool:
    """Whether an image and its codes are there and can be read, drawn with these settings."""
    codes = path.with_suffix(".npz")
    if not path.exists() or not codes.exists():
        return False
    try:
        stored = load_codes(codes)
        open_image(path)
    except OspoError:
        return False
    return all(stored.get(name) == value for name, value in settings.items())


def run(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
    speed: Callable[[Throughput], None] | None = None,
) -> Iterator[Record]:
    """Every record with `base_metadata` and `negative_metadata`, which name the images that were drawn.

    Beside each PNG lies an .npz with `codes` (T,) and the prompt, seed and sampling settings; it is written after the
    PNG, whole or not at all, and marks the image as finished. Finished images are not drawn again. Records come out one
    chunk late, once their images are written: that happens while the next chunk is drawn.

    speed: called after each chunk with how fast all images so far were drawn.

    Raises:
        OspoError: no run folder was given, or it cannot be written.

    """
    from ospo_fast.generation import ImageGenerator, ImageWriter

    if out is None:
        raise OspoError("images: got no run folder; give `out`, where the images go.")
    folder, settings = out, config.images
    generator = ImageGenerator(model, batch_size=settings.batch_size, jacobi_window=settings.jacobi_window)
    unwritten: dict[int, Drawing] = {}
    ready: list[Record] = []  # once none of `awaited` is unwritten
    awaited = range(0)
    fast: Throughput | None = None

    def save(index: int, codes: Tensor, image: Image) -> None:
        drawing = unwritten[index]
        write_atomic(folder / drawing.path, png(image))
        save_codes((folder / drawing.path).with_suffix(".npz"), codes, **_settings(drawing, settings))
        del unwritten[index]

    with ImageWriter(model, save) as writer:

        def written() -> list[Record]:
            writer.wait(lambda: unwritten.keys().isdisjoint(awaited))
            return ready

        for chunk in chunked(records, CHUNK):
            plans = [drawings(record, config.seed, settings.draws, settings.prompts) for record in chunk]
            todo = [d for plan in plans for d in plan if not finished(folder / d.path, _settings(d, settings))]
            failed = {d.path: why for d in todo if (why := prompt_error(model, d.prompt)) is not None}
            todo = [drawing for drawing in todo if drawing.path not in failed]
            indices = range(awaited.stop, awaited.stop + len(todo))
            if todo:
                unwritten.update(zip(indices, todo, strict=True))
                wrong = _draw(generator, writer, todo, indices, settings)
                failed |= dict.fromkeys((unwritten.pop(n).path for n in wrong), "the model's logits were not finite")
                if generator.throughput is not None:
                    fast = generator.throughput if fast is None else fast + generator.throughput
                    if context is not None:
                        context.report.drawing = fast.figures()
                    if speed is not None:
                        speed(fast)
            yield from written()
            ready = [_with_images(record, plan, failed) for record, plan in zip(chunk, plans, strict=True)]
            awaited = indices
        yield from written()


def _draw(
    generator: ImageGenerator, writer: ImageWriter, todo: list[Drawing], indices: range, settings: ImagesConfig
) -> list[int]:
    """Draw images and have each written as soon as its batch is finished; which of `indices` failed."""
    from ospo_fast.generation import GeneratedBatch

    def keep(drawn: GeneratedBatch) -> None:
        writer.take([indices[n] for n in drawn.indices], drawn.codes)

    codes = generator.generate(
        [drawing.prompt for drawing in todo],
        seeds=[drawing.seed for drawing in todo],
        guidance_scale=settings.guidance_scale,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        output="codes",
        callback=keep,
        progress=False,
        on_error="skip",
        groups=[drawing.path.rsplit("/", 1)[0] for drawing in todo],  # the images of an item
    )
    return [indices[n] for n in (codes < 0).any(1).nonzero().flatten().tolist()]


def _with_images(record: Record, plan: list[Drawing], failed: dict[str, str]) -> Record:
    """The record with the images of its variants; where a drawing failed, all of its variant are left out."""
    reasons = list(record.get("variant_reasons", [None] * len(record.get("long_prompt", []))))
    bad = {drawing.variant: failed[drawing.path] for drawing in plan if drawing.path in failed}
    good = [drawing for drawing in plan if drawing.variant not in bad]
    base, negative = (
        {d.name: ImageVerdict(path=d.path, prompt=d.prompt) for d in good if d.name.startswith(side)} for side in SIDES
    )
    for variant, reason in bad.items():
        reasons[variant] = reason
    return {**record, "base_metadata": base, "negative_metadata": negative, "variant_reasons": reasons}


def failure(record: Record) -> Failure | None:
    """Return why images of an item are missing that its prompts ask for; None where all were generated."""
    asked = enumerate(record.get("long_prompt", []))
    missing = [n for n, prompt in asked if prompt and f"base_{n}" not in record["base_metadata"]]
    return next((Failure(reason) for n in missing if (reason := record["variant_reasons"][n])), None)

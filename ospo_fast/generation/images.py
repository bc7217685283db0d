"""Images from prompts: batched, guided, and the same for an item and its seed whatever else is drawn beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation.decode_batch import DecodeBatch, Engine, Sampling, signature
from ospo_fast.generation.image_writer import ImageWriter
from ospo_fast.generation.jacobi import JacobiDecodeBatch
from ospo_fast.generation.requests import (
    REMEDY,
    GenerationError,
    Request,
    check_batch_size,
    check_ids,
    check_window,
    eval_mode,
    full_batch,
    in_groups,
    make_requests,
    max_batch_size,
    run_batches,
)
from ospo_fast.generation.throughput import Throughput, streamed_bytes
from ospo_fast.models.base import UnifiedModel
from ospo_fast.oom import BatchSizeLimit, out_of_memory, short

_OUTPUTS = ("pil", "codes", "pt")


@dataclass(frozen=True)
class GeneratedBatch:
    """What `callback` gets after each batch: which images are finished, and how many of all."""

    indices: list[int]  # positions in the output
    codes: Tensor  # (len(indices), T) int64
    done: int
    total: int


class ImageGenerator:
    """Draws images with a unified model.

    Args:
        model: from `load_model`.
        batch_size: images drawn at once; by default as many as are useful and fit the free memory. A batch that runs
            out of memory is halved and drawn again, and no later one is larger.
        capture: replay the steps from a CUDA graph; False runs them one by one, with the same result.
        jacobi_window: how many codes of an image one step may draw, 2 or more; 0 draws them one by one. See below.

    An image depends on the model, its prompt, its seed and the sampling settings alone: on one machine the codes are
    the same in any batch, of any size, and at any place in it. On a GPU that takes matrix products of one size, which
    are filled up with dummies: of 96 images, however many fit the memory, or of `batch_size` where it is given, and
    with another `batch_size` they may round otherwise.

    With `jacobi_window` a step runs that many positions of every image at once, on drafts of the codes that are not
    drawn yet, and keeps the codes up to the first wrong draft: the codes are those of drawing one by one (up to the
    rounding of products on a GPU, which have other numbers of rows). This is speculative Jacobi decoding (Teng et al.
    2024, arXiv 2410.01699), with noise fixed by seed and step in place of random acceptance. It is meant for a few
    images at a time, where a step costs what reading the weights costs; with many, products are the bound, and wrong
    drafts are lost work. So without `batch_size` fewer images are drawn at once, by this factor. How many drafts are
    right depends on the model, and is less with strong guidance: `throughput.codes_per_step` tells. What was measured
    stands in the README; on a GPU nothing was.

    `throughput` tells how fast the last call of `generate` drew; None where it drew nothing.

    """

    def __init__(
        self, model: UnifiedModel, *, batch_size: int | None = None, capture: bool = True, jacobi_window: int = 0
    ) -> None:
        check_batch_size(batch_size)
        check_window(jacobi_window)
        for name in ("decoder", "head", "grid", "image_prompt", "embed_codes"):
            if not hasattr(model, name):
                raise UsageError(f"model: got {type(model).__name__}, expected what ospo_fast.load_model returns")
        self.model = model
        self.batch_size = batch_size
        self.capture = capture
        self.jacobi_window = jacobi_window
        self.throughput: Throughput | None = None
        self._engine: Engine | None = None
        self._canvas: DecodeBatch | None = None
        self._canvas_settings: tuple[bool, int] | None = None
        self._room: int | None = None  # bytes of rows that fit, once more of them have run out of memory

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str | Tensor],
        *,
        seeds: Sequence[int] | Tensor,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_images: int = 1,
        output: str = "pil",
        callback: Callable[[GeneratedBatch], None] | None = None,
        progress: bool = True,
        on_error: str = "raise",
        groups: Sequence[Hashable] | None = None,
    ) -> Any:
        """Draw `num_images` images of each prompt, in input order (all images of the first prompt first).

        Args:
            prompts: texts (the chat template is applied), or token ids (S,) int64 that end in begin-of-image.
            seeds: one integer per image, len(prompts) · num_images of them.
            guidance_scale: w in u + w·(c − u), with c the logits under the prompt and u those without it. At 1 only c
                is computed.
            temperature: 0 takes the likeliest code.
            top_k: how many of the likeliest codes to keep; 0 keeps all.
            top_p: keep the fewest likeliest codes that have this probability together; 1 keeps all.
            num_images: images of each prompt.
            output: "pil" (list of images), "codes" ((N, T) int64 tensor on the CPU) or "pt" ((N, 3, H, W) float
                tensor in [0, 1], on the CPU).
            callback: called with a `GeneratedBatch` after each batch.
            progress: a bar on stderr for what takes more than two seconds.
            on_error: an image whose logits are not finite fails alone. "raise": GenerationError once the others are
                finished. "skip": None stands in its place (−1 in codes, NaN in "pt").
            groups: what each image belongs to, one value per image: neighbours of one group share a batch where they
                fit one, such as the images that one item is judged by.

        Raises:
            UsageError: an argument that makes no sense.
            GenerationError: images failed; it carries the finished ones.
            OspoError: guidance has no effect, or not even one image fits the memory.

        """
        sampling = Sampling(guidance_scale, temperature, top_k, top_p)
        _check_choice("output", output, _OUTPUTS)
        _check_choice("on_error", on_error, ("raise", "skip"))
        if num_images < 1:
            raise UsageError(f"num_images: got {num_images}, expected a positive number")
        ids = [i for i in self._ids(prompts) for _ in range(num_images)]
        jobs = make_requests(ids, seeds)
        if groups is not None and len(groups) != len(jobs):
            raise UsageError(f"groups: got {len(groups)} of them, expected {len(jobs)}, one for each image")
        tokens = self.model.grid[0] * self.model.grid[1]
        codes = torch.full((len(jobs), tokens), -1, dtype=torch.long)
        images: dict[int, Any] = {}
        failed: dict[int, str] = {}

        def save(index: int, _: Tensor, image: Any) -> None:
            images[index] = image

        done, seconds, streamed, passes = 0, 0.0, 0, 0
        self.throughput = None
        with (
            eval_mode(self.model),
            tqdm(total=len(jobs), unit="image", delay=2, disable=not progress) as bar,
            ImageWriter(self.model, save) as finished,
        ):
            begin = time.perf_counter()
            for batch, (drawn, bad, steps) in self._batches(jobs, sampling, groups) if jobs else ():
                seconds += time.perf_counter() - begin
                shape = [len(job.ids) for job in batch], sampling.branches
                streamed += streamed_bytes(self.model, *shape, steps)
                passes += sum(steps)
                for job, step in zip(batch, bad, strict=True):
                    if step >= 0:
                        name = prompts[job.index // num_images]
                        shown = repr(name[:60]) if isinstance(name, str) else f"{len(name)} token ids"
                        reason = f"the logits are not finite at code {step}"
                        failed[job.index] = f"image {job.index} ({shown}, seed {job.seed}): {reason}"
                fine = [i for i, step in enumerate(bad) if step < 0]
                indices = [batch[i].index for i in fine]
                codes[indices] = drawn[fine]
                if output != "codes":
                    finished.take(indices, drawn[fine])
                done += len(batch)
                bar.update(len(batch))
                self.throughput = Throughput(done, seconds, streamed, done * tokens, passes)
                bar.set_postfix_str(self.throughput.beside_rate, refresh=False)
                if callback is not None:
                    callback(GeneratedBatch(indices, drawn[fine], done, len(jobs)))
                begin = time.perf_counter()
        results = codes if output == "codes" else _pictures(images, len(jobs), output)
        if failed and on_error == "raise":
            raise GenerationError.from_failures("images", results, failed)
        return results

    def _ids(self, prompts: Sequence[str | Tensor]) -> list[Tensor]:
        if isinstance(prompts, (str, Tensor)):
            raise UsageError("prompts: got a single prompt, expected a list of them")
        tokens = self.model.grid[0] * self.model.grid[1]
        made: dict[str, Tensor] = {}
        found = []
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                if prompt not in made:
                    if not prompt.strip():
                        raise UsageError(f"prompts[{i}]: got an empty string, expected a description of an image")
                    made[prompt] = self.model.image_prompt(prompt)
                ids = made[prompt]
            else:
                ids = prompt.cpu()
                if ids.dim() == 1 and (len(ids) == 0 or int(ids[-1]) != self.model.boi_id):
                    raise UsageError(
                        f"prompts[{i}]: token ids must end in begin-of-image ({self.model.boi_id}), "
                        f"got {ids[-1:].tolist() or 'none'}"
                    )
            check_ids(f"prompts[{i}]", ids, self.model, tokens)
            found.append(ids.long())
        return found

    def _batches(
        self, jobs: list[Request], sampling: Sampling, groups: Sequence[Hashable] | None
    ) -> Iterator[tuple[list[Request], tuple[Tensor, list[int], list[int]]]]:
        engine = self._current()
        decoder, branches = engine.decoder, sampling.branches
        window = max(1, min(self.jacobi_window, engine.tokens - 1))
        length = -(-(max(len(job.ids) for job in jobs) + engine.tokens) // 64) * 64
        settings = self.capture, self.jacobi_window
        fits = self._canvas is not None and self._canvas.serves(sampling, 1, length)
        if decoder.device.type == "cpu" or not fits or self._canvas_settings != settings:
            self._canvas = None  # before the free memory is asked for
        self._canvas_settings = settings
        row_bytes = branches * decoder.row_bytes(length)
        free = max_batch_size(decoder, row_bytes, window)
        size = self.batch_size or (free if self._canvas is None else max(free, self._canvas.slots))
        rows = full_batch(decoder, self.batch_size, size, window)

        def work(batch: list[Request], size: int) -> tuple[Tensor, list[int], list[int]]:
            if self._canvas is None or not self._canvas.serves(sampling, len(batch), length):
                self._canvas = None  # its memory goes before the next one's comes
                slots, filled = len(batch), decoder.pad_rows(len(batch), rows, row_bytes, window)
                if decoder.device.type == "cuda":
                    slots = min(size, -(-len(jobs) // 8) * 8)  # with room for later batches: one graph serves them all
                given = (engine, filled, slots, length, sampling)
                if self.jacobi_window:
                    self._canvas = JacobiDecodeBatch(*given, window=window, capture=self.capture)
                else:
                    self._canvas = DecodeBatch(*given, capture=self.capture)
            try:
                return *self._canvas.draw(batch), self._canvas.steps
            except BaseException:
                self._canvas = None
                raise

        limit = BatchSizeLimit(size, "image", REMEDY)
        if self._room is not None:
            limit.max_size = max(1, min(size, self._room // row_bytes))
        batches = in_groups(jobs, range(len(jobs)) if groups is None else groups, limit.max_size)
        try:
            yield from run_batches(batches, work, limit)
        finally:
            if limit.max_size < size:
                self._room = limit.max_size * row_bytes

    def _current(self) -> Engine:
        """The engine with the weights that the model has now."""
        if self._engine is not None and self._engine.signature == signature(self.model):
            self._engine.refresh()
        else:
            self._canvas = self._engine = None
            try:
                self._engine = Engine(self.model)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise OspoError(
                    f"model: {self.model.name} leaves no memory for drawing ({short(error)}); "
                    "free some, or use a smaller dtype"
                ) from error
        return self._engine


def _pictures(images: dict[int, Any], count: int, output: str) -> Any:
    if output == "pil":
        return [images.get(i) for i in range(count)]
    arrays = {i: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for i, image in images.items()}
    if not arrays:
        return torch.empty(count, 3, 0, 0)
    blank = torch.full_like(next(iter(arrays.values())), torch.nan)
    return torch.stack([arrays.get(i, blank) for i in range(count)])


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")

"""Images from prompts: batched, guided, and the same for an item and its seed whatever else is drawn beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation.batching import (
    GenerationError,
    Job,
    by_length,
    check_batch_size,
    check_ids,
    check_number,
    check_sampling,
    evaluating,
    fitting,
    make_jobs,
    rows_of,
    run_batches,
)
from ospo_fast.generation.decoder import Cache, LeanDecoder
from ospo_fast.models.base import UnifiedModel
from ospo_fast.ops import sample_codes

_OUTPUTS = ("pil", "codes", "pt")


@dataclass(frozen=True)
class Drawn:
    """What `callback` gets after each batch: which images are finished, and how many of all."""

    indices: list[int]  # positions in the output
    codes: Tensor  # (len(indices), T) int64
    done: int
    total: int


@dataclass(frozen=True)
class _Sampling:
    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        check_number("guidance_scale", self.guidance_scale, "a number >= 0; 1 draws without guidance")
        check_sampling(self.temperature, self.top_p, "code")
        if self.top_k < 0:
            raise UsageError(f"top_k: got {self.top_k}, expected an integer >= 0; 0 keeps all codes")


class ImageGenerator:
    """Draws images with a unified model.

    Args:
        model: from `load_model`.
        batch_size: images drawn at once; by default as many as are useful and fit the free memory. A batch that runs
            out of GPU memory is halved and drawn again.

    An image depends on the model, its prompt, its seed and the sampling settings alone: on one machine the codes are
    the same in any batch and at any place in it. On the CPU that holds for any `batch_size` too; on a GPU, matrix
    products of another batch size may round otherwise.

    """

    def __init__(self, model: UnifiedModel, *, batch_size: int | None = None) -> None:
        check_batch_size(batch_size)
        self.model = model
        self.batch_size = batch_size

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
        callback: Callable[[Drawn], None] | None = None,
        progress: bool = True,
        on_error: str = "raise",
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
            callback: called with a `Drawn` after each batch.
            progress: a bar on stderr for what takes more than two seconds.
            on_error: an image whose logits are not finite fails alone. "raise": GenerationError once the others are
                finished. "skip": None stands in its place (−1 in codes, NaN in "pt").

        Raises:
            UsageError: an argument that makes no sense.
            GenerationError: images failed; it carries the finished ones.
            OspoError: guidance has no effect, or not even one image fits the memory.

        """
        sampling = _Sampling(guidance_scale, temperature, top_k, top_p)
        _check_choice("output", output, _OUTPUTS)
        _check_choice("on_error", on_error, ("raise", "skip"))
        if num_images < 1:
            raise UsageError(f"num_images: got {num_images}, expected a positive number")
        ids = [i for i in self._ids(prompts) for _ in range(num_images)]
        jobs = make_jobs(ids, seeds)
        tokens = self.model.grid[0] * self.model.grid[1]
        codes = torch.full((len(jobs), tokens), -1, dtype=torch.long)
        failed: dict[int, str] = {}
        if jobs:
            done = 0
            with evaluating(self.model), tqdm(total=len(jobs), unit="image", delay=2, disable=not progress) as bar:
                for batch, (drawn, bad) in self._batches(jobs, sampling):
                    for job, step in zip(batch, bad, strict=True):
                        if step >= 0:
                            name = prompts[job.index // num_images]
                            shown = repr(name[:60]) if isinstance(name, str) else f"{len(name)} token ids"
                            reason = f"the logits are not finite at code {step}"
                            failed[job.index] = f"image {job.index} ({shown}, seed {job.seed}): {reason}"
                    fine = [i for i, step in enumerate(bad) if step < 0]
                    indices = [batch[i].index for i in fine]
                    codes[indices] = drawn[fine]
                    done += len(batch)
                    bar.update(len(batch))
                    if callback is not None:
                        callback(Drawn(indices, drawn[fine], done, len(jobs)))
        results = self._output(codes, failed, output)
        if failed and on_error == "raise":
            raise GenerationError.of("images", results, failed)
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

    def _batches(self, jobs: list[Job], sampling: _Sampling) -> Any:
        decoder = LeanDecoder(self.model)
        tokens = self.model.grid[0] * self.model.grid[1]
        longest = max(len(job.ids) for job in jobs)
        decoder.positions(longest + tokens)
        table = self.model.embed_codes(torch.arange(self.model.num_codes, device=self.model.device))
        branches = 1 if sampling.guidance_scale == 1 else 2
        size = self.batch_size or fitting(decoder, branches * decoder.row_bytes(longest + tokens))

        def work(batch: list[Job], size: int) -> tuple[Tensor, list[int]]:
            rows = decoder.filled(len(batch), size, branches * decoder.row_bytes(len(batch[0].ids) + tokens))
            codes, bad = draw(self.model, decoder, table, batch, rows, sampling)
            return codes[: len(batch)].cpu(), bad[: len(batch)].tolist()

        return run_batches(by_length(jobs, lambda job: len(job.ids), size), work, size, "image")

    def _output(self, codes: Tensor, failed: dict[int, str], output: str) -> Any:
        if output == "codes":
            return codes
        fine = [i for i in range(len(codes)) if i not in failed]
        images = dict(zip(fine, self.model.decode_codes(codes[fine]), strict=True))
        if output == "pil":
            return [images.get(i) for i in range(len(codes))]
        arrays = {i: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for i, image in images.items()}
        if not arrays:
            return torch.empty(len(codes), 3, 0, 0)
        blank = torch.full_like(next(iter(arrays.values())), torch.nan)
        return torch.stack([arrays.get(i, blank) for i in range(len(codes))])


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def draw(
    model: UnifiedModel,
    decoder: LeanDecoder,
    table: Tensor,  # (num_codes, D)
    jobs: list[Job],
    rows: int,
    sampling: _Sampling,
) -> tuple[Tensor, Tensor]:
    """Codes (rows, T) of jobs of equal length, and per row the step at which its logits were not finite, or −1.

    With guidance the batch has 2 · rows: the conditional ones, then the unconditional ones.
    """
    guided = sampling.guidance_scale != 1
    ids, seeds = rows_of(jobs, rows, decoder.device)
    length, tokens = ids.shape[1], model.grid[0] * model.grid[1]
    cache = Cache(decoder, 2 * rows if guided else rows, length + tokens)
    hidden = decoder(model.embed_tokens(ids), cache.part(slice(0, rows)), 0)[:, -1]
    if guided:
        # An unconditional prompt depends on the length alone: one row is computed and copied to all.
        blank = model.unconditional(ids[0])
        single = Cache(decoder, 1, length)
        alone = decoder(model.embed_tokens(blank[None]), single, 0)[:, -1]
        cache.part(slice(rows, 2 * rows)).copy_rows(single, slice(0, 1), length)
        hidden = torch.cat((hidden, alone.expand(rows, -1)))
    bad = torch.full((rows,), -1, dtype=torch.long, device=decoder.device)
    codes = torch.empty(rows, tokens, dtype=torch.long, device=decoder.device)
    for step in range(tokens):
        logits = model.head(hidden)
        broken = ~logits.isfinite().all(1).view(-1, rows).all(0)
        bad = torch.where(broken & (bad < 0), step, bad)
        # A broken row goes on with zeros: it fails alone, at the end.
        logits = logits.masked_fill(broken.repeat(len(logits) // rows)[:, None], 0)
        cond, uncond = (logits[:rows], logits[rows:]) if guided else (logits, None)
        if uncond is not None and step == 0:
            _check_live(cond, uncond, ~broken & (ids != blank).any(1))
        codes[:, step] = sample_codes(
            cond,
            uncond,
            guidance_scale=sampling.guidance_scale,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seeds=seeds,
            step=step,
        )
        if step + 1 < tokens:
            x = table[codes[:, step]]
            hidden = decoder((torch.cat((x, x)) if guided else x)[:, None], cache, length + step)[:, -1]
    return codes, bad


def _check_live(cond: Tensor, uncond: Tensor, prompted: Tensor) -> None:
    """OspoError unless the branches differ where the prompts do: equal logits mean that no prompt reached the model."""
    rounding = max(1e-4, 2 * torch.finfo(cond.dtype).eps)
    cond, uncond = cond[prompted].float(), uncond[prompted].float()
    if not len(cond):
        return
    spread = float(cond.max() - cond.min())
    if spread > 0 and float((cond - uncond).abs().max()) <= rounding * spread:
        raise OspoError(
            "guidance: the logits with and without the prompt are equal, so guidance would do nothing; "
            "is the model trained, and are its weights whole? guidance_scale=1 draws without it"
        )

"""A batch of images being drawn: all its state on the device, one step at a time, on a GPU as one captured graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation.decoder import Buffers, Cache, InferenceDecoder
from ospo_fast.generation.graph import GraphRunner, capturable
from ospo_fast.generation.projections import ModuleProjection, head_projection
from ospo_fast.generation.requests import Request, check_number, check_sampling
from ospo_fast.models.base import UnifiedModel
from ospo_fast.ops.sample_codes import draw_codes


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn from logits; see `ImageGenerator.generate`."""

    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        check_number("guidance_scale", self.guidance_scale, "a number >= 0; 1 draws without guidance")
        check_sampling(self.temperature, self.top_p, "code")
        if self.top_k < 0:
            raise UsageError(f"top_k: got {self.top_k}, expected an integer >= 0; 0 keeps all codes")

    @property
    def branches(self) -> int:
        """Rows of the decoder for each image."""
        return 1 if self.guidance_scale == 1 else 2


class Engine:
    """What all batches of a model share: its decoder, its head, and the input embedding of every code."""

    def __init__(self, model: UnifiedModel) -> None:
        self.model = model
        self.signature = signature(model)
        self.tokens = model.grid[0] * model.grid[1]
        self.decoder = InferenceDecoder(model)
        self.decoder.positions(model.max_positions)
        self.head = head_projection(model.head, self.decoder.packed)
        self.table = torch.empty(model.num_codes, model.hidden_size, device=model.device, dtype=model.dtype)
        self._embed()

    def refresh(self) -> None:
        """Read the model's weights again, into the same memory: captured graphs stay valid."""
        self.decoder.refresh()
        self.head.refresh()
        self._embed()

    def _embed(self) -> None:
        self.table.copy_(self.model.embed_codes(torch.arange(self.model.num_codes, device=self.model.device)))

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Hidden (M, D) → logits (M, V) of the codes, into `out`."""
        if isinstance(self.head, ModuleProjection) and self.decoder.device.type == "cpu":
            return out.copy_(self.decoder.run_padded(self.head, hidden))
        return self.head(hidden, out)


class DecodeBatch:
    """Buffers for up to `slots` images of at most `length` positions; `rows` ≥ slots is how many the products have.

    Rows without an image are dummies: of length −1, which attention passes over.
    With `capture` the steps of a CUDA device are replayed from a graph, captured at the first batch.
    """

    def __init__(
        self, engine: Engine, rows: int, slots: int, length: int, sampling: Sampling, *, capture: bool
    ) -> None:
        self._engine, self._sampling = engine, sampling
        self._rows, self.slots, self._length = rows, slots, length
        decoder = engine.decoder
        device, all_rows = decoder.device, sampling.branches * rows
        self._cache = Cache(decoder, sampling.branches * slots + 1, length)
        self._buffers = Buffers(decoder, all_rows)
        self._x = torch.empty(all_rows, decoder.width, device=device, dtype=decoder.dtype)
        self._logits = torch.empty(all_rows, engine.model.num_codes, device=device, dtype=decoder.dtype)
        self._where, self._lengths, self._active = torch.zeros(3, all_rows, dtype=torch.long, device=device)
        self._seeds, self._steps, self._codes, self._bad = torch.zeros(4, rows, dtype=torch.long, device=device)
        self._tokens = torch.zeros(rows, engine.tokens, dtype=torch.long, device=device)
        self._replay = GraphRunner(device, capture and capturable(decoder))
        self.steps: list[int] = []  # of each image drawn last: passes of the decoder, the prompt's included

    def serves(self, sampling: Sampling, images: int, length: int) -> bool:
        """Whether it can draw so many images of at most `length` positions: on the CPU without a row too many."""
        room = images <= self.slots if self._engine.decoder.device.type == "cuda" else images == self.slots
        return self._sampling == sampling and room and length <= self._length

    def draw(self, jobs: Sequence[Request]) -> tuple[Tensor, list[int]]:
        """Codes (N, T) of the jobs, on the CPU, and for each the step at which its logits were wrong, or −1."""
        self._begin(jobs)
        for _ in range(self._engine.tokens - 1):
            self._replay(self._step)
        self._sample()
        count = len(jobs)
        self.steps = [self._engine.tokens] * count
        return self._tokens[:count].cpu(), self._bad[:count].tolist()

    def _begin(self, jobs: Sequence[Request]) -> None:
        """Prompts into the cache, state to its start, first logits."""
        rows, slots, decoder = self._rows, self.slots, self._engine.decoder
        guided = self._sampling.branches == 2
        lengths = torch.tensor([len(job.ids) for job in jobs])
        spare = self._sampling.branches * slots
        self._where.fill_(spare)
        self._lengths.fill_(-1)
        self._active.zero_()
        for branch in range(self._sampling.branches):
            part = slice(branch * rows, branch * rows + len(jobs))
            self._where[part] = torch.arange(branch * slots, branch * slots + len(jobs), device=decoder.device)
            self._lengths[part] = lengths.to(decoder.device)
            self._active[part] = 1
        self._seeds.zero_()
        self._seeds[: len(jobs)] = torch.tensor([job.seed for job in jobs], device=decoder.device)
        self._steps.zero_()
        self._bad.fill_(-1)

        prompts = [job.ids for job in jobs]
        places = list(range(len(jobs)))
        first: dict[int, int] = {}
        if guided:
            # An unconditional prompt depends on the length alone: one of each length is computed and copied.
            for i, ids in enumerate(prompts[: len(jobs)]):
                if len(ids) not in first:
                    first[len(ids)] = len(prompts)
                    prompts.append(self._engine.model.unconditional(ids))
                    places.append(slots + i)
        last = decoder.prefill(prompts, self._cache, places)
        hidden = last.new_zeros(len(self._x), decoder.width)
        hidden[: len(jobs)] = last[: len(jobs)]
        for length, n in first.items():
            same = [i for i, job in enumerate(jobs) if len(job.ids) == length]
            self._cache.repeat_row(places[n], [slots + i for i in same], length)
            hidden[[rows + i for i in same]] = last[n]
        self._engine.logits(hidden, self._logits)
        if guided:
            blanks = [prompts[first[len(job.ids)]] for job in jobs]
            prompted = torch.tensor([not torch.equal(job.ids, blank) for job, blank in zip(jobs, blanks, strict=True)])
            check_guidance_has_effect(self._logits[: len(jobs)], self._logits[rows : rows + len(jobs)], prompted)

    def _sample(self) -> None:
        sampling, rows = self._sampling, self._rows
        draw_codes(
            self._logits[:rows],
            self._logits[rows:] if sampling.branches == 2 else None,
            guidance_scale=sampling.guidance_scale,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seeds=self._seeds,
            steps=self._steps,
            codes=self._codes,
            bad=self._bad,
            tokens=self._tokens,
        )

    def _step(self) -> None:
        """Draw a code from the logits, run it through the decoder, leave the next logits."""
        self._sample()
        torch.index_select(self._engine.table, 0, self._codes, out=self._x[: self._rows])
        if self._sampling.branches == 2:
            self._x[self._rows :] = self._x[: self._rows]
        hidden = self._engine.decoder.step(self._x, self._cache, self._where, self._lengths, self._buffers)
        self._engine.logits(hidden, self._logits)
        self._lengths += self._active
        self._steps += 1


def check_guidance_has_effect(cond: Tensor, uncond: Tensor, prompted: Tensor) -> None:
    """OspoError unless the branches (N, V) differ where prompts do: equal logits mean that no prompt reached the model.

    prompted (N,) bool, on the CPU: whether a prompt differs from its unconditional partner. Rows that are not finite
    are left out.
    """
    rounding = max(1e-4, 2 * torch.finfo(cond.dtype).eps)
    kept = prompted.to(cond.device) & (cond.isfinite() & uncond.isfinite()).all(1)
    cond, uncond = cond[kept].float(), uncond[kept].float()
    if not len(cond):
        return
    spread = float(cond.max() - cond.min())
    if spread > 0 and float((cond - uncond).abs().max()) <= rounding * spread:
        raise OspoError(
            "guidance: the logits with and without the prompt are equal, so guidance would do nothing; "
            "is the model trained, and are its weights whole? guidance_scale=1 draws without it"
        )


def signature(model: UnifiedModel) -> tuple[object, ...]:
    """What an `Engine` holds on to: it is made anew where a module, a hook or a weight's place changed."""
    found: list[object] = []
    for root in (model.decoder, model.head):
        for module in root.modules():
            found += [type(module), len(module._forward_hooks), len(module._forward_pre_hooks)]
            found += [(p.data_ptr(), p.shape, p.dtype) for p in module.parameters(recurse=False)]
    return tuple(found)

"""Jacobi window decoding: several codes of an image per step, the same codes as one by one.

With its noise fixed by seed and step (`ops.sample_codes`), a code is a function of the codes before it. A step runs the
last known code and drafts of the next ones, samples a successor of each, and keeps these up to the first wrong draft:
they are what single steps would have sampled. The successors behind it become the drafts of the next step, which
mostly samples them again, since their noise is the same.

The iteration is that of speculative Jacobi decoding (Teng et al. 2024, arXiv 2410.01699). That accepts drafts at
random and preserves only the distribution.

The gain is the number of drafts that are right, which depends on the model and is smaller with strong guidance. With
many images the products are the limit, and wrong drafts are lost work: without `batch_size` a batch has fewer images,
by the size of the window. On a GPU nothing was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ospo_fast.generation.decode_batch import DecodeBatch
from ospo_fast.generation.decoder import Buffers
from ospo_fast.generation.requests import Completion, Request


class JacobiDecodeBatch(DecodeBatch):
    """A `DecodeBatch` of images. A step runs a window of each: its last known code and window − 1 drafts.

    Each position of a window is a row of the decoder, and the rows of an image and branch share one row of the cache.
    What a wrong draft writes there is overwritten before it is read. Positions past the last code, and those of
    finished images, have length −1 as padding rows do.
    """

    def __init__(self, *arguments: Any, window: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._window = window

    def _set_rows(self, state: Tensor, tokens: Tensor) -> None:
        branches, rows, window, device = self.sampling.branches, len(tokens), self._window, tokens.device
        super()._set_rows(state, tokens)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self._window_x = self.x.new_empty(branches * rows * window, self.x.shape[1])
        self._window_buffers = Buffers(self._engine.decoder, len(self._window_x))
        self._window_cache_rows, self._window_lengths = integers(2, branches, rows, window)
        # drafts: the code at each position; the first is known. window_steps, window_seeds, sampled: step, seed and
        # value of the code that is sampled from it. window_error_steps: that step if the logits were invalid, or −1.
        self._drafts, self._window_steps, self._window_seeds, self._sampled, self._window_error_steps = integers(
            5, rows, window
        )
        # By step: the length of the row that samples it, its code, and its `window_error_steps`. Windows reach past the
        # last step.
        self._length_at, self.tokens, self._error_step_at = integers(3, rows, self.max_tokens + window)
        self._passes, self._partner_shift = integers(2, rows)
        # Row n: if n codes are kept, the positions of the next drafts in the window. Behind its end the last one is
        # repeated, since neighboring codes are often equal.
        kept, position = torch.arange(window + 1, device=device)[:, None], torch.arange(window, device=device)
        self._next_drafts = (kept - 1 + position).clamp(0, window - 1)

    def prefill(self, requests: Sequence[Request]) -> None:
        """See `DecodeBatch`."""
        super().prefill(requests)
        total, prompts = self.max_tokens, self.lengths[0, :, None]
        steps = torch.arange(self.tokens.shape[1], device=prompts.device)
        # An unconditional prompt may have another length.
        self._partner_shift.copy_(self.lengths[-1] - self.lengths[0])
        # The code of step s is sampled from the hidden state at position prompt + s − 1.
        self._length_at.copy_(torch.where((prompts < 0) | (steps >= total), -1, prompts + steps - 1))
        self._window_steps.copy_(torch.where(prompts < 0, total, 1) + steps[: self._window])
        self._passes.fill_(1)  # prefill
        self._error_step_at.fill_(-1)
        self._error_step_at[:, 0] = self.error_steps
        self._drafts.copy_(self.codes[:, None].expand_as(self._drafts))
        self._window_seeds.copy_(self.seeds[:, None].expand_as(self._drafts))
        self._window_cache_rows.copy_(self.cache_rows[..., None].expand_as(self._window_cache_rows))

    def step(self) -> None:
        """Sample a code at every position, keep those behind right drafts, and set the next drafts.

        As in `DecodeBatch.step`, everything stays on the device. It has few operations: on a CPU their number counts.
        """
        steps, sampled = self._window_steps, self._sampled
        half = sampled.numel()
        lengths = torch.gather(self._length_at, 1, steps, out=self._window_lengths[0])
        self._engine.embed(self._drafts.view(-1), self._window_x[:half])
        if self.sampling.branches == 2:
            self._window_lengths[1] = torch.where(lengths < 0, lengths, lengths + self._partner_shift[:, None])
            self._window_x[half:] = self._window_x[:half]
        hidden = self._engine.decoder.step(
            self._window_x, self.cache, self._window_cache_rows.view(-1), self._window_lengths.view(-1),
            self._window_buffers, shared_slots=True,
        )  # fmt: skip
        logits = self._engine.logits(hidden)
        self._window_error_steps.fill_(-1)
        self.sampling.sample(
            logits,
            seeds=self._window_seeds.view(-1),
            steps=steps.view(-1),
            codes=sampled.view(-1),
            error_steps=self._window_error_steps.view(-1),
        )
        # Codes behind a wrong draft are wrong too; later steps overwrite them.
        self.tokens.scatter_(1, steps, sampled)
        self._error_step_at.scatter_(1, steps, self._window_error_steps)
        right = lengths >= 0
        self._passes += right[:, 0]
        right[:, 1:] &= self._drafts[:, 1:] == sampled[:, :-1]
        kept = right.cumprod(1).sum(1)  # 0 for a finished image
        torch.gather(sampled, 1, self._next_drafts[kept], out=self._drafts)
        steps += kept[:, None]

    def steps_left(self) -> int:
        """See `DecodeBatch`. A step keeps `window` codes at most: the device is asked when all could be finished."""
        missing = self.max_tokens - int(self._window_steps[:, 0].min())
        return -(-missing // self._window)

    def completions(self) -> list[Completion]:
        """See `DecodeBatch`."""
        errors = self._error_step_at[:, : self.max_tokens]
        first = torch.where(errors < 0, self.max_tokens, errors).amin(1)
        self.error_steps.copy_(torch.where(first < self.max_tokens, first, -1))
        self.steps.copy_(self.limits)
        passes = self._passes.tolist()
        return [replace(result, steps=passes[i]) for i, result in enumerate(super().completions())]

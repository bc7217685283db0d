"""Several codes of an image in one step: Jacobi iteration on drafts, with the codes of drawing one by one.

With its noise fixed by seed and step (`ops.sample_codes`), a code is a function of the codes before it. So a step may
take drafts for the next ones, compute all of their successors at once, and keep the codes up to the first draft that
was wrong: these are what single steps would have drawn. The codes behind it are the drafts of the next step, which
mostly repeats them, because their noise is the same. The iteration is that of speculative Jacobi decoding (Teng et al.
2024, arXiv 2410.01699), which accepts drafts at random instead, so that the distribution alone stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ospo_fast.generation.decode_batch import DecodeBatch, Engine, Sampling
from ospo_fast.generation.decoder import Buffers
from ospo_fast.generation.requests import Request
from ospo_fast.ops.sample_codes import draw_codes


class JacobiDecodeBatch(DecodeBatch):
    """A `DecodeBatch` whose steps run the last code of every image and window − 1 drafts behind it.

    Each place of a window is a row of the decoder, and all of an image's and branch's write to one slot of the cache.
    What a wrong draft leaves there is written anew before it is read. Places past the last code, and those of finished
    images, are of length −1.
    """

    def __init__(
        self, engine: Engine, rows: int, slots: int, length: int, sampling: Sampling, *, window: int, capture: bool
    ) -> None:
        super().__init__(engine, rows, slots, length, sampling, capture=capture)
        decoder, branches = engine.decoder, sampling.branches
        device, dtype, whole = decoder.device, decoder.dtype, engine.tokens + window

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self._window = window
        self._inputs = torch.empty(branches * rows * window, decoder.width, device=device, dtype=dtype)
        self._window_logits = torch.empty(len(self._inputs), engine.model.num_codes, device=device, dtype=dtype)
        self._window_buffers = Buffers(decoder, len(self._inputs))
        self._window_where = numbers(branches, rows, window)
        self._window_lengths = numbers(branches, rows, window)
        # In each place the code that goes in, the first one known and drafts behind it; of the one that comes out its
        # step, seed, value, and its step again where the logits were wrong.
        self._drafts, self._window_steps, self._window_seeds, self._drawn, self._wrong = numbers(5, rows, window)
        # By step, past the last one too, since windows reach there: the length of the row that draws it; the code, and
        # what `_wrong` said, right up to the steps of the window.
        self._length_at, self._tokens, self._wrong_at = numbers(3, rows, whole)
        self._passes = numbers(rows)
        # Row n: where the next drafts are among the codes of a window of which n are kept; behind the last one its
        # repetition, as neighbours are often alike.
        kept, place = torch.arange(window + 1, device=device)[:, None], torch.arange(window, device=device)
        self._next = (kept - 1 + place).clamp(0, window - 1)

    def draw(self, jobs: Sequence[Request]) -> tuple[Tensor, list[int]]:
        """See `DecodeBatch.draw`."""
        self._begin(jobs)
        total, count = self._engine.tokens, len(jobs)
        missing = total - 1
        while missing > 0:  # the device is asked when all could be finished, not after every step
            for _ in range(-(-missing // self._window)):
                self._replay(self._step)
            missing = total - int(self._window_steps[:, 0].min())
        self.steps = self._passes[:count].tolist()
        wrong = self._wrong_at[:count, :total]
        first = torch.where(wrong < 0, total, wrong).amin(1).tolist()
        return self._tokens[:count, :total].cpu(), [-1 if step == total else step for step in first]

    def _begin(self, jobs: Sequence[Request]) -> None:
        super()._begin(jobs)
        self._sample()
        rows, total = self._rows, self._engine.tokens
        prompts = self._lengths[:rows, None]
        steps = torch.arange(self._length_at.shape[1], device=prompts.device)
        # The code of step s is drawn from what follows position prompt + s − 1.
        self._length_at.copy_(torch.where((prompts < 0) | (steps >= total), -1, prompts + steps - 1))
        self._window_steps.copy_(torch.where(prompts < 0, total, 1) + steps[: self._window])
        self._passes.fill_(1)  # the prompt's
        self._wrong_at.fill_(-1)
        self._wrong_at[:, 0] = self._bad
        self._drafts.copy_(self._codes[:, None].expand_as(self._drafts))
        self._window_seeds.copy_(self._seeds[:, None].expand_as(self._drafts))
        self._window_where.copy_(self._where.view(-1, rows, 1).expand_as(self._window_where))

    def _step(self) -> None:
        """Draw a code in every place of the windows, keep those behind right drafts, leave the next drafts.

        It is a few small operations: on a CPU their number counts.
        """
        engine, sampling, steps, drawn = self._engine, self._sampling, self._window_steps, self._drawn
        half = drawn.numel()
        lengths = torch.gather(self._length_at, 1, steps, out=self._window_lengths[0])
        torch.index_select(engine.table, 0, self._drafts.view(-1), out=self._inputs[:half])
        if sampling.branches == 2:
            self._window_lengths[1] = lengths
            self._inputs[half:] = self._inputs[:half]
        hidden = engine.decoder.step(
            self._inputs, self._cache, self._window_where.view(-1), self._window_lengths.view(-1),
            self._window_buffers, shared_slots=True,
        )  # fmt: skip
        engine.logits(hidden, self._window_logits)
        self._wrong.fill_(-1)
        draw_codes(
            self._window_logits[:half],
            self._window_logits[half:] if sampling.branches == 2 else None,
            guidance_scale=sampling.guidance_scale,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seeds=self._window_seeds.view(-1),
            steps=steps.view(-1),
            codes=drawn.view(-1),
            bad=self._wrong.view(-1),
        )
        # Those behind a wrong draft are overwritten by later steps.
        self._tokens.scatter_(1, steps, drawn)
        self._wrong_at.scatter_(1, steps, self._wrong)
        right = lengths >= 0
        self._passes += right[:, 0]
        right[:, 1:] &= self._drafts[:, 1:] == drawn[:, :-1]
        kept = right.cumprod(1).sum(1)  # none of a finished image
        torch.gather(drawn, 1, self._next[kept], out=self._drafts)
        steps += kept[:, None]

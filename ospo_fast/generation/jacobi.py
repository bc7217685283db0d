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

from ospo_fast.generation.batching import Job
from ospo_fast.generation.canvas import Canvas, Engine, Sampling
from ospo_fast.generation.decoder import Buffers
from ospo_fast.ops.sample_codes import draw_codes


class JacobiCanvas(Canvas):
    """A `Canvas` whose steps run the last code of every image and window − 1 drafts behind it.

    Each place of a window is a row of the decoder, and all of an image's and branch's write to one slot of the cache.
    What a wrong draft leaves there is written anew before it is read. Places past the last code, and those of finished
    images, are of length −1.
    """

    def __init__(
        self, engine: Engine, rows: int, slots: int, length: int, sampling: Sampling, *, window: int, capture: bool
    ) -> None:
        super().__init__(engine, rows, slots, length, sampling, capture=capture)
        decoder, branches = engine.decoder, sampling.branches
        device, dtype = decoder.device, decoder.dtype
        self._window = window
        self._places = torch.arange(window, device=device)
        self._inputs = torch.empty(branches * rows * window, decoder.width, device=device, dtype=dtype)
        self._window_logits = torch.empty(len(self._inputs), engine.model.num_codes, device=device, dtype=dtype)
        self._window_buffers = Buffers(decoder, len(self._inputs))
        self._window_where, self._window_lengths = torch.zeros(
            2, branches, rows, window, dtype=torch.long, device=device
        )
        # The last code and the drafts behind it; what was drawn in their places; the seed, and the step if it is wrong.
        self._drafts, self._drawn, self._window_seeds, self._wrong = torch.zeros(
            4, rows, window, dtype=torch.long, device=device
        )
        self._prompts, self._passes = torch.zeros(2, rows, dtype=torch.long, device=device)
        # Windows reach beyond the last code.
        self._tokens = torch.zeros(rows, engine.tokens + window, dtype=torch.long, device=device)

    def draw(self, jobs: Sequence[Job]) -> tuple[Tensor, list[int]]:
        """See `Canvas.draw`."""
        self._begin(jobs)
        total, count = self._engine.tokens, len(jobs)
        missing = total - 1
        while missing:  # the device is asked when all could be finished, not after every step
            for _ in range(-(-missing // self._window)):
                self._advance()
            missing = total - int(self._steps.min())
        self.steps = self._passes[:count].tolist()
        return self._tokens[:count, :total].cpu(), self._bad[:count].tolist()

    def _begin(self, jobs: Sequence[Job]) -> None:
        super()._begin(jobs)
        self._sample()
        rows = self._rows
        self._prompts.copy_(self._lengths[:rows])
        self._steps.copy_(torch.where(self._prompts < 0, self._engine.tokens, 1))
        self._passes.fill_(1)  # the prompt's
        self._drafts.copy_(self._codes[:, None].expand_as(self._drafts))
        self._window_seeds.copy_(self._seeds[:, None].expand_as(self._drafts))
        self._window_where.copy_(self._where.view(-1, rows, 1).expand_as(self._window_where))

    def _step(self) -> None:
        """Draw a code in every place of the windows, keep those behind right drafts, leave the next drafts."""
        engine, sampling, total, window = self._engine, self._sampling, self._engine.tokens, self._window
        half = self._rows * window
        steps = self._steps[:, None] + self._places  # of the codes to be drawn
        # The code of step s is drawn from what follows position prompt + s − 1.
        self._window_lengths.copy_(torch.where(steps < total, self._prompts[:, None] + steps - 1, -1))
        torch.index_select(engine.table, 0, self._drafts.view(-1), out=self._inputs[:half])
        if sampling.branches == 2:
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
            codes=self._drawn.view(-1),
            bad=self._wrong.view(-1),
        )
        right = self._drafts[:, 1:] == self._drawn[:, :-1]
        kept = torch.minimum(1 + right.cumprod(1).sum(1), total - self._steps)[:, None]  # none of a finished image
        self._tokens.scatter_(1, steps, self._drawn)  # beyond `kept` until the next step
        # Logits that are not finite count where their code was kept alone.
        wrong = torch.where((self._places < kept) & (self._wrong >= 0), self._wrong, total).amin(1)
        self._bad.copy_(torch.where((self._bad < 0) & (wrong < total), wrong, self._bad))
        # Behind the last code that was drawn its repetition: neighbours are often alike.
        self._drafts.copy_(self._drawn.gather(1, (kept - 1 + self._places).clamp(0, window - 1)))
        self._passes += self._steps < total
        self._steps += kept[:, 0]

"""A batch of images or texts that is decoded token by token, with all of its state on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ospo_fast.errors import Failure
from ospo_fast.generation.decoder import Buffers, Cache
from ospo_fast.generation.graph import GraphRunner, capturable
from ospo_fast.generation.requests import Completion, Request
from ospo_fast.generation.sampling import Sampling
from ospo_fast.generation.validation import check_guidance_has_effect

if TYPE_CHECKING:
    from ospo_fast.generation.engine import Engine


class DecodeBatch:
    """Buffers and state of up to `slots` requests.

    A decoder step runs `branches · rows` rows: conditional rows, then, with guidance, unconditional rows. `rows` may
    exceed the requests, so that matrix products have the same number of rows in every batch and results are bitwise
    independent of the batch. Padding rows have length −1: attention writes zeros for them and skips the cache.

    Row i of branch b uses row b·slots + i of the cache. Padding rows use one spare cache row after all others. So the
    cache row of branch 0 identifies the request, also after rows were removed.

    Requests end at their `max_tokens` or at a stop token. Without stop tokens all of them end together, and no step
    tests for it. With stop tokens, rows that end become padding rows, and are removed where `pad_rows` allows it.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        *,
        slots: int,
        length: int,
        max_tokens: int,
        pad_rows: Callable[[int], int],
        capture: bool,
    ) -> None:
        self._engine, self.sampling, self._pad_rows = engine, sampling, pad_rows
        self.slots, self.length, self.max_tokens, self.rows = slots, length, max_tokens, 0
        self.cache = Cache(engine.decoder, sampling.branches * slots + 1, length)
        self._stop_ids = torch.tensor(engine.stop_ids, device=engine.decoder.device) if engine.stop_ids else None
        self.runner = GraphRunner(engine.decoder.device, capture and capturable(engine.decoder))
        self._requests: Sequence[Request] = ()
        self._completions: dict[int, Completion] = {}

    def _set_rows(self, state: Tensor, tokens: Tensor) -> None:
        """Set the state of all rows (2·branches + 6, rows) and their tokens, and allocate the buffers of a step."""
        decoder, branches, self.rows = self._engine.decoder, self.sampling.branches, len(tokens)
        self._state, self.tokens = state, tokens
        # By step, as the tokens.
        size = tokens.shape if self.sampling.return_logps else 0
        self.logps = torch.zeros(size, device=decoder.device, dtype=torch.float32)
        self.cache_rows, self.lengths = state[:branches], state[branches : 2 * branches]
        # active: 1 while the request generates. codes: sampled last. error_steps: first step with bad logits, or −1.
        self.active, self.seeds, self.steps, self.limits, self.codes, self.error_steps = state[2 * branches :]
        self.x = torch.empty(branches * self.rows, decoder.width, device=decoder.device, dtype=decoder.dtype)
        self._buffers = Buffers(decoder, branches * self.rows)

    def prefill(self, requests: Sequence[Request]) -> None:
        """Run the prompts of up to `slots` requests, and sample the first token of each."""
        count, branches, device = len(requests), self.sampling.branches, self._engine.decoder.device
        rows = self._pad_rows(count)
        # On a GPU the rows are allocated once, since `pad_rows` is constant: a captured step needs fixed addresses.
        if rows != self.rows:
            # One more column than tokens, for the samples of finished rows.
            tokens = torch.zeros(rows, self.max_tokens + 1, dtype=torch.long, device=device)
            self._set_rows(torch.zeros(2 * branches + 6, rows, dtype=torch.long, device=device), tokens)
        self._requests, self._completions = requests, {}
        self._state.zero_()
        self.error_steps.fill_(-1)
        self.lengths.fill_(-1)
        self.cache_rows.fill_(branches * self.slots)
        columns = torch.tensor([(len(r.ids), r.seed, r.max_tokens, 1, i) for i, r in enumerate(requests)]).T.to(device)
        self.lengths[:, :count], self.seeds[:count], self.limits[:count], self.active[:count] = columns[:4]
        self.cache_rows[:, :count] = columns[4] + self.slots * torch.arange(branches, device=device)[:, None]
        unconditional = self._unconditional_prompts(requests)
        for ids, same in unconditional:
            self.lengths[1, same] = len(ids)
        self._sample(self._run_prompts(requests, unconditional))

    def _unconditional_prompts(self, requests: Sequence[Request]) -> list[tuple[Tensor, list[int]]]:
        """Return each unconditional prompt and the requests that it belongs to: it depends on their length alone."""
        by_length: dict[int, list[int]] = {}
        if self.sampling.branches == 2:
            for i, request in enumerate(requests):
                by_length.setdefault(len(request.ids), []).append(i)
        return [(self._engine.model.unconditional(requests[same[0]].ids), same) for same in by_length.values()]

    def _run_prompts(self, requests: Sequence[Request], unconditional: list[tuple[Tensor, list[int]]]) -> Tensor:
        """Fill the cache, and return the logits (branches · rows, V) of the first token."""
        engine, count = self._engine, len(requests)
        prompts, cache_rows = [r.ids for r in requests], list(range(count))
        for ids, same in unconditional:  # each is computed once, and copied
            prompts.append(ids)
            cache_rows.append(self.slots + same[0])
        head = engine.guided_head if self.sampling.return_logps else None
        last = engine.decoder.prefill(prompts, self.cache, cache_rows, exact=head is not None)
        hidden = last.new_zeros(len(self.x), engine.decoder.width)
        hidden[:count] = last[:count]
        has_prompt = torch.ones(count, dtype=torch.bool)
        for n, (ids, same) in enumerate(unconditional, count):
            computed = slice(cache_rows[n], cache_rows[n] + 1)
            self.cache.copy([self.slots + i for i in same], self.cache, computed, len(ids))
            hidden[[self.rows + i for i in same]] = last[n]
            has_prompt[same] = torch.tensor([not torch.equal(prompts[i], ids) for i in same])
        logits = engine.logits(hidden)
        if unconditional:
            check_guidance_has_effect(logits[:count], logits[self.rows : self.rows + count], has_prompt)
        if self.sampling.return_logps:
            return engine.guided_logits(hidden, self.sampling)
        return logits

    def step(self) -> None:
        """Run the tokens sampled last through the decoder, and sample the next ones.

        On a GPU this is captured in a CUDA graph. All it reads and writes stays on the device at fixed addresses, and
        nothing in it synchronizes with the device.
        """
        self._engine.embed(self.codes, self.x[: self.rows])
        if self.sampling.branches == 2:
            self.x[self.rows :] = self.x[: self.rows]
        positions = self._engine.rotary_positions(self.lengths, self.steps)
        hidden = self._engine.decoder.step(
            self.x, self.cache, self.cache_rows.view(-1), self.lengths.view(-1), self._buffers, positions=positions
        )
        self.lengths += self.active
        if self.sampling.return_logps:
            self._sample(self._engine.guided_logits(hidden, self.sampling))
        else:
            self._sample(self._engine.logits(hidden))

    def _sample(self, logits: Tensor) -> None:
        """Sample one token per row into `codes` and column `steps` of `tokens`, and end requests."""
        state = {"seeds": self.seeds, "steps": self.steps, "codes": self.codes, "error_steps": self.error_steps}
        if self.sampling.return_logps:
            logps = self.sampling.sample_guided(logits, **state, tokens=self.tokens)
            self.logps.scatter_(1, self.steps[:, None], logps[:, None])
        else:
            self.sampling.sample(logits, **state, tokens=self.tokens)
        self._engine.put_structure(self.codes, self.steps)
        # A finished row keeps its `steps`, so its later samples overwrite one unused column.
        self.steps += self.active
        if self._stop_ids is not None:
            stopped = (self.codes[:, None] == self._stop_ids).any(1)
            ended = stopped | (self.error_steps >= 0) | (self.steps >= self.limits)
            self.active.masked_fill_(ended, 0)
            self.lengths.masked_fill_(ended, -1)

    def steps_left(self) -> int:
        """Return how many steps to run before checking again; 0 once all requests have ended.

        This synchronizes with the device: once per step with stop tokens, else once per batch.
        """
        if self._stop_ids is None:
            return int((self.limits - self.steps).max())
        running = int(self.active.sum())
        if running and self._state.device.type == "cpu":
            rows = self._pad_rows(running)
            if rows < self.rows:
                order = self.active.argsort(descending=True, stable=True)  # rows that generate come first
                self._complete(order[rows:])
                self._set_rows(self._state.index_select(1, order[:rows]), self.tokens[order[:rows]])
        return min(running, 1)

    def completions(self) -> list[Completion]:
        """Return the result of each request, once all have ended."""
        self._complete(torch.arange(self.rows, device=self._state.device))
        return [self._completions[i] for i in range(len(self._requests))]

    def _complete(self, rows: Tensor) -> None:
        """Read the results of rows from the device."""
        vectors = (vector[rows].tolist() for vector in (self.cache_rows[0], self.steps, self.error_steps))
        logps = self.logps[rows].cpu() if self.sampling.return_logps else [None] * len(rows)
        for request, n, error_step, tokens, own in zip(*vectors, self.tokens[rows].cpu(), logps, strict=True):
            if request >= len(self._requests):
                continue  # a padding row
            # A finished row keeps running. Invalid logits in it, which have step n, are ignored.
            if 0 <= error_step < n:
                result: Tensor | Failure = Failure(f"the logits are not finite at token {error_step}")
            else:
                result = tokens[: n - (int(tokens[n - 1]) in self._engine.stop_ids)]
            self._completions[request] = Completion(result, n, None if own is None else own[:n])

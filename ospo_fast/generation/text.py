"""Texts from chat prompts: batched sampling with stop tokens, each text from its own seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ospo_fast.errors import UsageError
from ospo_fast.generation.decoder import Buffers, Cache, InferenceDecoder
from ospo_fast.generation.graph import GraphRunner, capturable
from ospo_fast.generation.requests import (
    REMEDY,
    GenerationError,
    Request,
    check_batch_size,
    check_ids,
    check_sampling,
    eval_mode,
    full_batch,
    in_groups,
    make_requests,
    max_batch_size,
    run_batches,
)
from ospo_fast.models.base import UnifiedModel
from ospo_fast.oom import BatchSizeLimit
from ospo_fast.ops.sample_codes import draw_codes


@torch.no_grad()
def generate_text(
    model: UnifiedModel,
    prompts: Sequence[Tensor],
    *,
    seeds: Sequence[int] | Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int | None = None,
    progress: bool = True,
    capture: bool = True,
) -> list[str]:
    """The model's answer to each prompt, in input order.

    Args:
        model: from `load_model`.
        prompts: token ids (S,) int64, as `model.chat` makes them.
        seeds: one integer per prompt. A text depends on the model, its prompt, seed and settings alone.
        max_new_tokens: the longest answer; fewer where the model has no more positions. An end token ends it earlier.
        temperature: 0 takes the likeliest token.
        top_p: keep the fewest likeliest tokens that have this probability together; 1 keeps all.
        batch_size: texts written at once; by default as many as are useful and fit the memory.
        progress: a bar on stderr for what takes more than two seconds.
        capture: on a GPU replay the steps of a batch from a CUDA graph; False runs them one by one, with the same
            result.

    Raises:
        UsageError: an argument that makes no sense.
        GenerationError: the logits of some texts were not finite; it carries the finished ones.

    """
    check_sampling(temperature, top_p, "token")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens: got {max_new_tokens}, expected a positive number")
    check_batch_size(batch_size)
    for i, ids in enumerate(prompts):
        check_ids(f"prompts[{i}]", ids, model, 1)
    jobs = make_requests([ids.cpu().long() for ids in prompts], seeds)
    if not jobs:
        return []
    decoder = InferenceDecoder(model)
    longest = min(max(len(job.ids) for job in jobs) + max_new_tokens, model.max_positions)
    decoder.positions(longest)
    size = batch_size or max_batch_size(decoder, decoder.row_bytes(longest))
    rows = full_batch(decoder, batch_size, size)

    def work(batch: list[Request], size: int) -> list[list[int] | None]:
        return write(_Texts(model, decoder, batch, rows, max_new_tokens, temperature, top_p), capture)

    limit = BatchSizeLimit(size, "text", REMEDY)
    texts: list[str | None] = [None] * len(jobs)
    failed: dict[int, str] = {}
    with eval_mode(model), tqdm(total=len(jobs), unit="text", delay=2, disable=not progress) as bar:
        for batch, written in run_batches(in_groups(jobs, range(len(jobs)), size), work, limit):
            for job, tokens in zip(batch, written, strict=True):
                if tokens is None:
                    failed[job.index] = f"text {job.index} (seed {job.seed}): the logits are not finite"
                else:
                    texts[job.index] = model.detokenize(tokens)
            bar.update(len(batch))
    if failed:
        raise GenerationError.from_failures("texts", texts, failed)
    return [text for text in texts if text is not None]


def write(texts: _Texts, capture: bool) -> list[list[int] | None]:
    """The tokens of each text, without its end token; None where the logits were not finite."""
    answers: list[list[int] | None] = [[] for _ in range(texts.count)]
    # A GPU's batches keep their rows to the end.
    replay = GraphRunner(texts.decoder.device, capture and capturable(texts.decoder))
    while True:
        for job, token, stopped, broken, over in texts.look():
            if over:
                continue
            answer = answers[job]
            if broken:
                answers[job] = None
            elif not stopped and answer is not None:
                answer.append(token)
        if not texts.go_on():
            return answers
        replay(texts.step)


class _Texts:
    """A batch of texts: one row each, all state on the device; dummies have length −1.

    Rows that are finished leave the batch where fewer rows are less work; `full` is how many rows a full batch has.
    """

    def __init__(
        self,
        model: UnifiedModel,
        decoder: InferenceDecoder,
        jobs: list[Request],
        full: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> None:
        device, count = decoder.device, len(jobs)
        room = [min(max_new_tokens, model.max_positions - len(job.ids)) for job in jobs]
        longest = max(len(job.ids) + most for job, most in zip(jobs, room, strict=True))
        self._model, self.decoder, self._full, self.count = model, decoder, full, count
        self._temperature, self._top_p = temperature, top_p
        self._row_bytes = decoder.row_bytes(longest)
        rows = decoder.pad_rows(count, full, self._row_bytes)
        self._cache = Cache(decoder, count + 1, longest)  # the last row is that of the dummies

        def per_row(values: list[int], dummy: int) -> Tensor:
            return torch.tensor(values + [dummy] * (rows - count), device=device)

        self._owner = per_row(list(range(count)), count)  # which job a row writes, and its row of the cache
        self._lengths = per_row([len(job.ids) for job in jobs], -1)
        self._active = per_row([1] * count, 0)
        self._seeds, self._limits = per_row([job.seed for job in jobs], 0), per_row(room, 0)
        self._steps, self._ends = torch.zeros_like(self._seeds), torch.tensor(model.eos_ids, device=device)
        self._tokens, self._bad = torch.empty_like(self._seeds), torch.empty_like(self._seeds)
        self._finished = self._owner == count
        self._buffers = Buffers(decoder, rows)
        last = decoder.prefill([job.ids for job in jobs], self._cache, range(count))
        self._draw(F.pad(last, (0, 0, 0, rows - count)))

    def step(self) -> None:
        """Run the tokens drawn last through the decoder and draw the next: nothing looks at the device."""
        x = self._model.embed_tokens(self._tokens).clone()
        self._draw(self.decoder.step(x, self._cache, self._owner, self._lengths, self._buffers))
        self._lengths += self._active

    def _draw(self, hidden: Tensor) -> None:
        logits = self.decoder.run_padded(self._model.text_logits, hidden)
        self._bad.fill_(-1)
        draw_codes(
            logits,
            temperature=self._temperature,
            top_p=self._top_p,
            seeds=self._seeds,
            steps=self._steps,
            codes=self._tokens,
            bad=self._bad,
        )
        self._steps += 1

    def look(self) -> Iterator[tuple[int, int, bool, bool, bool]]:
        """Of each row: its job, its token, whether that ends it, whether its logits were wrong, whether it was over."""
        self._stopped, self._broken = torch.isin(self._tokens, self._ends), self._bad >= 0
        columns = self._owner, self._tokens, self._stopped, self._broken, self._finished
        return zip(*(values.tolist() for values in columns), strict=True)

    def go_on(self) -> bool:
        """Mark what is finished by what was looked at; whether a text is left to write."""
        self._finished |= self._stopped | self._broken | (self._steps >= self._limits)
        if bool(self._finished.all()):
            return False
        # Attention passes over a row that is over.
        self._lengths.masked_fill_(self._finished, -1)
        self._active.masked_fill_(self._finished, 0)
        fewer = self.decoder.pad_rows(int((~self._finished).sum()), self._full, self._row_bytes)
        if fewer < len(self._owner):
            keep = self._finished.long().argsort(stable=True)[:fewer].sort().values
            for name in ("owner", "lengths", "active", "seeds", "limits", "steps", "tokens", "bad", "finished"):
                setattr(self, f"_{name}", getattr(self, f"_{name}")[keep])
            self._buffers = Buffers(self.decoder, fewer)
        return True

"""Texts from chat prompts: batched sampling with stop tokens, each text from its own seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ospo_fast.errors import UsageError
from ospo_fast.generation.batching import (
    REMEDY,
    GenerationError,
    Job,
    check_batch_size,
    check_ids,
    check_sampling,
    evaluating,
    fitting,
    full_batch,
    in_groups,
    make_jobs,
    run_batches,
)
from ospo_fast.generation.decoder import Buffers, Cache, LeanDecoder
from ospo_fast.halving import Limit
from ospo_fast.models.base import UnifiedModel
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
    jobs = make_jobs([ids.cpu().long() for ids in prompts], seeds)
    if not jobs:
        return []
    decoder = LeanDecoder(model)
    longest = min(max(len(job.ids) for job in jobs) + max_new_tokens, model.max_positions)
    decoder.positions(longest)
    size = batch_size or fitting(decoder, decoder.row_bytes(longest))
    rows = full_batch(decoder, batch_size, size)

    def work(batch: list[Job], size: int) -> list[list[int] | None]:
        return write(model, decoder, batch, rows, max_new_tokens, temperature, top_p)

    limit = Limit(size, "text", REMEDY)
    texts: list[str | None] = [None] * len(jobs)
    failed: dict[int, str] = {}
    with evaluating(model), tqdm(total=len(jobs), unit="text", delay=2, disable=not progress) as bar:
        for batch, written in run_batches(in_groups(jobs, range(len(jobs)), size), work, limit):
            for job, tokens in zip(batch, written, strict=True):
                if tokens is None:
                    failed[job.index] = f"text {job.index} (seed {job.seed}): the logits are not finite"
                else:
                    texts[job.index] = model.detokenize(tokens)
            bar.update(len(batch))
    if failed:
        raise GenerationError.of("texts", texts, failed)
    return [text for text in texts if text is not None]


def write(
    model: UnifiedModel,
    decoder: LeanDecoder,
    jobs: list[Job],
    full: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> list[list[int] | None]:
    """The tokens of each job's answer, without its end token; None where the logits were not finite.

    Rows that are finished leave the batch where fewer rows are less work; `full` is how many rows a full batch has.
    """
    device, count = decoder.device, len(jobs)
    room = [min(max_new_tokens, model.max_positions - len(job.ids)) for job in jobs]
    longest = max(len(job.ids) + most for job, most in zip(jobs, room, strict=True))
    row_bytes = decoder.row_bytes(longest)
    rows = decoder.filled(count, full, row_bytes)
    cache = Cache(decoder, count + 1, longest)  # the last row is that of the dummies
    hidden = F.pad(decoder.prefill([job.ids for job in jobs], cache, range(count)), (0, 0, 0, rows - count))

    def per_row(values: list[int], dummy: int) -> Tensor:
        return torch.tensor(values + [dummy] * (rows - count), device=device)

    owner = per_row(list(range(count)), count)  # which job a row writes, and its row of the cache
    lengths, active = per_row([len(job.ids) for job in jobs], -1), per_row([1] * count, 0)
    seeds, limits = per_row([job.seed for job in jobs], 0), per_row(room, 0)
    steps, ends = torch.zeros_like(seeds), torch.tensor(model.eos_ids, device=device)
    answers: list[list[int] | None] = [[] for _ in jobs]
    finished = owner == count
    buffers = Buffers(decoder, rows)
    while True:
        logits = decoder.tiled(model.text_logits, hidden)
        tokens, bad = torch.empty_like(seeds), torch.full_like(seeds, -1)
        draw_codes(logits, temperature=temperature, top_p=top_p, seeds=seeds, steps=steps, codes=tokens, bad=bad)
        steps += 1
        broken, stopped = bad >= 0, torch.isin(tokens, ends)
        for job, token, stop, fail, over in zip(
            *(values.tolist() for values in (owner, tokens, stopped, broken, finished)), strict=True
        ):
            if over:
                continue
            answer = answers[job]
            if fail:
                answers[job] = None
            elif not stop and answer is not None:
                answer.append(token)
        finished = finished | stopped | broken | (steps >= limits)
        if bool(finished.all()):
            return answers
        # Attention passes over a row that is over.
        lengths, active = torch.where(finished, -1, lengths), torch.where(finished, 0, active)
        fewer = decoder.filled(int((~finished).sum()), full, row_bytes)
        if fewer < len(owner):
            keep = finished.long().argsort(stable=True)[:fewer].sort().values
            owner, lengths, active, seeds, limits, steps, tokens, finished = (
                values[keep] for values in (owner, lengths, active, seeds, limits, steps, tokens, finished)
            )
            buffers = Buffers(decoder, fewer)
        x = model.embed_tokens(tokens).clone()
        hidden = decoder.step(x, cache, owner, lengths, buffers)
        lengths = lengths + active

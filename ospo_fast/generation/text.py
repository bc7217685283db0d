"""Texts from chat prompts: batched sampling with stop tokens, each text from its own seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ospo_fast.errors import UsageError
from ospo_fast.generation.batching import (
    GenerationError,
    Job,
    by_length,
    check_batch_size,
    check_ids,
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

    def work(batch: list[Job], size: int) -> list[list[int] | None]:
        return write(model, decoder, batch, size, max_new_tokens, temperature, top_p)

    texts: list[str | None] = [None] * len(jobs)
    failed: dict[int, str] = {}
    with evaluating(model), tqdm(total=len(jobs), unit="text", delay=2, disable=not progress) as bar:
        for batch, written in run_batches(by_length(jobs, lambda job: len(job.ids), size), work, size, "text"):
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
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> list[list[int] | None]:
    """The tokens of each job's answer, without its end token; None where the logits were not finite."""
    length = len(jobs[0].ids)
    steps = min(max_new_tokens, model.max_positions - length)
    row_bytes = decoder.row_bytes(length + steps)
    rows = decoder.filled(len(jobs), batch_size, row_bytes)
    ids, seeds = rows_of(jobs, rows, decoder.device)
    ends = torch.tensor(model.eos_ids, device=decoder.device)
    cache = Cache(decoder, rows, length + steps)
    hidden = decoder(model.embed_tokens(ids), cache, 0)[:, -1]
    answers: list[list[int] | None] = [[] for _ in jobs]
    owner = torch.arange(rows, device=decoder.device)  # which job a row writes; dummy rows have none
    finished = owner >= len(jobs)
    for step in range(steps):
        logits = model.text_logits(hidden)
        broken = ~logits.isfinite().all(1)
        tokens = sample_codes(
            logits.masked_fill(broken[:, None], 0), temperature=temperature, top_p=top_p, seeds=seeds, step=step
        )
        stopped = torch.isin(tokens, ends)
        for job, token, stop, fail, over in zip(
            owner.tolist(), tokens.tolist(), stopped.tolist(), broken.tolist(), finished.tolist(), strict=True
        ):
            if over:
                continue
            answer = answers[job]
            if fail:
                answers[job] = None
            elif not stop and answer is not None:
                answer.append(token)
        finished = finished | stopped | broken
        if step + 1 == steps or bool(finished.all()):
            break
        fewer = decoder.filled(int((~finished).sum()), rows, row_bytes)
        if fewer <= rows // 2:
            # Half of the rows or more are done: the rest moves to a smaller cache.
            keep = finished.long().argsort(stable=True)[:fewer]
            old, cache = cache, Cache(decoder, fewer, length + steps)
            cache.copy_rows(old, keep, length + step)
            owner, seeds, tokens, finished, rows = owner[keep], seeds[keep], tokens[keep], finished[keep], fewer
        hidden = decoder(model.embed_tokens(tokens)[:, None], cache, length + step)[:, -1]
    return answers

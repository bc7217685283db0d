"""Texts of chat models of transformers, by its own `generate`, with the sampling and the seeds of `generate_text`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ospo_fast.cost import causal
from ospo_fast.errors import Failure
from ospo_fast.generation.requests import Request, make_requests
from ospo_fast.generation.sampling import Sampling
from ospo_fast.generation.validation import check_batch_size, check_positive
from ospo_fast.models import loading
from ospo_fast.models.chat import ChatModel, naming
from ospo_fast.oom import BatchSizeLimit
from ospo_fast.work import count

ROWS = 64  # texts of a batch, halved when memory runs out


def generate_chat_text(
    model: ChatModel,
    prompts: Sequence[Tensor],
    *,
    seeds: Sequence[int] | Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int | None = None,
) -> list[str | Failure]:
    """Generate the model's answer to each prompt, in input order.

    Prompts of one length share a batch, so that none is padded: caches, windows and positions of any model are those of
    transformers. Its generation settings apply apart from its sampling, such as a penalty of repetitions.

    Args:
        model: loaded at the first call.
        prompts: token ids (S,) int64, from `model.chat`.
        seeds: one integer per prompt. A text depends on the model, its prompt, seed and settings alone, up to the
            rounding of its batch.
        max_new_tokens: see `generate_text`.
        temperature: see `generate_text`.
        top_p: see `generate_text`.
        batch_size: texts per batch; default: `ROWS`.

    Returns:
        One text per prompt, without special tokens; a `Failure` for one whose logits are not finite.

    Raises:
        UsageError: an invalid argument.
        OspoError: one text does not fit the memory, or transformers cannot generate with the model.

    """
    sampling = Sampling(temperature=temperature, top_p=top_p)
    check_positive("max_new_tokens", max_new_tokens)
    check_batch_size(batch_size)
    max_tokens = [min(max_new_tokens, model.max_positions - len(ids)) for ids in prompts]
    requests = sorted(make_requests(prompts, seeds, max_tokens), key=_length)
    groups = [list(group) for _, group in itertools.groupby(requests, _length)]
    texts: list[Any] = [None] * len(requests)
    limit = BatchSizeLimit(batch_size or ROWS, "text", "free some, or use a smaller dtype")
    with naming(model.option), loading(f"{model.name} cannot write texts", "use another model"):
        for batch, found in limit.run(groups, lambda batch: _generate(model, batch, sampling)):
            for request, text in zip(batch, found, strict=True):
                texts[request.index] = text
    return texts


def _length(request: Request) -> int:
    return len(request.ids)


class _Sampler:
    """A processor of logits that leaves the sampled token of each row alone, for greedy decoding to take."""

    def __init__(self, requests: Sequence[Request], sampling: Sampling, device: torch.device) -> None:
        self._start, self._sampling = len(requests[0].ids), sampling
        self._seeds = torch.tensor([request.seed for request in requests], device=device)
        self._codes = torch.empty_like(self._seeds)
        self.error_steps = torch.full_like(self._seeds, -1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        steps = torch.full_like(self._seeds, input_ids.shape[1] - self._start)
        self._sampling.sample(scores, seeds=self._seeds, steps=steps, codes=self._codes, error_steps=self.error_steps)
        return torch.full_like(scores, -torch.inf).scatter_(1, self._codes[:, None], 0.0)


def _generate(model: ChatModel, requests: Sequence[Request], sampling: Sampling) -> list[str | Failure]:
    from transformers import LogitsProcessorList

    module, eos, length = model.load(), model.eos_ids, len(requests[0].ids)
    ids = torch.stack([request.ids for request in requests]).to(model.device)
    sampler = _Sampler(requests, sampling, ids.device)
    with torch.inference_mode():
        rows = module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList([sampler]),
            max_new_tokens=requests[0].max_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            eos_token_id=list(eos) or None,
            pad_token_id=eos[0] if eos else 0,
            **dict.fromkeys(("temperature", "top_p", "top_k")),  # else a warning says that they have no effect
        )
    texts: list[str | Failure] = []
    for tokens, error_step in zip(rows[:, length:].cpu(), sampler.error_steps.tolist(), strict=True):
        ends = torch.isin(tokens, torch.tensor(eos, dtype=torch.long)).nonzero()
        steps = int(ends[0]) + 1 if len(ends) else len(tokens)
        failed = 0 <= error_step < steps  # a row that has ended keeps running
        count(tokens=length + steps - 1, attended=causal(length + steps - 1), words=steps)
        kept = tokens[: steps - len(ends[:1])]
        texts.append(Failure(f"the logits are not finite at token {error_step}") if failed else model.detokenize(kept))
    return texts

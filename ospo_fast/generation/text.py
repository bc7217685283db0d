"""Texts from chat prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ospo_fast.errors import Failure
from ospo_fast.generation.engine import Engine, eval_mode
from ospo_fast.generation.requests import GenerationError, make_requests
from ospo_fast.generation.sampling import Sampling
from ospo_fast.generation.validation import check_batch_size, check_choice, check_ids, check_positive
from ospo_fast.models.base import UnifiedModel


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
    on_error: str = "raise",
) -> list[str | Failure]:
    """Generate the model's answer to each prompt, in input order.

    Args:
        model: from `load_model`.
        prompts: token ids (S,) int64, from `model.chat`.
        seeds: one integer per prompt. A text depends on the model, its prompt, seed and settings alone.
        max_new_tokens: limit of an answer. A stop token, or the last position of the model, ends it earlier.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the smallest set of most likely tokens with at least this total probability; 1 keeps all.
        batch_size: texts per batch; by default as many as are useful and fit the free memory.
        progress: show a bar on stderr if it takes more than two seconds.
        capture: on a GPU replay the steps from a CUDA graph; False runs them one by one, with the same results.
        on_error: a text fails by itself if its logits are not finite. "raise": GenerationError once the others are
            finished. "skip": the result is a `Failure`.

    Returns:
        One text per prompt, without special tokens; with on_error="skip" a `Failure` for one that failed.

    Raises:
        UsageError: an invalid argument.
        GenerationError: texts failed; it carries the finished ones.
        OspoError: one text does not fit the memory.

    """
    from tqdm.auto import tqdm

    sampling = Sampling(temperature=temperature, top_p=top_p)
    check_positive("max_new_tokens", max_new_tokens)
    check_batch_size(batch_size)
    check_choice("on_error", on_error, ("raise", "skip"))
    for i, ids in enumerate(prompts):
        check_ids(f"prompts[{i}]", ids, model, 1)
    max_tokens = [min(max_new_tokens, model.max_positions - len(ids)) for ids in prompts]
    requests = make_requests([ids.cpu().long() for ids in prompts], seeds, max_tokens)
    if not requests:
        return []
    texts: list[Any] = [None] * len(requests)
    failed: dict[int, str] = {}
    with eval_mode(model), tqdm(total=len(requests), unit="text", delay=2, disable=not progress) as bar:
        engine = Engine(model, text=True, batch_size=batch_size, capture=capture)
        for batch, completions in engine.decode(requests, sampling):
            for request, completion in zip(batch, completions, strict=True):
                if not isinstance(completion.tokens, Failure):
                    texts[request.index] = model.detokenize(completion.tokens.tolist())
                elif on_error == "skip":
                    texts[request.index] = completion.tokens
                else:
                    failed[request.index] = f"text {request.index} (seed {request.seed}): {completion.tokens}"
            bar.update(len(batch))
    if failed:
        raise GenerationError.from_failures("texts", texts, failed)
    return texts

"""Teacher-forced sequences: a prompt that ends in begin-of-image, then the codes of an image, padded on the right.

Attention is causal: no position that counts sees the padding, so it needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ospo_fast.errors import OspoError
from ospo_fast.models.base import UnifiedModel
from ospo_fast.ops import IGNORE_INDEX
from ospo_fast.ops._transfer import to_device_packed


@dataclass(frozen=True)
class Batch:
    """N sequences for the decoder."""

    embeds: Tensor  # (N, S, D)
    labels: Tensor  # (N, S) int64, unshifted: the codes at their own positions, IGNORE_INDEX elsewhere
    lengths: Tensor  # (N,) int64 on the CPU, tokens of each prompt: where its image starts
    tokens: int  # T, codes of an image


def teacher_forced(model: UnifiedModel, prompts: Sequence[Tensor], codes: Tensor) -> Batch:
    """Embed N prompts, ids (L_n,) that end in begin-of-image, each followed by its row of the codes (N, T).

    Raises:
        OspoError: a sequence is longer than the model's positions.

    """
    size = codes.shape[1]
    lengths = torch.tensor([len(ids) for ids in prompts])
    longest = int(lengths.max()) + size
    if longest > model.max_positions:
        raise OspoError(
            f"A prompt of {int(lengths.max())} tokens and {size} image tokens do not fit the model's "
            f"{model.max_positions} positions; shorten the prompt."
        )
    ids = torch.full((len(prompts), int(lengths.max())), model.pad_id)
    labels = torch.full((len(prompts), longest), IGNORE_INDEX)
    for n, prompt in enumerate(prompts):
        ids[n, : len(prompt)] = prompt
        labels[n, len(prompt) : len(prompt) + size] = codes[n]
    ids, labels, codes = to_device_packed((ids, labels, codes), model.device)
    text = model.embed_tokens(ids)
    image = model.embed_codes(codes)
    embeds = text.new_zeros(len(prompts), longest, text.shape[-1])
    embeds[:, : text.shape[1]] = text
    for n, start in enumerate(lengths.tolist()):
        embeds[n, start : start + size] = image[n]
    return Batch(embeds, labels, lengths, size)


def hidden_states(model: UnifiedModel, embeds: Tensor) -> Tensor:
    """Return the last hidden states (N, S, D) of the decoder."""
    hidden: Tensor = model.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def mean_logprobs(model: UnifiedModel, prompts: Sequence[Tensor], codes: Tensor, *, batch_size: int) -> list[float]:
    """Return the mean over the image tokens of log p(code | prompt, codes before), for each of N images.

    prompts: N × ids (L_n,). codes: (N, T). batch_size: images per forward pass.
    """
    from ospo_fast.ops import token_logprobs

    means: list[float] = []
    for start in range(0, len(prompts), batch_size):
        batch = teacher_forced(model, prompts[start : start + batch_size], codes[start : start + batch_size])
        hidden = hidden_states(model, batch.embeds)[:, :-1]
        logps = token_logprobs(hidden, model.head, batch.labels[:, 1:])
        means += (logps.sum(1) / batch.tokens).tolist()
    return means

"""Teacher-forced sequences: a prompt that ends in begin-of-image, then the tokens of an image, padded on the right.

Attention is causal: no position that counts sees the padding, so it needs no mask. But its sums have an order that
depends on the length of the padded sequence. Where results must have the same bits in any batch, batches hold sequences
that are padded to one length, which depends on each of them alone (`padded_length`). On a CPU the number of sequences
in a batch has no influence then. On a GPU, products of another number of rows may round differently: batches are
filled up (`fill`), and with another batch size results may round differently.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ospo_fast.cost import causal
from ospo_fast.errors import OspoError
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.layout import embed_image, image_layout
from ospo_fast.ops import IGNORE_INDEX
from ospo_fast.ops._transfer import to_device_packed
from ospo_fast.records import chunked
from ospo_fast.work import count, passes

T = TypeVar("T")
LENGTH_TILE = 16  # positions: prompts of similar lengths share a batch


@dataclass(frozen=True)
class Batch:
    """N sequences for the decoder."""

    embeds: Tensor  # (N, S, D)
    labels: Tensor  # (N, S) int64, unshifted: the codes at their own positions, IGNORE_INDEX elsewhere
    lengths: Tensor  # (N,) int64 on the CPU, tokens of each prompt: where its image starts
    tokens: int  # of an image: its codes, and the structure tokens between them
    positions: Tensor | None = None  # (A, N, S) rotary positions, of a decoder with several axes


def padded_length(model: UnifiedModel, prompt: Tensor) -> int:
    """Return the positions of a prompt (L,) and an image: rounded up, but no more than the model has."""
    length = len(prompt) + image_layout(model).tokens
    return max(length, min(-(-length // LENGTH_TILE) * LENGTH_TILE, model.max_positions))


def equal_batches(items: Iterable[T], length: Callable[[T], int], batch_size: int) -> Iterator[list[T]]:
    """Split items into batches of one length each, the shortest first, in order within a length."""
    for _, same in itertools.groupby(sorted(items, key=length), length):
        yield from chunked(same, batch_size)


def fill(batch: Sequence[T], batch_size: int, device: torch.device) -> list[T]:
    """Repeat the first item up to `batch_size` on a GPU, see above; its results are to be ignored."""
    items = list(batch)
    return items if device.type == "cpu" else items + items[:1] * (batch_size - len(items))


def check_lengths(model: UnifiedModel, prompts: Sequence[Tensor], size: int) -> Tensor:
    """Return the lengths (N,) of prompts. Raises OspoError if one and `size` codes exceed the model's positions."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    if int(lengths.max()) + size > model.max_positions:
        raise OspoError(
            f"A prompt of {int(lengths.max())} tokens and {size} image tokens do not fit the model's "
            f"{model.max_positions} positions; shorten the prompt."
        )
    return lengths


def teacher_forced(
    model: UnifiedModel, prompts: Sequence[Tensor], codes: Tensor, *, length: int | None = None
) -> Batch:
    """Embed N prompts, ids (L_n,) that end in begin-of-image, each followed by its row of the codes (N, T).

    length: positions S of the padded sequences; by default those of the longest.

    Raises:
        OspoError: a sequence is longer than the model's positions.

    """
    layout = image_layout(model)
    if (layout.structure or len(layout.grids) > 1) and codes.shape[1] != layout.codes:
        raise OspoError(f"codes: got {codes.shape[1]} of an image, expected {layout.codes}, those of {model.name}.")
    size = layout.tokens if layout.structure else codes.shape[1]
    lengths = check_lengths(model, prompts, size)
    padded = int(lengths.max()) + size if length is None else length
    ids = torch.full((len(prompts), int(lengths.max())), model.pad_id)
    labels = torch.full((len(prompts), padded), IGNORE_INDEX)
    spread = layout.spread(codes, IGNORE_INDEX)
    for n, prompt in enumerate(prompts):
        ids[n, : len(prompt)] = prompt
        labels[n, len(prompt) : len(prompt) + size] = spread[n]
    positions = None
    if layout.positions is not None:
        positions = layout.rotary_positions(lengths.tolist(), padded, model.device)
    ids, labels, codes = to_device_packed((ids, labels, codes), model.device)
    text = model.embed_tokens(ids)
    image = embed_image(model, codes)
    embeds = text.new_zeros(len(prompts), padded, text.shape[-1])
    embeds[:, : text.shape[1]] = text
    for n, start in enumerate(lengths.tolist()):
        embeds[n, start : start + size] = image[n]
    return Batch(embeds, labels, lengths, size, positions)


def hidden_states(
    model: UnifiedModel, embeds: Tensor, *, layers: int | None = None, positions: Tensor | None = None
) -> Tensor:
    """Return the last hidden states (N, S, D) of the decoder.

    layers: how many run, where a capture ends the pass early. positions: of the `Batch`.
    """
    rows, length = embeds.shape[:2]
    attended = rows * causal(length)
    count(tokens=rows * length, attended=attended, layers=layers, **passes(model))
    options = {} if positions is None else {"position_ids": positions}
    hidden: Tensor = model.decoder(inputs_embeds=embeds, use_cache=False, **options).last_hidden_state
    return hidden


@torch.no_grad()
def mean_logprobs(model: UnifiedModel, prompts: Sequence[Tensor], codes: Tensor, *, batch_size: int) -> list[float]:
    """Return the mean over the codes of log p(code | prompt, tokens before), for each of N images.

    prompts: N × ids (L_n,). codes: (N, T). batch_size: images per forward pass; a mean does not depend on the others.
    """
    from ospo_fast.ops import token_logprobs

    means = [0.0] * len(prompts)
    for rows in equal_batches(range(len(prompts)), lambda n: len(prompts[n]), batch_size):
        filled = fill(rows, batch_size, model.device)
        batch = teacher_forced(model, [prompts[n] for n in filled], codes[filled])
        hidden = hidden_states(model, batch.embeds, positions=batch.positions)[:, :-1]
        for n, own, labels in zip(rows, hidden, batch.labels[:, 1:], strict=False):
            # Image by image: the products of the head have one size, and fsum rounds once.
            means[n] = math.fsum(token_logprobs(own, model.head, labels).tolist()) / codes.shape[1]
    return means

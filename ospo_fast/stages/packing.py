"""Teacher-forced sequences without padding: one after the other in one row, each with attention to itself alone.

A decoder of transformers runs them with its own layers: positions start at 0 in each sequence, and `_attention` takes
the place of its attention. Other decoders need sequences that are padded (`teacher_forcing`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast.cost import causal
from ospo_fast.errors import OspoError
from ospo_fast.generation.varlen import varlen_attention, varlen_runs
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.layout import embed_image, image_layout
from ospo_fast.oom import out_of_memory
from ospo_fast.ops import IGNORE_INDEX
from ospo_fast.ops._transfer import to_device_packed
from ospo_fast.stages.teacher_forcing import check_lengths, hidden_states, teacher_forced
from ospo_fast.work import count, passes

logger = logging.getLogger(__name__)

_NAME = "ospo_fast_packed"  # of `_attention` among those of transformers
_OTHER_ATTENTION = ("sliding_window", "softcap", "s_aux")  # options that `_attention` has not


@dataclass(frozen=True)
class Packed:
    """N sequences of L_n tokens for the decoder, ΣL tokens in all; the hidden states that predict codes are read."""

    embeds: Tensor  # (1, ΣL, D)
    positions: Tensor  # (1, ΣL) int64, from 0 in each sequence
    bounds: Tensor  # (N + 1,) int32: first token of each sequence, and the end of the last
    longest: int
    rows: Tensor  # (N, T + 1) int64: where in ΣL the T tokens of each image are, and the token before them
    labels: Tensor  # (N, T + 1) int64, unshifted: IGNORE_INDEX, then the codes; IGNORE_INDEX for structure tokens
    lengths: Tensor  # (N,) int64 on the CPU, tokens of each prompt


def pack(model: UnifiedModel, prompts: Sequence[Tensor], codes: Tensor) -> Packed:
    """Embed N prompts, ids (L_n,) that end in begin-of-image, each followed by the image of its row of the codes.

    Raises:
        OspoError: a sequence is longer than the model's positions.

    """
    spread = image_layout(model).spread(codes, IGNORE_INDEX)
    size = spread.shape[1]
    lengths = check_lengths(model, prompts, size)
    totals = [length + size for length in lengths.tolist()]
    ends = list(itertools.accumulate(totals, initial=0))
    rows = torch.tensor(ends[1:])[:, None] + torch.arange(-size - 1, 0)
    labels = F.pad(spread, (1, 0), value=IGNORE_INDEX)
    positions = torch.cat([torch.arange(total) for total in totals])[None]
    ids, codes, rows, labels, positions, bounds = to_device_packed(
        (torch.cat(list(prompts)), codes, rows, labels, positions, torch.tensor(ends, dtype=torch.int32)), model.device
    )
    texts = model.embed_tokens(ids).split(lengths.tolist())
    parts = [part for pair in zip(texts, embed_image(model, codes), strict=True) for part in pair]
    return Packed(torch.cat(parts)[None], positions, bounds, max(totals), rows, labels, lengths)


def packed_hidden_states(model: UnifiedModel, batch: Packed) -> Tensor:
    """Return the last hidden states (N, T + 1, D) of the decoder at `rows`; run it in `packed_attention`."""
    attended = sum(map(causal, (batch.lengths + batch.rows.shape[1] - 1).tolist()))
    count(tokens=batch.embeds.shape[1], attended=attended, **passes(model))
    hidden: Tensor = model.decoder(
        inputs_embeds=batch.embeds,
        position_ids=batch.positions,
        use_cache=False,
        cu_seq_lens_q=batch.bounds,
        max_length_q=batch.longest,
    ).last_hidden_state
    return hidden[0, batch.rows]


@contextlib.contextmanager
def packed_attention(model: UnifiedModel) -> Iterator[None]:
    """Return the context of forward and backward passes of packed sequences: checkpoints run layers again in these."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
    config: Any = model.decoder.config
    before = config._attn_implementation
    config._attn_implementation = _NAME  # it has no mask: none of that name is registered
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: Any,
    query: Tensor,  # (1, H, ΣL, D)
    key: Tensor,  # (1, H', ΣL, D)
    value: Tensor,  # (1, H', ΣL, D)
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:  # (1, ΣL, H, D)
    given = [name for name in _OTHER_ATTENTION if options.get(name) is not None]
    if given or dropout:
        raise OspoError(f"its attention has {', '.join(given) or 'dropout'}")
    query, key = query.to(value.dtype), key.to(value.dtype)  # positions may widen them under autocast
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cuda":
        groups = query.shape[1] // key.shape[1]
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        return varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scale)[None], None
    sizes = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(sizes, 2) for x in (query, key, value)), strict=True)
    found = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in parts
    ]
    return torch.cat(found, 2).transpose(1, 2), None


def packing_runs(model: UnifiedModel, dtype: torch.dtype) -> bool:
    """Return whether training of packed sequences pays and works on the device of a model, with products in `dtype`.

    It pays on a GPU. On a CPU it gains little (`bench/packing.py`): each sequence takes a call of attention of its own.
    """
    config: Any = getattr(model.decoder, "config", None)
    if model.device.type != "cuda" or not getattr(model.decoder, "_supports_attention_backend", False):
        return False
    if image_layout(model).positions is not None:  # packed sequences have one axis
        return False
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return varlen_runs(model.device, dtype, width, backward=True)


@torch.no_grad()
def packing_matches(model: UnifiedModel, prompts: Sequence[Tensor], codes: Tensor) -> bool:
    """Return whether packed sequences have the hidden states of padded ones, which shows that a decoder can run them.

    prompts, codes: see `pack`; of several lengths.
    """
    try:
        with packed_attention(model):
            found = packed_hidden_states(model, pack(model, prompts, codes)).float()
    except Exception as error:  # of decoders that do not take these arguments, or do not pass them on
        if out_of_memory(error):
            raise
        reason = str(error).splitlines()[0][:160]
    else:
        batch = teacher_forced(model, prompts, codes)
        padded = hidden_states(model, batch.embeds)
        starts = batch.lengths.to(padded.device)[:, None] + torch.arange(-1, batch.tokens, device=padded.device)
        expected = padded[torch.arange(len(padded), device=padded.device)[:, None], starts].float()
        difference = float((found - expected).norm() / expected.norm())
        # Rounding is far below, also that of bfloat16 through all layers. Attention to others is far above.
        if difference <= 0.05:
            return True
        reason = f"hidden states differ by {difference:.2g}"
    logger.warning("train: sequences are padded, because %s does not run packed ones: %s", model.name, reason)
    return False

"""Prune a cache with kvpress by observed attention, without eager: `BlockwiseObservedAttentionPress`.

```python
press = BlockwiseObservedAttentionPress(compression_ratio=0.5)
with press(model):
    model(input_ids, past_key_values=DynamicCache())
```

kvpress 0.5 requires transformers < 5.3. This press alone also runs with later versions; presses of kvpress that wrap it
do not. Once kvpress is imported, flex attention fails in transformers, with or without a press.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospo_fast.errors import OpError, UsageError
from ospo_fast.integrations._patch import replaced

try:
    _ScorerPress: Any = importlib.import_module("kvpress").ScorerPress
except Exception as error:  # packages with binaries that do not fit raise anything
    raise UsageError(
        f"ospo_fast.integrations.kvpress: ScorerPress of kvpress cannot be imported ({error}), expected kvpress 0.5; "
        "run pip install kvpress, or with transformers >= 5.3: pip install --no-deps kvpress, and its cachetools, fire "
        "and requests"
    ) from error

_CAPTURE = "ospo_observed_attention"  # as an attention implementation of transformers
_BLOCK_BYTES = 4 * 2**20  # of scores in memory: the fastest size on CPU, where they stay in the cache
_GPU_BLOCK_BYTES = 256 * 2**20
# Arguments of an attention that change its probabilities in ways that are not computed here: a bias, sinks of each row,
# and the choice of keys of sparse attention.
_UNKNOWN_OPTIONS = ("position_bias", "sinks", "indices", "block_indices")


@dataclass
class BlockwiseObservedAttentionPress(_ScorerPress):
    """`kvpress.ObservedAttentionPress` for sdpa, eager and flash attention, without the (H, S, S) matrix.

    The score of a key is the sum of the attention that it receives, divided by the number of rows at and after its
    position, averaged over the query heads of its group. The layer's forward runs once more, up to its attention, and
    `mean_attention_received` computes the scores from what the layer passes to it: queries, keys, mask, scale, sliding
    window, soft cap and sinks.

    Sequences are prefilled in one forward pass, into a cache that keeps every key. As after every press, the pruned
    cache does not know the positions of its keys: while decoding, a sliding window counts keys of the cache.

    Args:
        compression_ratio: fraction of the keys to prune, >= 0 and < 1.

    Raises:
        UsageError: before the layer is pruned, for a layer that does not call transformers' AttentionInterface,
            attention that is not causal, sparse attention, a position bias, packed sequences, and a cache that does
            not hold every key (sliding windows, chunks, keys that another press pruned).
        OpError: before the layer is pruned, for padding, whose mask would not fit the pruned cache.

    """

    compression_ratio: float = 0.0

    def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:  # noqa: A002
        """Prune the cache of a layer after its prefill."""
        cache = kwargs.get("past_key_values", kwargs.get("cache"))  # the name of transformers >= 5.24
        if cache is None:
            raise UsageError(
                "BlockwiseObservedAttentionPress: the model runs without a cache, expected one to prune; pass "
                "past_key_values=DynamicCache()"
            )
        kwargs = {**kwargs, "past_key_values": cache}
        if "cache_position" not in kwargs:  # kvpress reads it, and transformers >= 5.3 does not pass it
            hidden_states = kwargs["hidden_states"]
            seen = cache.get_seq_length(module.layer_idx)
            position = torch.arange(seen - hidden_states.shape[1], seen, device=hidden_states.device)
            kwargs = {**kwargs, "cache_position": position}
        return super().forward_hook(module, input, kwargs, output)

    def score(
        self,
        module: Any,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return the scores of a layer's keys, (B, Hkv, S) fp32 (float64 for float64); `attentions` is not read."""
        length = kwargs.get("hidden_states", hidden_states).shape[1]
        if not length == hidden_states.shape[1] == keys.shape[2]:
            raise UsageError(
                f"BlockwiseObservedAttentionPress: layer {module.layer_idx} runs {length} positions, and the press has "
                f"{hidden_states.shape[1]} of their hidden states and {keys.shape[2]} keys, expected those of every "
                "position; pass past_key_values=DynamicCache(), without a configuration, and combine this press with "
                "none that prunes before it or splits sequences"
            )
        with torch.no_grad():
            call = _capture_call(module, hidden_states, kwargs)
            _check_call(module, call)
            return mean_attention_received(
                call.query,
                call.key,
                scale=call.options.get("scaling"),
                mask=call.mask,
                window=call.options.get("sliding_window"),
                softcap=call.options.get("softcap"),
                sinks=call.options.get("s_aux"),
            )


def mean_attention_received(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    mask: Any = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute r[b,g,j] = sum over rows i of P[b,g,i,j] / (S - j), without the attention matrix.

    P[b,g,i,j] is the mean over the query heads h of key head g of softmax_j(scale · q[b,h,i]·k[b,g,j]). The scores of a
    block of rows are in memory at a time: 4 MiB on CPU, 256 MiB on GPU, or one row if it is larger. No gradient.

    Args:
        q: (B, Hq, S, D) float, after position encoding.
        k: (B, Hkv, S, D), after position encoding; Hq is a multiple of Hkv (grouped queries).
        scale: default D^-0.5.
        mask: as transformers gives it to an attention. None or nonzero (B, S): causal. (B or 1, Hq or 1, S, >= S),
            bool (visible) or float (added to the scores): as it is.
        window: with mask None or (B, S), rows attend to the last `window` keys up to their own; None: to all.
        softcap: c of c · tanh(scores / c), before the mask; None: no cap.
        sinks: (Hq,) logits that take part in the softmax of each row; None: none.

    Returns:
        (B, Hkv, S) fp32 (float64 for float64 inputs).

    Raises:
        OpError: wrong shapes, or a mask that hides a position from itself, as padding does.

    """
    B, heads, S, D = q.shape
    if (k.shape[0], k.shape[2], k.shape[3]) != (B, S, D) or k.shape[1] == 0 or heads % k.shape[1]:
        raise OpError(
            f"mean_attention_received: k has shape {tuple(k.shape)}, q {tuple(q.shape)}; expected k (B, Hkv, S, D) "
            "with Hq a multiple of Hkv"
        )
    _check_mask(mask, q)
    causal = mask is None or len(mask.shape) == 2
    group, dtype = heads // k.shape[1], torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = D**-0.5 if scale is None else scale
    step = max(1, (_BLOCK_BYTES if q.device.type == "cpu" else _GPU_BLOCK_BYTES) // (group * S * dtype.itemsize))
    received = q.new_zeros(B, k.shape[1], S, dtype=dtype)
    blocks = ((b, h, start) for b in range(B) for h in range(k.shape[1]) for start in range(0, S, step))
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for b, h, start in blocks:
            own, rows, keys = slice(h * group, (h + 1) * group), slice(start, min(start + step, S)), slice(0, S)
            if causal:
                keys = slice(max(0, start - window + 1) if window else 0, rows.stop)
            queries = q[b, own, rows].to(dtype).reshape(-1, D) * scale
            scores = (queries @ k[b, h, keys].to(dtype).T).view(group, rows.stop - start, -1)
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            block = _mask_block(None if causal else mask, window, b, own, rows, keys, q.device)
            if block.dtype == torch.bool:
                scores.masked_fill_(~block, -torch.inf)
            else:
                scores += block
            peak = scores.amax(-1, keepdim=True)
            total = scores.sub_(peak).exp_().sum(-1, keepdim=True)
            if sinks is not None:
                total += (sinks[own].to(dtype).view(-1, 1, 1) - peak).exp()
            received[b, h, keys] += (1 / total).view(-1) @ scores.flatten(0, 1)
    return received / (group * torch.arange(S, 0, -1, device=q.device))


def _mask_block(
    mask: Any, window: int | None, b: int, heads: slice, rows: slice, keys: slice, device: torch.device
) -> Tensor:
    """Return the mask, bool or float, of a block of scores (heads, rows, keys) of one sequence; None: causal."""
    if mask is None:
        i, j = (torch.arange(part.start, part.stop, device=device) for part in (rows, keys))
        visible = j <= i[:, None]
        return visible & (j > i[:, None] - window) if window else visible
    block: Tensor = mask[b if len(mask) > 1 else 0]
    return block[heads if len(block) > 1 else slice(1), rows, keys]


def _check_mask(mask: Any, q: Tensor) -> None:
    if mask is None:
        return
    B, heads, S = q.shape[:3]
    shape = tuple(getattr(mask, "shape", ()))
    fits = len(shape) == 4 and shape[0] in (1, B) and shape[1] in (1, heads) and shape[2] == S <= shape[3]
    if shape == (B, S):
        visible = mask != 0
    elif fits:
        visible = mask.diagonal(dim1=2, dim2=3)
        visible = visible if mask.dtype == torch.bool else visible > torch.finfo(mask.dtype).min
    else:
        raise OpError(
            f"mean_attention_received: the mask is {type(mask).__name__} with shape {shape}, expected None, ({B}, {S}) "
            f"or (1 or {B}, 1 or {heads}, {S}, {S})"
        )
    if not bool(visible.all()):
        raise OpError(
            "mean_attention_received: the mask hides positions from themselves, expected a mask without padding; a "
            "padding mask does not fit the pruned cache, so run sequences of different lengths one by one"
        )


class _CapturedCall(BaseException):
    """End of the forward of a layer at its attention. Not an Exception: no handler of the layer must see it."""

    def __init__(self, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
        self.query, self.key, self.mask, self.options = query, key, mask, options


def _capture_attention(
    module: Any, query: Tensor, key: Tensor, value: Any, attention_mask: Any, *_: Any, **options: Any
) -> Any:
    raise _CapturedCall(query, key, attention_mask, options)


def _capture_call(module: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> _CapturedCall:
    """Run the forward of a layer up to its attention, without a cache; return what the attention is called with."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[_CAPTURE] = _capture_attention
    config = copy.copy(module.config)
    config._attn_implementation_internal = _CAPTURE  # the property would also change configurations inside this one
    try:
        with replaced(module, "config", config):
            inputs = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "cache")}
            module.forward(**{**inputs, "hidden_states": hidden_states})
    except _CapturedCall as call:
        return call.with_traceback(None)  # its frames hold the values
    raise UsageError(
        f"BlockwiseObservedAttentionPress: {type(module).__name__} computes its attention itself, expected a layer "
        "that calls transformers' AttentionInterface; use another press for this model"
    )


def _check_call(module: Any, call: _CapturedCall) -> None:
    options, batch = call.options, len(call.query)
    changed = [name for name in _UNKNOWN_OPTIONS if options.get(name) is not None]
    causal, ends, ids = (options.get(name) for name in ("is_causal", "cu_seq_lens_q", "position_ids"))
    # transformers' flash attention takes positions that do not increase for the starts of packed sequences.
    flash = "flash" in (module.config._attn_implementation or "") and call.mask is None and batch == 1
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        reason = "is not causal (is_causal=False)"
    elif ends is not None and len(ends) > batch + 1:
        reason = f"runs {len(ends) - 1} packed sequences (cu_seq_lens_q)"
    elif flash and ids is not None and ids.ndim == 2 and bool((ids.diff() <= 0).any()):
        reason = "runs packed sequences (position_ids that do not increase)"
    elif changed:
        reason = f"changes its probabilities by {changed[0]}"
    else:
        return
    raise UsageError(
        f"BlockwiseObservedAttentionPress: layer {module.layer_idx} {reason}, expected causal attention of one "
        "sequence per row; use another press, or run sequences one by one"
    )

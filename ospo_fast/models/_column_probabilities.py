"""Attention probabilities of key columns in one call of an attention function, in any of three ways.

* Plain attention of transformers' sdpa and flash functions: from queries and keys, by `attention_columns` and the
  log-sum-exp of the attention that ran (`plain_keys`, `LseRecorder`).
* Functions that return their weights, as eager attention does: from the weights (`from_weights`).
* Everything else: softmax attention is linear in its values, so the function itself, run on values that are 1 at the
  columns of an object and 0 elsewhere, returns the sum of their probabilities (`from_indicators`). This is right for
  any mask, bias, window, chunk, soft cap and sink, and costs one more attention.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ospo_fast.errors import OspoError
from ospo_fast.ops._transfer import to_device_packed
from ospo_fast.ops.attention_columns import ColumnRequest

_NAMES = ("query", "key", "value", "attention_mask")
_MASK_BYTES = 16 * 2**20  # of a mask that is inspected at a time
# Operations whose second result is the natural log-sum-exp of the rows, (B, H, at least S). True: it is only computed
# if the fifth argument says so.
_LSE_OPS = {
    "aten::_scaled_dot_product_flash_attention": False,
    "aten::_scaled_dot_product_flash_attention_for_cpu": False,
    "aten::_scaled_dot_product_fused_attention_overrideable": False,
    "aten::_scaled_dot_product_efficient_attention": True,
    "aten::_scaled_dot_product_cudnn_attention": True,
    "flash_attn::_flash_attn_forward": False,
}


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """A call function(module, query, key, value, attention_mask, **options) → ((B, Q, H, Dv), weights or None)."""

    function: Callable[..., Any]
    module: nn.Module
    query: Tensor  # (B, H, Q, D)
    key: Tensor  # (B, Hkv, K, D)
    value: Tensor  # (B, Hkv, K, Dv)
    mask: Any
    options: Mapping[str, Any]

    @staticmethod
    def from_args(
        function: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AttentionCall:
        """Read the arguments, which models give by name or by place."""
        names = list(_NAMES)
        if len(args) > len(names):
            names += list(inspect.signature(function).parameters)[1 + len(names) :]
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = (options.pop(name) for name in _NAMES[:3])
        return AttentionCall(function, module, query, key, value, options.pop("attention_mask", None), options)

    def run(self) -> Any:
        """Call the function."""
        return self.function(self.module, self.query, self.key, self.value, self.mask, **self.options)

    @property
    def dropout(self) -> float:
        """The dropout probability of the weights."""
        return float(self.options.get("dropout") or 0.0)


class LseRecorder(TorchDispatchMode):
    """Recorder of the log-sum-exp and the dtype of the attention that runs inside.

    Fused attentions return the log-sum-exp to autograd but not to their caller, so it is read below autograd, where
    the operation itself is dispatched.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lse: Tensor | None = None
        self.dtype: torch.dtype | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        has_flag = _has_flag(func)
        if has_flag and len(args) > 4:
            args = (*args[:4], True, *args[5:])
        result = func(*args, **(kwargs or {}))
        if has_flag is not None:
            self._lse, self.dtype = result[1], args[0].dtype
        return result

    def lse_of(self, q: Tensor) -> Tensor | None:
        """The recorded log-sum-exp (B, H, S) if its shape fits q, else None."""
        lse = self._lse
        if lse is None:
            return None
        if lse.dim() == 4 and lse.shape[3] == 1:  # cuDNN's
            lse = lse.squeeze(3)
        fits = lse.dim() == 3 and lse.shape[:2] == q.shape[:2] and lse.shape[2] >= q.shape[2]
        return lse[:, :, : q.shape[2]].detach() if fits else None


@functools.cache
def _has_flag(operation: Any) -> bool | None:
    return _LSE_OPS.get(operation._schema.name)


class PlainRequests:
    """The requests of `attention_columns` for the plain attentions of one pass.

    Inspecting a mask synchronizes the device. Layers share masks, so each mask is inspected once.
    """

    def __init__(self, request: ColumnRequest, device: torch.device, heads: int) -> None:
        self._request = request  # on the CPU
        self._device, self._heads = device, heads  # the number of sequences that each one is taken for
        self._unmasked: ColumnRequest | None = None
        self._inspected: dict[int, tuple[Tensor, int, ColumnRequest | None]] = {}
        self._ordered: dict[int, tuple[Tensor, bool]] = {}

    def get(self, call: AttentionCall) -> tuple[ColumnRequest, bool] | None:
        """Return the request for a call, and whether it is causal; None if the call is not plain attention.

        Plain is a softmax over all keys, or over all keys up to the row, apart from padding at the ends.
        """
        options, mask = call.options, call.mask
        causal = options.get("is_causal")
        sdpa, flash = _own_functions()  # themselves: what wraps them may change their arguments
        if call.function is sdpa:
            causal = getattr(call.module, "is_causal", True) if causal is None else causal
            causal = bool(causal) and call.query.shape[2] > 1
            changed = options.get("position_bias") is not None or (mask is not None and mask.dim() != 4)
        elif call.function is flash:
            causal = bool(getattr(call.module, "is_causal", True) if causal is None else causal)
            window, positions = options.get("sliding_window"), options.get("position_ids")
            names = ("softcap", "s_aux", "cu_seq_lens_q", "cu_seq_lens_k", "position_bias")
            changed = any(options.get(name) is not None for name in names)
            changed = changed or (window is not None and window < call.key.shape[2])
            changed = changed or (mask is not None and (mask.dim() != 2 or not causal))
            changed = changed or (mask is None and positions is not None and not self._in_order(positions))
        else:
            return None
        if changed or call.query.shape[2] != call.key.shape[2]:
            return None
        if mask is None:
            if self._unmasked is None:
                self._unmasked = self._finish(self._request)
            return self._unmasked, causal
        request = self._inspect(mask)
        return None if request is None else (request, True)

    def _inspect(self, mask: Tensor) -> ColumnRequest | None:
        # A mask may be changed in place. In inference mode there is no version that would tell.
        version = -1 if mask.is_inference() else mask._version
        known = self._inspected.get(id(mask))
        if known is None or known[1] != version or version < 0:
            first = first_visible_keys(mask, self._request)
            request = None if first is None else self._finish(replace(self._request, key_start=first))
            known = self._inspected[id(mask)] = mask, version, request  # it holds the mask: ids are reused
        return known[2]

    def _finish(self, request: ColumnRequest) -> ColumnRequest:
        return repeat_request(request, self._heads).to(self._device)

    def _in_order(self, positions: Tensor) -> bool:
        """Whether positions (B, S) count up by one. If they do not, flash attention may take them for packed ones."""
        known = self._ordered.get(id(positions))
        if known is None:
            ordered = positions.dim() == 2 and bool((positions.diff(dim=-1) == 1).all())
            known = self._ordered[id(positions)] = positions, ordered
        return known[1]


def repeat_request(request: ColumnRequest, heads: int) -> ColumnRequest:
    """Return the request with each sequence `heads` times."""
    if heads == 1:
        return request
    fields: dict[str, Any] = {name: value for name, value in vars(request).items() if isinstance(value, Tensor)}
    return replace(request, **{name: value.repeat_interleave(heads, 0) for name, value in fields.items()})


def first_visible_keys(mask: Tensor, request: ColumnRequest) -> Tensor | None:
    """Find the first key that the requested rows see, (B,) on the CPU, in a mask of a causal attention.

    Synchronizes the device once.

    Args:
        mask: (B or 1, H or 1, S or 1, at least S), bool or additive, or (B, S), which is causal in addition.
        request: on the CPU.

    Returns:
        None if not every requested row sees exactly the keys from there up to itself, by the same scores. Rows before
        that key are padding if they see none.

    """
    batch, length = len(request.columns), request.positions
    if mask.dim() == 4 and mask.shape[1] != 1:
        return None
    start, count = to_device_packed((request.row_start, request.row_count), mask.device)
    last = (start + count - 1).clamp(0, length - 1)[:, None]
    position = torch.arange(length, device=mask.device)

    def visible(begin: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B, size), which keys each sees (B, size, S), and whether no score is changed."""
        row = torch.minimum(start[:, None] + torch.arange(begin, begin + size, device=mask.device), last)
        if mask.dim() == 2:
            seen = mask.expand(batch, -1).bool()[:, None] & (position <= row[..., None])
            return row, seen, torch.ones((), dtype=torch.bool, device=mask.device)
        source = mask[:, 0, :, :length].expand(batch, length, -1)
        values = source.gather(1, row[..., None].expand(-1, -1, length))
        if mask.dtype == torch.bool:
            return row, values, torch.ones((), dtype=torch.bool, device=mask.device)
        seen = values == 0
        # A row that sees nothing attends to all keys if their values are finite.
        return row, seen, (seen | (values <= torch.finfo(mask.dtype).min / 2)).all() & seen.any(-1).all()

    total = max(request.length, 1)
    step = max(1, _MASK_BYTES // (8 * batch * length))  # bounds the memory of long sequences
    # A mask (B, S) hides the same keys of all rows, so its last row determines it.
    begins = range(0, total, step) if mask.dim() == 4 else [total - 1]
    end = visible(begins[-1], total - begins[-1])
    first = (end[1] & (position <= end[0][..., None]))[:, -1].long().argmax(1)
    plain = torch.ones((), dtype=torch.bool, device=mask.device)
    for begin in begins:
        row, seen, unchanged = end if begin == begins[-1] else visible(begin, step)
        expected = (position <= row[..., None]) & (position >= first[:, None, None])
        plain = plain & ~((seen != expected) & (count > 0)[:, None, None]).any() & unchanged
    *first_keys, is_plain = torch.cat([first, plain[None].long()]).tolist()
    return torch.tensor(first_keys, dtype=torch.long) if is_plain else None


def check_options(call: AttentionCall) -> None:
    """Raise OspoError for a call that cannot run twice, or that is not the model's own attention."""
    name = type(call.module).__name__
    if hasattr(call.query, "placements"):
        raise OspoError(f"capture: {name} runs on a DTensor, a part of the heads or rows; capture an unsharded model")
    if call.options.get("cache") is not None:
        raise OspoError(f"capture: {name} writes to a paged cache; run the model without continuous batching")
    dropped = [option for option in ("softcap", "s_aux") if call.options.get(option) is not None]
    if dropped and call.function is _own_functions()[0]:
        raise OspoError(
            f"capture: {name} has a {dropped[0]}, which sdpa ignores: the model computes something else than with its "
            "own attention; load it with attn_implementation='eager'"
        )


def take_rows(sums: Tensor, request: ColumnRequest, first: int) -> tuple[Tensor, Tensor]:
    """Select the requested rows of sums over columns (B, Q, O), whose first row is at position `first`.

    Returns:
        The means over columns (B, O, length), and where they are rows of `sums` (B, length).

    """
    # Not by `share`, which is fp32.
    means = sums.transpose(1, 2) / (request.columns >= 0).sum(-1).clamp(min=1)[..., None]
    i = torch.arange(request.length, device=sums.device)
    source = request.row_start[:, None] + i - first
    inside = (i < request.row_count[:, None]) & (source >= 0) & (source < sums.shape[1])
    index = source.clamp(0, sums.shape[1] - 1)[:, None].expand(-1, means.shape[1], -1)
    return means.gather(2, index), inside


def from_weights(weights: Tensor, columns: Tensor, key_start: int) -> Tensor:
    """Sum the weights (B, H, Q, K) of the columns (B, O, C) of each object → (B, H, Q, O).

    key_start: position of the first key. Columns at other positions than those of the keys count as 0.
    """
    (B, H, Q, K), (_, objects, C) = weights.shape, columns.shape
    index = columns - key_start
    inside = (columns >= 0) & (index >= 0) & (index < K)
    index = torch.where(inside, index, 0).flatten(1)[:, None, None].expand(B, H, Q, -1)
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    found = weights.detach().gather(3, index).to(dtype).view(B, H, Q, objects, C)
    return (found * inside[:, None, None]).sum(-1)


@torch.no_grad()
def from_indicators(call: AttentionCall, columns: Tensor, key_start: int) -> Tensor:
    """Sum the probabilities of the columns (B, O, C) of each object, by the attention itself → (B, H, Q, O).

    key_start: as in `from_weights`.
    """
    (B, H, Q, _), (K, width), objects = call.query.shape, call.value.shape[2:], columns.shape[1]
    index = columns - key_start
    index = torch.where((columns >= 0) & (index >= 0) & (index < K), index, K)
    table = torch.zeros(B, objects, K + 1, dtype=call.value.dtype, device=call.value.device)
    table.scatter_add_(2, index, torch.ones_like(index, dtype=table.dtype))
    table = table[..., :K].transpose(1, 2)  # (B, K, O)
    dtype = torch.float64 if call.value.dtype == torch.float64 else torch.float32
    parts = []
    for first in range(0, objects, width):
        part = table[..., first : first + width]
        values = torch.zeros(B, 1, K, width, dtype=table.dtype, device=table.device)
        values[:, 0, :, : part.shape[2]] = part
        options = {**call.options, **({"dropout": 0.0} if "dropout" in call.options else {})}
        again = replace(call, value=values.expand(-1, call.value.shape[1], -1, -1), options=options)
        # The model's random numbers stay the same, also for functions that draw some.
        own = call.function in _own_functions()
        with torch.random.fork_rng([values.device] if values.is_cuda else [], enabled=not own):
            result = again.run()
        result = result[0] if isinstance(result, tuple) else result
        if not isinstance(result, Tensor) or tuple(result.shape) != (B, Q, H, width):
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise OspoError(
                f"capture: the attention of {type(call.module).__name__} returned {got}, expected a tensor of shape "
                f"{(B, Q, H, width)}; use an attention that keeps transformers' AttentionInterface"
            )
        parts.append(result[..., : part.shape[2]].transpose(1, 2).to(dtype))
    if not parts:
        return torch.zeros(B, H, Q, 0, dtype=dtype, device=call.value.device)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@functools.cache
def _own_functions() -> tuple[Any, Any]:
    """The sdpa and the flash attention of transformers."""
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward, flash_attention_forward

"""Object attention maps from a forward pass that runs anyway, with the attention implementation the model has."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ospo_fast.errors import OpError, OspoError
from ospo_fast.ops import attention_columns

if TYPE_CHECKING:
    from typing_extensions import Self

Bounds = tuple["int | Tensor", "int | Tensor"]

_PREFIX = "ospo_capture|"
# Attention modules under capture. The functions that transformers' registries hold stay there for good, one per
# implementation; they look here for what to capture, and without an entry they only run the attention.
_ACTIVE: dict[int, AttentionCapture] = {}


class _StopForward(BaseException):
    """Ends a forward pass whose rest nobody wants. No error, so it passes by what handles errors."""

    def __init__(self, capture: AttentionCapture) -> None:
        self.capture = capture


class AttentionCapture:
    """Mean attention of query rows on key columns, read off while the decoder runs.

    maps[b, o, i] = mean over the layers kept, over heads and over columns c of object o of the attention probability
    softmax_j(q_i·k_j)[c] of row rows[0] + i, as (B, O, H, W) fp32. The model's own attention (sdpa, eager, flash …)
    computes the forward pass; beside it `attention_columns` computes the few probabilities wanted.

        with AttentionCapture(model, columns=columns, rows=(prompt_length, tokens)) as capture:
            model.decoder(inputs_embeds=x, attention_mask=mask, use_cache=False)
        masks = object_masks(capture.maps)

    One capture takes one forward pass over whole sequences (no key-value cache). Padding on either side is left out by
    means of the attention mask that the decoder is given. The maps carry no gradient; with gradient checkpointing,
    leave the context before the backward pass. Not for decoders under torch.compile.

    Args:
        model: an adapter, or a transformers module with a Llama-like decoder.
        columns: (B, O, C) integers, the key positions of each object's tokens; −1 = none. An object with no column gets
            a map of zeros. Nested lists may be ragged.
        rows: (start, count): the positions of the image tokens; ints or (B,) tensors.
        layers: which layers to average over, by index (negative from the end); default: all but the first and last
            `skip` where there are more than 2 · `skip` layers, else all.
        skip: 5 as in the official code.
        grid: (H, W) with H · W = count; default: the adapter's.
        stop_early: end the forward pass after the last layer kept; it returns nothing then, so the forward call must be
            the last statement of the context.

    Raises:
        OspoError: a model that does not route its attention through transformers' AttentionInterface, a decoder that
            is being captured already, a second forward pass, a grid that does not fit.
        OpError: columns or rows outside the sequence.

    """

    def __init__(
        self,
        model: Any,
        *,
        columns: Tensor | Sequence[Sequence[Sequence[int]]],
        rows: Bounds,
        layers: Sequence[int] | None = None,
        skip: int = 5,
        grid: tuple[int, int] | None = None,
        stop_early: bool = False,
    ) -> None:
        self._decoder: Any = _decoder_of(model)
        self._columns = columns if isinstance(columns, Tensor) else _rectangular(columns)
        self._rows = rows
        self._stop_early = stop_early
        self._attention = [layer.self_attn for layer in self._decoder.layers]
        self.layers = _kept(len(self._attention), layers, skip)
        self._grid = _grid_of(model, grid, rows)
        self._seen: set[int] = set()
        self._maps: Tensor | None = None
        self._implementation: str | None = None

    @property
    def maps(self) -> Tensor:
        """(B, O, H, W) fp32, once the forward pass is through the layers kept."""
        if self._maps is None or len(self._seen) < len(self.layers):
            raise OspoError(
                f"capture: {len(self._seen)} of {len(self.layers)} layers were seen; run the decoder once inside the "
                "`with` block before reading maps"
            )
        return self._maps.reshape(*self._maps.shape[:2], *self._grid)

    def __enter__(self) -> Self:
        if any(id(module) in _ACTIVE for module in self._attention):
            raise OspoError("capture: this decoder is being captured already; leave that `with` block first")
        config = self._decoder.config
        name: str = config._attn_implementation or "eager"
        _register(name, self._attention[0])
        self._implementation = config._attn_implementation
        self._seen.clear()
        self._maps = None
        for module in self._attention:
            _ACTIVE[id(module)] = self
        config._attn_implementation = _PREFIX + name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._decoder.config._attn_implementation = self._implementation
        for module in self._attention:
            _ACTIVE.pop(id(module), None)
        return isinstance(error, _StopForward) and error.capture is self

    def _take(self, module: Any, q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> None:
        index = int(module.layer_idx)
        if index not in self.layers:
            return
        if index in self._seen:
            raise OspoError("capture: a second forward pass reached the decoder; one capture takes one pass")
        if q.shape[2] != k.shape[2]:
            raise OspoError(
                f"capture: the decoder was called with {q.shape[2]} queries for {k.shape[2]} keys; "
                "run whole sequences with use_cache=False"
            )
        columns = self._columns.to(q.device)
        if columns.dim() == 3 and columns.shape[0] != q.shape[0]:
            raise OpError(f"capture: columns has {columns.shape[0]} sequences, the decoder runs {q.shape[0]}")
        weight = 1 / len(self.layers)
        self._maps = attention_columns(
            q.detach(),
            k.detach(),
            columns,
            rows=self._rows,
            scale=scale,
            key_range=_visible(mask, self._rows, q.shape[0], q.shape[2]),
            out=self._maps,
            weight=weight,
        )
        self._seen.add(index)

    def _finished(self) -> bool:
        return self._stop_early and len(self._seen) == len(self.layers)


def _register(name: str, attention: nn.Module) -> None:
    """Make `_PREFIX + name` known to transformers: the attention `name`, and the mask that it wants."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name.startswith(_PREFIX):
        raise OspoError("capture: another decoder that shares this configuration is being captured")
    if _PREFIX + name in ALL_ATTENTION_FUNCTIONS:
        return
    if name == "eager":
        # Not in the registry: each model file brings its own.
        own = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    else:
        own = ALL_ATTENTION_FUNCTIONS.get(name)
    if own is None or name not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise OspoError(
            f"capture: the attention implementation {name!r} is not in transformers' AttentionInterface; "
            "load the model with attn_implementation='sdpa'"
        )
    AttentionInterface.register(_PREFIX + name, _wrapper(own))
    AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _wrapper(own: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        result = own(module, query, key, value, mask, **kwargs)
        capture = _ACTIVE.get(id(module))
        if capture is not None:
            capture._take(module, query, key, mask, kwargs.get("scaling"))
            if capture._finished():
                raise _StopForward(capture)
        return result

    return attention


def _visible(mask: Tensor | None, rows: Bounds, batch: int, length: int) -> tuple[Tensor, int] | None:
    """The keys that the wanted rows may see beside causality, from any mask that transformers hands to attention."""
    if mask is None:
        return None
    start, count = (torch.as_tensor(bound, device=mask.device).expand(batch) for bound in rows)
    last = (start + count - 1).clamp(0, length - 1)
    if mask.dim() == 4:  # (B or 1, 1, S, S), bool or additive
        index = last.view(-1, 1, 1, 1).expand(-1, 1, 1, length)
        seen = mask[..., :length].expand(batch, -1, -1, -1)[:, :1].gather(2, index).flatten(1)
        seen = seen if mask.dtype == torch.bool else seen > torch.finfo(mask.dtype).min / 2
    elif mask.dim() == 2:  # (B, S), flash attention's
        seen = mask.expand(batch, -1).bool()
    else:
        raise OspoError(f"capture: got an attention mask of shape {tuple(mask.shape)}, expected (B, S) or (B, 1, S, S)")
    position = torch.arange(length, device=mask.device)
    first = seen.long().argmax(1)
    expected = (position >= first[:, None]) & (position <= last[:, None])
    if bool((seen & (position <= last[:, None]) != expected).any()):
        raise OspoError("capture: the attention mask has holes before the wanted rows; pad without gaps")
    return first, length


def _decoder_of(model: Any) -> Any:
    decoder = getattr(model, "decoder", None) or model
    if not isinstance(decoder, nn.Module):
        raise OspoError(f"capture: got a {type(model).__name__}, expected a model adapter or a transformers module")
    for module in decoder.modules():
        layers = getattr(module, "layers", None)
        if (
            isinstance(layers, nn.ModuleList)
            and len(layers)
            and all(hasattr(getattr(layer, "self_attn", None), "layer_idx") for layer in layers)
            and getattr(module, "_supports_attention_backend", False)
        ):
            return module
    raise OspoError(
        f"capture: {type(decoder).__name__} has no decoder whose attention goes through transformers' "
        "AttentionInterface (transformers models with sdpa, eager or flash attention do)"
    )


def _kept(count: int, layers: Sequence[int] | None, skip: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(skip, count - skip)) if count > 2 * skip else tuple(range(count))
    if not len(layers) or any(not -count <= layer < count for layer in layers):
        raise OspoError(
            f"capture: layers is {list(layers)}, expected indices from {-count} to {count - 1}, at least one"
        )
    return tuple(sorted({layer % count for layer in layers}))


def _grid_of(model: Any, grid: tuple[int, int] | None, rows: Bounds) -> tuple[int, int]:
    count = int(rows[1].max()) if isinstance(rows[1], Tensor) else int(rows[1])
    if grid is None:
        grid = getattr(model, "grid", None)
    if grid is None:
        raise OspoError("capture: this model tells no grid; give grid=(rows, columns) of the image tokens")
    if grid[0] * grid[1] != count:
        raise OspoError(
            f"capture: rows holds {count} positions, the grid {grid[0]} by {grid[1]}; give the grid= that fits"
        )
    return grid


def _rectangular(columns: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Nested lists of any lengths → (B, O, C), filled up with −1."""
    objects = max((len(item) for item in columns), default=0)
    longest = max((len(found) for item in columns for found in item), default=0)
    table = torch.full((len(columns), objects, longest), -1, dtype=torch.long)
    for b, item in enumerate(columns):
        for o, found in enumerate(item):
            table[b, o, : len(found)] = torch.as_tensor(list(found), dtype=torch.long)
    return table

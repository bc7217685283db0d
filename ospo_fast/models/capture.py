"""Object attention maps from a forward pass that runs anyway, with the attention implementation the model has."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ospo_fast.errors import OpError, OspoError
from ospo_fast.ops._transfer import to_device_packed
from ospo_fast.ops.attention_columns import ColumnRequest

if TYPE_CHECKING:
    from typing_extensions import Self

Bounds = tuple["int | Tensor", "int | Tensor"]

_PREFIX = "ospo_capture|"
# Attention modules under capture. The functions that transformers' registries hold stay there for good, one per
# implementation; they look here for what to capture, and without an entry they only run the attention.
_ACTIVE: dict[int, AttentionCapture] = {}
# Operations whose second result is the natural log-sum-exp of the rows, (B, H, S or more); of those marked True the
# fifth argument says whether to compute it.
_TELL_LSE = {
    "aten::_scaled_dot_product_flash_attention": False,
    "aten::_scaled_dot_product_flash_attention_for_cpu": False,
    "aten::_scaled_dot_product_fused_attention_overrideable": False,
    "aten::_scaled_dot_product_efficient_attention": True,
    "aten::_scaled_dot_product_cudnn_attention": True,
    "flash_attn::_flash_attn_forward": False,
}


class _StopForward(BaseException):
    """Ends a forward pass whose rest nobody wants. No error, so it passes by what handles errors."""

    def __init__(self, capture: AttentionCapture) -> None:
        self.capture = capture


class _Watch(TorchDispatchMode):
    """Keeps the log-sum-exp that the attention running inside computes anyway, and the dtype it ran in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lse: Tensor | None = None
        self.dtype: torch.dtype | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        asks = _TELL_LSE.get(func._schema.name)
        if asks and len(args) > 4:
            args = (*args[:4], True, *args[5:])
        result = func(*args, **(kwargs or {}))
        if asks is not None:
            self.lse, self.dtype = result[1], args[0].dtype
        return result

    def of(self, q: Tensor) -> Tensor | None:
        """The log-sum-exp (B, H, S) of these queries; None where the attention told none of that shape."""
        lse = self.lse
        if lse is None:
            return None
        if lse.dim() == 4 and lse.shape[3] == 1:
            lse = lse.squeeze(3)
        fits = lse.dim() == 3 and lse.shape[:2] == q.shape[:2] and lse.shape[2] >= q.shape[2]
        return lse[:, :, : q.shape[2]].detach() if fits else None


class AttentionCapture:
    """Mean attention of query rows on key columns, read off while the decoder runs.

    maps[b, o, i] = mean over the layers and heads kept and over columns c of object o of the attention probability
    softmax_j(q_i·k_j)[c] of row rows[0] + i, as (B, O, H, W) fp32 (float64 for a float64 decoder); `layer_maps` has
    each layer's own, `head_maps` each head's. The model's own attention (sdpa, eager, flash …) computes the forward
    pass; beside it `attention_columns` computes the few probabilities wanted, from the log-sum-exp of that attention
    where it tells one (torch's fused attentions and flash-attn without padding do), else from its own. A GPU is waited
    for once a pass where the decoder has an attention mask, to look at it; else not at all, where columns and rows are
    given on the CPU.

        with AttentionCapture(model, columns=columns, rows=(prompt_length, tokens)) as capture:
            model.decoder(inputs_embeds=x, attention_mask=mask, use_cache=False)
        masks = object_masks(capture.maps)

    One capture takes one forward pass over whole sequences (no key-value cache, none packed). Padding on either side is
    left out by means of the attention mask that the decoder is given; apart from it rows see all keys up to themselves,
    and another mask is refused. The maps carry no gradient; with gradient
    checkpointing, leave the context before the backward pass. A decoder under torch.compile is compiled anew for the
    context, with a graph break at each attention; under fullgraph=True torch refuses.

    Args:
        model: an adapter, or a transformers module with a Llama-like decoder.
        columns: (B, O, C) integers, the key positions of each object's tokens; −1 = none. An object with no column gets
            a map of zeros. Nested lists may be ragged.
        rows: (start, count): the positions of the image tokens; ints or (B,) tensors.
        layers: which layers to average over, by index (negative from the end); default: all but the first and last
            `skip` where there are more than 2 · `skip` layers, else all.
        skip: 5 as in the official code.
        heads: which heads to average over in these layers, by index (negative from the end); default: all.
        by_head: keep the heads apart, for `head_maps`; the maps take as many times the memory.
        grid: (H, W) with H · W = count; default: the adapter's.
        stop_early: end the forward pass after the last layer kept; it returns nothing then, so the forward call must be
            the last statement of the context.

    Raises:
        OspoError: layers or heads that are not there, a model that does not route its attention through transformers'
            AttentionInterface, an unknown attention implementation, sliding windows and soft caps, attention that is
            not causal, masks with holes, a decoder that is being captured already, a second forward pass, a grid that
            does not fit.
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
        heads: Sequence[int] | None = None,
        by_head: bool = False,
        grid: tuple[int, int] | None = None,
        stop_early: bool = False,
    ) -> None:
        self._decoder: Any = _decoder_of(model)
        self._columns = columns if isinstance(columns, Tensor) else _rectangular(columns)
        self._rows = rows
        self._stop_early = stop_early
        self._attention = [layer.self_attn for layer in self._decoder.layers]
        self.layers = _kept(len(self._attention), layers, skip)
        self._heads = None if heads is None else _indices("heads", heads, self._head_count())
        self._by_head = by_head
        self._grid = _grid_of(model, grid, rows)
        self._seen: set[int] = set()
        self._request: ColumnRequest | None = None
        self._maps: Tensor | None = None
        self._implementation: str | None = None

    @property
    def heads(self) -> tuple[int, ...]:
        """The heads kept, in ascending order."""
        return tuple(range(self._head_count())) if self._heads is None else self._heads

    def _head_count(self) -> int:
        return int(self._decoder.config.num_attention_heads)

    @property
    def maps(self) -> Tensor:
        """(B, O, H, W), once the forward pass is through the layers kept."""
        return self.layer_maps.mean(0)

    @property
    def layer_maps(self) -> Tensor:
        """(layers, B, O, H, W), in the order of `layers`; their mean is `maps`."""
        return self._maps_by_head.mean(1)

    @property
    def head_maps(self) -> Tensor:
        """(layers, heads, B, O, H, W), in the order of `layers` and `heads`; OspoError without `by_head`."""
        if not self._by_head:
            raise OspoError("capture: the heads were not kept apart; give by_head=True for head_maps")
        return self._maps_by_head

    @property
    def _maps_by_head(self) -> Tensor:
        """With each head by itself at dimension 1, or the mean over all heads alone."""
        if self._maps is None or len(self._seen) < len(self.layers):
            raise OspoError(
                f"capture: {len(self._seen)} of {len(self.layers)} layers were seen; run the decoder once inside the "
                "`with` block before reading maps"
            )
        layers, sequences, objects = self._maps.shape[:3]
        heads = len(self.heads) if self._by_head else 1
        return self._maps.view(layers, sequences // heads, heads, objects, *self._grid).transpose(1, 2)

    def __enter__(self) -> Self:
        if any(id(module) in _ACTIVE for module in self._attention):
            raise OspoError("capture: this decoder is being captured already; leave that `with` block first")
        config = self._decoder.config
        name: str = config._attn_implementation or "eager"
        _register(name, self._attention[0])
        self._implementation = config._attn_implementation
        self._seen.clear()
        self._maps = self._request = None
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

    def _wants(self, module: Any) -> bool:
        return int(module.layer_idx) in self.layers

    def _take(
        self, module: Any, q: Tensor, k: Tensor, mask: Tensor | None, options: dict[str, Any], watch: _Watch
    ) -> None:
        index = int(module.layer_idx)
        if index in self._seen:
            raise OspoError("capture: a second forward pass reached the decoder; one capture takes one pass")
        if q.shape[2] != k.shape[2]:
            raise OspoError(
                f"capture: the decoder was called with {q.shape[2]} queries for {k.shape[2]} keys; "
                "run whole sequences with use_cache=False"
            )
        _refuse_unusual(module, options, q.shape[2])
        dtype = watch.dtype or q.dtype  # autocast may have narrowed what the attention saw
        if self._request is None or self._maps is None:
            # Looked at once: the layers of a pass share the mask, and looking waits for a GPU.
            self._request = self._ask(q, mask).repeated(len(self.heads) if self._by_head else 1)
            shape = (len(self.layers), *self._request.columns.shape[:2], self._request.length)
            kept = torch.float64 if dtype == torch.float64 else torch.float32
            self._maps = torch.zeros(shape, dtype=kept, device=q.device)
        q, k, lse = self._of_heads(q.detach().to(dtype), k.detach().to(dtype), watch.of(q))
        self._request.run(q, k, scale=options.get("scaling"), lse=lse, out=self._maps[self.layers.index(index)])
        self._seen.add(index)

    def _of_heads(self, q: Tensor, k: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The heads kept (B, heads, S, D); by_head as sequences of their own (B·heads, 1, S, D)."""
        if self._heads is not None or self._by_head:
            group = q.shape[1] // k.shape[1]
            q, k = _picked(q, self.heads), _picked(k, [head // group for head in self.heads])
            lse = None if lse is None else _picked(lse, self.heads)
        if self._by_head:
            q, k = _apart(q), _apart(k)
            lse = None if lse is None else _apart(lse)
        return q, k, lse

    def _ask(self, q: Tensor, mask: Tensor | None) -> ColumnRequest:
        batch, _, length, _ = q.shape
        if self._columns.dim() == 3 and self._columns.shape[0] != batch:
            raise OpError(f"capture: columns has {self._columns.shape[0]} sequences, the decoder runs {batch}")
        request = ColumnRequest.from_args(self._columns, batch, length, rows=self._rows)
        if mask is not None:
            request = replace(request, key_start=_first_keys(mask, request))
        return request.to(q.device)

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
    AttentionInterface.register(_PREFIX + name, _wrapper(name, own))
    AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _wrapper(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    @torch.compiler.disable
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        def run() -> Any:
            # The attention may look up its own name, as transformers' flash attention does.
            captured, module.config._attn_implementation = module.config._attn_implementation, name
            try:
                return own(module, query, key, value, mask, **kwargs)
            finally:
                module.config._attn_implementation = captured

        capture = _ACTIVE.get(id(module))
        if capture is None or not capture._wants(module):
            return run()
        with _Watch() as watch:
            result = run()
        capture._take(module, query, key, mask, kwargs, watch)
        if capture._finished():
            raise _StopForward(capture)
        return result

    wrapped: Callable[..., Any] = attention
    return wrapped


def _refuse_unusual(module: Any, options: dict[str, Any], length: int) -> None:
    """OspoError for attention that is no plain softmax over all earlier keys."""
    window = options.get("sliding_window") or getattr(module, "sliding_window", None)
    if window is not None and window < length:
        raise OspoError(
            f"capture: layer {module.layer_idx} has a sliding window of {window} for {length} positions; "
            "give layers= without windows"
        )
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise OspoError(
            f"capture: layer {module.layer_idx} is not causal (is_causal=False), but maps are of causal attention; "
            "leave the layer out by layers=, or capture a causal decoder"
        )
    if options.get("cu_seq_lens_q") is not None:
        raise OspoError("capture: the decoder runs packed sequences (cu_seq_lens_q); give it padded ones, with a mask")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise OspoError(f"capture: layer {module.layer_idx} changes its scores by {name}, which maps do not know")


def _first_keys(mask: Tensor, request: ColumnRequest) -> Tensor:
    """(B,) on the CPU: the first key that the wanted rows may see, from any mask that transformers hands to attention.

    Waits for the device, once. OspoError for rows that see other keys than all from there up to themselves; what rows
    of padding see is their own affair.
    """
    (batch, *_), length = request.columns.shape, request.positions
    if mask.dim() not in (2, 4):
        raise OspoError(f"capture: got an attention mask of shape {tuple(mask.shape)}, expected (B, S) or (B, 1, S, S)")
    start, count = to_device_packed((request.row_start, request.row_count), mask.device)
    last = (start + count - 1).clamp(0, length - 1)
    if mask.dim() == 4:  # (B or 1, 1, S, S), bool or additive
        row = torch.minimum(start[:, None] + torch.arange(max(request.length, 1), device=mask.device), last[:, None])
        index = row[:, None, :, None].expand(-1, 1, -1, length)
        seen = mask[..., :length].expand(batch, -1, -1, -1)[:, :1].gather(2, index)[:, 0]  # (B, rows, S)
        seen = seen if mask.dtype == torch.bool else seen > torch.finfo(mask.dtype).min / 2
    else:  # (B, S), flash attention's: the same for all rows, beside causality
        row, seen = last[:, None], mask.expand(batch, -1).bool()[:, None]
    position = torch.arange(length, device=mask.device)
    up_to_itself = position <= row[..., None]
    first = (seen & up_to_itself)[:, -1].long().argmax(1)
    concerned = ((row >= first[:, None]) & (count > 0)[:, None])[..., None]
    holes = (seen & up_to_itself) != (up_to_itself & (position >= first[:, None, None]))
    later = seen & ~up_to_itself if mask.dim() == 4 else torch.zeros_like(seen)
    *found, has_holes, has_later = torch.cat(
        [first, *((wrong & concerned).any().long()[None] for wrong in (holes, later))]
    ).tolist()
    if has_later:
        raise OspoError(
            "capture: the attention mask shows wanted rows keys after themselves, but maps are of causal attention; "
            "run the decoder with a causal mask"
        )
    if has_holes:
        raise OspoError("capture: the attention mask has holes before the wanted rows; pad without gaps")
    return torch.tensor(found, dtype=torch.long)


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
    return _indices("layers", layers, count)


def _indices(name: str, given: Sequence[int], count: int) -> tuple[int, ...]:
    if not len(given) or any(not -count <= index < count for index in given):
        raise OspoError(
            f"capture: {name} is {list(given)}, expected indices from {-count} to {count - 1}, at least one"
        )
    return tuple(sorted({index % count for index in given}))


def _picked(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of x (B, H, …): a view of one or of neighbours, else a copy; no index that has to reach a GPU."""
    first, last = heads[0], heads[-1]
    if list(heads) == list(range(first, last + 1)):
        return x[:, first : last + 1]
    return torch.stack([x[:, head] for head in heads], dim=1)


def _apart(x: Tensor) -> Tensor:
    """(B, H, …) → (B·H, 1, …); a view where B is 1."""
    return x.flatten(0, 1)[:, None]


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

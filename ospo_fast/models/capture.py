"""Object attention maps from a forward pass that runs anyway, with the model's own attention implementation."""

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
from ospo_fast.ops.attention_columns import Bounds, ColumnRequest

if TYPE_CHECKING:
    from typing_extensions import Self

_PREFIX = "ospo_capture|"
# Attention modules under capture, by id. transformers' registries have no way to unregister, so a wrapper stays there
# once it is registered. It looks up its module here, and without an entry it only runs the attention.
_ACTIVE: dict[int, AttentionCapture] = {}
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


class _StopForward(BaseException):
    """End of a forward pass after the last captured layer. Not an Exception: no handler of the model must see it."""

    def __init__(self, capture: AttentionCapture) -> None:
        self.capture = capture


class _LseRecorder(TorchDispatchMode):
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
        has_flag = _LSE_OPS.get(func._schema.name)
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


class AttentionCapture:
    """Context manager that captures the mean attention of query rows to key columns while the decoder runs.

    maps[b, o, i] = mean over the captured layers and heads and over columns c of object o of the attention probability
    softmax_j(q_i·k_j)[c] of row rows[0] + i, as (B, O, H, W) fp32 (float64 for a float64 decoder). `layer_maps` has the
    maps of each layer. The maps carry no gradient.

    The model's own attention (sdpa, eager, flash …) computes the forward pass, and `attention_columns` the captured
    probabilities. It uses the log-sum-exp of the attention that ran (torch's fused attentions, and flash-attn without
    padding); where there is none, it computes its own. With an attention mask a pass synchronizes the GPU once, to
    inspect the mask. Without one it does not synchronize, provided that columns and rows are on the CPU.

        with AttentionCapture(model, columns=columns, rows=(prompt_length, tokens)) as capture:
            model.decoder(inputs_embeds=x, attention_mask=mask, use_cache=False)
        masks = object_masks(capture.maps)

    One capture takes one forward pass over whole sequences: no key-value cache, no packed sequences. Padding on either
    side is excluded by the decoder's attention mask; apart from padding, the mask must be causal. With gradient
    checkpointing, leave the context before the backward pass. A decoder under torch.compile is recompiled for the
    context with a graph break at each attention; with fullgraph=True torch raises an error.

    Args:
        model: an adapter, or a transformers module with a Llama-like decoder.
        columns: (B, O, C) integers, the key positions of each object's tokens; −1 = none. An object with no column gets
            a map of zeros. Nested lists may be ragged.
        rows: (start, count): the positions of the image tokens; ints or (B,) tensors.
        layers: indices of the layers to average over (negative from the end); default: all but the first and last
            `skip` where there are more than 2 · `skip` layers, else all.
        skip: 5 as in the official code.
        heads: indices of the heads to average over in these layers (negative from the end); default: all.
        grid: (H, W) with H · W = count; default: the adapter's.
        stop_early: end the forward pass after the last captured layer. The forward call must then be the last statement
            of the context, because it does not return.

    Raises:
        OspoError: layers or heads out of range; a grid that does not fit; a model that does not route its attention
            through transformers' AttentionInterface; an unknown attention implementation; sliding windows, soft caps,
            attention that is not causal, masks with holes; a decoder that is already being captured; a second forward
            pass.
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
        grid: tuple[int, int] | None = None,
        stop_early: bool = False,
    ) -> None:
        self._decoder: Any = _find_decoder(model)
        self._columns = columns if isinstance(columns, Tensor) else _pad_columns(columns)
        self._rows = rows
        self._stop_early = stop_early
        self._attention = [layer.self_attn for layer in self._decoder.layers]
        count = len(self._attention)
        if layers is None:
            layers = range(skip, count - skip) if count > 2 * skip else range(count)
        self.layers = _resolve_indices("layers", layers, count)
        self._heads = None
        if heads is not None:  # some configurations have no number of heads
            self._heads = _resolve_indices("heads", heads, self._decoder.config.num_attention_heads)
        self._grid = _resolve_grid(model, grid, rows)
        self._seen: set[int] = set()
        self._request: ColumnRequest | None = None
        self._maps: Tensor | None = None
        self._implementation: str | None = None

    @property
    def maps(self) -> Tensor:
        """(B, O, H, W): the mean of `layer_maps`. Raises OspoError before the forward pass."""
        return self.layer_maps.mean(0)

    @property
    def layer_maps(self) -> Tensor:
        """(layers, B, O, H, W), in the order of `layers`. Raises OspoError before the forward pass."""
        maps = self._captured()
        return maps.view(*maps.shape[:3], *self._grid)

    def _captured(self) -> Tensor:
        """(layers, B, O, rows)."""
        if self._maps is None or len(self._seen) < len(self.layers):
            raise OspoError(
                f"capture: {len(self._seen)} of {len(self.layers)} layers were seen; run the decoder once inside the "
                "`with` block before reading maps"
            )
        return self._maps

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

    def _capture_layer(
        self, module: Any, q: Tensor, k: Tensor, mask: Tensor | None, options: dict[str, Any], recorder: _LseRecorder
    ) -> None:
        index = int(module.layer_idx)
        if index in self._seen:
            raise OspoError("capture: a second forward pass reached the decoder; one capture takes one pass")
        if q.shape[2] != k.shape[2]:
            raise OspoError(
                f"capture: the decoder was called with {q.shape[2]} queries for {k.shape[2]} keys; "
                "run whole sequences with use_cache=False"
            )
        _check_attention(module, options, q.shape[2])
        dtype = recorder.dtype or q.dtype  # autocast may have narrowed what the attention got
        if self._request is None or self._maps is None:
            # Once per pass: the layers share the mask, and inspecting it synchronizes the GPU.
            self._request = self._build_request(q, mask)
            shape = (len(self.layers), *self._request.columns.shape[:2], self._request.length)
            maps_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            self._maps = torch.zeros(shape, dtype=maps_dtype, device=q.device)
        q, k, lse = self._select_heads(q.detach().to(dtype), k.detach().to(dtype), recorder.lse_of(q))
        self._request.run(q, k, scale=options.get("scaling"), lse=lse, out=self._maps[self.layers.index(index)])
        self._seen.add(index)
        if self._stop_early and len(self._seen) == len(self.layers):
            raise _StopForward(self)

    def _select_heads(self, q: Tensor, k: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The captured heads: q and k (B, heads, S, D), lse (B, heads, S)."""
        if self._heads is None:
            return q, k, lse
        group = q.shape[1] // k.shape[1]
        key_heads = [head // group for head in self._heads]
        return (
            _take_heads(q, self._heads),
            _take_heads(k, key_heads),
            lse if lse is None else _take_heads(lse, self._heads),
        )

    def _build_request(self, q: Tensor, mask: Tensor | None) -> ColumnRequest:
        batch, _, length, _ = q.shape
        if self._columns.dim() == 3 and self._columns.shape[0] != batch:
            raise OpError(f"capture: columns has {self._columns.shape[0]} sequences, the decoder runs {batch}")
        request = ColumnRequest.from_args(self._columns, batch, length, rows=self._rows)
        if mask is not None:
            request = replace(request, key_start=_first_visible_keys(mask, request))
        return request.to(q.device)


def _register(name: str, attention: nn.Module) -> None:
    """Register `_PREFIX + name` with transformers: the attention `name`, wrapped, and the kind of mask it expects."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name.startswith(_PREFIX):
        raise OspoError(
            "capture: another decoder with the same configuration is being captured; leave that `with` block first"
        )
    if _PREFIX + name in ALL_ATTENTION_FUNCTIONS:
        return
    if name == "eager":
        # Not in the registry: each model file has its own.
        function = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    else:
        function = ALL_ATTENTION_FUNCTIONS.get(name)
    if function is None or name not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise OspoError(
            f"capture: the attention implementation {name!r} is not in transformers' AttentionInterface; "
            "load the model with attn_implementation='sdpa'"
        )
    AttentionInterface.register(_PREFIX + name, _wrap(name, function))
    AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function `name` with a capture of modules in `_ACTIVE`."""

    @torch.compiler.disable
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        def run() -> Any:
            # The function may read its own name from the configuration, as transformers' flash attention does.
            captured, module.config._attn_implementation = module.config._attn_implementation, name
            try:
                return function(module, query, key, value, mask, **kwargs)
            finally:
                module.config._attn_implementation = captured

        capture = _ACTIVE.get(id(module))
        if capture is None or int(module.layer_idx) not in capture.layers:
            return run()
        with _LseRecorder() as recorder:
            result = run()
        capture._capture_layer(module, query, key, mask, kwargs, recorder)
        return result

    wrapped: Callable[..., Any] = attention
    return wrapped


def _check_attention(module: Any, options: dict[str, Any], length: int) -> None:
    """Raise OspoError for attention that is not a plain causal softmax over all earlier keys."""
    window = options.get("sliding_window") or getattr(module, "sliding_window", None)
    causal = options.get("is_causal")
    changed = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if options.get("cu_seq_lens_q") is not None:
        reason = "runs packed sequences (cu_seq_lens_q)"
    elif window is not None and window < length:
        reason = f"has a sliding window of {window} for {length} positions"
    elif not (getattr(module, "is_causal", True) if causal is None else causal):
        reason = "is not causal (is_causal=False)"
    elif changed:
        reason = f"changes its scores by {changed[0]}"
    else:
        return
    raise OspoError(
        f"capture: layer {module.layer_idx} {reason}, expected a causal softmax over all earlier keys of a sequence; "
        "exclude the layer by layers=, or pad sequences instead of packing them"
    )


def _first_visible_keys(mask: Tensor, request: ColumnRequest) -> Tensor:
    """(B,) on the CPU: the first key that the captured rows see, from any mask that transformers gives to attention.

    Synchronizes the device once. Raises OspoError where a captured row does not see exactly the keys from there up to
    itself. Rows before that key are padding, and not checked.
    """
    batch, length = len(request.columns), request.positions
    if mask.dim() not in (2, 4):
        raise OspoError(f"capture: got an attention mask of shape {tuple(mask.shape)}, expected (B, S) or (B, 1, S, S)")
    start, count = to_device_packed((request.row_start, request.row_count), mask.device)
    last = (start + count - 1).clamp(0, length - 1)[:, None]
    position = torch.arange(length, device=mask.device)
    if mask.dim() == 4:  # (B or 1, 1, S, S), bool or additive
        row = torch.minimum(start[:, None] + torch.arange(max(request.length, 1), device=mask.device), last)
        index = row[:, None, :, None].expand(-1, 1, -1, length)
        seen = mask[..., :length].expand(batch, -1, -1, -1)[:, :1].gather(2, index)[:, 0]  # (B, rows, S)
        seen = seen if mask.dtype == torch.bool else seen > torch.finfo(mask.dtype).min / 2
    else:  # (B, S), flash attention's, which is causal in addition, so the last row determines the mask
        row = last
        seen = mask.expand(batch, -1).bool()[:, None] & (position <= row[..., None])
    causal = position <= row[..., None]
    first = (seen & causal)[:, -1].long().argmax(1)
    expected = causal & (position >= first[:, None, None])
    checked = ((row >= first[:, None]) & (count > 0)[:, None])[..., None]
    later = (seen & ~causal & checked).any()
    holes = (((seen & causal) != expected) & checked).any()
    *first_keys, has_later, has_holes = torch.cat([first, torch.stack([later, holes]).long()]).tolist()
    if has_later or has_holes:
        reason = "shows captured rows keys after themselves" if has_later else "has holes before the captured rows"
        raise OspoError(f"capture: the attention mask {reason}, expected a causal mask with padding at the ends only")
    return torch.tensor(first_keys, dtype=torch.long)


def _find_decoder(model: Any) -> Any:
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


def _resolve_indices(name: str, given: Sequence[int], count: int) -> tuple[int, ...]:
    """Sorted unique indices from 0."""
    if not len(given) or any(not -count <= index < count for index in given):
        raise OspoError(
            f"capture: {name} is {list(given)}, expected indices from {-count} to {count - 1}, at least one"
        )
    return tuple(sorted({index % count for index in given}))


def _take_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Select heads of x (B, H, …) without an index tensor, which would be copied to the GPU."""
    first, last = heads[0], heads[-1]
    if list(heads) == list(range(first, last + 1)):
        return x[:, first : last + 1]
    return torch.stack([x[:, head] for head in heads], dim=1)


def _resolve_grid(model: Any, grid: tuple[int, int] | None, rows: Bounds) -> tuple[int, int]:
    count = int(rows[1].max()) if isinstance(rows[1], Tensor) else int(rows[1])
    if grid is None:
        grid = getattr(model, "grid", None)
    if grid is None:
        raise OspoError("capture: this model has no grid; give grid=(rows, columns) of the image tokens")
    if grid[0] * grid[1] != count:
        raise OspoError(
            f"capture: rows holds {count} positions, the grid {grid[0]} by {grid[1]}; give the grid= that fits"
        )
    return grid


def _pad_columns(columns: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Ragged nested lists → (B, O, C), padded with −1."""
    objects = max((len(item) for item in columns), default=0)
    width = max((len(tokens) for item in columns for tokens in item), default=0)
    table = torch.full((len(columns), objects, width), -1, dtype=torch.long)
    for b, item in enumerate(columns):
        for o, tokens in enumerate(item):
            table[b, o, : len(tokens)] = torch.tensor(list(tokens), dtype=torch.long)
    return table

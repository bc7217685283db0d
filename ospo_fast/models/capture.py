"""Attention maps from a forward pass that runs anyway, with the model's own attention implementation."""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from ospo_fast.errors import OpError, OspoError
from ospo_fast.models._attention_modules import check_readable, find_attention
from ospo_fast.models._column_probabilities import (
    AttentionCall,
    LseRecorder,
    PlainRequests,
    check_options,
    from_indicators,
    from_weights,
    repeat_request,
    take_rows,
)
from ospo_fast.ops.attention_columns import Bounds, ColumnRequest

if TYPE_CHECKING:
    from typing_extensions import Self

_ENDLESS = 2**31 - 1  # positions of a sequence that a cache may still extend
# Modules under capture, by id, with the index of their layer. The hooks and the wrapped attention below are the same
# functions for every capture and read this when they run, so that code compiled in one capture works in the next.
_ACTIVE: dict[int, tuple[AttentionCapture, int]] = {}
_PATCHES: Counter[int] = Counter()  # captures that use a patched AttentionInterface, by its id
_LOCK = threading.Lock()


class _StopForward(BaseException):
    """End of a forward pass after the last captured layer. Not an Exception: no handler of the model must see it."""

    def __init__(self, capture: AttentionCapture) -> None:
        self.capture = capture


@dataclass
class _Position:
    """Where in the sequence the queries and the keys of a layer's call are."""

    query: int = 0  # of the first query
    key: int = 0  # of the first key
    cached: bool = False  # a cache holds the keys, so that later calls may follow
    keys: int | None = None  # their number by that cache
    shared: bool = False  # the keys are those of an earlier layer
    attended: bool = False  # the attention of this call has run


class AttentionCapture:
    """Context manager that captures the mean attention of query rows to key columns while the decoder runs.

    maps[b, o, i] = mean over the captured layers and heads and over columns c of object o of the attention probability
    p_h(row rows[0] + i → c), as (B, O, H, W) with a grid and (B, O, rows) without one, fp32 (float64 for a float64
    decoder). These are the probabilities that `output_attentions=True` returns under eager attention, before dropout.
    `layer_maps` has the maps of each layer. The maps carry no gradient.

    The forward pass is unchanged, bit for bit, with the attention that the model runs (sdpa, eager, flash, flex or
    registered ones), and with any mask, window, chunk, soft cap, sink or position bias. Plain causal sdpa and flash
    attention costs least: `attention_columns` computes the probabilities with the log-sum-exp of the attention that
    ran. Eager attention returns its weights. Other attention runs a second time, on values that mark the columns. With
    an attention mask a pass synchronizes the GPU once for each mask, to inspect it. Without one it does not
    synchronize, provided that columns and rows are on the CPU.

        with AttentionCapture(model, columns=columns, rows=(start, count)) as capture:
            model(input_ids=ids, attention_mask=mask)
        capture.maps

    One capture takes one sequence: in one forward pass, or with a cache in consecutive passes, such as the steps of
    `generate()`. `generate` does not run its last token: capture it by `replay`. With gradient checkpointing, leave the
    context before the backward pass. A decoder under torch.compile is recompiled for the context with a graph break at
    each attention; with fullgraph=True torch raises an error.

    Args:
        model: an adapter, or a transformers model (also inside of peft's, torch.compile's and other wrappers).
        columns: (B, O, C) integers, the key positions of each object's tokens; −1 = none. An object with no column gets
            a map of zeros. Nested lists may be ragged.
        rows: (start, count): the positions of the rows, for example of image tokens; ints or (B,) tensors.
        layers: indices into the tuple that `output_attentions` returns (negative from the end): for most decoders the
            decoder layers. Default: all but the first and last `skip` where there are more than 2 · `skip`, else all.
        skip: 5 as in the official code.
        heads: indices of the heads to average over in these layers (negative from the end); default: all.
        grid: (H, W) with H · W = count; default: the adapter's. Without one the maps are (B, O, rows).
        stop_early: end the forward pass after the last captured layer. The forward call must then be the last statement
            of the context, because it does not return.
        attentions: of an encoder-decoder, the output to capture: "decoder_attentions", "cross_attentions" (columns are
            positions of the encoder) or "encoder_attentions".

    Raises:
        OspoError: layers or heads out of range; a grid that does not fit; a model whose attention cannot be read, such
            as differential attention; an unknown attention implementation; a decoder that is already being captured; a
            second sequence; maps that are read before all rows ran.
        OpError: columns or rows outside the sequence.

    """

    per_head = False  # of a subclass: every head is a sequence of its own

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
        attentions: str | None = None,
    ) -> None:
        self._attention = find_attention(model, attentions)
        self._model = model
        self._columns = columns if isinstance(columns, Tensor) else pad_columns(columns)
        self._rows = rows
        self._stop_early = stop_early
        count = len(self._attention.layers)
        if layers is None:
            layers = range(skip, count - skip) if count > 2 * skip else range(count)
        self.layers = _resolve_indices("layers", layers, count)
        self._heads = None
        if heads is not None:
            self._heads = _resolve_indices("heads", heads, _number_of_heads(self._attention.owner))
        self._grid = _resolve_grid(model, grid, rows)
        self._handles: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self._positions: dict[int, _Position] = {}  # of the calls that run
        self._cached_keys: dict[tuple[int, ...], _Position] = {}  # by address and shape, of this pass
        self._ends: dict[int, int] = {}  # of each layer: the position behind the queries that ran
        self._key_end = 0
        self._request: ColumnRequest | None = None  # on the CPU
        self._requests: dict[torch.device, ColumnRequest] = {}
        self._plain: dict[torch.device, PlainRequests] = {}
        self._maps: Tensor | None = None  # (layers, B, O, rows)

    @property
    def maps(self) -> Tensor:
        """(B, O, H, W) or (B, O, rows): the mean of `layer_maps`. Raises OspoError before all rows ran."""
        return self.layer_maps.mean(0)

    @property
    def layer_maps(self) -> Tensor:
        """(layers, B, O, H, W) or (layers, B, O, rows), in the order of `layers`. Raises OspoError as `maps`."""
        return self._with_grid(self._captured())

    def _with_grid(self, maps: Tensor) -> Tensor:
        return maps if self._grid is None else maps.view(*maps.shape[:-1], *self._grid)

    def _captured(self) -> Tensor:
        """(layers, B, O, rows)."""
        seen = [layer for layer in self.layers if layer in self._ends]
        if self._maps is None or self._request is None or len(seen) < len(self.layers):
            raise OspoError(
                f"capture: {len(seen)} of {len(self.layers)} layers were seen; run the decoder once inside the "
                "`with` block before reading maps"
            )
        end, ran = self._last_row(), min(self._ends.values())
        if ran < end:
            raise OspoError(
                f"capture: rows end at position {end}, but {ran} positions ran; run the others too, or ask for fewer "
                "rows (generate() does not run its last token: use capture.replay(sequence))"
            )
        if self._request.columns.numel() and int(self._request.columns.max()) >= self._key_end:
            raise OpError(
                f"capture: columns are up to {int(self._request.columns.max())}, expected at most {self._key_end - 1}, "
                "the last position that ran"
            )
        return self._maps

    def replay(self, sequence: Tensor, **arguments: Any) -> Tensor:
        """Run a forward pass over a whole sequence, for example what `generate()` returned, and return its `maps`.

        Args:
            sequence: (B, S) token ids, or (B, S, D) embeddings. Of an encoder-decoder, those of the decoder.
            arguments: of the forward call, such as attention_mask. As in `generate`, position_ids follow from a
                mask (B, S) unless they are given.

        Raises:
            OspoError, OpError: as the capture of a forward pass.

        """
        owner = self._attention.owner
        name = "inputs_embeds" if sequence.is_floating_point() else "input_ids"
        forward = owner
        if getattr(owner.config, "is_encoder_decoder", False):
            forward, name = _whole_model(self._model), f"decoder_{name}"
        mask = arguments.get("attention_mask")
        takes = functools.partial(_takes, forward)
        if name in ("input_ids", "inputs_embeds") and mask is not None and mask.dim() == 2 and takes("position_ids"):
            arguments.setdefault("position_ids", (mask.long().cumsum(-1) - 1).clamp(min=0))
        if takes("use_cache"):
            arguments.setdefault("use_cache", False)
        with torch.no_grad(), self:
            forward(**{name: sequence}, **arguments)
        return self.maps

    def __enter__(self) -> Self:
        check_readable(self._attention)
        modules = {id(part): index for index, part in self._parts()}
        with _LOCK:
            if any(part in _ACTIVE for part in modules):
                raise OspoError("capture: this decoder is being captured already; leave that `with` block first")
            self._reset()
            _ACTIVE.update({part: (self, index) for part, index in modules.items()})
            for registry in self._registries():
                _PATCHES[id(registry)] += 1
                registry.get_interface = MethodType(_get_interface, registry)
        for layer in self._attention.layers:
            self._handles.append(layer.module.register_forward_pre_hook(_before, with_kwargs=True))
            self._handles.append(layer.module.register_forward_hook(_after))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        while self._handles:
            self._handles.pop().remove()
        with _LOCK:
            for _, part in self._parts():
                _ACTIVE.pop(id(part), None)
            for registry in self._registries():
                _PATCHES[id(registry)] -= 1
                if not _PATCHES[id(registry)]:
                    del _PATCHES[id(registry)], registry.get_interface
        self._positions.clear()
        self._requests, self._plain = {}, {}  # they hold masks
        return isinstance(error, _StopForward) and error.capture is self

    def _parts(self) -> list[tuple[int, Any]]:
        """Every module of a layer that is looked up in `_ACTIVE`, with the index of the layer."""
        layers = enumerate(self._attention.layers)
        return [(index, part) for index, layer in layers for part in {layer.module, *layer.callers}]

    def _registries(self) -> list[Any]:
        return list({id(r): r for layer in self._attention.layers for r in layer.registries}.values())

    def _begin(self, index: int, values: Sequence[Any]) -> None:
        """Note where the call of a layer is, from the arguments of its module."""
        layer = self._attention.layers[index]
        position = _find_position(layer.callers[0] if layer.callers else layer.module, index, values, self._is_cross)
        if index == 0:
            self._cached_keys.clear()
        self._positions[index] = position

    def _run(self, index: int, call: AttentionCall) -> Any:
        """Run the attention of a layer, and capture it if the layer is captured."""
        position = self._positions.get(index)
        name = type(call.module).__name__
        if position is None or position.attended:
            times = "outside of its forward" if position is None else "more than once"
            raise OspoError(f"capture: {name} runs its attention {times}, expected once in each layer")
        position.attended = True
        if position.cached:
            position = self._follow_shared_keys(position, call)
        (B, H, Q, _), K = call.query.shape, call.key.shape[2]
        if not self._starts(index, position, B, Q, K, call.query):
            return call.run()
        check_options(call)
        plain = self._plain_requests(position, Q, K, call.query.device)
        found = None if plain is None else plain.get(call)
        if found is not None:
            with LseRecorder() as recorder:
                result = call.run()
            self._read_plain(index, call, *found, recorder)
        else:
            result = call.run()
            weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
            columns = self._request_on(call.query.device).columns
            if _are_weights(weights, (B, H, Q)) and not call.dropout:
                sums = from_weights(self._take_heads(weights), columns, position.key)
            else:
                sums = self._take_heads(from_indicators(call, columns, position.key))
            self._write(index, sums, position)
        self._stop_if_done()
        return result

    def _follow_shared_keys(self, position: _Position, call: AttentionCall) -> _Position:
        """Return the position of a call. A layer may take its keys from an earlier layer, whose cache holds them."""
        key = (call.key.data_ptr(), *call.key.shape)
        if key not in self._cached_keys and position.shared:
            raise OspoError(
                f"capture: {type(call.module).__name__} takes its keys from a layer that was not found; exclude it by "
                "layers=, or run whole sequences with use_cache=False"
            )
        return self._cached_keys.setdefault(key, position)

    def _end(self, index: int, output: Any) -> None:
        """Capture the weights that a layer returned, if its attention did not go through the AttentionInterface."""
        position = self._positions.pop(index, None)
        if position is None or position.attended:
            return
        layer = self._attention.layers[index]
        found = isinstance(output, (tuple, list)) and len(output) > layer.index
        weights = output[layer.index] if found else None
        if not _are_weights(weights, ()):
            if index not in self.layers:
                return
            raise OspoError(
                f"capture: {type(layer.module).__name__} computes its attention itself, not through transformers' "
                "AttentionInterface, and returned no weights; call the model with output_attentions=True"
            )
        B, _, Q, K = weights.shape
        if self._starts(index, position, B, Q, K, weights):
            columns = self._request_on(weights.device).columns
            self._write(index, from_weights(self._take_heads(weights), columns, position.key), position)
            self._stop_if_done()

    def _starts(self, index: int, position: _Position, batch: int, Q: int, K: int, like: Tensor) -> bool:
        """Check the call of a layer, and return whether it has rows to capture."""
        if index not in self.layers:
            return False
        if position.query < self._ends.get(index, 0):
            raise OspoError(
                "capture: a second forward pass reached the decoder; one capture takes one sequence, with a cache if "
                "in several passes"
            )
        if position.keys is not None and position.keys != K:
            raise OspoError(f"capture: the cache returned {K} keys, its own size is {position.keys}; use another cache")
        if not position.cached and Q != K and not self._is_cross:
            raise OspoError(
                f"capture: the decoder was called with {Q} queries for {K} keys and no cache of transformers; run "
                "whole sequences with use_cache=False"
            )
        if self._request is None or self._maps is None:
            request = self._request = self._build_request(batch, position, Q, K)
            heads = 1
            if self.per_head:
                heads = like.shape[1] if self._heads is None else len(self._heads)
            shape = (len(self.layers), batch * heads, request.columns.shape[1], request.length)
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            self._maps = torch.zeros(shape, dtype=dtype, device=like.device)
        if len(self._request.columns) != batch:
            raise OpError(f"capture: the decoder ran {len(self._request.columns)} sequences, then {batch}")
        begin, end = position.query, position.query + Q
        self._ends[index] = end
        self._key_end = max(self._key_end, position.key + K)
        if self._request.length == 0 or begin >= self._last_row() or end <= int(self._request.row_start.min()):
            self._stop_if_done()
            return False
        return True

    def _build_request(self, batch: int, position: _Position, Q: int, K: int) -> ColumnRequest:
        if self._columns.dim() == 3 and self._columns.shape[0] != batch:
            raise OpError(f"capture: columns has {self._columns.shape[0]} sequences, the decoder runs {batch}")
        positions = _ENDLESS if position.cached else max(Q, K)
        try:
            request = ColumnRequest.from_args(self._columns, batch, positions, rows=self._rows)
        except OpError as error:
            if position.cached:
                raise
            raise OpError(f"capture: {error}; the pass has no cache, so no other one follows") from error
        if self._is_cross and not position.cached and int((request.row_start + request.row_count).max()) > Q:
            raise OpError(f"capture: rows {self._rows} are beyond the {Q} positions of the decoder")
        if self._is_cross and request.columns.numel() and int(request.columns.max()) >= K:
            raise OpError(f"capture: columns are up to {int(request.columns.max())}, the encoder has {K} positions")
        return request

    def _plain_requests(self, position: _Position, Q: int, K: int, device: torch.device) -> PlainRequests | None:
        """The requests for attention over one whole sequence; None for any other call."""
        request = self._request
        assert request is not None
        whole = Q == K and position.query == position.key == 0 and not self._is_cross
        columns = int(request.columns.max()) if request.columns.numel() else 0
        if not whole or self._last_row() > Q or columns >= K:
            return None
        if device not in self._plain:
            heads = 1
            if self.per_head and self._maps is not None:
                heads = self._maps.shape[1] // len(request.columns)
            self._plain[device] = PlainRequests(replace(request, positions=Q), device, heads)
        return self._plain[device]

    def _read_plain(
        self, index: int, call: AttentionCall, request: ColumnRequest, causal: bool, recorder: LseRecorder
    ) -> None:
        assert self._maps is not None
        dtype = recorder.dtype or call.query.dtype  # autocast may have narrowed what the attention got
        q, k, lse = self._select_heads(call.query.detach().to(dtype), call.key.detach().to(dtype), recorder)
        maps = self._maps[self.layers.index(index)]
        options: dict[str, Any] = {"scale": call.options.get("scaling"), "lse": lse, "causal": causal}
        if maps.device == q.device:
            request.run(q, k, out=maps, **options)
        else:  # a model that is split over devices
            maps.copy_(request.run(q, k, **options))

    def _select_heads(self, q: Tensor, k: Tensor, recorder: LseRecorder) -> tuple[Tensor, Tensor, Tensor | None]:
        """The captured heads: q and k (B, heads, S, D), lse (B, heads, S); each head a sequence with `per_head`."""
        lse = recorder.lse_of(q)
        if self._heads is not None or self.per_head:
            heads = range(q.shape[1]) if self._heads is None else self._heads
            group = q.shape[1] // k.shape[1]
            k = _take_heads(k, [head // group for head in heads])
        q, lse = self._take_heads(q), None if lse is None else self._take_heads(lse)
        if self.per_head:  # views where B is 1
            q, k = q.flatten(0, 1)[:, None], k.flatten(0, 1)[:, None]
            lse = None if lse is None else lse.flatten(0, 1)[:, None]
        return q, k, lse

    def _take_heads(self, x: Tensor) -> Tensor:
        if self._heads is None:
            return x
        if self._heads[-1] >= x.shape[1]:
            raise OspoError(f"capture: heads is {list(self._heads)}, expected indices from 0 to {x.shape[1] - 1}")
        return _take_heads(x, self._heads)

    def _write(self, index: int, sums: Tensor, position: _Position) -> None:
        """Write the rows of a call that are captured, from the sums over columns (B, heads, Q, O)."""
        assert self._maps is not None
        request = self._request_on(sums.device)
        values = sums.flatten(0, 1) if self.per_head else sums.mean(1)  # (B, Q, O)
        request = repeat_request(request, len(values) // len(request.columns))
        values, inside = take_rows(values, request, position.query)
        maps = self._maps[self.layers.index(index)]
        maps.copy_(torch.where(inside[:, None].to(maps.device), values.to(maps), maps))

    def _request_on(self, device: torch.device) -> ColumnRequest:
        assert self._request is not None
        if device not in self._requests:
            self._requests[device] = self._request.to(device)
        return self._requests[device]

    def _last_row(self) -> int:
        """The position behind the last row."""
        assert self._request is not None
        ends = self._request.row_start + self._request.row_count
        return int(ends.max()) if len(ends) else 0

    def _stop_if_done(self) -> None:
        done = all(self._ends.get(layer, -1) >= self._last_row() for layer in self.layers)
        if self._stop_early and done:
            raise _StopForward(self)

    @property
    def _is_cross(self) -> bool:
        return self._attention.is_cross


def _get_interface(registry: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `get_interface` of an AttentionInterface during captures.

    The model asks for its attention as always: its configuration and masks stay the same, each module file gives its
    own eager function, and modules that are not captured only run what they got.
    """
    function = type(registry).get_interface(registry, name, default)
    return functools.partial(_attend, function)


@torch.compiler.disable
def _attend(function: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    active = _ACTIVE.get(id(module))
    if active is None:
        return function(module, *args, **kwargs)
    capture, index = active
    return capture._run(index, AttentionCall.from_args(function, module, args, kwargs))


@torch.compiler.disable
def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    active = _ACTIVE.get(id(module))
    if active is not None:
        capture, index = active
        capture._begin(index, [*args, *kwargs.values()])


@torch.compiler.disable
def _after(module: Any, args: tuple[Any, ...], output: Any) -> None:
    active = _ACTIVE.get(id(module))
    if active is not None:
        capture, index = active
        capture._end(index, output)


def _find_position(module: Any, index: int, values: Sequence[Any], is_cross: bool) -> _Position:
    """Where the call of an attention layer is, from the cache among the arguments of its module."""
    from transformers.cache_utils import Cache, EncoderDecoderCache

    cache = next((value for value in values if isinstance(value, Cache)), None)
    hidden = next((v for v in values if isinstance(v, Tensor) and v.dim() == 3 and v.is_floating_point()), None)
    if cache is None or hidden is None:
        return _Position()
    length = hidden.shape[1]
    layer = getattr(module, "layer_idx", None)
    layer = index if layer is None else int(layer)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if is_cross:  # behind the layer's self-attention, which has stored its keys
        return _Position(query=max(0, int(cache.get_seq_length(layer)) - length), cached=True)
    try:
        keys, offset = cache.get_mask_sizes(length, layer)
    except ValueError:  # transformers keeps no keys of layers that share those of another one
        return _Position(cached=True, shared=True)
    return _Position(int(cache.get_seq_length(layer)), int(offset), cached=True, keys=int(keys))


def _are_weights(value: Any, shape: tuple[int, ...]) -> TypeGuard[Tensor]:
    """Whether an output is attention weights (B, H, Q, K)."""
    return isinstance(value, Tensor) and value.dim() == 4 and tuple(value.shape[: len(shape)]) == shape


def _whole_model(model: Any) -> Any:
    from transformers import PreTrainedModel

    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _takes(module: Any, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _number_of_heads(owner: Any) -> int:
    count = getattr(owner.config, "num_attention_heads", None)
    return _ENDLESS if count is None else int(count)  # checked when a layer runs


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


def _resolve_grid(model: Any, grid: tuple[int, int] | None, rows: Bounds) -> tuple[int, int] | None:
    count = int(rows[1].max()) if isinstance(rows[1], Tensor) else int(rows[1])
    if grid is None:
        grid = getattr(model, "grid", None)
    if grid is not None and grid[0] * grid[1] != count:
        raise OspoError(
            f"capture: rows holds {count} positions, the grid {grid[0]} by {grid[1]}; give the grid= that fits"
        )
    return grid


def pad_columns(columns: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Ragged nested lists → (B, O, C), padded with −1."""
    objects = max((len(item) for item in columns), default=0)
    width = max((len(tokens) for item in columns for tokens in item), default=0)
    table = torch.full((len(columns), objects, width), -1, dtype=torch.long)
    for b, item in enumerate(columns):
        for o, tokens in enumerate(item):
            table[b, o, : len(tokens)] = torch.tensor(list(tokens), dtype=torch.long)
    return table

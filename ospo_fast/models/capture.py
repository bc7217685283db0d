"""Attention maps from a forward pass that runs anyway, with the model's own attention implementation."""

from __future__ import annotations

import functools
import inspect
import operator
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from ospo_fast.errors import OpError, OspoError
from ospo_fast.models._attention_modules import Layer, check_readable, find_attention, whole_model
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
from ospo_fast.models.base import default_layers
from ospo_fast.models.layout import ImageLayout
from ospo_fast.ops.attention_columns import Bounds, ColumnRequest

if TYPE_CHECKING:
    from typing_extensions import Self

# Methods of a cache that change which sequence is where, as beam search does.
_REORDERINGS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")
_ENDLESS = 2**31 - 1  # positions of a sequence that a cache may still extend
# Modules under capture, by id, with the index of their layer. The hooks and the wrapped attention below are the same
# functions for every capture and read this when they run, so that code compiled in one capture works in the next.
_ACTIVE: dict[int, tuple[AttentionCapture, int]] = {}
_OWNERS: dict[int, list[AttentionCapture]] = {}  # of the transformers models that they belong to
_PATCHES: Counter[int] = Counter()  # captures that use a patched AttentionInterface, by its id
_LOCK = threading.Lock()


class _StopForward(BaseException):
    """End of a forward pass after the last captured layer. Not an Exception: no handler of the model must see it."""

    def __init__(self, capture: AttentionCapture) -> None:
        self.capture = capture


@dataclass
class _Position:
    """Where in the sequence the queries and the keys of a layer are in a pass."""

    query: int = 0  # of the first query
    key: int = 0  # of the first key
    keys: int | None = None  # their number with the cache that the pass got
    shared: bool = False  # that cache holds no keys for this layer: they are those of another one


class AttentionCapture:
    """Context manager that captures the mean attention of query rows to key columns while the decoder runs.

    maps[b, o, i] = mean over the captured layers and heads and over columns c of object o of the attention probability
    p_h(row rows[0] + i → c), as (B, O, H, W) with a grid and (B, O, rows) without one, fp32 (float64 for a float64
    decoder). These are the probabilities that `output_attentions=True` returns under eager attention, before dropout
    (after it where a module computes its attention itself). Rows that are padding have those of the attention that ran.
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
    each attention; with fullgraph=True torch raises an error, so generate() with a static cache needs
    disable_compile=True on a GPU.

    Args:
        model: an adapter, or a transformers model (also inside of peft's, torch.compile's and other wrappers).
        columns: (B, O, C) integers, the key positions of each object's tokens; −1 = none. An object with no column gets
            a map of zeros. Nested lists may be ragged.
        rows: (start, count): the positions of the rows, for example of image tokens; ints or (B,) tensors.
        layers: indices into the tuple that `output_attentions` returns (negative from the end): for most decoders the
            decoder layers. Default: all but the first and last `skip` where there are more than 2 · `skip`, else all.
        skip: a number of layers at each end, or the indices of the layers that the default leaves out, those that the
            decoder has. The official code leaves out the indices 0 to 4 and 25 to 29, 5 at each end of 30 layers.
        heads: indices of the heads to average over in these layers (negative from the end); default: all.
        grid: (H, W) with H · W = count; default: the adapter's, of whose image tokens the maps have the codes alone.
            Without one the maps are (B, O, rows).
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
        skip: int | Sequence[int] = 5,
        heads: Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
        stop_early: bool = False,
        attentions: str | None = None,
    ) -> None:
        self._attention = find_attention(model, attentions)
        self._model = model
        every = self._attention.layers
        # Every module of a layer that is looked up in `_ACTIVE`, and the AttentionInterface objects that they ask.
        self._parts = [(part, index) for index, layer in enumerate(every) for part in {layer.module, *layer.callers}]
        self._registries = list({id(r): r for layer in every for r in layer.registries}.values())
        self._columns = columns if isinstance(columns, Tensor) else pad_columns(columns)
        self._rows = rows
        self._stop_early = stop_early
        count = len(every)
        if layers is None:
            layers = default_layers(skip, count)
        self.layers = _resolve_indices("layers", layers, count)
        self._heads = None
        if heads is not None:
            self._heads = _resolve_indices("heads", heads, self._attention.heads or _ENDLESS)  # checked in each layer
        self._grid, self.cells = _resolve_grid(model, grid, rows)
        self._handles: list[Any] = []
        self._thread = 0
        self._reset()

    def _reset(self) -> None:
        # Of the pass that runs: where its layers are, if it got a cache; those that ran; those that stored keys, by the
        # address and shape of the keys.
        self._positions: dict[int, _Position] = {}
        self._attended: set[int] = set()
        self._stored: dict[tuple[int, ...], _Position] = {}
        self._cache: Any = None  # that the passes share
        self._is_last = False  # it fills no cache, so that no other pass can follow
        self._ends: dict[int, int] = {}  # of each layer: the position behind the queries that ran
        self._key_end = 0
        self._first_row = self._last_row = 0  # the first position of a row, and the one behind the last row
        self._last_column = -1
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
        if self._grid is None:
            return maps
        if self.cells is not None:
            maps = maps[..., self.cells]
        return maps.view(*maps.shape[:-1], *self._grid)

    def _captured(self) -> Tensor:
        """(layers, B, O, rows)."""
        seen = [layer for layer in self.layers if layer in self._ends]
        if self._maps is None or self._request is None or len(seen) < len(self.layers):
            raise OspoError(
                f"capture: {len(seen)} of {len(self.layers)} layers were seen; run the decoder once inside the "
                "`with` block, in its thread, before reading maps (if it is compiled, without torch.compile)"
            )
        ran = min(self._ends.values())
        if ran < self._last_row:
            raise OspoError(
                f"capture: rows end at position {self._last_row}, but {ran} positions ran; run the others too, or ask "
                "for fewer rows (generate() does not run its last token: use capture.replay(sequence))"
            )
        if self._last_column >= self._key_end:
            raise OpError(
                f"capture: columns are up to {self._last_column}, expected at most {self._key_end - 1}, "
                "the last position that ran"
            )
        return self._maps

    def replay(self, sequence: Tensor, **arguments: Any) -> Tensor:
        """Run a forward pass over a whole sequence, for example what `generate()` returned, and return its `maps`.

        Args:
            sequence: (B, S) token ids, or (B, S, D) embeddings. Of an encoder-decoder, those of the decoder.
            arguments: of the forward call of the model, such as attention_mask. As in `generate`, position_ids follow
                from a mask (B, S) if it is the only argument.

        Raises:
            OspoError, OpError: as the capture of a forward pass.

        """
        name = "inputs_embeds" if sequence.is_floating_point() else "input_ids"
        # An adapter's decoder, else the model as it was given: it passes images on, and adapters may add tokens.
        forward = self._model if isinstance(self._model, nn.Module) else self._attention.owner
        whole = whole_model(forward)
        if getattr(whole.config, "is_encoder_decoder", False):
            name = f"decoder_{name}"
        mask, parameters = arguments.get("attention_mask"), inspect.signature(whole.forward).parameters
        generates = whole.can_generate() and "position_ids" in parameters and name in ("input_ids", "inputs_embeds")
        if generates and mask is not None and mask.dim() == 2 and len(arguments) == 1 and not bool(mask.all()):
            arguments["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        for option, value in (("use_cache", False), ("logits_to_keep", 1)):
            if option in parameters:
                arguments.setdefault(option, value)
        with torch.no_grad(), self:
            forward(**{name: sequence}, **arguments)
        return self.maps

    def __enter__(self) -> Self:
        from ospo_fast.models import _capture_hooks as hooks  # not above, because it imports torch._dynamo

        check_readable(self._attention)
        with _LOCK:
            if any(id(part) in _ACTIVE for part, _ in self._parts):
                raise OspoError("capture: this decoder is being captured already; leave that `with` block first")
            self._reset()
            self._thread = threading.get_ident()
            _ACTIVE.update({id(part): (self, index) for part, index in self._parts})
            _OWNERS.setdefault(id(self._attention.owner), []).append(self)
            for registry in self._registries:
                _PATCHES[id(registry)] += 1
                registry.get_interface = MethodType(hooks.get_interface, registry)
        self._handles.append(self._attention.owner.register_forward_pre_hook(hooks.before_pass, with_kwargs=True))
        for layer in self._attention.layers:
            if not layer.callers:
                self._handles.append(layer.module.register_forward_hook(hooks.after_layer))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        while self._handles:
            self._handles.pop().remove()
        with _LOCK:
            for part, _ in self._parts:
                _ACTIVE.pop(id(part), None)
            _OWNERS[id(self._attention.owner)].remove(self)
            if not _OWNERS[id(self._attention.owner)]:
                del _OWNERS[id(self._attention.owner)]
            for registry in self._registries:
                _PATCHES[id(registry)] -= 1
                if not _PATCHES[id(registry)]:
                    del _PATCHES[id(registry)], registry.get_interface
        self._requests, self._plain = {}, {}  # they hold masks
        for name in _REORDERINGS if self._cache is not None else ():
            vars(self._cache).pop(name, None)
        self._cache = None
        return isinstance(error, _StopForward) and error.capture is self

    def _begin_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note where the layers are in the sequence, from the arguments of the decoder."""
        from transformers.cache_utils import Cache

        self._attended.clear()
        self._stored.clear()
        self._positions.clear()
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        self._is_last = cache is None and kwargs.get("use_cache") is False
        if cache is not None:
            if self._cache is not None and cache is not self._cache:
                raise OspoError("capture: a pass got another cache than the one before; one capture takes one sequence")
            self._guard(cache)
            if args:
                kwargs = inspect.signature(self._attention.owner.forward).bind_partial(*args, **kwargs).arguments
            embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
            tokens = embeds if embeds is not None else ids
            if not isinstance(tokens, Tensor):
                raise OspoError("capture: the decoder got a cache without input_ids or inputs_embeds; pass one of them")
            for index, layer in enumerate(self._attention.layers):
                self._positions[index] = _find_position(layer, index, cache, tokens.shape[1], self._is_cross)

    def _guard(self, cache: Any) -> None:
        """Let the cache refuse to change the order of its sequences until the end of the context."""
        if self._cache is None:
            self._cache = cache
            for name in _REORDERINGS:
                setattr(cache, name, functools.partial(_refuse_reordering, name))

    def _run(self, index: int, call: AttentionCall) -> Any:
        """Run the attention of a layer, and capture it if the layer is captured."""
        position = self._positions.get(index) or _Position()
        if self._positions:
            position = self._follow_shared_keys(position, call)
        (B, H, Q, _), K = call.query.shape, call.key.shape[2]
        if index not in self.layers or not self._starts(index, position, B, Q, K, call.query):
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
            if _are_weights(weights, (B, H, Q, K)) and not call.dropout:
                sums = from_weights(self._take_heads(weights), columns, position.key)
            else:
                sums = self._take_heads(from_indicators(call, columns, position.key))
            self._write(index, sums, position)
        self._stop_if_done()
        return result

    def _follow_shared_keys(self, position: _Position, call: AttentionCall) -> _Position:
        """Return the position of a call. A layer may take its keys from an earlier layer, whose cache holds them."""
        key = (call.key.data_ptr(), *call.key.shape)
        if key not in self._stored and position.shared:
            raise OspoError(
                f"capture: {type(call.module).__name__} takes its keys from a layer that was not found; exclude it by "
                "layers=, or run whole sequences with use_cache=False"
            )
        return self._stored.setdefault(key, position)

    def _read_output(self, index: int, output: Any) -> None:
        """Capture the weights that a layer returned, if its attention does not go through the AttentionInterface."""
        layer, position = self._attention.layers[index], self._positions.get(index) or _Position()
        if index not in self.layers:
            return
        found = isinstance(output, (tuple, list)) and len(output) > layer.index
        weights = output[layer.index] if found else None
        if not _are_weights(weights, ()):
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
        """Check the call of a captured layer, and return whether it has rows to capture."""
        if index in self._attended:
            name = type(self._attention.layers[index].module).__name__
            raise OspoError(f"capture: {name} runs its attention more than once in a pass, expected once")
        self._attended.add(index)
        if position.query < self._ends.get(index, 0):
            raise OspoError(
                "capture: a second forward pass reached the decoder; one capture takes one sequence, with a cache if "
                "in several passes"
            )
        if position.keys is not None and position.keys != K:
            raise OspoError(f"capture: the cache returned {K} keys, its own size is {position.keys}; use another cache")
        if not self._positions and Q != K and not self._is_cross:
            raise OspoError(
                f"capture: the decoder was called with {Q} queries for {K} keys and no cache of transformers; run "
                "whole sequences with use_cache=False"
            )
        if self._request is None or self._maps is None:
            request = self._request = self._build_request(batch, Q, K)
            self._last_row = int((request.row_start + request.row_count).max()) if batch else 0
            self._last_column = int(request.columns.max()) if request.columns.numel() else -1
            self._first_row = int(request.row_start.min()) if batch else 0
            heads = len(self._heads or range(like.shape[1])) if self.per_head else 1
            shape = (len(self.layers), batch * heads, request.columns.shape[1], request.length)
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            self._maps = torch.zeros(shape, dtype=dtype, device=like.device)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and like.shape[1] != (self._attention.heads or like.shape[1]):
            raise OspoError(
                f"capture: a layer runs {like.shape[1]} of {self._attention.heads} heads, as with tensor parallelism, "
                "and the mean needs all of them; capture a model whose heads are not split over processes"
            )
        if len(self._request.columns) != batch:
            raise OpError(f"capture: the decoder ran {len(self._request.columns)} sequences, then {batch}")
        begin, end = position.query, position.query + Q
        ran = max(self._ends.get(index, 0), self._first_row)
        if begin > ran and ran < self._last_row:
            raise OspoError(
                f"capture: rows from position {ran} to {min(begin, self._last_row) - 1} are in the cache already, and "
                "their attention did not run; capture the pass that runs them too, or use capture.replay(sequence)"
            )
        self._ends[index] = end
        self._key_end = max(self._key_end, K if self._is_cross else end)
        if self._request.length == 0 or begin >= self._last_row or end <= self._first_row:
            self._stop_if_done()
            return False
        return True

    def _build_request(self, batch: int, Q: int, K: int) -> ColumnRequest:
        if self._columns.dim() == 3 and self._columns.shape[0] != batch:
            raise OpError(f"capture: columns has {self._columns.shape[0]} sequences, the decoder runs {batch}")
        if not self._is_last:
            return ColumnRequest.from_args(self._columns, batch, _ENDLESS, rows=self._rows)
        request = ColumnRequest.from_args(self._columns, batch, max(Q, K), rows=self._rows)
        if self._is_cross and int((request.row_start + request.row_count).max()) > Q:
            raise OpError(f"capture: rows {self._rows} are beyond the {Q} positions of the decoder")
        if self._is_cross and request.columns.numel() and int(request.columns.max()) >= K:
            raise OpError(f"capture: columns are up to {int(request.columns.max())}, the encoder has {K} positions")
        return request

    def _plain_requests(self, position: _Position, Q: int, K: int, device: torch.device) -> PlainRequests | None:
        """The requests for attention over one whole sequence; None for any other call."""
        request = self._request
        assert request is not None
        assert self._maps is not None
        whole = Q == K and position.query == position.key == 0 and not self._is_cross
        if not whole or self._last_row > Q or self._last_column >= K:
            return None
        if device not in self._plain:
            heads = self._maps.shape[1] // max(1, len(request.columns))
            request = replace(request, positions=Q, key_end=request.key_end.clamp(max=Q))
            self._plain[device] = PlainRequests(request, device, heads)
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
        count = self._attention.heads or x.shape[1]
        if x.shape[1] != count or self._heads[-1] >= x.shape[1]:
            raise OspoError(
                f"capture: heads is {list(self._heads)} of {count} by the configuration, a layer has "
                f"{x.shape[1]}; exclude it by layers=, or leave out heads="
            )
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

    def _stop_if_done(self) -> None:
        if self._stop_early and all(self._ends.get(layer, -1) >= self._last_row for layer in self.layers):
            raise _StopForward(self)

    @property
    def _is_cross(self) -> bool:
        return self._attention.is_cross


def _refuse_reordering(name: str, *_: Any, **__: Any) -> None:
    raise OspoError(f"capture: the cache was asked to change its sequences ({name}), as beams do; use num_beams=1")


def _find_position(layer: Layer, index: int, cache: Any, length: int, is_cross: bool) -> _Position:
    """Where a layer is in the pass that begins, with a cache of transformers."""
    from transformers.cache_utils import EncoderDecoderCache

    module = layer.callers[0] if layer.callers else layer.module
    number = getattr(module, "layer_idx", None)
    number = index if number is None else int(number)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if is_cross:
        return _Position(int(cache.get_seq_length(number)))
    try:
        keys, start = cache.get_mask_sizes(length, number)
    except ValueError:  # transformers keeps no keys of layers that share those of another one
        return _Position(shared=True)
    return _Position(int(cache.get_seq_length(number)), int(start), int(keys))


def _are_weights(value: Any, shape: tuple[int, ...]) -> TypeGuard[Tensor]:
    """Whether an output is attention weights (B, H, Q, K)."""
    return isinstance(value, Tensor) and value.dim() == 4 and tuple(value.shape[: len(shape)]) == shape


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


def _resolve_grid(
    model: Any, grid: tuple[int, int] | None, rows: Bounds
) -> tuple[tuple[int, int] | None, list[int] | None]:
    """Return the grid, and which rows are its cells; None: all of them, in order."""
    count = int(rows[1].max()) if isinstance(rows[1], Tensor) else int(rows[1])
    layout: ImageLayout | None = getattr(model, "layout", None)
    if grid is None and layout is not None and layout.tokens == count:
        cells = list(layout.grid_positions)
        return layout.grid, None if len(cells) == count else cells
    if grid is None and layout is not None and layout.tokens != layout.grid[0] * layout.grid[1]:
        raise OspoError(
            f"capture: rows holds {count} positions, expected the {layout.tokens} tokens of an image, of which the "
            "maps have the codes; or give grid="
        )
    if grid is None:
        grid = getattr(model, "grid", None)
    if grid is not None and grid[0] * grid[1] != count:
        raise OspoError(
            f"capture: rows holds {count} positions, the grid {grid[0]} by {grid[1]}; give the grid= that fits"
        )
    return grid, None


def pad_columns(columns: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Ragged nested lists → (B, O, C), padded with −1. Raises OpError for other nesting and other values."""
    try:
        objects = max((len(item) for item in columns), default=0)
        width = max((len(tokens) for item in columns for tokens in item), default=0)
        table = torch.full((len(columns), objects, width), -1, dtype=torch.long)
        for b, item in enumerate(columns):
            for o, tokens in enumerate(item):
                for c, token in enumerate(tokens):
                    table[b, o, c] = operator.index(token)
    except TypeError as error:
        raise OpError(
            f"capture: columns are {str(columns)[:60]} ({error}), expected integers in lists of three levels: of each "
            "sequence, of each object, its positions"
        ) from error
    return table

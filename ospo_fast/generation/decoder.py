"""Forward pass of a loaded decoder of Llama's kind (`models.architectures`), with a cache that is written in place.

Each row of the cache starts at position 0 and has its own length, so there is no padding, no mask and no position
bookkeeping. Plain layers are fused (`projections`): query, key and value in one product, gate and up in another.

Bitwise independence. The bits of a row must not depend on the rest of its batch. Norms, gates and attention work row
by row. Matrix products do not: BLAS libraries switch kernels with the number of rows. Therefore:

* On a CPU with vector instructions, float32 products run on packed weights (`ops.linear`), which use one kernel.
* Prompts attend by SDPA, in which a token rounds differently than in a step. `prefill(exact=True)` runs it by steps.
* Other products on a CPU run a multiple of `ROW_TILE` rows. With as many rows or more, all rows were measured to agree
  bit for bit; tests/generation/test_decoder.py checks it on each machine.
* On a GPU, and for models of which `ROW_TILE` rows do not fit, every batch is padded to the full batch size, and
  prompts run in pieces of `PREFILL` tokens.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ospo_fast.errors import OspoError
from ospo_fast.generation.projections import (
    FusedProjection,
    Kind,
    ModuleProjection,
    UnfusedProjection,
    build_projection,
)
from ospo_fast.generation.varlen import varlen_attention, varlen_runs
from ospo_fast.models.architectures import layer_norms
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.quantized import stored_bytes
from ospo_fast.oom import out_of_memory, release, short
from ospo_fast.ops.decode_attention import attends_row_by_row, decode_attention, rotate
from ospo_fast.ops.linear import PackedLinear, packed_linear_runs
from ospo_fast.ops.rms_norm import add_rms_norm
from ospo_fast.ops.silu_mul import silu_mul

logger = logging.getLogger(__name__)

ROW_TILE = 32
PREFILL = 1024
CPU_BYTES = 512 * 2**20  # limit of the caches on a CPU
COPIED_BYTES = 2 * 2**30  # on a CPU, weights beyond this size are not copied
# Attention of prompts on a GPU. The first does not split keys by the batch size; cuDNN's plans again for every length.
_PREFILL_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""attend(layer, qkv (M, (H + 2·Hkv)·D), out (M, H·D)) → (M, H·D)."""

LengthRun = tuple[slice, Tensor | slice, int]
"""Packed sequences of one length: their tokens, their rows of the cache, the length."""


class Cache:
    """Keys and values of every layer: 2 × (layers, rows, kv heads, length, head dim), contiguous, of fixed size."""

    def __init__(self, decoder: Decoder, rows: int, length: int) -> None:
        shape = (len(decoder.layers), rows, decoder.kv_heads, length, decoder.head_dim)
        self.keys = torch.empty(shape, device=decoder.device, dtype=decoder.dtype)
        self.values = torch.empty(shape, device=decoder.device, dtype=decoder.dtype)

    def copy(self, rows: Any, source: Cache, source_rows: Any, length: int) -> None:
        """Copy the first `length` positions of `source_rows` (as many, or one for all) to `rows`."""
        self.keys[:, rows, :, :length] = source.keys[:, source_rows, :, :length]
        self.values[:, rows, :, :length] = source.values[:, source_rows, :, :length]


class Buffers:
    """Intermediate results of a step of `rows` rows, allocated once: a captured step must find them where they were."""

    def __init__(self, decoder: Decoder, rows: int) -> None:
        def empty(width: int) -> Tensor:
            return torch.empty(rows, width, device=decoder.device, dtype=decoder.dtype)

        self.normed, self.delta = empty(decoder.width), empty(decoder.width)
        self.qkv = empty((decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim)
        self.attended = empty(decoder.heads * decoder.head_dim)
        self.gate_up, self.gated = empty(2 * decoder.inner), empty(decoder.inner)
        self.branch = empty(decoder.width if decoder.has_branch_norms else 0)


class Layer:
    """One decoder layer of transformers, with its matrix products of one `kind` where they are plain.

    Attributes:
        norm, mlp_norm: RMS norms before attention and MLP, of the residual stream; None: they read it as it is.
        out_norm, down_norm: RMS norms of the results of attention and MLP; None: they are added as they are.
        head_norms: norms of queries and keys, each a function of (M, H, D); None where there are none.

    """

    def __init__(self, module: Any, kind: Kind) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.norm, self.mlp_norm, self.out_norm, self.down_norm = layer_norms(module)
        self.head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        self.qkv = build_projection([attention.q_proj, attention.k_proj, attention.v_proj], kind)
        self.out = build_projection([attention.o_proj], kind)
        both = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        self.gate_up = build_projection(both, kind)
        self.down = build_projection([mlp.down_proj], kind)
        self.projections = (self.qkv, self.out, self.gate_up, self.down)


class Decoder(ABC):
    """What the engine asks of a decoder, and the sizes that it allocates buffers by.

    Attributes:
        layers: one entry per layer of the cache.
        plain: its layers run without modules of adapters, so that its steps can be captured in a CUDA graph.
        packed: its products run on packed weights, where the number of rows has no influence on their bits.
        calls_modules: its modules run as they are, and the embeddings and the head have to as well.
        exact: the bits of a token's hidden state depend on the tokens up to it alone, if prompts run with `exact`.
        has_branch_norms: the results of attention or MLP have norms of their own.

    """

    layers: Sequence[Any]
    plain = packed = calls_modules = exact = has_branch_norms = False

    def __init__(self, model: UnifiedModel) -> None:
        module: Any = model.decoder
        config = module.config
        attentions = [getattr(layer, "self_attn", None) for layer in module.layers]
        if not all(getattr(part, "is_causal", True) for part in (config, *attentions)):
            raise OspoError("model: is_causal of the decoder is False, expected causal attention; set it to True")
        self.model = model
        self.device, self.dtype = model.device, model.dtype
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.width, self.inner = int(config.hidden_size), int(config.intermediate_size)
        self.head_dim = int(getattr(config, "head_dim", None) or self.width // self.heads)

    @abstractmethod
    def refresh(self) -> None:
        """Reload the model's weights into the same buffers, so that captured graphs stay valid."""

    @abstractmethod
    def __call__(self, x: Tensor, cache: Cache, start: int) -> Tensor:
        """Run embeddings x (B, S, D) at positions start … start+S−1 of the cache's B rows → hidden states (B, S, D).

        Attention covers the first `start` positions of `cache`, and x causally. The keys and values of x are stored.
        """

    @abstractmethod
    def prefill(
        self, prompts: Sequence[Tensor], cache: Cache, cache_rows: Sequence[int], *, exact: bool = False
    ) -> Tensor:
        """Run prompts (S,) of any lengths into `cache_rows` → the last hidden state of each (N, D).

        exact: in the kernels of `step`, of a decoder that is `exact`.
        """

    @abstractmethod
    def step(
        self,
        x: Tensor,  # (M, D), overwritten
        cache: Cache,
        cache_rows: Tensor,  # (M,) int64
        lengths: Tensor,  # (M,) int64: filled positions of each cache row; −1 for a padding row
        buffers: Buffers | None = None,
        *,
        shared_slots: bool = False,
        positions: Tensor | None = None,  # (A, M) int64: rotary positions on each axis, where they are not the lengths
    ) -> Tensor:
        """Run one token per row, with embeddings x → hidden states (M, D). Its keys and values are stored.

        With `buffers` the next step overwrites the result. shared_slots: see `decode_attention`.
        """

    @abstractmethod
    def pad_rows(self, rows: int, batch_size: int, row_bytes: int) -> int:
        """Round up to the number of rows to run.

        batch_size: a full batch. row_bytes: cache of a row.
        """

    @abstractmethod
    def run_padded(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return function(x) for rows x (M, D)."""

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits over the text vocabulary (M, V) of hidden states (M, D)."""
        return self.run_padded(self.model.text_logits, hidden)

    def row_bytes(self, length: int) -> int:
        """Return the bytes of one cache row of `length` positions."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim * length * self.dtype.itemsize

    def pass_bytes(self, tokens: int) -> int:
        """Return the bytes of a pass over `tokens` tokens without the cache: embeddings, `Buffers`, attention."""
        heads = self.heads * self.head_dim
        all_heads = heads + 2 * self.kv_heads * self.head_dim
        buffers = 2 * self.width + all_heads + heads + 3 * self.inner
        return tokens * (2 * self.width + buffers + 2 * all_heads + heads) * self.dtype.itemsize


class InferenceDecoder(Decoder):
    """The decoder of `model`. Its weights are read at construction and reloaded by `refresh`."""

    def __init__(self, model: UnifiedModel) -> None:
        module: Any = model.decoder
        config = module.config
        first = module.layers[0].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling"):
            if not hasattr(first, name):
                raise OspoError(f"model: the decoder {type(module).__name__} has no {name}, expected a Llama decoder")
        if config.hidden_act != "silu":
            raise OspoError(f"model: the decoder's hidden_act is {config.hidden_act!r}, expected 'silu'")
        super().__init__(model)
        self.head_dim = int(first.head_dim)
        self._norm = module.norm
        self._scale = float(first.scaling)
        self._cos, self._sin = self._rotary_tables(module.rotary_emb)
        self._axes = self._rotary_axes(module.rotary_emb)
        # The kernel of a step rotates whole heads, at one position per row.
        self._rotates_before = self._axes is not None or self._cos.shape[1] < self.head_dim
        if self._rotates_before:
            blank = self._cos.new_ones(len(self._cos), self.head_dim)
            self._kernel_tables = blank, torch.zeros_like(blank)
        else:
            self._kernel_tables = self._cos, self._sin
        kind = self._projection_kind(module)
        self.layers: list[Layer] = []
        try:
            self.layers = [Layer(layer, kind) for layer in module.layers]
        except (RuntimeError, MemoryError) as error:
            if kind is UnfusedProjection or not out_of_memory(error):
                raise
            logger.warning(
                "no memory for fused copies of the decoder's weights (%s): reading the weights in place; "
                "results may round differently",
                short(error),
            )
        if not self.layers:  # not in the except clause: there the exception keeps the copies alive
            release()
            kind = UnfusedProjection
            self.layers = [Layer(layer, kind) for layer in module.layers]
        self.plain = not any(isinstance(p, ModuleProjection) for layer in self.layers for p in layer.projections)
        self.packed = self.plain and kind is PackedLinear
        self.exact = self.packed and attends_row_by_row(self.head_dim)
        self.has_branch_norms = any(layer.out_norm is not None for layer in self.layers)

    def _projection_kind(self, module: Any) -> Kind:
        """Choose by the total memory of the device, not by the free memory, so that every run computes the same."""
        size = stored_bytes(module.layers)
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            return FusedProjection if 2 * size <= 0.8 * total else UnfusedProjection
        if size > COPIED_BYTES:
            return UnfusedProjection
        packs = self.device.type == "cpu" and self.dtype == torch.float32 and packed_linear_runs()
        return PackedLinear if packs else FusedProjection

    def _rotary_tables(self, rotary: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines (P, R) of all positions; R ≤ D, the part of a head that is rotated."""
        index = torch.arange(self.model.max_positions, device=self.device)[None]
        layout = getattr(self.model, "layout", None)
        if layout is not None and layout.positions is not None:  # of text: the same on every axis
            index = index.expand(len(layout.positions), 1, -1)
        cos, sin = rotary(torch.empty(0, device=self.device, dtype=self.dtype), index)
        # `rotate` shifts without a sign: the sine carries the sign of rotate_half.
        half = cos.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return cos[0].contiguous(), sin[0].contiguous()

    def _rotary_axes(self, rotary: Any) -> Tensor | None:
        """The axis of positions (R,) that turns each part of a head; None for a decoder with one axis."""
        layout = getattr(self.model, "layout", None)
        if layout is None or layout.positions is None:
            return None
        found = []
        for axis in range(len(layout.positions)):
            index = torch.zeros(len(layout.positions), 1, 1, dtype=torch.long, device=self.device)
            index[axis] = 1
            found.append(rotary(torch.empty(0, device=self.device), index)[1][0, 0])
        axes = torch.stack(found) != 0
        if not bool((axes.sum(0) == 1).all()):
            raise OspoError(
                f"model: rotary_emb of {self.model.name} turns a part of a head by several axes; use another model"
            )
        return axes.int().argmax(0)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the first R of the D values of heads."""
        width = cos.shape[-1]
        if width == x.shape[-1]:
            return rotate(x, cos, sin)
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), -1)

    def _tables_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (M, 1, R) at positions (A, M), or (M,) of one axis."""
        if self._axes is None or positions.dim() == 1:
            return self._cos[positions][:, None], self._sin[positions][:, None]
        part = torch.arange(len(self._axes), device=positions.device)
        own = positions[self._axes].T  # (M, R)
        return self._cos[own, part][:, None], self._sin[own, part][:, None]

    def refresh(self) -> None:
        """See `Decoder`."""
        for layer in self.layers:
            for part in layer.projections:
                part.refresh()

    def pad_rows(self, rows: int, batch_size: int, row_bytes: int) -> int:
        """See `Decoder`: the padded batch size, so that results are bitwise independent of the batch."""
        if self.packed:
            return rows
        if self.device.type == "cpu" and ROW_TILE * row_bytes <= CPU_BYTES:
            return -(-rows // ROW_TILE) * ROW_TILE
        return max(rows, batch_size)

    def run_padded(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """See `Decoder`, for a product that is not packed: on a CPU, run whole tiles."""
        missing = -len(x) % ROW_TILE if self.device.type == "cpu" else 0
        return function(F.pad(x, (0, 0, 0, missing)))[: len(x)] if missing else function(x)

    def __call__(self, x: Tensor, cache: Cache, start: int) -> Tensor:
        """See `Decoder`."""
        rows, length, _ = x.shape
        if length == 1:  # the bits of SDPA would depend on the number of rows
            lengths = torch.full((rows,), start, device=x.device)
            return self.step(x[:, 0].clone(), cache, torch.arange(rows, device=x.device), lengths)[:, None]
        attend = self._attend_runs(cache, [(slice(0, rows * length), slice(0, rows), length)], start)
        return self._run_layers(x.reshape(rows * length, -1).clone(), attend).view(rows, length, -1)

    def prefill(
        self, prompts: Sequence[Tensor], cache: Cache, cache_rows: Sequence[int], *, exact: bool = False
    ) -> Tensor:
        """See `Decoder`."""
        run = self._prefill_exact if exact else self._prefill_piece
        last = torch.empty(len(prompts), self.width, device=self.device, dtype=self.dtype)
        pieces: list[list[int]] = [[]]
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            if pieces[-1] and sum(len(prompts[j]) for j in (*pieces[-1], i)) > PREFILL:
                pieces.append([])
            pieces[-1].append(i)
        for piece in pieces:
            last[piece] = run([prompts[j] for j in piece], cache, [cache_rows[j] for j in piece])
        return last

    def _prefill_exact(self, prompts: list[Tensor], cache: Cache, cache_rows: list[int]) -> Tensor:
        """Run every token of the prompts as a row of one step."""
        x = self.model.embed_tokens(torch.cat(prompts).to(self.device)).clone()  # the layers add to x in place
        counts = torch.tensor([len(ids) for ids in prompts])
        rows = torch.tensor(cache_rows).repeat_interleave(counts)
        positions = torch.cat([torch.arange(len(ids)) for ids in prompts])
        return self.step(x, cache, rows, positions, shared_slots=True)[counts.cumsum(0) - 1]

    def _prefill_piece(self, prompts: list[Tensor], cache: Cache, cache_rows: list[int]) -> Tensor:
        """Run prompts of ascending lengths, one behind the other, as the rows of one pass."""
        lengths = [len(ids) for ids in prompts]
        total = sum(lengths)
        x = self.model.embed_tokens(torch.cat(prompts).to(self.device))
        tile = 1 if self.packed else ROW_TILE if self.device.type == "cpu" else PREFILL
        # Padded or cloned: the layers add to x in place.
        x = F.pad(x, (0, 0, 0, -total % tile)) if total % tile else x.clone()
        counts = torch.tensor(lengths, device=self.device)
        ends = counts.cumsum(0)
        if varlen_runs(self.device, self.dtype, self.head_dim):
            bounds = F.pad(ends, (1, 0)).int()
            rows = torch.tensor(cache_rows, device=self.device).repeat_interleave(counts, output_size=total)
            starts = bounds[:-1].repeat_interleave(counts, output_size=total)
            positions = torch.arange(total, device=self.device) - starts
            attend = self._attend_packed(cache, rows, positions, bounds, max(lengths))
        else:
            runs: list[LengthRun] = []
            begin = 0
            for length, same in itertools.groupby(zip(lengths, cache_rows, strict=True), lambda pair: pair[0]):
                row_list = [row for _, row in same]
                end = begin + length * len(row_list)
                runs.append((slice(begin, end), torch.tensor(row_list, device=self.device), length))
                begin = end
            attend = self._attend_runs(cache, runs)
        return self._run_layers(x, attend)[ends - 1]

    def _attend_runs(self, cache: Cache, runs: Sequence[LengthRun], start: int = 0) -> Attend:
        """Attention of sequences that begin at position `start`, one call for each run of sequences of one length."""
        total, grouped = runs[-1][0].stop, self.heads != self.kv_heads

        def attend(i: int, qkv: Tensor, y: Tensor) -> Tensor:
            y[total:] = 0
            for tokens, rows, length in runs:
                end = start + length
                cos, sin = self._cos[start:end], self._sin[start:end]
                parts = qkv[tokens].view(-1, length, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
                q, k, v = parts.split((self.heads, self.kv_heads, self.kv_heads), 1)
                k = self._rotate(k, cos, sin)
                cache.keys[i][rows, :, start:end], cache.values[i][rows, :, start:end] = k, v
                mask = None
                if start:
                    k, v = cache.keys[i][rows, :, :end], cache.values[i][rows, :, :end]
                    mask = torch.ones(length, end, dtype=torch.bool, device=k.device).tril(start)
                repeats = grouped and k.device.type != "cpu"  # the first of the backends of CUDA takes no groups
                if repeats:
                    k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
                with sdpa_kernel(_PREFILL_BACKENDS, set_priority=True) if k.is_cuda else nullcontext():
                    attended = F.scaled_dot_product_attention(
                        self._rotate(q, cos, sin),
                        k,
                        v,
                        attn_mask=mask,
                        is_causal=mask is None,
                        scale=self._scale,
                        enable_gqa=grouped and not repeats,
                    )
                y[tokens] = attended.transpose(1, 2).flatten(2).flatten(0, 1)
            return y

        return attend

    def _attend_packed(self, cache: Cache, rows: Tensor, positions: Tensor, bounds: Tensor, longest: int) -> Attend:
        """Attention of packed prompts in one call. Token t is stored at positions[t] of cache row rows[t]."""
        cos, sin = self._tables_at(positions)
        total, rotated, group = len(rows), self.heads + self.kv_heads, self.heads // self.kv_heads

        def attend(i: int, qkv: Tensor, y: Tensor) -> Tensor:
            parts = qkv[:total].view(total, -1, self.head_dim)
            q, k = self._rotate(parts[:, :rotated], cos, sin).split((self.heads, self.kv_heads), 1)
            v = parts[:, rotated:]
            for stored, new in ((cache.keys[i], k), (cache.values[i], v)):
                stored.transpose(1, 2)[rows, positions] = new
            if group > 1:
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            y[:total] = varlen_attention(q, k, v, bounds, longest, self._scale).flatten(1)
            y[total:] = 0
            return y

        return attend

    def step(
        self,
        x: Tensor,
        cache: Cache,
        cache_rows: Tensor,
        lengths: Tensor,
        buffers: Buffers | None = None,
        *,
        shared_slots: bool = False,
        positions: Tensor | None = None,
    ) -> Tensor:
        """See `Decoder`."""
        tables = None
        if self._rotates_before:
            tables = self._tables_at(lengths.clamp(min=0) if positions is None else positions)

        def attend(i: int, qkv: Tensor, out: Tensor) -> Tensor:
            if tables is not None:
                heads = qkv.view(len(qkv), -1, self.head_dim)[:, : self.heads + self.kv_heads]
                heads.copy_(self._rotate(heads, *tables))
            return decode_attention(
                qkv, *self._kernel_tables, cache.keys[i], cache.values[i], cache_rows, lengths,
                heads=self.heads, scale=self._scale, out=out, shared_slots=shared_slots,
            )  # fmt: skip

        return self._run_layers(x, attend, buffers)

    def _run_layers(self, x: Tensor, attend: Attend, buffers: Buffers | None = None) -> Tensor:
        """Run all layers over rows x (M, D), which becomes the residual stream."""
        b = buffers or Buffers(self, x.shape[0])
        # Each sum of the residual stream is fused with the norm behind it, which may be that of the next layer.
        next_norms = [layer.norm for layer in self.layers[1:]] + [self._norm]
        h = _add_norm(None, x, self.layers[0].norm, b.normed)
        for i, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            qkv = layer.qkv(h, b.qkv)
            self._norm_heads(layer, qkv)
            y = attend(i, qkv, b.attended)
            h = _add_norm(_norm(layer.out(y, b.delta), layer.out_norm, b.branch), x, layer.mlp_norm, b.normed)
            y = silu_mul(layer.gate_up(h, b.gate_up), out=b.gated)
            h = _add_norm(_norm(layer.down(y, b.delta), layer.down_norm, b.branch), x, next_norm, b.normed)
        return h

    def _norm_heads(self, layer: Layer, qkv: Tensor) -> None:
        """Apply the norms of queries and keys to qkv (M, (H + 2·Hkv)·D), in place."""
        if layer.head_norms is not None:
            parts = qkv.view(len(qkv), -1, self.head_dim).split((self.heads, self.kv_heads, self.kv_heads), 1)
            for part, norm in zip(parts, layer.head_norms, strict=False):
                part.copy_(norm(part))


def _norm(x: Tensor, norm: Any, out: Tensor) -> Tensor:
    return x if norm is None else add_rms_norm(None, x, norm.weight, norm.variance_epsilon, out=out)


def _add_norm(delta: Tensor | None, x: Tensor, norm: Any, out: Tensor) -> Tensor:
    """Add delta to x (M, D), and return the norm of the sum, in `out`; without a norm, x itself."""
    if norm is None:
        return x if delta is None else x.add_(delta)
    return add_rms_norm(delta, x, norm.weight, norm.variance_epsilon, out=out)

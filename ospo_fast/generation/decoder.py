"""A lean forward pass of a loaded Llama decoder, with a cache that is written in place.

Every row of the cache starts at position 0 and knows its own length, so no padding, no mask and no position bookkeeping
exist. Plain layers are fused (`weights`): query, key and value in one product, gate and up in another, where the
memory takes a copy of them; layers with adapters or hooks are called as they are.

Bits. A row's result must not depend on its batch-mates. Norms, gates and attention work row by row. Products do not
have to: BLAS libraries switch kernels with the number of rows. So on a CPU with vector instructions float32 products
run on packed weights (`ops.linear`), which have no such switch. Elsewhere on the CPU, products of at least `ROW_TILE`
rows were found to agree bit for bit in every row (tests/generation/test_decoder.py looks again on each machine), and
batches are filled up to multiples of it. On a GPU, and for models of which so many rows do not fit, every batch is
filled up to the full batch size, and prompts pass in pieces of `PREFILL` tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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
    Projection,
    UnfusedProjection,
    projection,
)
from ospo_fast.generation.varlen import varlen_attention, varlen_runs
from ospo_fast.models.base import UnifiedModel
from ospo_fast.oom import out_of_memory, release, short
from ospo_fast.ops.decode_attention import decode_attention, rotate
from ospo_fast.ops.linear import PackedLinear, packed_linear_runs
from ospo_fast.ops.rms_norm import add_rms_norm
from ospo_fast.ops.silu_mul import silu_mul
from ospo_fast.ops.skinny_linear import ROWS as SKINNY_ROWS
from ospo_fast.ops.skinny_linear import skinny_linear

logger = logging.getLogger(__name__)

ROW_TILE = 32
PREFILL = 1024
CPU_BYTES = 512 * 2**20  # of caches
# On a GPU: the first splits no row's keys by the size of the batch; cuDNN's would plan anew for every length.
_PREFILL = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
VARLEN = True  # on a GPU: prompts of all lengths in one launch a layer; False runs them length by length
# On a GPU, of bfloat16: steps of few rows by `skinny_linear`, six launches a layer for nine. Off until a measurement
# shows it ahead (bench/skinny_linear.py, bench/generation.py). Read when a decoder is made.
SKINNY = False
COPIED_BYTES = 2 * 2**30  # on the CPU larger models keep the one copy of their weights

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""attend(layer, qkv (M, (H + 2·Hkv)·D), out (M, H·D)) → (M, H·D)."""


class Cache:
    """Keys and values of every layer: 2 × (layers, rows, kv heads, length, head dim), contiguous, never grown."""

    def __init__(self, decoder: InferenceDecoder, rows: int, length: int) -> None:
        shape = (len(decoder.layers), rows, decoder.kv_heads, length, decoder.head_dim)
        self.keys = torch.empty(shape, device=decoder.device, dtype=decoder.dtype)
        self.values = torch.empty(shape, device=decoder.device, dtype=decoder.dtype)

    def copy_rows(self, source: Cache, rows: Tensor | slice, length: int) -> None:
        """Take the first `length` positions of `source`'s `rows` (or of its single row, for all) into this cache."""
        self.keys[..., :length, :] = source.keys[:, rows, :, :length]
        self.values[..., :length, :] = source.values[:, rows, :, :length]

    def repeat_row(self, row: int, rows: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of one row to others."""
        for cache in (self.keys, self.values):
            cache[:, rows, :, :length] = cache[:, row : row + 1, :, :length]


class Buffers:
    """What one step of `rows` rows writes: allocated once, so that steps allocate nothing and can be captured."""

    def __init__(self, decoder: InferenceDecoder, rows: int) -> None:
        def empty(width: int) -> Tensor:
            return torch.empty(rows, width, device=decoder.device, dtype=decoder.dtype)

        self.normed, self.delta = empty(decoder.width), empty(decoder.width)
        self.qkv = empty((decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim)
        self.attended = empty(decoder.heads * decoder.head_dim)
        self.gate_up, self.gated = empty(2 * decoder.inner), empty(decoder.inner)


@dataclass(frozen=True)
class _Layer:
    norm: Any  # before attention
    qkv: Projection
    out: Projection
    mlp_norm: Any
    gate_up: Projection
    down: Projection

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.out, self.gate_up, self.down


def _layers(module: Any, kind: Kind) -> list[_Layer]:
    return [
        _Layer(
            layer.input_layernorm,
            projection([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj], kind),
            projection([layer.self_attn.o_proj], kind),
            layer.post_attention_layernorm,
            projection([layer.mlp.gate_proj, layer.mlp.up_proj], kind),
            projection([layer.mlp.down_proj], kind),
        )
        for layer in module.layers
    ]


class InferenceDecoder:
    """The decoder of `model`. Its weights are read when it is made, and again by `refresh`."""

    def __init__(self, model: UnifiedModel) -> None:
        module: Any = model.decoder
        config = module.config
        first = module.layers[0].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling"):
            if not hasattr(first, name):
                raise OspoError(f"model: the decoder {type(module).__name__} has no {name}, expected a Llama decoder")
        if config.hidden_act != "silu":
            raise OspoError(f"model: the decoder's hidden_act is {config.hidden_act!r}, expected 'silu'")
        self.model = model
        self.device, self.dtype = model.device, model.dtype
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(first.head_dim)
        self.width, self.inner = int(config.hidden_size), int(config.intermediate_size)
        self._rotary = module.rotary_emb
        self._norm = module.norm
        self._scale = float(first.scaling)
        self._angles: tuple[Tensor, Tensor] | None = None
        kind = self._kind(module)
        self.layers: list[_Layer] = []
        try:
            self.layers = _layers(module, kind)
        except (RuntimeError, MemoryError) as error:
            if kind is UnfusedProjection or not out_of_memory(error):
                raise
            reason = short(error)
        if not self.layers:  # outside the handler: the exception held the copies that were made
            release()
            logger.warning(
                "no memory for fused copies of the decoder's weights (%s): going on with the weights as they are; "
                "results may round otherwise than with the copies",
                reason,
            )
            kind = UnfusedProjection
            self.layers = _layers(module, kind)
        self.plain = not any(isinstance(p, ModuleProjection) for layer in self.layers for p in layer.projections)
        self.packed = self.plain and kind is PackedLinear
        products = [part for layer in self.layers for part in layer.projections]
        bare = all(isinstance(part, FusedProjection) and part.bias is None for part in products)
        self._skinny = SKINNY and bare and self.device.type == "cuda" and self.dtype == torch.bfloat16

    def _kind(self, module: Any) -> Kind:
        """How plain layers are read: by what the device has in all, so that the choice is the same in every run."""
        size = sum(p.numel() * p.element_size() for p in module.layers.parameters())
        if self.device.type == "cuda":
            room = torch.cuda.get_device_properties(self.device).total_memory
            return FusedProjection if 2 * size <= 0.8 * room else UnfusedProjection
        if size > COPIED_BYTES:
            return UnfusedProjection
        return PackedLinear if self.dtype == torch.float32 and packed_linear_runs() else FusedProjection

    def refresh(self) -> None:
        """Read the model's weights again, into the same memory."""
        for layer in self.layers:
            for part in layer.projections:
                part.refresh()

    def row_bytes(self, length: int) -> int:
        """Bytes of cache that one row of `length` positions takes."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim * length * self.dtype.itemsize

    def pass_bytes(self, tokens: int) -> int:
        """Bytes that a pass over so many tokens takes beside the cache: embeddings, `Buffers` and attention's own."""
        heads = self.heads * self.head_dim
        all_heads = heads + 2 * self.kv_heads * self.head_dim
        buffers = 2 * self.width + all_heads + heads + 3 * self.inner
        return tokens * (2 * self.width + buffers + 2 * all_heads + heads) * self.dtype.itemsize

    def pad_rows(self, rows: int, batch_size: int, row_bytes: int, tokens: int = 1) -> int:
        """How many rows to run for `rows` wanted ones: with dummies, so that a row's bits are the same in any batch.

        tokens: of each row that are run at once.
        """
        if self.packed:
            return rows
        if self.device.type == "cpu" and ROW_TILE * row_bytes <= CPU_BYTES:
            tile = ROW_TILE // math.gcd(ROW_TILE, tokens)
            return -(-rows // tile) * tile
        return max(rows, batch_size)

    def run_padded(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x) for rows x (M, D) of a product that is not packed: filled up to a whole tile on the CPU."""
        missing = -len(x) % ROW_TILE if self.device.type == "cpu" else 0
        return function(F.pad(x, (0, 0, 0, missing)))[: len(x)] if missing else function(x)

    def positions(self, length: int) -> None:
        """Prepare the rotary angles of positions 0 … length−1, which all later calls use."""
        index = torch.arange(length, device=self.device)[None]
        cos, sin = self._rotary(torch.empty(0, device=self.device, dtype=self.dtype), index)
        half = self.head_dim // 2
        # rotate_half as a plain shift: its sign goes into the sine.
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        self._angles = (cos[0].contiguous(), sin[0].contiguous())

    def __call__(self, x: Tensor, cache: Cache, start: int) -> Tensor:
        """Embeddings x (B, S, D) at positions start … start+S−1 of the cache's B rows → hidden (B, S, D).

        Attention reaches the first `start` positions of `cache`, and x itself causally; x's keys and values are stored.
        """
        rows, steps, _ = x.shape
        index = torch.arange(rows, device=x.device)
        if steps == 1:
            lengths = torch.full((rows,), start, device=x.device)
            return self.step(x[:, 0].clone(), cache, index, lengths)[:, None]
        mask = torch.ones(steps, start + steps, dtype=torch.bool, device=x.device).tril(start) if start else None

        def attend(i: int, qkv: Tensor, _: Tensor) -> Tensor:
            return self._attend_run(qkv, cache, i, slice(0, rows), start, steps, mask)

        return self._run(x.reshape(rows * steps, -1).clone(), attend).view(rows, steps, -1)

    def prefill(self, prompts: Sequence[Tensor], cache: Cache, slots: Sequence[int]) -> Tensor:
        """Run prompts (S,) of any lengths, packed, into the rows `slots` of an empty cache → last hidden (N, D)."""
        last = torch.empty(len(prompts), self.width, device=self.device, dtype=self.dtype)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        piece: list[int] = []
        for n, i in enumerate(order):
            piece.append(i)
            following = len(prompts[order[n + 1]]) if n + 1 < len(order) else PREFILL
            if sum(len(prompts[j]) for j in piece) + following > PREFILL:
                last[piece] = self._prefill_piece([prompts[j] for j in piece], cache, [slots[j] for j in piece])
                piece = []
        return last

    def _prefill_piece(self, prompts: list[Tensor], cache: Cache, slots: list[int]) -> Tensor:
        lengths = [len(ids) for ids in prompts]
        total = sum(lengths)
        x = self.model.embed_tokens(torch.cat(prompts).to(self.device))
        tile = 1 if self.packed else ROW_TILE if self.device.type == "cpu" else PREFILL
        # A pad on top of a copy: the layers add to x in place.
        x = F.pad(x, (0, 0, 0, -total % tile)) if total % tile else x.clone()
        counts = torch.tensor(lengths, device=self.device)
        ends = counts.cumsum(0)
        if VARLEN and varlen_runs(self.device, self.dtype, self.head_dim):
            bounds = F.pad(ends, (1, 0)).int()
            # Of every token: its row of the cache, and its place in it.
            rows = torch.tensor(slots, device=self.device).repeat_interleave(counts, output_size=total)
            starts = bounds[:-1].repeat_interleave(counts, output_size=total)
            places = torch.arange(total, device=self.device) - starts
            attend = self._packed_attention(cache, rows, places, bounds, max(lengths))
        else:
            attend = self._attention_by_length(cache, slots, lengths)
        return self._run(x, attend)[ends - 1]

    def _attention_by_length(self, cache: Cache, slots: Sequence[int], lengths: Sequence[int]) -> Attend:
        """Of packed prompts of rising lengths into rows `slots`: all those of one length at once."""
        runs, total = [], sum(lengths)  # (first token, rows of the cache, length)
        begin = 0
        for length in sorted(set(lengths)):
            rows = [slot for slot, own in zip(slots, lengths, strict=True) if own == length]
            runs.append((begin, torch.tensor(rows, device=self.device), length))
            begin += len(rows) * length

        def attend(i: int, qkv: Tensor, y: Tensor) -> Tensor:
            y[total:] = 0
            for begin, rows, length in runs:
                part = slice(begin, begin + len(rows) * length)
                y[part] = self._attend_run(qkv[part], cache, i, rows, 0, length, None)
            return y

        return attend

    def _packed_attention(self, cache: Cache, rows: Tensor, places: Tensor, bounds: Tensor, longest: int) -> Attend:
        """Of packed prompts all at once, whatever their lengths; token t goes to places[t] of rows[t]."""
        assert self._angles is not None
        cos, sin = (angle[places][:, None] for angle in self._angles)
        total, turned, group = len(rows), self.heads + self.kv_heads, self.heads // self.kv_heads

        def attend(i: int, qkv: Tensor, y: Tensor) -> Tensor:
            parts = qkv[:total].view(total, -1, self.head_dim)
            q, k = rotate(parts[:, :turned], cos, sin).split((self.heads, self.kv_heads), 1)
            v = parts[:, turned:]
            for stored, new in ((cache.keys[i], k), (cache.values[i], v)):
                stored.transpose(1, 2)[rows, places] = new
            if group > 1:
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            y[:total] = varlen_attention(q, k, v, bounds, longest, self._scale).flatten(1)
            y[total:] = 0
            return y

        return attend

    def step(
        self,
        x: Tensor,  # (M, D), overwritten
        cache: Cache,
        slots: Tensor,  # (M,) int64: a row of the cache for each
        lengths: Tensor,  # (M,) int64: how many positions of it are filled; −1 for a row without a token
        buffers: Buffers | None = None,
        *,
        shared_slots: bool = False,
    ) -> Tensor:
        """One new token for each row, with embeddings x → hidden (M, D); its keys and values are stored.

        With `buffers` the result is overwritten by the next step. shared_slots: as of `decode_attention`.
        """
        assert self._angles is not None
        cos, sin = self._angles

        def attend(i: int, qkv: Tensor, out: Tensor) -> Tensor:
            return decode_attention(
                qkv, cos, sin, cache.keys[i], cache.values[i], slots, lengths,
                heads=self.heads, scale=self._scale, out=out, shared_slots=shared_slots,
            )  # fmt: skip

        return self._run(x, attend, buffers)

    def _run(self, x: Tensor, attend: Attend, buffers: Buffers | None = None) -> Tensor:
        """The layers over rows x (M, D), which becomes the residual stream; attend(layer, qkv, out) → (M, H·D)."""
        b = buffers or Buffers(self, x.shape[0])
        if self._skinny and x.shape[0] <= SKINNY_ROWS:
            return self._run_skinny(x, attend, b)
        following = [layer.norm for layer in self.layers[1:]] + [self._norm]
        h = _normed(None, x, self.layers[0].norm, b.normed)
        for i, (layer, norm) in enumerate(zip(self.layers, following, strict=True)):
            y = attend(i, layer.qkv(h, b.qkv), b.attended)
            h = _normed(layer.out(y, b.delta), x, layer.mlp_norm, b.normed)
            y = silu_mul(layer.gate_up(h, b.gate_up), out=b.gated)
            h = _normed(layer.down(y, b.delta), x, norm, b.normed)
        return h

    def _run_skinny(self, x: Tensor, attend: Attend, b: Buffers) -> Tensor:
        """`_run` of few rows: norms, gate and sums within the products."""
        for i, layer in enumerate(self.layers):
            qkv, out, gate_up, down = (part.weight for part in layer.projections if isinstance(part, FusedProjection))
            norm, mlp_norm = layer.norm, layer.mlp_norm
            skinny_linear(x, qkv, norm=norm.weight, eps=norm.variance_epsilon, out=b.qkv)
            skinny_linear(attend(i, b.qkv, b.attended), out, add=True, out=x)
            skinny_linear(x, gate_up, norm=mlp_norm.weight, eps=mlp_norm.variance_epsilon, gated=True, out=b.gated)
            skinny_linear(b.gated, down, add=True, out=x)
        return _normed(None, x, self._norm, b.normed)

    def _attend_run(
        self, qkv: Tensor, cache: Cache, i: int, rows: Tensor | slice, start: int, steps: int, mask: Tensor | None
    ) -> Tensor:
        """Attention of qkv, whole rows of `steps` positions from `start` on, in rows `rows` of the cache → (…, H·D)."""
        assert self._angles is not None
        end = start + steps
        cos, sin = (angle[start:end] for angle in self._angles)
        parts = qkv.view(-1, steps, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        q, k, v = parts.split((self.heads, self.kv_heads, self.kv_heads), 1)
        k = rotate(k, cos, sin)
        cache.keys[i][rows, :, start:end], cache.values[i][rows, :, start:end] = k, v
        if start:
            k, v = cache.keys[i][rows, :, :end], cache.values[i][rows, :, :end]
        grouped = self.heads != self.kv_heads
        if k.is_cuda and grouped:  # the first of `_PREFILL` takes no groups
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
        with sdpa_kernel(_PREFILL, set_priority=True) if k.is_cuda else nullcontext():
            y = F.scaled_dot_product_attention(
                rotate(q, cos, sin),
                k,
                v,
                attn_mask=mask,
                is_causal=start == 0,
                scale=self._scale,
                enable_gqa=grouped and not k.is_cuda,
            )
        return y.transpose(1, 2).reshape(len(qkv), -1)


def _normed(delta: Tensor | None, x: Tensor, norm: Any, out: Tensor) -> Tensor:
    return add_rms_norm(delta, x, norm.weight, norm.variance_epsilon, out=out)

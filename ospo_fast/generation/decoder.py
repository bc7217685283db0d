"""A lean forward pass over the modules of a loaded Llama decoder, with a cache that is written in place.

All rows of a batch have the same length, so no padding, no mask and no position bookkeeping exist. The modules of the
model are called as they are: adapters inside them stay in force and nothing is copied.

Bits. A row's result must not depend on its batch-mates. Attention and norms work row by row; matrix products do not
have to: BLAS libraries switch kernels with the number of rows. On the CPU, products of at least `ROW_TILE` rows were
found to agree bit for bit in every row (tests/generation/test_decoder.py looks again on each machine), so batches are
filled up to multiples of it. On a GPU, and for models of which so many rows do not fit, every batch is filled up to
the full batch size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast.errors import OspoError
from ospo_fast.models.base import UnifiedModel

ROW_TILE = 32
CPU_BYTES = 512 * 2**20  # of caches


class Cache:
    """Keys and values of every layer: 2 × (layers, rows, kv heads, length, head dim), contiguous, never grown."""

    def __init__(self, decoder: LeanDecoder, rows: int, length: int) -> None:
        shape = (decoder.layers, rows, decoder.kv_heads, length, decoder.head_dim)
        self.keys = torch.empty(shape, device=decoder.device, dtype=decoder.dtype)
        self.values = torch.empty(shape, device=decoder.device, dtype=decoder.dtype)

    def copy_rows(self, source: Cache, rows: Tensor | slice, length: int) -> None:
        """Take the first `length` positions of `source`'s `rows` (or of its single row, for all) into this cache."""
        self.keys[..., :length, :] = source.keys[:, rows, :, :length]
        self.values[..., :length, :] = source.values[:, rows, :, :length]

    def part(self, rows: slice) -> Cache:
        """A view of some rows; writes go to this cache."""
        view = object.__new__(Cache)
        view.keys, view.values = self.keys[:, rows], self.values[:, rows]
        return view


class LeanDecoder:
    """The decoder of `model`, called with embeddings and a `Cache`."""

    def __init__(self, model: UnifiedModel) -> None:
        module: Any = model.decoder
        config = module.config
        first = module.layers[0].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling"):
            if not hasattr(first, name):
                raise OspoError(f"model: the decoder {type(module).__name__} has no {name}, expected a Llama decoder")
        self._module = module
        self.device, self.dtype = model.device, model.dtype
        self.layers = len(module.layers)
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(first.head_dim)
        self._scale = float(first.scaling)
        self._angles: tuple[Tensor, Tensor] | None = None

    def row_bytes(self, length: int) -> int:
        """Bytes of cache that one row of `length` positions takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * length * self.dtype.itemsize

    def filled(self, rows: int, batch_size: int, row_bytes: int) -> int:
        """How many rows to run for `rows` wanted ones: with dummies, so that a row's bits are the same in any batch."""
        if self.device.type == "cpu" and ROW_TILE * row_bytes <= CPU_BYTES:
            return -(-rows // ROW_TILE) * ROW_TILE
        return max(rows, batch_size)

    def positions(self, length: int) -> None:
        """Prepare the rotary angles of positions 0 … length−1, which all later calls use."""
        index = torch.arange(length, device=self.device)[None]
        cos, sin = self._module.rotary_emb(torch.empty(0, device=self.device, dtype=self.dtype), index)
        half = self.head_dim // 2
        # rotate_half as a plain shift: its sign goes into the sine.
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        self._angles = (cos[0], sin[0])

    def __call__(self, x: Tensor, cache: Cache, start: int) -> Tensor:
        """Embeddings x (B, S, D) at positions start … start+S−1 → hidden (B, S, D).

        Attention reaches the first `start` positions of `cache`, and x itself causally; x's keys and values are stored.
        """
        assert self._angles is not None
        rows, steps, _ = x.shape
        end = start + steps
        cos, sin = (angle[start:end] for angle in self._angles)
        mask = None
        if steps > 1 and start > 0:
            mask = torch.ones(steps, end, dtype=torch.bool, device=x.device).tril(start)
        for i, layer in enumerate(self._module.layers):
            attention = layer.self_attn
            y = layer.input_layernorm(x)
            q, k, v = (
                project(y).view(rows, steps, -1, self.head_dim).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys, values = cache.keys[i, :, :, :end], cache.values[i, :, :, :end]
            keys[:, :, start:] = _rotate(k, cos, sin)
            values[:, :, start:] = v
            y = F.scaled_dot_product_attention(
                _rotate(q, cos, sin),
                keys,
                values,
                attn_mask=mask,
                is_causal=steps > 1 and start == 0,
                scale=self._scale,
                enable_gqa=self.heads != self.kv_heads,
            )
            x = x + attention.o_proj(y.transpose(1, 2).reshape(rows, steps, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden: Tensor = self._module.norm(x)
        return hidden


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin

"""Decoder steps of few rows by `skinny_linear`: six launches per layer in place of nine.

    generator = ImageGenerator(model)
    generator.decoder_class = SkinnyDecoder

Core does not use it until a measurement shows a gain (bench/skinny_linear.py, bench/generation.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ospo_fast.experimental.skinny_linear import ROWS, skinny_linear
from ospo_fast.generation.decoder import Attend, Buffers, InferenceDecoder
from ospo_fast.generation.projections import FusedProjection
from ospo_fast.models.base import UnifiedModel
from ospo_fast.ops.rms_norm import add_rms_norm


class SkinnyDecoder(InferenceDecoder):
    """An `InferenceDecoder` with norms, gates and sums inside the products, where these have at most `ROWS` rows.

    It takes plain layers without biases, on a GPU in bfloat16. Others run as usual.
    """

    def __init__(self, model: UnifiedModel) -> None:
        super().__init__(model)
        products = [part for layer in self.layers for part in layer.projections]
        self._weights = [part.weight for part in products if isinstance(part, FusedProjection) and part.bias is None]
        suitable = self.device.type == "cuda" and self.dtype == torch.bfloat16
        self.skinny = suitable and len(self._weights) == len(products)

    def _run_layers(self, x: Tensor, attend: Attend, buffers: Buffers | None = None) -> Tensor:
        if not self.skinny or len(x) > ROWS:
            return super()._run_layers(x, attend, buffers)
        b = buffers or Buffers(self, len(x))
        for i, layer in enumerate(self.layers):
            qkv, out, gate_up, down = self._weights[4 * i : 4 * i + 4]
            norm, mlp_norm = layer.norm, layer.mlp_norm
            skinny_linear(x, qkv, norm=norm.weight, eps=norm.variance_epsilon, out=b.qkv)
            skinny_linear(attend(i, b.qkv, b.attended), out, add=True, out=x)
            skinny_linear(x, gate_up, norm=mlp_norm.weight, eps=mlp_norm.variance_epsilon, gated=True, out=b.gated)
            skinny_linear(b.gated, down, add=True, out=x)
        return add_rms_norm(None, x, self._norm.weight, self._norm.variance_epsilon, out=b.normed)

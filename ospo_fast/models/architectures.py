"""Decoders of transformers that `generation.decoder` computes itself: the classes of their parts, by module.

All are a Llama's layers, with the differences that `generation.decoder.Layer` reads from a layer: norms of queries and
keys, norms behind attention and MLP, biases, a gate and an up projection in one, and several axes of rotary positions.
A decoder that is not here runs by its own modules.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """The names of the classes of one decoder."""

    module: str  # that the classes are of, in `transformers.models`
    decoder: str
    layers: tuple[str, ...]
    attention: str
    mlp: str
    rotary: str
    norm: str  # of the residual stream
    head_norm: str | None = None  # of queries and keys
    norms_behind: tuple[str, ...] = ()  # of `layers`, those whose two norms are behind attention and MLP


_ARCHITECTURES = (
    Architecture(
        module="llama.modeling_llama",
        decoder="LlamaModel",
        layers=("LlamaDecoderLayer",),
        attention="LlamaAttention",
        mlp="LlamaMLP",
        rotary="LlamaRotaryEmbedding",
        norm="LlamaRMSNorm",
    ),
    Architecture(
        module="emu3.modeling_emu3",
        decoder="Emu3TextModel",
        layers=("Emu3DecoderLayer",),
        attention="Emu3Attention",
        mlp="Emu3MLP",
        rotary="Emu3RotaryEmbedding",
        norm="Emu3RMSNorm",
    ),
    Architecture(
        module="chameleon.modeling_chameleon",
        decoder="ChameleonModel",
        layers=("ChameleonDecoderLayer", "ChameleonSwinDecoderLayer"),
        attention="ChameleonAttention",
        mlp="ChameleonMLP",
        rotary="ChameleonRotaryEmbedding",
        norm="ChameleonRMSNorm",
        head_norm="ChameleonLayerNorm",
        norms_behind=("ChameleonSwinDecoderLayer",),
    ),
    Architecture(
        module="glm_image.modeling_glm_image",
        decoder="GlmImageTextModel",
        layers=("GlmImageTextDecoderLayer",),
        attention="GlmImageTextAttention",
        mlp="GlmImageTextMLP",
        rotary="GlmImageTextRotaryEmbedding",
        norm="GlmImageRMSNorm",
    ),
    Architecture(
        module="qwen3.modeling_qwen3",
        decoder="Qwen3Model",
        layers=("Qwen3DecoderLayer",),
        attention="Qwen3Attention",
        mlp="Qwen3MLP",
        rotary="Qwen3RotaryEmbedding",
        norm="Qwen3RMSNorm",
    ),
)


_BEHIND = frozenset(name for found in _ARCHITECTURES for name in found.norms_behind)


def layer_norms(layer: Any) -> tuple[Any, Any, Any, Any]:
    """Return the norms of a layer: before attention and MLP, and behind them; None where there is none."""
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    if type(layer).__name__ in _BEHIND:
        return None, None, first, second
    behind = (getattr(layer, name, None) for name in ("post_self_attn_layernorm", "post_mlp_layernorm"))
    return first, second, *behind


def find_architecture(decoder: Any) -> tuple[Architecture, Any] | None:
    """Return the architecture of a decoder, and the module of transformers that defines it; None for another class."""
    for found in _ARCHITECTURES:
        module = sys.modules.get(f"transformers.models.{found.module}")
        if module is not None and type(decoder) is getattr(module, found.decoder, None):
            return found, module
    return None

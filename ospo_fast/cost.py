"""Sizes and work of a model: parameters, FLOPs and bytes from the shapes in its config.json. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ospo_fast.errors import OspoError

# The sizes of `JanusConfig` of transformers, which a config.json may leave out. Its text model is a Llama.
_TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
_VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "mlp_ratio": 4.0,
    "image_size": 384,
    "patch_size": 16,
    "num_channels": 3,
    "projection_dim": 2048,
    "depth": 2,
}
_VQ = {
    "embed_dim": 8,
    "num_embeddings": 16384,
    "latent_channels": 256,
    "in_channels": 3,
    "out_channels": 3,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "num_patches": 24,
    "projection_dim": 2048,
    "num_hidden_layers": 2,
    "image_token_embed_dim": 2048,
}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of a Janus model, as its config.json names them.

    Counts of weights leave out the biases and norms that are below a thousandth of a model, except in `parameters` of
    the VQ model, whose layers are small.
    """

    hidden: int  # D
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the text head is the embedding
    tokens: int  # codes of an image
    side: int  # pixels of an image
    codes: int  # of the codebook
    head_weights: int  # of the head of image codes
    aligner_weights: int  # between encoders and language model, and the embeddings of codes
    vision_weights: int
    vision_tokens: int
    vision_width: int
    vision_layers: int
    vq_weights: int
    vq_decode_flops: int  # of an image

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "the model") -> ModelShapes:
        """Read the sizes from the values of a config.json, such as `module.config.to_dict()`.

        Raises:
            OspoError: a size is not a number of at least 1.

        """
        text, vision, vq = (
            {**defaults, **{key: value for key, value in (config.get(section) or {}).items() if value is not None}}
            for section, defaults in (("text_config", _TEXT), ("vision_config", _VISION), ("vq_config", _VQ))
        )
        for section, values, defaults in (("text", text, _TEXT), ("vision", vision, _VISION), ("vq", vq, _VQ)):
            for key in defaults:
                value = values[key]
                sizes = value if isinstance(value, list) and value else [value]
                least = 0 if key == "num_res_blocks" else 1
                if not all(type(size) in (int, float) and least <= size <= 2**31 for size in sizes):
                    raise OspoError(
                        f"model: {key} in the {section}_config of {name} is {value!r:.60}, expected a number of at "
                        f"least {least}; save or download the model again."
                    )
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        width, patch = vision["hidden_size"], vision["patch_size"]
        image_width, head_width = vq["image_token_embed_dim"], vq["projection_dim"]
        grid = vq["num_patches"]
        layer = 4 * width**2 + 2 * int(width * vision["mlp_ratio"]) * width
        aligner = width * vision["projection_dim"] + (vision["depth"] - 1) * vision["projection_dim"] ** 2
        codes = vq["num_embeddings"] * vq["embed_dim"]
        code_aligner = vq["embed_dim"] * head_width + (vq["num_hidden_layers"] - 1) * head_width**2
        encoder, decoder = list(_encoder(vq)), list(_decoder(vq))
        tied = config.get("tie_word_embeddings")
        return cls(
            hidden=hidden,
            intermediate=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads", heads),
            head_dim=text.get("head_dim", hidden // heads),
            vocab=text["vocab_size"],
            tied=tied is None or bool(tied),  # as in JanusConfig
            tokens=grid**2,
            side=grid * 2 ** (len(vq["channel_multiplier"]) - 1),
            codes=vq["num_embeddings"],
            head_weights=image_width * head_width + head_width * vq["num_embeddings"],
            aligner_weights=aligner + code_aligner + codes,
            vision_weights=vision["num_hidden_layers"] * layer
            + width * (vision["num_channels"] * patch**2 + (vision["image_size"] // patch) ** 2),
            vision_tokens=(vision["image_size"] // patch) ** 2,
            vision_width=width,
            vision_layers=vision["num_hidden_layers"],
            vq_weights=sum(weights for weights, _ in encoder + decoder) + codes,
            vq_decode_flops=sum(2 * weights * side**2 for weights, side in decoder),
        )

    @property
    def attention_width(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each linear layer of a decoder layer."""
        kv = self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, self.attention_width),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (self.attention_width, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of all decoder layers."""
        return self.layers * sum(rows * columns for rows, columns in self.linear_layers.values())

    @property
    def parameters(self) -> int:
        """Weights of the whole model."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        others = self.head_weights + self.aligner_weights + self.vision_weights + self.vq_weights
        return self.layer_weights + embeddings + others

    @property
    def streamed_weights(self) -> int:
        """Weights that one step of image generation reads: of the decoder layers and of the head."""
        return self.layer_weights + self.head_weights

    def cache_bytes(self, positions: int, itemsize: int) -> int:
        """Return the bytes of keys and values of `positions` tokens, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * positions * itemsize

    def lora_weights(self, rank: int, targets: Sequence[str] = LORA_TARGETS) -> int:
        """Return the weights of LoRA matrices of a rank on the named linear layers."""
        return self.layers * rank * sum(sum(self.linear_layers.get(name, ())) for name in targets)

    def flops(
        self,
        *,
        tokens: float = 0,
        attended: float = 0,
        codes: float = 0,
        words: float = 0,
        decoded: float = 0,
        seen: float = 0,
        layers: int | None = None,
        backward: bool = False,
        trained: bool = False,
    ) -> float:
        """Return the floating-point operations of matrix products: 2 per weight and row that it multiplies.

        Args:
            tokens: positions that pass the decoder layers.
            attended: keys that all queries attend to, n·(n + 1) / 2 of a causal sequence of n tokens.
            codes: rows that pass the head of image codes.
            words: rows that pass the text head.
            decoded: images that the VQ decoder makes of codes.
            seen: images that the vision encoder embeds.
            layers: decoder layers that run; None: all.
            backward: add the backward pass. Gradients flow through the weights (as many operations as forward), and
                attention takes twice the forward. Recomputed activations are no work of the model, and are not counted.
            trained: the weights of the decoder layers have gradients of their own (as many operations again); else they
                are frozen, as those of the head always are.

        """
        share = 1.0 if layers is None else layers / self.layers
        layer_passes, head_passes = (2 + trained, 2) if backward else (1, 1)
        products = 2.0 * (share * self.layer_weights * tokens * layer_passes + self.head_weights * codes * head_passes)
        attention = 4.0 * share * self.layers * self.attention_width * attended
        vision = 2.0 * self.vision_weights * self.vision_tokens
        vision += 4.0 * self.vision_layers * self.vision_width * self.vision_tokens**2
        total = products + attention * (3 if backward else 1)
        return total + 2.0 * self.vocab * self.hidden * words + self.vq_decode_flops * decoded + vision * seen


def causal(tokens: float, before: float = 0) -> float:
    """Return the keys that `tokens` queries attend to in all, behind `before` tokens in a cache."""
    return tokens * before + tokens * (tokens + 1) / 2


def activation_bytes(
    shapes: ModelShapes,
    tokens: int,
    *,
    checkpointing: bool,
    itemsize: int = 2,
    rank: int = 64,
    targets: Sequence[str] = LORA_TARGETS,
    dropout: bool = True,
) -> int:
    """Return the bytes of activations that one forward and backward pass of LoRA training needs at its peak.

    Of each token, a decoder layer keeps for its backward pass: the fp32 inputs of both norms, queries, keys, values and
    output of a fused attention, gate, SiLU(gate) and up of the MLP, and the input and inner result of each LoRA branch
    (with dropout also its mask). With checkpointing a layer keeps its input only, and one layer at a time is computed
    again. The largest gradients of a layer come on top. Weights, LoRA, optimizer and what the loss takes (`head_bytes`)
    are not included.

    Args:
        shapes: of the model.
        tokens: positions of all sequences of the pass, G·B·S for G groups of B pairs, padding included.
        checkpointing: gradient checkpointing of the decoder layers.
        itemsize: bytes of the compute dtype: 2 with bf16 autocast on CUDA, 4 on the CPU.
        rank: of the LoRA matrices.
        targets: names of the linear layers that have them.
        dropout: LoRA's inputs are dropped out at random: each branch then keeps its own input.

    """
    width, inner, kv = shapes.attention_width, shapes.intermediate, shapes.kv_heads * shapes.head_dim
    layer = 2 * 4 * shapes.hidden + itemsize * (2 * width + 2 * kv + 3 * inner) + 4 * shapes.heads
    branches = [shapes.linear_layers[name][0] for name in targets if name in shapes.linear_layers]
    if dropout or itemsize < 4:  # dropout and autocast give each branch an input of its own
        mask = (1 if itemsize < 4 else 4) if dropout else 0  # a CPU keeps it as numbers of the dtype
        layer += (itemsize + mask) * sum(branches)
    else:  # branches share the outputs of the norms, o_proj has the output of the attention
        layer += itemsize * (2 * shapes.hidden + inner)
    layer += itemsize * rank * len(branches)
    kept = shapes.layers * itemsize * shapes.hidden + layer if checkpointing else shapes.layers * layer
    gradients = itemsize * (inner + shapes.hidden) + 4 * shapes.hidden
    if itemsize < 4:  # PEFT casts the input of a branch to fp32, and so has its gradient in fp32
        gradients += 4 * max(branches, default=0)
    return tokens * (kept + gradients)


def head_bytes(shapes: ModelShapes, rows: int, *, itemsize: int = 2, chunk_rows: int = 9216) -> int:
    """Return the bytes that the loss takes for `rows` image tokens: their hidden states and gradients, and one chunk.

    A chunk holds logits, features and their gradients (`ops/_chunked_head.py`). The rows of a chunk are at most
    `chunk_rows`.
    """
    chunk = min(rows, chunk_rows) * (shapes.codes + 2 * shapes.hidden)
    return itemsize * (2 * rows * shapes.hidden + chunk)


def _residual(inner: int, outer: int) -> int:
    shortcut = (inner + 1) * outer if inner != outer else 0
    return 2 * inner + (9 * inner + 1) * outer + 2 * outer + (9 * outer + 1) * outer + shortcut


def _attention(width: int) -> int:
    return 2 * width + 4 * (width + 1) * width


def _encoder(vq: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the weights of each part of the VQ encoder, and the side of the squares that it runs on."""
    base, widths = vq["base_channels"], [vq["base_channels"] * m for m in vq["channel_multiplier"]]
    last = len(widths) - 1
    side = vq["num_patches"] << last
    yield (9 * vq["in_channels"] + 1) * base, side
    inner = base
    for level, outer in enumerate(widths):
        inner = base * [1, *vq["channel_multiplier"]][level]
        for _ in range(vq["num_res_blocks"]):
            yield _residual(inner, outer) + (_attention(outer) if level == last else 0), side
            inner = outer
        if level != last:
            side //= 2
            yield (9 * inner + 1) * inner, side
    yield 2 * _residual(inner, inner) + _attention(inner), side
    yield 2 * inner + (9 * inner + 1) * vq["latent_channels"] * (2 if vq.get("double_latent") else 1), side
    yield (vq["latent_channels"] + 1) * vq["embed_dim"], side


def _decoder(vq: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the weights of each part of the VQ decoder, and the side of the squares that it runs on."""
    widths = [vq["base_channels"] * m for m in vq["channel_multiplier"]]
    inner, side = widths[-1], vq["num_patches"]
    yield (vq["embed_dim"] + 1) * vq["latent_channels"], side
    yield (9 * vq["latent_channels"] + 1) * inner, side
    yield 2 * _residual(inner, inner) + _attention(inner), side
    for level in reversed(range(len(widths))):
        outer = widths[level]
        for _ in range(vq["num_res_blocks"] + 1):
            yield _residual(inner, outer) + (_attention(outer) if level == len(widths) - 1 else 0), side
            inner = outer
        if level:
            side *= 2
            yield (9 * inner + 1) * inner, side
    yield 2 * inner + (9 * inner + 1) * vq["out_channels"], side

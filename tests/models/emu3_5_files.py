"""The published files of a tiny random Emu3.5, with weights that their names determine."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.models.deepseek_files import value

CODES = 24
MERGED = [
    "re", "he", "the", "in", "an", "red", " a", " re", " red", "ci", "rc", "cir", "circ", "le", "circle", " circle",
    " t", " the", "US", "USER", "lo", "ll", "hello", "el", "hel", "'s", "  ", "aa", "aaa",
]  # fmt: skip
RANKS = [bytes([n]) for n in range(256)] + [text.encode() for text in MERGED]
VISION_TOKENS = ["<|image token|>", "<|image start|>", "<|image end|>"]
VISION_TOKENS += [f"<|visual token {code:06d}|>" for code in range(CODES)]
VOCABULARY = len(RANKS) + 3 + 205 + len(VISION_TOKENS)
BOS = len(RANKS) + 3 + 203
CONFIG = {
    "model_type": "Emu3",
    "architectures": ["Emu3ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"},
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "max_position_embeddings": 512,
    "pad_token_id": len(RANKS), "bos_token_id": BOS, "eos_token_id": BOS + 1, "img_token_id": BOS + 2,
    "boi_token_id": BOS + 3, "eoi_token_id": BOS + 4, "eol_token_id": BOS - 3, "eof_token_id": BOS - 2,
}  # fmt: skip
VISION = {
    "ddconfig": {
        "double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
    },
    "n_embed": CODES,
    "embed_dim": 4,
    "beta": 0.25,
}  # fmt: skip
TEXTS = ["a red circle", "hello, it's the 1234\n\n  Ünï 漢字 e\u0301", "USER aaaa  <|extra_100|> the"]


def language_shapes() -> dict[str, tuple[int, ...]]:
    width, inner, dim = 32, 48, 24
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (VOCABULARY, width),
    }
    for n in range(2):
        place = f"model.layers.{n}"
        for name, shape in {
            "self_attn.q_proj": (2 * dim, width), "self_attn.k_proj": (dim, width), "self_attn.v_proj": (dim, width),
            "self_attn.o_proj": (width, 2 * dim), "self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,),
            "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
            "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }.items():  # fmt: skip
            shapes[f"{place}.{name}.weight"] = shape
    return shapes


def vision_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"quantize.embedding.weight": (CODES, 4)}

    def conv(name: str, inner: int, outer: int, kernel: int = 1) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outer, inner, kernel, kernel), (outer,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str) -> None:
        norm(f"{name}.norm1", 32), conv(f"{name}.conv1", 32, 32, 3)
        norm(f"{name}.norm2", 32), conv(f"{name}.conv2", 32, 32, 3)

    def attention(name: str) -> None:
        norm(f"{name}.norm", 32)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", 32, 32)

    conv("quant_conv", 4, 4), conv("post_quant_conv", 4, 4)
    for part, levels, blocks, (first, last) in (
        ("encoder", "down", 1, ((3, 32), (32, 4))),
        ("decoder", "up", 2, ((4, 32), (32, 3))),
    ):
        conv(f"{part}.conv_in", *first, 3), norm(f"{part}.norm_out", 32), conv(f"{part}.conv_out", *last, 3)
        block(f"{part}.mid.block_1"), attention(f"{part}.mid.attn_1"), block(f"{part}.mid.block_2")
        for level in range(2):
            for n in range(blocks):
                block(f"{part}.{levels}.{level}.block.{n}")
                if level == 1:
                    attention(f"{part}.{levels}.{level}.attn.{n}")
    conv("encoder.down.0.downsample.conv", 32, 32, 3), conv("decoder.up.1.upsample.conv", 32, 32, 3)
    return shapes


def language_tensors() -> dict[str, torch.Tensor]:
    return {name: value(name, shape) for name, shape in language_shapes().items()}


def vision_tensors() -> dict[str, torch.Tensor]:
    return {name: value(name, shape) for name, shape in vision_shapes().items()}


def write_tokenizer(folder: Path) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(RANKS)]
    (folder / "emu3.tiktoken").write_text("".join(lines))
    (folder / "emu3_vision_tokens.txt").write_text("\n".join(VISION_TOKENS) + "\n")


def write_language(folder: Path, **changes: Any) -> Path:
    """The folder of Emu3.5; changes: of its config.json."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(language_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def write_vision(folder: Path, *, form: str = "ckpt") -> Path:
    """The folder of Emu3.5-VisionTokenizer; form: ckpt, nested (a ckpt with state_dict) or safetensors."""
    from safetensors.torch import save_file

    folder.mkdir()
    if form == "safetensors":
        (folder / "config.json").write_text(json.dumps(VISION))
        save_file(vision_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    (folder / "config.yaml").write_text(yaml.safe_dump(VISION))
    tensors = vision_tensors()
    torch.save({"state_dict": tensors} if form == "nested" else tensors, folder / "model.ckpt")
    return folder

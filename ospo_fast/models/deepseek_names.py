"""Names of tensors: of DeepSeek's modules, of transformers' `JanusForConditionalGeneration`, and of LoRA matrices.

Needs no torch. In the patterns `*` is the rest of a name, `#` the number of a layer, and `%` a number of an
`nn.Sequential` with an activation between the linear layers: 2, 4, … there are 0, 1, … in transformers.
"""

from __future__ import annotations

import functools
import re

_VISION = ("vision_model.vision_tower.", "model.vision_model.")
_BLOCK = (_VISION[0] + "blocks.#.", _VISION[1] + "encoder.layers.#.")
_VQ = ("gen_vision_model.", "model.vqmodel.")
# DeepSeek's pattern, transformers' pattern. The first that matches counts, in both directions.
_TABLE = (
    ("language_model.lm_head.*", "lm_head.*"),
    ("language_model.model.*", "model.language_model.*"),
    (_VISION[0] + "patch_embed.proj.*", _VISION[1] + "embeddings.patch_embedding.*"),
    (_VISION[0] + "pos_embed", _VISION[1] + "embeddings.position_embedding.weight"),
    (_VISION[0] + "norm.*", _VISION[1] + "post_layernorm.*"),
    (_BLOCK[0] + "norm1.*", _BLOCK[1] + "layer_norm1.*"),
    (_BLOCK[0] + "norm2.*", _BLOCK[1] + "layer_norm2.*"),
    (_BLOCK[0] + "mlp.*", _BLOCK[1] + "mlp.*"),
    (_BLOCK[0] + "attn.proj.*", _BLOCK[1] + "self_attn.projection_layer.*"),
    *((f"{_BLOCK[0]}attn.qkv.*|{part}", f"{_BLOCK[1]}self_attn.{part}_proj.*") for part in "qkv"),
    *(
        pair
        for half, blocks in (("encoder", "down"), ("decoder", "up"))
        for pair in (
            (f"{_VQ[0]}{half}.conv_blocks.#.res.*", f"{_VQ[1]}{half}.{blocks}.#.block.*"),
            (f"{_VQ[0]}{half}.conv_blocks.#.*", f"{_VQ[1]}{half}.{blocks}.#.*"),
            *(
                (f"{_VQ[0]}{half}.mid.{i}.*", f"{_VQ[1]}{half}.mid.{name}.*")
                for i, name in enumerate(("block_1", "attn_1", "block_2"))
            ),
        )
    ),
    (_VQ[0] + "*", _VQ[1] + "*"),
    *(
        pair
        for theirs, ours in (("aligner.layers", "model.aligner"), ("gen_aligner.layers", "model.generation_aligner"))
        for pair in ((f"{theirs}.0.*", f"{ours}.fc1.*"), (f"{theirs}.%.*", f"{ours}.hidden_layers.%.*"))
    ),
    ("gen_head.output_mlp_projector.*", "model.generation_head.proj_out.*"),
    ("gen_head.vision_head.*", "model.generation_head.vision_head.*"),
    ("gen_embed.*", "model.generation_embeddings.*"),
)
# Part of the checkpoints, used in no forward pass, and unknown to transformers.
_UNUSED = re.compile(r"vision_model\.vision_tower\.attn_pool\..+|gen_vision_model\.quantize\.codebook_used")
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")  # of checkpoints of early versions of transformers
POS_EMBED = _VISION[0] + "pos_embed"  # (1, N, D) there, (N, D) in transformers
TRAINER = "model."  # the prefix of a model in the official trainer
_TRAINER_LORA = "model.language_model.base_model.model."
_PEFT = "base_model.model."


def is_unused(name: str) -> bool:
    """Return whether a tensor of DeepSeek's layout has no effect, and no place in transformers."""
    return _UNUSED.fullmatch(name) is not None


def is_derived(name: str) -> bool:
    """Return whether a tensor of DeepSeek's layout follows from config.json."""
    return _DERIVED.fullmatch(name) is not None


@functools.cache
def to_transformers(name: str) -> tuple[str, ...]:
    """Return the names in transformers of a tensor of DeepSeek's layout: three of a fused qkv, none if unknown."""
    if is_unused(name) or is_derived(name):
        return ()
    found = []
    for theirs, ours in _TABLE:
        pattern, _, part = theirs.partition("|")
        if (renamed := _rename(name, pattern, ours, -1)) is not None:
            found.append(renamed)
            if not part:
                break
        elif found:
            break
    return tuple(found)


@functools.cache
def to_deepseek(name: str) -> tuple[str, int] | None:
    """Return the name in DeepSeek's layout of a tensor of transformers', and which third of it that is.

    The second is 0, or 1 or 2 for k and v of a fused qkv. None if the name is unknown.
    """
    for theirs, ours in _TABLE:
        pattern, _, part = theirs.partition("|")
        if (renamed := _rename(name, ours, pattern, 1)) is not None:
            return renamed, "qkv".index(part or "q")
    return None


def _rename(name: str, pattern: str, target: str, step: int) -> str | None:
    """Return the name that `target` gives for what `pattern` matches; None if it does not match."""
    match = _compiled(pattern).fullmatch(name)
    if match is None:
        return None
    values = iter(match.groups())

    def fill(wildcard: re.Match[str]) -> str:
        value = next(values)
        if wildcard[0] != "%":
            return value
        # 2, 4, … of an nn.Sequential are 0, 1, … of a list.
        return str(int(value) // 2 - 1 if step < 0 else 2 * int(value) + 2)

    if "%" in pattern and step < 0 and (int(match[1]) % 2 or not int(match[1])):
        return None
    return re.sub(r"[*#%]", fill, target)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    kinds = {"*": "(.+)", "#": r"(\d{1,4})", "%": r"(\d{1,4})"}
    return re.compile("".join(kinds.get(part, re.escape(part)) for part in re.split(r"([*#%])", pattern)))


def peft_name(name: str) -> str | None:
    """Return the name in peft's file of a LoRA matrix of the official trainer; None if it is none."""
    if not name.startswith(_TRAINER_LORA) or not re.search(r"\.lora_[AB]\.default\.weight$", name):
        return None
    found = to_transformers("language_model." + name.removeprefix(_TRAINER_LORA))
    return _PEFT + found[0].replace(".default.weight", ".weight") if found else None


def trainer_lora_name(name: str) -> str | None:
    """Return the name in the official trainer of a LoRA matrix in peft's file; None for one of another module."""
    if not name.startswith(_PEFT) or not re.search(r"\.lora_[AB]\.weight$", name):
        return None
    found = to_deepseek(name.removeprefix(_PEFT))
    if found is None or not found[0].startswith("language_model."):
        return None
    return _TRAINER_LORA + found[0].removeprefix("language_model.").removesuffix(".weight") + ".default.weight"


def trainer_weight_name(name: str) -> str:
    """Return the name in DeepSeek's layout of a weight in the official trainer, also one under LoRA layers."""
    if name.startswith(_TRAINER_LORA):
        return "language_model." + name.removeprefix(_TRAINER_LORA).replace(".base_layer.", ".")
    return name.removeprefix(TRAINER)

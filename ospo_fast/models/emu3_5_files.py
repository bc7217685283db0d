"""Emu3.5 as it is published: a language model with code of its own, a list of BPE ranks, and an IBQ model apart.

`load_original` makes an `Emu35ForCausalLM` of them, and a tokenizer in the form of `tokenizers`. Only tensors and texts
are read, and no code runs. Light to import.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import OspoError
from ospo_fast.files import read_bytes, read_yaml, reading, yaml_loader
from ospo_fast.models import folder_checks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ospo_fast.models.adapter import Adapter

BASE = "the folder of Emu3.5-VisionTokenizer, which has the codes and pixels of"
RANKS, VISION_TOKENS = "emu3.tiktoken", "emu3_vision_tokens.txt"
NAMED_TOKENS: dict[str, Any] = {
    "bos_token": "<|extra_203|>",
    "eos_token": "<|extra_204|>",
    "pad_token": "<|endoftext|>",
    "extra_special_tokens": {
        "image_token": "<|image token|>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    },
}
"""Arguments of a tokenizer of transformers."""
# What a config.json leaves out is the default of the official class.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 184622, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 9216, "initializer_range": 0.02, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "pad_token_id": 151643, "bos_token_id": 151849, "eos_token_id": 151850, "attention_dropout": 0.1,
    "rope_theta": 1_000_000.0,
}  # fmt: skip
# Of the official config.yaml → ChameleonVQVAEConfig.
_VQ_KEYS = {
    "ch": "base_channels", "ch_mult": "channel_multiplier", "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions", "resolution": "resolution", "z_channels": "latent_channels",
    "in_channels": "in_channels", "double_z": "double_latent",
}  # fmt: skip
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXTRA = 205  # tokens <|extra_0|> …
_TOKENIZER_AGAIN = "copy src/tokenizer_emu3_ibq/ of the official code (baaivision/Emu3.5) into the folder"
_VISION_AGAIN = "download BAAI/Emu3.5-VisionTokenizer again"


def is_original(folder: Path) -> bool:
    """Return whether a folder is a published Emu3.5: of the `model_type` of the first Emu3, with norms of queries."""
    if folder_checks.read_json(folder / "config.json").get("model_type") != "Emu3":
        return False
    shapes = folder_checks.tensor_shapes(folder_checks.weight_files(folder))
    return any(name.endswith(".self_attn.q_norm.weight") for name in shapes)


def refuse_original(folder: Path) -> None:
    """Raise OspoError for a folder that has to be converted first."""
    if is_original(folder):
        raise OspoError(
            f"model: {folder} is an Emu3.5 without the model of its pixels; convert it: ospo-fast convert {folder} "
            "NEW_FOLDER --to transformers --base FOLDER_OF_Emu3.5-VisionTokenizer"
        )


def check_base(base: str) -> None:
    """Raise OspoError unless `base` is the folder of a vision tokenizer."""
    folder = Path(base)
    if not folder.is_dir():
        raise OspoError(f"--base: got {base!r:.60}, expected {BASE} an Emu3.5; download BAAI/Emu3.5-VisionTokenizer")
    _vision_files(folder)


def load_original(folder: Path, base: str, dtype: torch.dtype) -> Adapter:
    """Load an Emu3.5 on the CPU. `base`: the folder of its vision tokenizer.

    Raises OspoError: files are missing or damaged, or tensors are not those that the configurations describe.
    """
    import torch
    from transformers import Emu3ImageProcessor, Emu3Processor, GenerationConfig

    from ospo_fast.models import loading
    from ospo_fast.models.emu3_5 import Emu35Config, Emu35ForCausalLM, Emu35UnifiedModel
    from ospo_fast.models.tensor_files import open_tensors

    tokenizer, language = build_tokenizer(folder), _language_config(folder)
    if (bos := language["bos_token_id"]) != tokenizer.bos_token_id:
        raise OspoError(
            f"convert: {folder} has the bos_token_id {bos} in config.json, expected {tokenizer.bos_token_id}, that of "
            f"{tokenizer.bos_token} in its tokenizer; {_TOKENIZER_AGAIN}"
        )
    # As in the official code, which does not read those of config.json.
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vq, vision = _vision_files(Path(base))
    tensors = open_tensors(folder_checks.weight_files(folder))
    tensors |= {f"vqmodel.{name}": tensor for name, tensor in _vision_tensors(vision).items()}
    folder_checks.check_counts(folder / "config.json", {**language, "vq_config": vq}, len(tensors))
    with loading(f"{folder} and {base} do not describe a model", "download them again"):
        config = Emu35Config(**{**language, **ids, "vq_config": vq})
        with torch.device("meta"):
            expected = Emu35ForCausalLM(config).state_dict()
    for name, tensor in tensors.items():
        described = Path(base) if name.startswith("vqmodel.") else folder / "config.json"
        if name not in expected:
            raise OspoError(f"convert: there is a tensor {name}, which by {described} the model does not have")
        folder_checks.check_shape(described, name, list(expected[name].shape), list(tensor.shape))
    folder_checks.refuse_missing(set(expected) - set(tensors), f"{folder} with {base}", "download them again")
    module = Emu35ForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    module.generation_config = GenerationConfig(**ids)
    processor = Emu3Processor(Emu3ImageProcessor(), tokenizer)
    pixels = 2 ** (len(vq["channel_multiplier"]) - 1)  # of one code: the size of images is not known yet
    return Emu35UnifiedModel(module.eval(), processor, name=str(folder), image_size=(pixels, pixels))


def _language_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = folder_checks.read_json(path)
    if config.get("rope_scaling") is not None:
        raise OspoError(f"convert: {path} has rope_scaling {config['rope_scaling']!r:.60}, expected null")
    found = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    found["rope_parameters"] = {"rope_type": "default", "rope_theta": found.pop("rope_theta")}
    return found


def _vision_files(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The configuration of an IBQ model, as that of a ChameleonVQVAE, and its weights."""
    import yaml

    weights = folder / "model.ckpt"
    files = [weights] if weights.is_file() else folder_checks.weight_files(folder)
    path = folder / "config.yaml"
    if path.is_file():
        with reading("configuration", path, _VISION_AGAIN):
            config = yaml.load(read_yaml(path), Loader=yaml_loader())
    else:
        path = folder / "config.json"
        config = folder_checks.read_json(path)
    inner = config.get("ddconfig") if isinstance(config, dict) else None
    missing = [f"ddconfig.{key}" for key in _VQ_KEYS if not isinstance(inner, dict) or key not in inner]
    missing += [key for key in ("n_embed", "embed_dim") if key not in config] if isinstance(config, dict) else []
    if missing:
        raise OspoError(f"convert: {path} has no {', '.join(missing)}, which an IBQ model needs; {_VISION_AGAIN}")
    assert isinstance(inner, dict)
    found = {own: inner[key] for key, own in _VQ_KEYS.items()}
    return {**found, "num_embeddings": config["n_embed"], "embed_dim": config["embed_dim"]}, files


def _vision_tensors(files: list[Path]) -> dict[str, Tensor]:
    from ospo_fast.models.tensor_files import check_tensors, open_pickled, open_tensors

    if files[0].suffix != ".ckpt":
        return open_tensors(files)
    content = open_pickled(files[0])
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    return check_tensors(content, files[0])


def build_tokenizer(folder: Path) -> Any:
    """Build a tokenizer of transformers from `emu3.tiktoken` and `emu3_vision_tokens.txt` of a folder.

    A line of the former is a token in base 64 and its rank, by which pairs of tokens are merged. The ids of special
    tokens follow the ranks.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = folder / RANKS
    with reading("ranks", path, _TOKENIZER_AGAIN):
        lines = [line.split() for line in read_bytes(path).decode().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("its ranks are not 0, 1, 2 …, each once")
    with reading("tokens", folder / VISION_TOKENS, _TOKENIZER_AGAIN):
        vision = [token.strip() for token in read_bytes(folder / VISION_TOKENS).decode().splitlines()]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(_EXTRA))]
    special += [token for token in vision if token]

    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    tokenizer = Tokenizer(
        models.BPE(
            {text(token): rank for token, rank in ranks.items()},
            [(text(first), text(second)) for first, second in merges],
            ignore_merges=True,
        )
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **NAMED_TOKENS)

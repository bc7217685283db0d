"""Emu3.5 as it is published: a language model with code of its own, a list of BPE ranks, and an IBQ model apart.

`load_original` makes an `Emu35ForCausalLM` and its processor of them. Only tensors and texts are read, no code runs.
Light to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import OspoError
from ospo_fast.files import read_yaml, reading, yaml_loader
from ospo_fast.models import folder_checks
from ospo_fast.models.emu3_5_tokenizer import AGAIN as TOKENIZER_AGAIN
from ospo_fast.models.emu3_5_tokenizer import build_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ospo_fast.models.adapter import Adapter

BASE = "the folder of Emu3.5-VisionTokenizer, which has the codes and pixels of"
# What a config.json leaves out is the default of the official class.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 184622, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 9216, "initializer_range": 0.02, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "attention_dropout": 0.1, "rope_theta": 1_000_000.0,
}  # fmt: skip
_TOKEN_IDS = {
    "bos_token_id": ("<|extra_203|>", 151849), "img_token_id": ("<|image token|>", 151851),
    "boi_token_id": ("<|image start|>", 151852), "eoi_token_id": ("<|image end|>", 151853),
    "eol_token_id": ("<|extra_200|>", 151846), "eof_token_id": ("<|extra_201|>", 151847),
}  # fmt: skip
# Of the official config.yaml → ChameleonVQVAEConfig.
_VQ_SIZES = {
    "ddconfig.ch": "base_channels", "ddconfig.num_res_blocks": "num_res_blocks", "ddconfig.resolution": "resolution",
    "ddconfig.z_channels": "latent_channels", "n_embed": "num_embeddings", "embed_dim": "embed_dim",
}  # fmt: skip
_VQ_LISTS = {"ddconfig.ch_mult": "channel_multiplier", "ddconfig.attn_resolutions": "attn_resolutions"}
# What the classes here build, where the official ones know more.
_VQ_FIXED = {"double_z": False, "in_channels": 3, "out_ch": 3, "resamp_with_conv": True, "give_pre_end": False}
_MODEL_AGAIN = "download the model again"
_VISION_AGAIN = "download BAAI/Emu3.5-VisionTokenizer"


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
    _vision_config(Path(base))
    _vision_weights(Path(base))


def load_original(folder: Path, base: str, dtype: torch.dtype) -> Adapter:
    """Load an Emu3.5 on the CPU. `base`: the folder of its vision tokenizer.

    Raises OspoError: files are missing or damaged, or tensors are not those that the configurations describe.
    """
    import torch
    from transformers import Emu3ImageProcessor, Emu3Processor, GenerationConfig

    from ospo_fast.models import loading
    from ospo_fast.models.emu3_5 import Emu35Config, Emu35ForCausalLM, Emu35UnifiedModel
    from ospo_fast.models.tensor_files import common_dtype, open_tensors

    tokenizer, path = build_tokenizer(folder), folder / "config.json"
    language, (vision_path, vq) = _language_config(path, tokenizer), _vision_config(Path(base))
    tensors = open_tensors(folder_checks.weight_files(folder))
    vision = _vision_tensors(_vision_weights(Path(base)))
    common_dtype(vision, base)  # refuses integers
    folder_checks.check_counts(path, language, len(tensors))
    folder_checks.check_counts(vision_path, vq, len(vision))
    with loading(f"{folder} and {base} do not describe a model", "download them again"):
        config = Emu35Config(**{**language, "vq_config": vq})
        folder_checks.check_kind(config.to_dict(), str(folder))
        with torch.device("meta"):
            expected = Emu35ForCausalLM(config).state_dict()
    weights = {}
    for described, prefix, found in ((path, "", tensors), (vision_path, "vqmodel.", vision)):
        for name, tensor in found.items():
            own = expected.get(prefix + name) if prefix or not name.startswith("vqmodel.") else None
            if own is None:
                if name.endswith(".rotary_emb.inv_freq"):
                    continue  # which follows from config.json
                raise OspoError(
                    f"convert: the weights have a tensor {name}, which by {described} the model does not have; "
                    "download both again"
                )
            folder_checks.check_shape(described, name, list(own.shape), list(tensor.shape))
            weights[prefix + name] = tensor
    folder_checks.refuse_missing(set(expected) - set(weights), f"{folder} with {base}", "download them again")
    module = Emu35ForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    module.generation_config = GenerationConfig(**_text_ids(tokenizer))
    processor = Emu3Processor(Emu3ImageProcessor(), tokenizer)
    pixels = 2 ** (len(vq["channel_multiplier"]) - 1)  # of one code: the size of images is not known yet
    return Emu35UnifiedModel(module.eval(), processor, name=str(folder), image_size=(pixels, pixels))


def _text_ids(tokenizer: Any) -> dict[str, Any]:
    return {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _language_config(path: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the arguments of an `Emu35Config`, without those of the IBQ model."""
    config = folder_checks.read_json(path)
    for key, (token, default) in _TOKEN_IDS.items():
        given, own = config.get(key, default), tokenizer.convert_tokens_to_ids(token)
        if given != own:
            raise OspoError(
                f"convert: {path} has the {key} {given!r:.60}, expected {own}, that of {token} in its tokenizer; "
                f"{TOKENIZER_AGAIN}"
            )
    found = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    theta = found.pop("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < float("inf"):
        raise OspoError(f"convert: {path} has rope_theta {theta!r:.60}, expected a number above 0; {_MODEL_AGAIN}")
    rope = {"rope_type": "default", "rope_theta": theta}
    for key, accepted, what in (
        ("rope_scaling", [None], "null"),
        ("rope_parameters", [None, rope], f"null and {theta} as rope_theta"),
        ("tie_word_embeddings", [None, False], "false and a head of its own, lm_head.weight"),
    ):
        if (value := config.get(key)) not in accepted:
            raise OspoError(f"convert: {path} has {key} {value!r:.80}, expected {what}; {_MODEL_AGAIN}")
    # A tokenizer that lacks a token would move the ids of others: `Emu35UnifiedModel` compares them.
    added, first = tokenizer.get_added_vocab(), "<|visual token 000000|>"
    kept = {token: number for token, number in added.items() if number <= added.get(first, 0)}
    return {
        **found,
        **_text_ids(tokenizer),  # as in the official code, which does not read those of config.json
        "rope_parameters": rope,
        "vocabulary_map": kept,
    }


def _vision_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of the configuration of an IBQ model, and that of a ChameleonVQVAE."""
    import yaml

    expected = f"--base: got {str(folder)!r:.80}, expected {BASE} an Emu3.5"
    if not folder.is_dir():
        raise OspoError(f"{expected}; {_VISION_AGAIN}")
    path = folder / "config.yaml"
    if path.exists():
        with reading("configuration", path, _VISION_AGAIN):
            config = yaml.load(read_yaml(path), Loader=yaml_loader())
    elif (path := folder / "config.json").exists():
        config = folder_checks.read_json(path)
    else:
        raise OspoError(f"{expected}: it has no config.yaml; {_VISION_AGAIN}")
    if not isinstance(config, dict) or not isinstance(config.get("ddconfig"), dict):
        raise OspoError(f"{expected}: {path} is not that of an IBQ model, which has ddconfig; {_VISION_AGAIN}")
    values = {**config, **{f"ddconfig.{key}": value for key, value in config["ddconfig"].items()}}
    if missing := [key for key in (*_VQ_SIZES, *_VQ_LISTS) if key not in values]:
        raise OspoError(f"convert: {path} has no {', '.join(missing)}, which an IBQ model needs; {_VISION_AGAIN}")
    for key in (*_VQ_SIZES, *_VQ_LISTS):
        numbers = [values[key]] if key in _VQ_SIZES else values[key] or []
        if not isinstance(numbers, list) or any(type(number) is not int or number < 1 for number in numbers):
            what = "an integer" if key in _VQ_SIZES else "a list of integers"
            raise OspoError(f"convert: {path} has {key} {values[key]!r:.60}, expected {what} above 0; {_VISION_AGAIN}")
    for key, fixed in _VQ_FIXED.items():
        if (value := config["ddconfig"].get(key, fixed)) != fixed:
            raise OspoError(
                f"convert: {path} has ddconfig.{key} {value!r:.60}, expected {fixed}, as in the published one; "
                f"{_VISION_AGAIN}"
            )
    return path, {own: values[key] or [] for key, own in (_VQ_SIZES | _VQ_LISTS).items()}


def _vision_weights(folder: Path) -> list[Path]:
    weights = folder / "model.ckpt"
    if weights.is_file():
        return [weights]
    if not any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise OspoError(
            f"--base: got {str(folder)!r:.80}, expected {BASE} an Emu3.5: it has neither model.ckpt nor "
            f"model.safetensors; {_VISION_AGAIN}"
        )
    return folder_checks.weight_files(folder)


def _vision_tensors(files: list[Path]) -> dict[str, Tensor]:
    from ospo_fast.models.tensor_files import check_tensors, open_pickled, open_tensors

    if files[0].suffix != ".ckpt":
        return open_tensors(files)
    content = open_pickled(files[0])
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    return check_tensors(content, files[0])

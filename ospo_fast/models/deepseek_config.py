"""config.json of DeepSeek's layout of Janus and Janus-Pro, to and from transformers' `JanusConfig`. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ospo_fast.errors import OspoError

KIND = "multi_modality"
# What the class of a vision tower builds: sizes are not in config.json. (width, layers, heads, patch_size, mlp_ratio)
_TOWER_KEYS = ("width", "layers", "heads", "patch_size", "mlp_ratio")
_SO400M = (1152, 27, 16, 14, 3.7362)
_TOWERS = {
    "siglip_large_patch16_384": (1024, 24, 16, 16, 4),
    "siglip_so400m_patch14_384": _SO400M,
    "siglip_so400m_patch14_224": _SO400M,
}
# The same of VQ-16: DeepSeek's name, transformers' name, size.
_VQ = (
    ("ch", "base_channels", 128),
    ("ch_mult", "channel_multiplier", [1, 1, 2, 2, 4]),
    ("num_res_blocks", "num_res_blocks", 2),
    ("z_channels", "latent_channels", 256),
)
# Of language_config: what shapes or computes, with the defaults of LlamaConfig that its published forms rely on.
_LANGUAGE = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False, "head_dim": None, "tie_word_embeddings": False,
}  # fmt: skip
_PUBLISHED = tuple(_LANGUAGE)[:7]
_THETA = 10000.0
# Of other values transformers' module has no counterpart in DeepSeek's classes.
_FIXED = {
    "vision_config": {
        "hidden_act": "gelu", "layer_norm_eps": 1e-6, "attention_bias": True, "use_qk_norm": False, "num_channels": 3,
    },
    "vq_config": {"hidden_act": "gelu", "double_latent": False, "in_channels": 3, "out_channels": 3},
}  # fmt: skip
_AGAIN = "save or download the model again"


def is_deepseek(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is of DeepSeek's layout."""
    return config.get("model_type") == KIND


def to_janus(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the arguments of a JanusConfig for a config.json of DeepSeek's layout, without the ids of tokens.

    Raises OspoError for another model than Janus or Janus-Pro, and for values that are missing or contradictory.
    """
    reader = _Reader(config, name)
    for section, classes in (
        ("vision_config", ("CLIPVisionTower",)),
        ("aligner_config", ("MlpProjector",)),
        ("gen_vision_config", ("VQ-16",)),
        ("gen_aligner_config", ("MlpProjector",)),
        ("gen_head_config", ("vision_head",)),
    ):
        if reader.section(section).get("cls") not in classes:
            raise reader.error(f"{section}.cls", reader.section(section).get("cls"), " or ".join(classes))
    language = reader.section("language_config")
    text: dict[str, Any] = {"model_type": language.get("model_type", "llama")}
    text |= {key: language.get(key, default) for key, default in _LANGUAGE.items()}
    scaling = language.get("rope_scaling") or {}
    rope = {"rope_type": "default", "rope_theta": language.get("rope_theta") or _THETA}
    rope |= {"rope_type" if key == "type" else key: value for key, value in dict(scaling).items()}
    text["rope_parameters"] = {**rope, **(language.get("rope_parameters") or {})}

    width, layers, heads, patch, ratio = reader.tower()
    image_size = reader.count("vision_config", "image_size")
    hidden = reader.count("aligner_config", "n_embed")
    head, codes = reader.count("gen_head_config", "image_token_embed"), reader.count("gen_vision_config", "n_embed")
    number = reader.count("gen_vision_config", "image_token_size")
    for section, key, size in (
        ("aligner_config", "input_dim", width),
        ("gen_aligner_config", "input_dim", codes),
        ("gen_aligner_config", "n_embed", head),
        ("gen_head_config", "image_token_size", number),
    ):
        if (count := reader.count(section, key)) != size:
            raise reader.error(f"{section}.params.{key}", count, f"{size}, the size of the part that it goes with")
    for section in ("aligner_config", "gen_aligner_config"):
        if (found := reader.params(section).get("projector_type")) != "mlp_gelu":
            raise reader.error(f"{section}.params.projector_type", found, "'mlp_gelu'")
    vq = reader.params("gen_vision_config")
    result = {
        "model_type": "janus",
        "text_config": text,
        "vision_config": {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": image_size,
            "patch_size": patch,
            "mlp_ratio": ratio,
            "projection_dim": hidden,
            "depth": reader.count("aligner_config", "depth", 1),
            "num_image_tokens": (image_size // patch) ** 2,
        },
        "vq_config": {
            "embed_dim": codes,
            "num_embeddings": number,
            "projection_dim": head,
            "image_token_embed_dim": reader.count("gen_head_config", "n_embed"),
            "num_hidden_layers": reader.count("gen_aligner_config", "depth", 1),
            "num_patches": image_size // patch,
            **{ours: vq.get(theirs, size) for theirs, ours, size in _VQ},
        },
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    if config.get("template_set") is not None:
        result["template_set"] = config["template_set"]
    return result


def from_janus(config: Any, dtype: str, name: str) -> dict[str, Any]:
    """Return the config.json of DeepSeek's layout for a JanusConfig.

    Sizes that DeepSeek's classes do not build are written too; see `is_published_size`.

    Raises OspoError for a model that DeepSeek's classes cannot compute.
    """
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    for section, values in _FIXED.items():
        for key, expected in values.items():
            if (found := getattr(getattr(config, section), key)) != expected:
                raise OspoError(
                    f"convert: {section}.{key} of {name} is {found!r:.60}, and DeepSeek's classes compute with "
                    f"{expected!r} alone; keep this model in transformers' layout"
                )
    language: dict[str, Any] = {key: getattr(text, key) for key in _PUBLISHED} | {"model_type": "llama"}
    usual = {**_LANGUAGE, "head_dim": text.hidden_size // text.num_attention_heads}
    language |= {key: found for key in usual if (found := getattr(text, key, usual[key])) != usual[key]}
    # transformers ties the head of the whole model, DeepSeek's classes that of the language model.
    language["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    if not language["tie_word_embeddings"]:
        del language["tie_word_embeddings"]
    rope = dict(text.rope_parameters or {})
    if (theta := rope.pop("rope_theta", _THETA)) != _THETA:
        language["rope_theta"] = theta
    if rope.pop("rope_type", "default") != "default":
        kind = text.rope_parameters["rope_type"]
        language["rope_scaling"] = {"rope_type": kind, "type": kind, **rope}
    language["torch_dtype"] = dtype
    tower, params = _find_tower(vision), {ours: getattr(vq, ours) for _, ours, _ in _VQ}
    sizes = {theirs: params[ours] for theirs, ours, size in _VQ if _plain(params[ours]) != size}

    def projector(kind: str, depth: int, inner: int, outer: int) -> dict[str, Any]:
        values = {"depth": depth, "input_dim": inner, "n_embed": outer, "projector_type": "mlp_gelu"}
        return {"cls": "MlpProjector", "model_type": kind, "params": values}

    head = {
        "image_token_embed": vq.projection_dim,
        "image_token_size": vq.num_embeddings,
        "n_embed": vq.image_token_embed_dim,
    }
    result = {
        "aligner_config": projector("aligner", vision.depth, vision.hidden_size, vision.projection_dim),
        "architectures": ["MultiModalityCausalLM"],
        "gen_aligner_config": projector("gen_aligner", vq.num_hidden_layers, vq.embed_dim, vq.projection_dim),
        "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": head},
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": vq.num_embeddings, "n_embed": vq.embed_dim, **sizes},
        },
        "language_config": dict(sorted(language.items())),
        "model_type": KIND,
        "torch_dtype": dtype,
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {"image_size": vision.image_size, "select_feature": "same", **tower},
        },
    }
    if (templates := getattr(config, "template_set", None)) not in (None, "janus"):
        result["template_set"] = templates
    return result


def is_published_size(config: Mapping[str, Any]) -> bool:
    """Return whether DeepSeek's own classes build what a config.json of its layout describes."""
    vision, vq = config["vision_config"]["params"], config["gen_vision_config"]["params"]
    extra = {*vision}.intersection(_TOWER_KEYS) | {*vq}.intersection(theirs for theirs, _, _ in _VQ)
    return not extra and (vq["image_token_size"], vq["n_embed"]) == (16384, 8)


def _find_tower(vision: Any) -> dict[str, Any]:
    """Return the entries of vision_config.params that say which tower is built."""
    ratio = vision.mlp_ratio
    sizes = (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.patch_size, ratio)
    for name, (width, layers, heads, patch, mlp) in _TOWERS.items():
        if (width, heads, patch, mlp) == (sizes[0], *sizes[2:]) and sizes[1] <= layers:
            return {"model_name": name, "select_layer": sizes[1] - layers - 1}
    explicit = dict(zip(_TOWER_KEYS, sizes, strict=True))
    return {"model_name": next(iter(_TOWERS)), "select_layer": -1, **explicit}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class _Reader:
    """Values of a config.json of DeepSeek's layout, checked."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self._config, self._name = config, name

    def error(self, key: str, found: object, expected: str) -> OspoError:
        return OspoError(
            f"model: {key} in the config.json of {self._name} is {found!r:.60}, expected {expected}; {_AGAIN}"
        )

    def section(self, name: str) -> dict[str, Any]:
        value = self._config.get(name)
        if value is None and name != "language_config":
            raise OspoError(
                f"model: the config.json of {self._name} has no {name}, so it is no Janus or Janus-Pro (DeepSeek-VL "
                "and JanusFlow have the same model_type); give one of these"
            )
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return value

    def params(self, name: str) -> dict[str, Any]:
        value = self.section(name).get("params")
        if not isinstance(value, dict):
            raise self.error(f"{name}.params", value, "an object")
        return value

    def count(self, section: str, key: str, default: int | None = None) -> int:
        """Return a size, which is a positive whole number."""
        value = self.params(section).get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(f"{section}.params.{key}", value, "a whole number of 1 or more")
        return value

    def tower(self) -> tuple[int, int, int, int, float]:
        """Return width, layers, heads, patch size and MLP ratio of the vision tower."""
        params = self.params("vision_config")
        name, selected = params.get("model_name"), params.get("select_layer", -1)
        if name not in _TOWERS:
            raise self.error("vision_config.params.model_name", name, f"one of {', '.join(_TOWERS)}")
        if params.get("pixel_mean") is not None and params.get("pixel_std") is not None:
            raise self.error("vision_config.params.pixel_mean", params["pixel_mean"], "none: the processor normalizes")
        values = {**dict(zip(_TOWER_KEYS, _TOWERS[name], strict=True)), **params}
        for key in _TOWER_KEYS:
            value = values[key]
            whole = type(value) is int or (key == "mlp_ratio" and type(value) is float and math.isfinite(value))
            if not whole or value <= 0:
                raise self.error(f"vision_config.params.{key}", value, "a number above 0")
        if type(selected) is not int:
            raise self.error("vision_config.params.select_layer", selected, "a whole number")
        # A layer of the tower counted from its end, or their number.
        layers = min(values["layers"], selected if selected > 0 else values["layers"] + selected + 1)
        if layers < 1:
            raise self.error("vision_config.params.select_layer", selected, f"a layer of the {values['layers']}")
        return values["width"], layers, values["heads"], values["patch_size"], values["mlp_ratio"]

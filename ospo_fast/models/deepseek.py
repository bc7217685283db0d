"""Checkpoints in DeepSeek's layout of Janus and Janus-Pro: read into transformers' classes, and written from them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import OspoError
from ospo_fast.models import deepseek_names as names
from ospo_fast.models import folder_checks
from ospo_fast.models.deepseek_config import from_janus, is_published_size, to_janus
from ospo_fast.models.tensor_files import common_dtype, open_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ospo_fast.models.janus import JanusUnifiedModel

logger = logging.getLogger(__name__)

UNUSED_FILE = "deepseek_unused.safetensors"  # in a folder of transformers' layout: what only DeepSeek's layout has
_CODEBOOK_USED = "gen_vision_model.quantize.codebook_used"
_CODEBOOK_SIZE = 65536  # of any codebook
_TAGS = {
    "image_tag": "<image_placeholder>",
    "image_start_tag": "<begin_of_image>",
    "image_end_tag": "<end_of_image>",
    "pad_tag": "<\uff5c\u2581pad\u2581\uff5c>",
}
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# The conversations of DeepSeek's code: a system message has no role, and two line ends after it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set role = message['role'] | lower %}"
    "{% if role == 'user' %}<|User|>: {% elif role == 'assistant' %}<|Assistant|>: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE_TAG{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% else %}{{ part['text'] | trim }}{% if not loop.last %} {% endif %}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


def load_deepseek(folder: Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Return transformers' module, on the CPU, and processor of a folder in DeepSeek's layout.

    Args:
        folder: with config.json, the tokenizer's and processor's files, and the weights.
        dtype: default: that of the weights, whose memory the module then shares with the files.

    Raises:
        OspoError: files are missing or damaged, or the weights are not those that config.json describes.

    """
    import torch
    import transformers

    config = folder_checks.read_json(folder / "config.json")
    arguments = to_janus(config, str(folder))
    processor = _load_processor(folder, arguments["vision_config"])
    tokenizer = processor.tokenizer
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # LlamaConfig has ids of its own, 1 and 2, which would end texts.
    arguments["text_config"] |= ids
    arguments |= {**ids, "image_token_id": tokenizer.convert_tokens_to_ids(tokenizer.image_token)}

    tensors = open_tensors(folder_checks.weight_files(folder, pickled=True))
    used = {name: tensor for name, tensor in tensors.items() if not (names.is_unused(name) or names.is_derived(name))}
    folder_checks.check_counts(folder / "config.json", arguments, len(used))
    janus = transformers.JanusConfig(**arguments)
    with torch.device("meta"):
        expected = restore_tensors(transformers.JanusForConditionalGeneration(janus).state_dict())
    tied, place = bool(janus.tie_word_embeddings), str(folder / "config.json")
    _check_against(expected, used, tied=tied, source=str(folder), described=place)
    module, info = transformers.JanusForConditionalGeneration.from_pretrained(
        None,
        config=janus,
        state_dict=convert_tensors(used, tied=tied, source=str(folder)),
        dtype=dtype or common_dtype(used, str(folder)),
        output_loading_info=True,
    )
    folder_checks.refuse_missing(info["missing_keys"], str(folder), "save or download it again")
    module.generation_config = transformers.GenerationConfig(
        **ids,
        guidance_scale=5.0,
        generation_kwargs={"boi_token_id": tokenizer.convert_tokens_to_ids(tokenizer.boi_token)},
    )
    return module, processor


def convert_tensors(tensors: Mapping[str, Tensor], *, tied: bool, source: str) -> dict[str, Tensor]:
    """Return tensors by transformers' names, as views of those by DeepSeek's names. All of them must be known."""
    import torch

    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = names.to_transformers(name)
        if name == names.POS_EMBED:
            tensor = tensor[0]
        result |= zip(found, tensor.chunk(len(found)), strict=True)
    head, embedding = "lm_head.weight", result.get("model.language_model.embed_tokens.weight")
    if tied and embedding is not None and head in result and not torch.equal(result.pop(head), embedding):
        raise OspoError(
            f"model: by config.json, language_model.lm_head.weight of {source} is the embedding, and it is not; set "
            "tie_word_embeddings of language_config to false"
        )
    return result


def restore_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by DeepSeek's names, of all tensors by transformers' names."""
    import torch

    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():  # q, k and v come in any order
        found = names.to_deepseek(name)
        if found is None:
            raise OspoError(
                f"convert: {name} has no place in DeepSeek's layout; keep this model in transformers' layout"
            )
        target, index = found
        own = parts.setdefault(target, [])
        own += [tensor] * (index + 1 - len(own))
        own[index] = tensor
    result = {name: own[0] if len(own) == 1 else torch.cat(own) for name, own in parts.items()}
    result[names.POS_EMBED] = result[names.POS_EMBED][None]
    return result


def load_weights(module: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put all weights, by DeepSeek's names, into transformers' module, in its dtype. Raises OspoError if any lacks."""
    import torch

    used = {name: tensor for name, tensor in tensors.items() if names.to_transformers(name)}
    state, tied = module.state_dict(), bool(module.config.tie_word_embeddings)
    expected = restore_tensors({name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()})
    _check_against(expected, used, tied=tied, source=source, described="the base model")
    module.load_state_dict(convert_tensors(used, tied=tied, source=source), strict=False)


def _check_against(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, tied: bool, source: str, described: str
) -> None:
    """Raise OspoError unless tensors have the names and shapes of those expected, and one dtype."""
    optional = {"language_model.lm_head.weight"} if tied else set()
    folder_checks.refuse_missing(
        {*expected} - {*tensors} - optional, source, "save or download it again, with all shards"
    )
    if unknown := sorted({*tensors} - {*expected}):
        raise OspoError(
            f"model: {source} has {len(unknown)} tensors that {described} does not have ({unknown[0]}, …); remove "
            "them, or give the config.json or base model that belongs to these weights"
        )
    for name, tensor in tensors.items():
        folder_checks.check_shape(Path(described), name, list(expected[name].shape), list(tensor.shape))
    common_dtype(tensors, source)


# Tokenizer and processor


def _load_processor(folder: Path, vision: Mapping[str, Any]) -> Any:
    """Build the processor of transformers from the files of DeepSeek's."""
    import transformers

    settings = {**_optional(folder / "processor_config.json")}
    pixels = folder_checks.read_json(folder / "preprocessor_config.json")
    tags = {key: str(settings.get(key, default)) for key, default in _TAGS.items()}
    size = pixels.get("image_size", vision["image_size"])
    if pixels.get("do_normalize", True) is not True:
        raise OspoError(
            f"model: do_normalize in the preprocessor_config.json of {folder} is {pixels['do_normalize']!r:.60}, "
            "expected true, as in the published models"
        )
    image_processor = transformers.JanusImageProcessorPil(
        size={"height": size, "width": size},
        **{key: pixels[key] for key in ("min_size", "image_mean", "image_std", "rescale_factor") if key in pixels},
    )
    tokenizer, template = _load_tokenizer(folder, tags), folder / "chat_template.jinja"
    if template.is_file():
        text = folder_checks.read_text(template)
    else:
        text = CHAT_TEMPLATE.replace("IMAGE_TAG", tags["image_tag"])
        if tokenizer.backend_tokenizer.token_to_id("<|User|>") is None:  # the roles of Janus are plain words
            text = text.replace("<|User|>", "User").replace("<|Assistant|>", "Assistant")
    return transformers.JanusProcessor(
        image_processor,
        tokenizer,
        chat_template=text,
        use_default_system_prompt=True,
        num_image_tokens=vision["num_image_tokens"],
    )


def _load_tokenizer(folder: Path, tags: Mapping[str, str]) -> Any:
    """Build the tokenizer from tokenizer.json as it is: the class that tokenizer_config.json names would rebuild it."""
    import transformers
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = _optional(folder / "tokenizer_config.json")
    settings = {**_optional(folder / "special_tokens_map.json"), **settings}
    special = {key: _content(settings[key]) for key in _TOKENS if settings.get(key) is not None}
    special.setdefault("pad_token", tags["pad_tag"])
    for what, token in (*special.items(), *tags.items()):
        if tokenizer.token_to_id(token) is None:
            raise OspoError(
                f"model: the tokenizer.json of {folder} lacks {token!r:.60}, the {what}; use that of the published "
                "model"
            )
    bos, eos = special.get("bos_token"), special.get("eos_token")
    if bos is None or eos is None:
        raise OspoError(
            f"model: the tokenizer_config.json of {folder} has no bos_token or no eos_token; use that of the published "
            "model"
        )
    # LlamaTokenizerFast, the class of DeepSeek's code, replaces that of tokenizer.json too.
    sides = [[bos] if settings.get("add_bos_token", True) else [], [eos] if settings.get("add_eos_token") else []]
    single = [*sides[0], "$A", *sides[1]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *sides[0], "$B", *sides[1]],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*sides[0], *sides[1]}],
    )
    limit = settings.get("model_max_length")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "image_token": tags["image_tag"],
            "boi_token": tags["image_start_tag"],
            "eoi_token": tags["image_end_tag"],
        },
        **({"model_max_length": limit} if type(limit) is int else {}),
        **special,
    )


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _optional(path: Path) -> dict[str, Any]:
    return folder_checks.read_json(path) if path.is_file() else {}


# Writing


def save_deepseek(model: JanusUnifiedModel, folder: Path, unused: Mapping[str, Tensor]) -> None:
    """Write a model in DeepSeek's layout to an existing, empty folder.

    Args:
        model: on the CPU.
        folder: gets what the published folders have: weights, config.json, and the files of tokenizer and processor.
        unused: tensors that only this layout has. Missing ones are written as zeros, which no forward pass reads.

    Raises:
        OspoError: DeepSeek's classes cannot compute this model.

    """
    import huggingface_hub

    model.complete_config()
    module, processor = model.module, model.processor
    dtype = str(model.dtype).removeprefix("torch.")
    config = from_janus(module.config, dtype, model.name)
    if not is_published_size(config):
        logger.warning(
            "%s has other sizes than the published models: this package loads the result, DeepSeek's code does not",
            model.name,
        )
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    tensors = restore_tensors(state)
    if model.is_tied:  # an own copy, since safetensors takes no tensor twice
        tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"].clone()
    tensors |= _complete_unused(module, unused)
    huggingface_hub.save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder,
        max_shard_size="5GB",
        metadata={"format": "pt"},
    )
    _write(folder / "config.json", config)
    _write_processor(model, folder)
    if config.get("template_set") is not None:
        (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")


def find_unused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of DeepSeek's tensors that transformers has no place for, unless all of their values are zero."""
    found = {name: tensor for name, tensor in tensors.items() if names.is_unused(name)}
    return found if any(tensor.count_nonzero() for tensor in found.values()) else {}


def _complete_unused(module: Any, unused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors that only DeepSeek's layout has, with the shapes of DeepSeek's classes."""
    import torch

    vision = module.config.vision_config
    width, inner = vision.hidden_size, int(vision.hidden_size * vision.mlp_ratio)
    pool = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width)}
    pool |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    shapes: dict[str, tuple[int, ...]] = {"latent": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    for part, size in pool.items():
        shapes |= {f"{part}.weight": size, f"{part}.bias": size[:1]}
    shapes = {f"vision_model.vision_tower.attn_pool.{name}": shape for name, shape in shapes.items()}
    shapes[_CODEBOOK_USED] = (_CODEBOOK_SIZE,)
    result = {}
    for name, shape in shapes.items():
        tensor = unused.get(name)
        fits = tensor is not None and tuple(tensor.shape) == shape
        result[name] = tensor if tensor is not None and fits else torch.zeros(shape, dtype=module.dtype)
    return result


def _write_processor(model: JanusUnifiedModel, folder: Path) -> None:
    processor, tokenizer = model.processor, model.processor.tokenizer
    pixels = processor.image_processor
    _write(
        folder / "preprocessor_config.json",
        {
            "background_color": [int(255 * value) for value in pixels.image_mean],
            "do_normalize": bool(pixels.do_normalize),
            "image_mean": list(pixels.image_mean),
            "image_processor_type": "VLMImageProcessor",
            "image_size": int(pixels.size["height"]),
            "image_std": list(pixels.image_std),
            "min_size": int(pixels.min_size),
            "processor_class": "VLChatProcessor",
            "rescale_factor": float(pixels.rescale_factor),
        },
    )
    own = (tokenizer.image_token, tokenizer.boi_token, tokenizer.eoi_token, tokenizer.pad_token)
    tags = dict(zip(_TAGS, map(str, own), strict=True))
    settings = {
        "add_special_token": False,
        "ignore_id": -100,
        "mask_prompt": True,
        "num_image_tokens": int(processor.num_image_tokens),
        "processor_class": "VLChatProcessor",
        "sft_format": "deepseek",
    }
    settings |= {key: tag for key, tag in tags.items() if key == "image_tag" or tag != _TAGS[key]}
    _write(folder / "processor_config.json", dict(sorted(settings.items())))
    special = {key: str(token) for key in _TOKENS if (token := getattr(tokenizer, key, None)) is not None}
    more = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in special.values()
    ]
    _write(folder / "special_tokens_map.json", {"additional_special_tokens": more, **special})
    ids = tokenizer("")["input_ids"]
    _write(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": ids[:1] == [model.bos_id],
            "add_eos_token": bool(ids) and ids[-1] == tokenizer.eos_token_id,
            "additional_special_tokens": more,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": int(tokenizer.model_max_length),
            "processor_class": "VLChatProcessor",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizerFast",
            "unk_token": None,
            "use_default_system_prompt": False,
            **special,
        },
    )
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

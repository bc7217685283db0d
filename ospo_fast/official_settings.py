"""YAML files of the official implementation (configs/step1.yaml to step5.yaml, ospo/attention/main.yaml) as settings.

Each file is of one step, and sets the sections of that step and the preset `official`. What has an effect on results
is translated, or refused where it cannot be; what names places and processes has none here, and is told of once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from ospo_fast.errors import UsageError
from ospo_fast.records import shown

logger = logging.getLogger(__name__)

# Keys at the top of official files, and of no file of ours.
_MARKS = frozenset(("seed_list", "generation_config", "ckpt_path", "algo", "experiment", "lora", "skip_layer_idx"))
_PROMPT_KINDS = (
    "color1 color2 texture1 texture2 shape1 shape2 2D_spatial 3D_spatial numeracy1 numeracy2 non-spatial complex"
)
KINDS = _PROMPT_KINDS.split()
_SECTIONS = {"negative": "perturb", "dense": "perturb", "question": "questions", "answer": "score"}  # of prompt_type
# Official keys and ours; {} is the section of the step.
_KEYS = {
    "batch_size": "{}.batch_size",
    "repeat": "prompts.samples_per_call",
    "interval": "prompts.refresh_every",
    "generation_config.temperature": "{}.temperature",
    "generation_config.top_p": "{}.top_p",
    "generation_config.max_new_tokens": "{}.max_new_tokens",
    "generation_config.cfg_weight": "images.guidance_scale",
    "use_mask": "masks.enabled",
    "mask_dir": "masks.official",
    "skip_layer_idx": "masks.skip_layers",
    "scaler": "masks.scaler",
    "lora.lora_rank": "train.lora_rank",
    "lora.lora_alpha": "train.lora_alpha",
    "lora.lora_dropout": "train.lora_dropout",
    "lora.target_modules": "train.lora_targets",
    "dataset.train.batch_size": "train.batch_size",
    "dataset.train.num_samples": "train.max_pairs",
    "optimizer.init_lr": "train.learning_rate",
    "optimizer.min_lr": "train.min_learning_rate",
    "optimizer.betas": "train.betas",
    "optimizer.eps": "train.eps",
    "optimizer.weight_decay": "train.weight_decay",
    "experiment.warmup_ratio": "train.warmup_ratio",
    "experiment.gradient_clip_val": "train.clip",
    "experiment.gradient_checkpointing": "train.gradient_checkpointing",
    "experiment.max_training_steps": "train.steps",
    "experiment.save_steps": "train.save_every",
    "algo.beta": "train.loss.beta",
    "algo.gamma_beta_ratio": "train.loss.gamma_beta_ratio",
    "algo.label_smoothing": "train.loss.label_smoothing",
    "algo.simpo_weight": "train.loss.simpo_weight",
    "algo.sft_weight": "train.loss.sft_weight",
    "algo.mask_alpha": "train.loss.mask_alpha",
    "algo.mask_gamma": "train.loss.mask_gamma",
}
_TRAINED = ("train",)
_FROZEN = ("vision_model", "aligner", "gen_vision_model", "gen_aligner", "gen_head", "gen_embed")
# Keys with the only values that can be done, and what to do in place of others.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "s_idx": ((None,), "use --shard i/n for a part of the items"),
    "e_idx": ((None,), "use --shard i/n for a part of the items"),
    "off_policy": ((False,), "only masks of the own images are read"),
    "generation_config.do_sample": ((True,), "set temperature: 0 for the most probable token"),
    "generation_config.num_beams": ((1,), "there is no beam search"),
    "generation_config.parallel_size": ((1,), "images.draws is the number of images of a prompt"),
    "aggregate": (("mean",), "masks.choose selects one layer"),
    "lora.modules_to_save": ((None,), "train.full trains all weights"),
    "algo.loss_type": (("sigmoid",), "there is no other loss"),
    "algo.schedule_loss_weight": ((False,), "the weights of the loss are constant"),
    "experiment.precision": (("bf16", "auto"), "set dtype in place of it"),
    "experiment.freeze.language_model": ((False,), "it is what is trained"),
    **dict.fromkeys(
        (f"experiment.freeze.{part}" for part in _FROZEN), ((True,), "the language model alone is trained")
    ),
}
# Keys that are read together with others.
_READ = ("model.model_path", "ckpt_path", "prompt_type", "category", "max_len", "use_peft", "optimizer.scheduler_type",
         "base.world_size", "experiment.gradient_accumulation_steps")  # fmt: skip
# Places, processes, logs: the run folder has the files, torchrun the processes. Seeds: the random numbers are others.
_NO_EFFECT = (
    "seed seed_list world_size num_workers data_path save_path save_name save_dir image_path save_attn img_constraint "
    "model.cache_dir model.attn_mode base.save_path base.exp_name base.resume dataset.train.num_workers "
    "dataset.train.data_path experiment.seed experiment.enable_checkpointing experiment.log_steps experiment.val_steps "
    "experiment.log_by_category experiment.padding_value experiment.label_pad_token_id tokenizer.max_length "
    "tokenizer.max_prompt_length tokenizer.truncation_mode tokenizer.truncation_side tokenizer.label_pad_token_id "
    "dataset.val"
)
_WITHOUT_EFFECT = frozenset(_NO_EFFECT.split())


def is_official(layer: Mapping[str, Any]) -> bool:
    """Return whether the content of a YAML file has keys of the official files."""
    return bool(_MARKS & layer.keys()) or isinstance(layer.get("model"), Mapping)  # ours is a text


def translate(layer: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the settings of an official file. Raises UsageError that names a key and what to do."""
    values = dict(_leaves(layer))
    section = _section(values, source)
    settings: dict[str, Any] = {"preset": "official", "select.rejected": "negative"}  # not that of a model's family
    ignored = []
    for key, value in values.items():
        target = _KEYS.get(key, "").format(section)
        known = [*_KEYS, *_FIXED, *_READ, *_WITHOUT_EFFECT]
        if key not in known and not key.startswith("dataset.val."):
            from ospo_fast.config import nearest

            raise UsageError(f"{source}: unknown key {key!r:.80} of the official files; {nearest(key, known)}.")
        if value is None:
            pass
        elif key in _FIXED:
            accepted, remedy = _FIXED[key]
            if value not in accepted:
                raise UsageError(f"{source}: {key} is {shown(value)}, expected {_listed(accepted)}; {remedy}.")
        elif target and _has_effect(section, target):
            settings[target] = value
        elif key not in _READ:
            ignored.append(key)
    settings |= _combined(values, section, source)
    if ignored:
        _tell(f"{source} is a file of the official code; without effect here: {', '.join(ignored)}")
    return _nested(settings)


def _has_effect(section: str, target: str) -> bool:
    """Return whether a setting is one of the step: a file of masks has some of training, one of answers of texts."""
    from ospo_fast.config import is_setting

    own = target.startswith(f"{section}.") or section in _TRAINED
    return own and is_setting(target) and target != "prompts.batch_size"  # of calls, one by one


@functools.cache  # files are read more than once
def _tell(text: str) -> None:
    logger.warning("%s", text)


def _leaves(layer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, None if value == {} else value


def _section(values: Mapping[str, Any], source: str) -> str:
    """Return the section of ours that a file is of."""
    if "prompt_type" in values:
        kind = values["prompt_type"]
        if not isinstance(kind, str) or kind not in _SECTIONS:
            raise UsageError(f"{source}: prompt_type is {shown(kind)}, expected one of {', '.join(_SECTIONS)}.")
        return _SECTIONS[kind]
    marks = {"skip_layer_idx": "masks", "repeat": "prompts", "category": "prompts"}
    marks |= dict.fromkeys(("algo", "optimizer", "lora", "base", "dataset", "experiment"), "train")
    names = {*values, *(key.partition(".")[0] for key in values)}
    return next((section for mark, section in marks.items() if mark in names), "images")


def _combined(values: Mapping[str, Any], section: str, source: str) -> dict[str, Any]:
    """Return the settings that several keys give, or one of another form."""
    settings: dict[str, Any] = {}
    if (model := values.get("ckpt_path") or values.get("model.model_path")) is not None:
        settings["model"] = model
    if (kind := values.get("category")) is not None:
        if not isinstance(kind, str) or kind not in KINDS:
            raise UsageError(f"{source}: category is {shown(kind)}, expected one of {', '.join(KINDS)}.")
        settings["prompts.counts"] = dict.fromkeys((each for each in KINDS if each != kind), 0)
        if (count := values.get("max_len")) is not None:
            settings["prompts.counts"][kind] = count
    elif values.get("max_len") is not None:
        settings["prompts.counts"] = dict.fromkeys(KINDS, values["max_len"])
    if (peft := values.get("use_peft")) is not None and section in _TRAINED:
        if not isinstance(peft, bool):
            raise UsageError(f"{source}: use_peft is {shown(peft)}, expected true or false.")
        settings["train.full"] = not peft
    schedules: dict[str | None, str] = {"cosine": "official", "constant": "constant", None: "official"}
    if "optimizer.scheduler_type" in values:
        kind = values["optimizer.scheduler_type"]
        if not isinstance(kind, str | None) or kind not in schedules:
            raise UsageError(f"{source}: optimizer.scheduler_type is {shown(kind)}, expected cosine or constant.")
        settings["train.schedule"] = schedules[kind]
        if kind == "constant":  # of which the official code has no warm-up
            settings["train.warmup_ratio"] = 0.0
    counts = [values.get(key) for key in ("experiment.gradient_accumulation_steps", "base.world_size")]
    passes, devices = (1 if count is None else count for count in counts)
    if not all(type(number) is int and number > 0 for number in (passes, devices)):
        raise UsageError(
            f"{source}: experiment.gradient_accumulation_steps and base.world_size are {shown(passes)} and "
            f"{shown(devices)}, expected numbers of 1 or more."
        )
    if section in _TRAINED:  # a step has the pairs of all devices; here any number of them shares it
        settings["train.accumulation"] = passes * devices
    return settings


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) for value in values
    )


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        inner = layer
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return layer

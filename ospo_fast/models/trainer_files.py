"""Checkpoints of the official trainer: a Lightning `.ckpt`, LoRA or all weights, next to its config.yaml.

They hold the whole model, also with LoRA, and no tokenizer: the base model gives that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import OspoError
from ospo_fast.files import read_yaml, reading, yaml_loader
from ospo_fast.models import deepseek_names as names
from ospo_fast.models.tensor_files import check_tensors, open_pickled

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".ckpt"
# Settings of peft that do not change what trained matrices compute. With any other one they are not plain LoRA.
_FREE = (
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
)


def is_trainer_file(path: Path) -> bool:
    """Return whether a path is that of a checkpoint of the official trainer, which is a file."""
    return path.suffix == SUFFIX and os.path.isfile(path)  # noqa: PTH113 (Path.is_file raises for long names)


@dataclass(frozen=True)
class TrainerCheckpoint:
    """Tensors of a checkpoint, mapped into memory."""

    path: Path
    weights: dict[str, Tensor]  # by DeepSeek's names; those of the base model where there is a LoRA
    lora: dict[str, Tensor]  # by peft's names

    @classmethod
    def read(cls, path: Path) -> TrainerCheckpoint:
        """Read a file. Raises OspoError for one with code, and for tensors of another model."""
        value = open_pickled(path)
        state = value.get("state_dict", value) if isinstance(value, Mapping) else value
        weights, lora = {}, {}
        for name, tensor in check_tensors(state, path).items():
            if (renamed := names.peft_name(name)) is not None:
                lora[renamed] = tensor
                continue
            plain = names.trainer_weight_name(name)
            known = names.to_transformers(plain) or names.is_unused(plain) or names.is_derived(plain)
            if not name.startswith(names.TRAINER) or not known or ".lora_" in name:
                raise OspoError(
                    f"model: {path} has the tensor {name!r:.120}, expected those of the official trainer "
                    "(model.language_model.…, LoRA matrices without DoRA); check that it is one of its checkpoints"
                )
            weights[plain] = tensor
        if not (weights or lora):
            raise OspoError(f"model: {path} holds no tensors; take a checkpoint of the official trainer")
        return cls(path, weights, lora)

    def lora_config(self, base: str) -> dict[str, Any]:
        """Return the configuration of peft for the LoRA matrices. Raises OspoError where config.yaml does not fit."""
        settings = read_settings(self.path).get("lora")
        settings = settings if isinstance(settings, dict) else {}
        rank, alpha, dropout = (settings.get(f"lora_{key}") for key in ("rank", "alpha", "dropout"))
        place = f"model: the lora section of {_config_file(self.path)}"
        if type(rank) is not int or not isinstance(alpha, (int, float)):
            raise OspoError(
                f"{place} has lora_rank {rank!r:.40} and lora_alpha {alpha!r:.40}, expected numbers: they scale the "
                "matrices; put the config.yaml of the training next to the checkpoint"
            )
        for name, tensor in self.lora.items():
            found = tensor.shape[0] if ".lora_A." in name else tensor.shape[-1]
            if found != rank:
                raise OspoError(
                    f"{place} has lora_rank {rank}, and {name} of {self.path} has rank {found}; put the config.yaml of "
                    "the training next to the checkpoint"
                )
        if settings.get("modules_to_save"):
            raise OspoError(f"{place} has modules_to_save, which is not supported; train without it, or all weights")
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": dropout if isinstance(dropout, (int, float)) else 0.0,
            # By full names: the vision tower has layers of these last names too.
            "target_modules": sorted(
                {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in self.lora}
            ),
            "bias": "none",
        }


def _config_file(path: Path) -> Path:
    return path.with_name("config.yaml")


def read_settings(path: Path) -> dict[str, Any]:
    """Return the config.yaml, YAML or JSON, next to a checkpoint; nothing if there is none. Raises OspoError."""
    import yaml

    file = _config_file(path)
    if not os.path.isfile(file):  # noqa: PTH113
        return {}
    with reading("configuration", file, "put the config.yaml of the training next to the checkpoint"):
        value = yaml.load(read_yaml(file), yaml_loader())
    return value if isinstance(value, dict) else {}


def find_base(path: Path) -> str:
    """Return the folder or the hub name of the base model of a checkpoint. Raises OspoError if it is not here."""
    model = read_settings(path).get("model")
    name = model.get("model_path") if isinstance(model, dict) else None
    remedy = f"name it in model.model_path of {_config_file(path)}, or run: ospo-fast convert {path} OUT --base MODEL"
    if not isinstance(name, str) or not name:
        file = _config_file(path)
        lack = f"{file.name} has no model.model_path" if file.is_file() else f"there is no {file.name}"
        raise OspoError(f"model: the base model of {path} is not known: {lack}; {remedy}")
    on_hub = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    if not on_hub and not os.path.isdir(os.path.expanduser(name)):  # noqa: PTH111, PTH112 (they raise for some names)
        raise OspoError(f"model: the base model of {path} is {name!r:.120}, and there is no such folder; {remedy}")
    return name


def write_trainer_lora(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: str, source: Path
) -> None:
    """Write an adapter of peft as a checkpoint of the official trainer and its config.yaml into an empty folder.

    Raises:
        OspoError: the official trainer's LoRA, of one rank on layers of the language model, cannot express it.

    """
    import torch

    plain = {"bias": "none", "init_lora_weights": True}
    for key, value in config.items():
        # Other initializations, such as PiSSA, change the base model.
        if key not in _FREE and value and value != plain.get(key) and (key, value) != ("init_lora_weights", "gaussian"):
            raise OspoError(
                f"convert: adapter_config.json of {source} has {key} {value!r:.60}, for which the official trainer has "
                "no setting; convert the merged model instead: --to deepseek"
            )
    renamed = {name: names.trainer_lora_name(name) for name in tensors}
    if foreign := sorted(name for name, found in renamed.items() if found is None):
        raise OspoError(
            f"convert: {source} has {foreign[0]}, and the official trainer has LoRA on the language model alone; "
            "convert the merged model instead: --to deepseek"
        )
    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in tensors})
    settings = {
        "model": {"model_path": base, "cache_dir": None, "attn_mode": "sdpa"},
        "use_peft": True,
        "lora": {
            "lora_rank": config["r"],
            "lora_alpha": config["lora_alpha"],
            "lora_dropout": config.get("lora_dropout") or 0.0,
            "target_modules": targets,
            "modules_to_save": None,
        },
    }
    (folder / "config.yaml").write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
    state = {str(renamed[name]): tensor.contiguous() for name, tensor in tensors.items()}
    # What Lightning reads of a checkpoint without the state of a trainer.
    torch.save(
        {"state_dict": state, "epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.0.0"},
        folder / "adapter.ckpt",
    )

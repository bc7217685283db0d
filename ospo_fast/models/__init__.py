"""Unified models: the protocol that the stages are written against, its adapters, and `load_model`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.resolve import check_kind
from ospo_fast.oom import short
from ospo_fast.records import parse_json

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

__all__ = ["UnifiedModel", "find_model", "load_model"]

_EMBEDDED = Path(__file__).parent.parent / "shapes" / "checkpoint"


def load_model(
    name_or_path: str | Path = "shapes",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> JanusUnifiedModel:
    """Load a Janus model for inference.

    Args:
        name_or_path: `"shapes"` (the embedded model), a folder written by `save_pretrained`, a folder with a LoRA
            adapter (its base model is loaded and the adapter merged into it), or a name on the Hugging Face hub.
        device: default: CUDA if available, else the CPU.
        dtype: a torch dtype or its name; default: bfloat16 on CUDA, float32 on the CPU.

    Raises:
        OspoError: the checkpoint is missing, broken, or of an unsupported kind.
        UsageError: unknown device or dtype.

    """
    device = _resolve_device(device)
    dtype = _resolve_dtype(dtype, device)
    name = str(name_or_path)
    folder = find_model(name)
    if folder is not None and _is_adapter(folder):
        return _load_adapter(folder, device, dtype)
    return _load_checkpoint(folder, name, device, dtype)


def find_model(name_or_path: str | Path) -> Path | None:
    """Find the folder of a model without loading it.

    Returns:
        The folder; None for a name on the Hugging Face hub.

    Raises:
        OspoError: the folder is missing or holds no supported model, as in `load_model`.

    """
    name = str(name_or_path)
    if name == "shapes":
        if not (_EMBEDDED / "config.json").is_file():
            raise OspoError(f"model: the embedded checkpoint is missing in {_EMBEDDED}; install the package again")
        return _EMBEDDED
    path = Path(name).expanduser()
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises for long names)
        if _is_adapter(path):
            find_model(_base_model(path))
        else:
            check_kind(_read_json(path / "config.json"), name)
            if not any(path.glob("*.safetensors")):
                raise OspoError(f"model: {path} holds no weights (*.safetensors); save or download the model again")
        return path
    if os.path.exists(path):  # noqa: PTH110 (see above)
        raise OspoError(f"model: {name!r} is a file, expected the folder that holds config.json and the weights")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or "\\" in name:
        raise OspoError(
            f"model: there is no folder {name!r}; expected 'shapes', a folder or a hub name like 'org/model'"
        )
    return None


def _resolve_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device: got {device!r}, expected 'cpu' or 'cuda' with an optional index") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: got {str(resolved)!r}, but torch finds no CUDA device; use 'cpu'")
    return resolved


def _resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise UsageError(f"dtype: got {dtype!r}, expected a floating-point type such as 'float32' or 'bfloat16'")
    return resolved


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise OspoError(f"model: cannot read {path} ({error}); give the folder of a saved model") from error
    if not isinstance(content, dict):
        raise OspoError(f"model: {path} holds no JSON object; save or download the model again")
    return content


def _load_checkpoint(folder: Path | None, name: str, device: torch.device, dtype: torch.dtype) -> JanusUnifiedModel:
    import transformers
    from safetensors import SafetensorError

    from ospo_fast.models.janus import JanusUnifiedModel

    source = str(folder or name)
    remedy = "save or download it again"
    if folder is None:
        remedy = "check the name and the network, or give the folder of a downloaded copy"
    try:
        if folder is None:
            config, _ = transformers.PreTrainedConfig.get_config_dict(source)
            check_kind(config, name)
        module, info = transformers.JanusForConditionalGeneration.from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
        processor = transformers.JanusProcessor.from_pretrained(source)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OspoError(f"model: {source} cannot be loaded ({short(error)}); {remedy}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers initializes them at random
        raise OspoError(f"model: {source} lacks {len(missing)} tensors of the model ({missing[0]}, …); {remedy}")
    return JanusUnifiedModel(module.to(device).eval(), processor, name=name)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _base_model(folder: Path) -> str:
    """The base model of a LoRA adapter."""
    base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise OspoError(f"model: {folder / 'adapter_config.json'} has no base_model_name_or_path; add the base model")
    if str(base) in (str(folder), folder.name):
        raise OspoError(f"model: the adapter {folder} names itself as its base model; fix its base_model_name_or_path")
    return str(base)


def _load_adapter(folder: Path, device: torch.device, dtype: torch.dtype) -> JanusUnifiedModel:
    base = _base_model(folder)
    model = load_model(base, device=device, dtype=dtype)

    import peft
    from safetensors import SafetensorError

    try:
        module = peft.PeftModel.from_pretrained(model.module, str(folder)).merge_and_unload()
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise OspoError(
            f"model: the adapter {folder} does not load on {base} ({short(error)}); check its base_model_name_or_path"
        ) from error
    return model.with_module(module.eval(), name=str(folder))

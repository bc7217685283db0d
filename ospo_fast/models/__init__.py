"""Unified models: the protocol that stages are written against, its adapters, and `load_model`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models.base import UnifiedModel

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

__all__ = ["EMBEDDED", "UnifiedModel", "find_model", "load_model"]

EMBEDDED = "shapes"
"""The name of the model that ships with the package."""
_CHECKPOINT = Path(__file__).parent.parent / "shapes" / "checkpoint"


def load_model(
    name_or_path: str | Path = EMBEDDED,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> JanusUnifiedModel:
    """Load a Janus model, ready for inference.

    Args:
        name_or_path: `"shapes"` (the embedded model), a folder written by `save_pretrained`, a folder with a LoRA
            adapter (its base is loaded and the adapter merged into it), or a name on the Hugging Face hub.
        device: default: CUDA where there is one, else the CPU.
        dtype: default: bfloat16 on CUDA, float32 on the CPU. A torch dtype or its name.

    Raises:
        OspoError: the checkpoint is missing, broken, or not of a known kind.
        UsageError: unknown device or dtype.

    """
    place = _device(device)
    number = _dtype(dtype, place)
    name = str(name_or_path)
    folder = find_model(name)
    if folder is not None and name != EMBEDDED and (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, place, number)
    return _load(folder, name, place, number)


def find_model(name_or_path: str | Path) -> Path | None:
    """The folder behind the name of a model, None for a name on the hub; nothing is loaded.

    Raises OspoError, as `load_model` would, for a folder that is missing or holds no model of a known kind.
    """
    name = str(name_or_path)
    if name == EMBEDDED:
        if not (_CHECKPOINT / "config.json").is_file():
            raise OspoError(
                "the embedded checkpoint is not in this installation; install the package again, or make one with "
                "`python -m ospo_fast.shapes.pretrain --out DIR` and name it: --model DIR/checkpoint"
            )
        return _CHECKPOINT
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            find_model(_base_of(path))
        else:
            _check_kind(_read_json(path / "config.json"), name)
            if not any(path.glob("*.safetensors")):
                raise OspoError(f"model: {path} holds no weights (*.safetensors); save or download the model again")
        return path
    if path.exists():
        raise OspoError(f"model: {name!r} is a file, expected the folder that holds config.json and the weights")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or "\\" in name:
        raise OspoError(
            f"model: there is no folder {name!r}; expected 'shapes', a folder or a hub name like 'org/model'"
        )
    return None


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device: got {device!r}, expected 'cpu' or 'cuda' with an optional index") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: got {str(place)!r}, but torch sees no CUDA device here; use 'cpu'")
    return place


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype: got {dtype!r}, expected a floating-point type such as 'float32' or 'bfloat16'")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OspoError(f"model: {path.parent} holds no {path.name}; is it the folder of a saved model?") from None
    except (OSError, ValueError) as error:
        raise OspoError(f"model: {path} cannot be read ({error}); save or download the model again") from error
    if not isinstance(content, dict):
        raise OspoError(f"model: {path} holds no JSON object; save or download the model again")
    return content


def _check_kind(config: dict[str, Any], name: str) -> None:
    kind = config.get("model_type")
    if kind == "multi_modality":
        raise OspoError(
            f"model: {name} is in DeepSeek's own format; use its conversion for transformers "
            "(deepseek-community/Janus-Pro-1B, deepseek-community/Janus-Pro-7B)"
        )
    if kind != "janus":
        raise OspoError(f"model: {name} has model_type {kind!r}, expected 'janus' (JanusForConditionalGeneration)")
    text = config.get("text_config") or {}
    if text.get("model_type", "llama") != "llama":
        raise OspoError(f"model: {name} has a {text['model_type']!r} language model, expected 'llama'")


def _load(folder: Path | None, name: str, device: torch.device, dtype: torch.dtype) -> JanusUnifiedModel:
    import transformers
    from safetensors import SafetensorError

    from ospo_fast.models.janus import JanusUnifiedModel

    source = name if folder is None else str(folder)
    try:
        if folder is None:
            config, _ = transformers.PreTrainedConfig.get_config_dict(source)
            _check_kind(config, name)
        module, info = transformers.JanusForConditionalGeneration.from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
        processor = transformers.JanusProcessor.from_pretrained(source)
    except OspoError:
        raise
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OspoError(f"model: {source} is broken ({_line(error)}); save or download it again") from error
    except OSError as error:
        remedy = (
            "check the name and the network, or give the folder of a downloaded copy"
            if folder is None
            else "save or download it again"
        )
        raise OspoError(f"model: {source} cannot be loaded ({_line(error)}); {remedy}") from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise OspoError(
            f"model: the weights in {source} lack {len(absent)} tensors of the model ({absent[0]}, …); "
            "save or download it again"
        )
    return JanusUnifiedModel(module.to(device).eval(), processor, name=name)


def _base_of(folder: Path) -> str:
    """The base model that a LoRA adapter names."""
    base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise OspoError(f"model: {folder / 'adapter_config.json'} names no base model (base_model_name_or_path)")
    if str(base) in (str(folder), folder.name):
        raise OspoError(f"model: the adapter {folder} names itself as its base model")
    return str(base)


def _load_adapter(folder: Path, device: torch.device, dtype: torch.dtype) -> JanusUnifiedModel:
    base = _base_of(folder)
    model = load_model(base, device=device, dtype=dtype)

    import peft
    from safetensors import SafetensorError

    try:
        wrapped = peft.PeftModel.from_pretrained(model.module, str(folder))
        module = wrapped.merge_and_unload()
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise OspoError(f"model: the adapter {folder} does not load on {base} ({_line(error)})") from error
    return model.replaced(module.eval(), name=str(folder))


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split())[:200]

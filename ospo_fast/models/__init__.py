"""Unified models: the protocol that the stages are written against, its adapters, and `load_model`."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ospo_fast.config import MAX_ADAPTERS
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.files import read_bytes
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.resolve import check_kind
from ospo_fast.oom import short
from ospo_fast.records import parse_json

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

__all__ = ["UnifiedModel", "find_model", "load_model"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Keys of config.json that say how many parts are built, each of which has a tensor of its own (labels: of a head).
_COUNTS = ("num_hidden_layers", "num_res_blocks", "depth", "channel_multiplier", "num_labels")
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
        UsageError: a device other than the CPU and CUDA, or one that torch does not find; a dtype other than float32,
            bfloat16, float16 and float64.

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
    folder = _find_folder(str(name_or_path))
    base, adapters = folder, 0
    while base is not None and _is_adapter(base):
        adapters += 1
        if adapters > MAX_ADAPTERS:
            raise OspoError(
                f"model: the base model of the adapter {folder} is in turn an adapter, and so on, more than "
                f"{MAX_ADAPTERS} times or in a circle; fix base_model_name_or_path in {base / 'adapter_config.json'}"
            )
        base = _find_folder(_base_model(base))
    return folder


def _find_folder(name: str) -> Path | None:
    """Find the folder of a model, as `find_model` does, or of an adapter without looking for its base model."""
    if name == "shapes":
        if not (_EMBEDDED / "config.json").is_file():
            raise OspoError(f"model: the embedded checkpoint is missing in {_EMBEDDED}; install the package again")
        return _EMBEDDED
    path = Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser raises for unknown users)
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises for long names)
        _refuse_pipes(path)
        if not _is_adapter(path):
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
    except (RuntimeError, TypeError):
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise UsageError(f"device: got {str(device)!r:.60}, expected 'cpu' or 'cuda' with an optional index")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: got {str(resolved)!r}, but torch finds no CUDA device; use 'cpu'")
    count = torch.cuda.device_count() if resolved.type == "cuda" else 1
    if (resolved.index or 0) >= count:
        raise UsageError(f"device: got {str(resolved)!r}, expected an index from 0 to {count - 1}")
    return resolved


def _resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in _DTYPES:
        expected = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise UsageError(f"dtype: got {dtype!r:.60}, expected one of {expected}")
    return resolved


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise OspoError(
            f"model: cannot read {path} ({getattr(error, 'strerror', None) or error}); give the folder of a saved model"
        ) from error
    if not isinstance(content, dict):
        raise OspoError(f"model: {path} holds no JSON object; save or download the model again")
    return content


def _load_checkpoint(folder: Path | None, name: str, device: torch.device, dtype: torch.dtype) -> JanusUnifiedModel:
    import transformers

    from ospo_fast.models.janus import JanusUnifiedModel

    source = str(folder or name)
    remedy = "save or download it again"
    if folder is None:
        remedy = "check the name and the network, or give the folder of a downloaded copy"
    with _loading(f"{source} cannot be loaded", remedy):
        if folder is None:
            config, _ = transformers.PreTrainedConfig.get_config_dict(source)
            check_kind(config, name)
        else:
            _check_sizes(folder)
        module, info = transformers.JanusForConditionalGeneration.from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
        processor = transformers.JanusProcessor.from_pretrained(source)
    missing = sorted(info["missing_keys"])
    if missing:  # transformers initializes them at random
        raise OspoError(f"model: {source} lacks {len(missing)} tensors of the model ({missing[0]}, …); {remedy}")
    module.to(device).eval()
    with _loading(f"{source} cannot be loaded", remedy):
        return JanusUnifiedModel(module, processor, name=name)


@contextlib.contextmanager
def _loading(problem: str, remedy: str) -> Iterator[None]:
    """Turn every error of the block, which parses files of a checkpoint, into an OspoError."""
    try:
        yield
    except OspoError:
        raise
    except Exception as error:  # damaged files raise anything: KeyError, ZeroDivisionError, errors of other packages
        raise OspoError(f"model: {problem} ({short(error)}); {remedy}") from error


def _refuse_pipes(folder: Path) -> None:
    """Raise OspoError for a pipe or a device in the folder of a model, for which other packages would wait."""
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a link to nothing
            mode = path.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise OspoError(f"model: {path} is no regular file; delete it, or save or download the model again")


def _tensor_shapes(files: Sequence[Path]) -> dict[str, list[int]]:
    """Return the shape of each tensor in safetensors files, whose headers hold them."""
    from safetensors import safe_open

    shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            shapes.update({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118 (no mapping)
    return shapes


def _check_sizes(folder: Path) -> None:
    """Raise OspoError if the sizes in config.json are not those of the weights, before memory or time depend on them.

    transformers fills tensors of another size at random before it refuses them.
    """
    import transformers

    path, remedy = folder / "config.json", "save or download the model again"
    config, shapes = _read_json(path), _tensor_shapes(sorted(folder.glob("*.safetensors")))
    count = len(shapes)
    for section, values in (("", config), *config.items()):
        for key in _COUNTS if isinstance(values, dict) else ():
            value = values.get(key)
            value = len(value) if isinstance(value, list) else value
            if isinstance(value, (int, float)) and value > count:
                raise OspoError(
                    f"model: {key} in {path}{section and f' ({section})'} is {value}, expected at most {count}, as "
                    f"many as the weights have tensors; {remedy}"
                )
    if "quantization_config" in config:  # packed tensors have other shapes
        return
    with torch.device("meta"):
        empty = transformers.JanusForConditionalGeneration(transformers.JanusConfig.from_pretrained(str(folder)))
    for name, tensor in empty.state_dict().items():
        if name in shapes and shapes[name] != list(tensor.shape):
            raise OspoError(
                f"model: by {path}, {name} has the shape {list(tensor.shape)}, expected that of the weights, "
                f"{shapes[name]}; {remedy}"
            )


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


def _check_ranks(folder: Path) -> None:
    """Raise OspoError if a rank in adapter_config.json is above every size in the adapter's weights.

    peft fills matrices of that rank at random before it compares them with the weights.
    """
    path = folder / "adapter_config.json"
    config, shapes = _read_json(path), _tensor_shapes(sorted(folder.glob("*.safetensors")))
    largest = max((size for shape in shapes.values() for size in shape), default=None)
    pattern = config.get("rank_pattern")
    for rank in (config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())):
        if largest is not None and isinstance(rank, (int, float)) and rank > largest:
            raise OspoError(
                f"model: {path} has the rank {rank}, expected at most {largest}, the largest size in the adapter's "
                "weights; save or download the adapter again"
            )


def _load_adapter(folder: Path, device: torch.device, dtype: torch.dtype) -> JanusUnifiedModel:
    base = _base_model(folder)
    model = load_model(base, device=device, dtype=dtype)

    import peft

    with _loading(f"the adapter {folder} does not load on {base}", "check its base_model_name_or_path"):
        _check_ranks(folder)
        module = peft.PeftModel.from_pretrained(model.module, str(folder)).merge_and_unload()
    return model.with_module(module.eval(), name=str(folder))

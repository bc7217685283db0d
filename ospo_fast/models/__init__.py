"""Unified models: the protocol that the stages are written against, its adapters, and `load_model`.

torch is imported when a model is loaded, so that a wrong name, device or dtype is refused without waiting for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.config import MAX_ADAPTERS, Config, image_size
from ospo_fast.errors import OspoError, UsageError, is_panic
from ospo_fast.models import emu3_5_files, folder_checks, lumina, quantized, trainer_files
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.deepseek_config import is_deepseek
from ospo_fast.models.families import find_family
from ospo_fast.packages import check_installed, required_by
from ospo_fast.records import local_base

if TYPE_CHECKING:
    import torch

    from ospo_fast.models.adapter import Adapter

__all__ = ["UnifiedModel", "check_device", "find_model", "load_model", "open_model"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_OTHER_DTYPES = ("float", "half", "double")  # torch's other names of these
_DEVICES = "'cpu', 'cuda' or 'mps' with an optional index"
_MPS_FLOAT64 = "dtype: got float64 with device mps, which does not have it, expected float32, bfloat16 or float16"
# Of the extra `pipeline`: what loading and use of a model need.
_PACKAGES = ("transformers", "tokenizers", "safetensors", "PIL", "jinja2", "tqdm")
_PUBLISHED = tuple(f"{org}/Janus-Pro-{size}" for org in ("deepseek-community", "deepseek-ai") for size in ("1B", "7B"))
_FILES = ("*.json", "*.jinja", "*.safetensors", "pytorch_model*.bin")  # what a model can need of a hub repository
# transformers patches torch and its own classes while it loads: two loads at once would leave the patches in place.
_LOCK = threading.RLock()  # an adapter loads its base model
_HUB_REMEDY = "check the name and the network, or give the folder of a downloaded copy"
_NOT_IN_WHEELS = ("shapes-large",)  # which would exceed their 9 MB with it
_EMBEDDED = {
    "shapes": Path(__file__).parent.parent / "shapes" / "checkpoint",
    "shapes-large": Path(__file__).parent.parent / "shapes" / "checkpoint-large",
}


def load_model(
    name_or_path: str | Path = "shapes",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    image_size: tuple[int, int] | None = None,
    quantize: str | None = None,
) -> Adapter:
    """Load a unified model for inference. Threads that call it at once load one after the other.

    Args:
        name_or_path: `"shapes"` or `"shapes-large"` (the embedded models), a folder written by `save_pretrained`, one
            in DeepSeek's layout, a folder with a LoRA adapter (its base model is loaded and the adapter merged into
            it), a `.ckpt` file of the official trainer, or a name on the Hugging Face hub; of one of the families in
            `models.families`.
        device: default: CUDA if available, else Apple MPS if available, else the CPU.
        dtype: a torch dtype or its name; default: bfloat16 on CUDA, else float32.
        image_size: height and width in pixels of the images that it generates; default: its own.
        quantize: "int8" or "int4": bits of the linear layers of the decoder's layers. They are read in `dtype` first. A
            LoRA adapter is then not merged but kept as it is, on its quantized base model.

    Raises:
        MissingPackageError: a package of the extra `pipeline` is missing, or with `quantize` both of `quantize`.
        OspoError: the checkpoint is missing, broken, or of an unsupported kind.
        UsageError: a device other than the CPU, CUDA and MPS, or one that torch does not find; a dtype other than
            float32, bfloat16, float16 and float64, which MPS does not have; an image size that the model does not know;
            `quantize` with another value, or of a model whose files are quantized.

    """
    name = str(name_or_path)
    if image_size is not None:
        image_size = _check_image_size(image_size)
    check_installed("load_model", *_PACKAGES)
    quantized.check_quantize(quantize, dtype)
    folder = find_model(name)
    if folder is None and is_deepseek(folder_checks.read_json(check_hub_model(name))):
        folder = download(name)
    device, dtype = resolve_placement(device, dtype)
    with _LOCK:
        if folder is not None and has_base(folder):
            return load_on_base(folder, device, dtype, image_size=image_size, quantize=quantize)
        return _load_checkpoint(folder, name, device, dtype, image_size, quantize)


def _check_image_size(image_size: Any) -> tuple[int, int]:
    size = tuple(image_size) if isinstance(image_size, (tuple, list)) else ()
    if len(size) != 2 or not all(type(side) is int and 0 <= side < 10**5 for side in size):
        raise UsageError(
            f"image_size: got {image_size!r:.60}, expected two integers, height and width in pixels, such as (512, 768)"
        )
    return size


def open_model(config: Config, name: str | None = None, *, device: str | None = None) -> Adapter:
    """Load the model of a configuration, or `name`, as it says; device: in place of that of the configuration."""
    return load_model(
        name or config.model,
        device=device or config.device,
        dtype=config.dtype,
        image_size=image_size(config),
        quantize=config.quantize,
    )


def find_model(name_or_path: str | Path) -> Path | None:
    """Find the folder of a model without loading it.

    Returns:
        The folder, or the file of the official trainer; None for a name on the Hugging Face hub.

    Raises:
        OspoError: the folder is missing or holds no supported model, as in `load_model`.

    """
    folder = find_folder(str(name_or_path))
    base, adapters = folder, 0
    while base is not None and has_base(base):
        adapters += 1
        if adapters > MAX_ADAPTERS:
            raise OspoError(
                f"model: the base model of the adapter {folder} is in turn an adapter, and so on, more than "
                f"{MAX_ADAPTERS} times or in a circle; fix base_model_name_or_path in {base / 'adapter_config.json'}"
            )
        name, adapter = find_base(base), base
        base = find_folder(name)
        if base is None:
            _check_base(name, adapter)
    if base is not None and base.is_dir():
        refuse_original(base)
    return folder


def find_folder(name: str) -> Path | None:
    """Find the folder of a model, as `find_model` does, or of an adapter without looking for its base model."""
    if (embedded := _EMBEDDED.get(name)) is not None:
        if not (embedded / "config.json").is_file():
            if name in _NOT_IN_WHEELS:
                raise OspoError(
                    f"model: wheels leave out the checkpoint of {name}; install from a clone of the repository "
                    f"(pip install -e .), or name ospo_fast/shapes/{embedded.name} of a clone"
                )
            raise OspoError(f"model: the embedded checkpoint is missing in {embedded}; install the package again")
        return embedded
    path = Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser raises for unknown users)
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises for long names)
        folder_checks.refuse_pipes(path)
        path = folder_checks.model_part(path)
        if not _is_adapter(path) and not emu3_5_files.is_original(path):  # of which transformers reads nothing
            config = folder_checks.read_json(path / "config.json")
            folder_checks.check_kind(config, name)
            if not is_deepseek(config):  # transformers does not read the files of those
                folder_checks.refuse_code(path)
            if not lumina.is_original(path):  # which is converted with the tokenizer of another model
                folder_checks.check_tokenizer(folder_checks.processor_part(path))
            folder_checks.weight_files(path, pickled=is_deepseek(config))
        return path
    if trainer_files.is_trainer_file(path):
        return path
    if os.path.exists(path):  # noqa: PTH110 (see above)
        raise OspoError(
            f"model: {name!r} is a file, expected the folder that holds config.json and the weights, or a .ckpt of the "
            "official trainer"
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or "\\" in name:
        raise OspoError(
            f"model: there is no folder {name!r}; expected 'shapes', 'shapes-large', a folder or a hub name like "
            "'org/model'"
        )
    return None


def find_original(folder: Path) -> Any:
    """Return the module that converts a folder in the layout of its own family, None for other folders."""
    return next((files for files in (lumina, emu3_5_files) if files.is_original(folder)), None)


def refuse_original(folder: Path) -> None:
    """Raise OspoError for a folder that has to be converted first."""
    if (files := find_original(folder)) is not None:
        files.refuse_original(folder)


def check_hub_model(name: str) -> Path:
    """Return the config.json of a model of the hub, before torch is imported.

    Raises OspoError for one that cannot be found or is not supported.
    """
    path = hub_config(name)
    folder_checks.check_kind(folder_checks.read_json(path), name)
    return path


def hub_config(name: str) -> Path:
    """Return the config.json of a model of any kind of the hub. Raises OspoError for one that cannot be found."""
    import huggingface_hub

    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            huggingface_hub.model_info(name, timeout=10)  # asks once, a download up to six times
        return Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except Exception as error:  # of the network, the hub, or the name
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise OspoError(f"model: {name} cannot be loaded ({reason}); {_HUB_REMEDY}") from error


def download(name: str) -> Path:
    """Return the folder of a model of the hub, without files of code. Raises OspoError if it cannot be fetched."""
    import huggingface_hub

    with loading(f"{name} cannot be loaded", _HUB_REMEDY):
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
        folder_checks.check_tokenizer(folder)
        return folder


def check_device(device: str | None, dtype: str | None) -> None:
    """Raise UsageError for a device or dtype that `load_model` refuses, as far as that is certain without torch."""
    if device is not None and not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", device):
        raise UsageError(f"device: got {device!r:.60}, expected {_DEVICES}")
    if device is not None and device.startswith(("cpu:", "mps:")) and device[4:].strip("0"):
        raise UsageError(f"device: got {device!r:.60}, expected '{device[:3]}' or '{device[:3]}:0'")
    if device is not None and device.startswith("mps") and sys.platform != "darwin":
        raise UsageError(f"device: got {device!r}, which macOS alone has; use 'cpu'")
    if device is not None and device.startswith("cuda") and lacks_driver():
        raise UsageError(f"device: got {device!r}, but there is no NVIDIA driver here (libcuda.so.1); use 'cpu'")
    if dtype is not None and dtype not in (*_DTYPES, *_OTHER_DTYPES):
        raise UsageError(f"dtype: got {dtype!r:.60}, expected one of {', '.join(_DTYPES)}")
    if device is not None and device.startswith("mps") and dtype in ("float64", "double"):
        raise UsageError(_MPS_FLOAT64)


def lacks_driver() -> bool:
    """Return whether torch surely finds no CUDA device."""
    if sys.platform != "linux" or os.path.exists("/dev/kfd"):  # noqa: PTH110 (ROCm's torch uses the name cuda)
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


def resolve_placement(
    device: str | torch.device | None, dtype: str | torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of a model; see `load_model`. Raises UsageError."""
    device = _resolve_device(device)
    return device, _resolve_dtype(dtype, device)


def _default_device() -> torch.device:
    import torch

    mps = torch.backends.mps.is_available()
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")


def _resolve_device(device: str | torch.device | None) -> torch.device:
    import torch

    if device is None:
        return _default_device()
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device: got {str(device)!r:.60}, expected {_DEVICES}")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: got {str(resolved)!r}, but torch finds no CUDA device; use 'cpu'")
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device: got {str(resolved)!r}, but torch finds no MPS device; use 'cpu'")
    count = torch.cuda.device_count() if resolved.type == "cuda" else 1
    if (resolved.index or 0) >= count:
        raise UsageError(f"device: got {str(resolved)!r}, expected an index from 0 to {count - 1}")
    return resolved


def _resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    import torch

    if dtype is None:  # MPS: not every macOS has bfloat16
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in [getattr(torch, name) for name in _DTYPES]:
        raise UsageError(f"dtype: got {dtype!r:.60}, expected one of {', '.join(_DTYPES)}")
    assert isinstance(resolved, torch.dtype)
    if (device.type, resolved) == ("mps", torch.float64):
        raise UsageError(_MPS_FLOAT64)
    return resolved


def _load_checkpoint(
    folder: Path | None,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    image_size: tuple[int, int] | None,
    quantize: str | None,
) -> Adapter:
    config = folder_checks.read_json(hub_config(name) if folder is None else folder / "config.json")
    family = find_family({"model_type": "janus"} if is_deepseek(config) else config, name)
    if quantize is not None and config.get("quantization_config") is not None:
        raise UsageError(f"quantize: got {quantize!r} for {name}, whose files are quantized, expected null")
    with required_by("load_model"):
        decoder_path = family.adapter_class().decoder_path
        # Named here, because transformers imports them, and what they need, when they are named.
        model_class = family.transformers_class(family.model_class)
        processor_class = family.transformers_class(family.processor_class)

    source = str(folder or name)
    remedy = _HUB_REMEDY if folder is None else "save or download it again"
    with loading(f"{source} cannot be loaded", remedy):
        if folder is not None and is_deepseek(config):
            from ospo_fast.models.deepseek import load_deepseek

            module, processor = load_deepseek(folder, dtype)
            folder_checks.check_token_ids(source, processor.tokenizer)
            module = quantized.to_device(module, decoder_path, device, quantize)
            return family.adapt(module.eval(), processor, name=name, image_size=image_size)
        if folder is not None:
            folder_checks.check_sizes(folder)
        # Without a value, transformers asks on the terminal whether to run the code of a folder.
        with _expecting(model_class, family.other_tensors):
            module, info = model_class.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True if folder else None,
                trust_remote_code=False,
            )
        folder_checks.refuse_missing(info["missing_keys"], source, remedy)
        folder_checks.refuse_unknown(info["unexpected_keys"], module, source, remedy)
        if family.other_tensors is not None:
            at = folder or download(name)
            family.adapter_class().load_rest(module, folder_checks.weight_files(at))
        processor_source = source if folder is None else str(folder_checks.processor_part(folder))
        processor = processor_class.from_pretrained(processor_source, trust_remote_code=False)
        folder_checks.check_token_ids(processor_source, processor.tokenizer)
        module = quantized.to_device(module, decoder_path, device, quantize)
        return family.adapt(module.eval(), processor, name=name, image_size=image_size)


@contextlib.contextmanager
def _expecting(model_class: Any, names: str | None) -> Iterator[None]:
    """Let transformers not report tensors that a class does not have; the lock of `load_model` is held."""
    before = model_class._keys_to_ignore_on_load_unexpected
    if names is not None:
        model_class._keys_to_ignore_on_load_unexpected = [*(before or ()), names]
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = before


@contextlib.contextmanager
def loading(problem: str, remedy: str) -> Iterator[None]:
    """Turn every error of the block, which parses files of a checkpoint, into an OspoError."""
    from ospo_fast.oom import out_of_memory, short

    try:
        yield
    except OspoError:
        raise
    except BaseException as error:  # damaged files raise anything: KeyError, ZeroDivisionError, panics of tokenizers
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        if out_of_memory(error):
            remedy = "free some memory, or use another device or a smaller dtype"
        raise OspoError(f"model: {problem} ({short(error)}); {remedy}") from error


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def has_base(path: Path) -> bool:
    """Return whether a path that `find_model` returned is that of an adapter, or of a file of the official trainer."""
    return _is_adapter(path) or trainer_files.is_trainer_file(path)


def find_base(folder: Path) -> str:
    """Return the name or the folder of the base model of a LoRA adapter, as `find_model` takes it."""
    if trainer_files.is_trainer_file(folder):
        return trainer_files.find_base(folder)
    base = folder_checks.read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise OspoError(f"model: {folder / 'adapter_config.json'} has no base_model_name_or_path; add the base model")
    if (local := local_base(folder, base)) is not None:
        return local
    if str(base) in (str(folder), folder.name):
        raise OspoError(f"model: the adapter {folder} names itself as its base model; fix its base_model_name_or_path")
    return str(base)


def _check_base(name: str, folder: Path) -> None:
    """Raise OspoError unless the hub name in an adapter's folder is published, or the user has loaded it before."""
    from huggingface_hub import try_to_load_from_cache

    cached = None
    with contextlib.suppress(ValueError):  # no hub name
        cached = try_to_load_from_cache(name, "config.json")
    if name not in _PUBLISHED and not isinstance(cached, str):
        raise OspoError(
            f"model: {folder} names the base model {name!r:.60}, expected a folder, a model of the local hub cache, or "
            f"{' or '.join(_PUBLISHED)}; download the base model yourself if you trust it"
        )


def load_on_base(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    base: str | None = None,
    image_size: tuple[int, int] | None = None,
    quantize: str | None = None,
) -> Adapter:
    """Load the base model of an adapter, or of a file of the official trainer, and put its weights into it.

    base: in place of the base model that it names. quantize: of the base model, after everything but the matrices of
    LoRA, which stay exact: merging would round them to the few bits of the weights.
    """
    import torch

    base = base or find_base(folder)
    with loading(f"{folder} cannot be loaded", "save or download it again"):
        trained = trainer_files.TrainerCheckpoint.read(folder) if trainer_files.is_trainer_file(folder) else None
        config = None if trained else folder_checks.check_adapter(folder)
        if trained is not None and trained.lora:
            config = trained.lora_config(base)
    model = load_model(
        base, device=device if quantize is None else torch.device("cpu"), dtype=dtype, image_size=image_size
    )
    if trained is not None and trained.weights:
        from ospo_fast.models.deepseek import load_weights

        with loading(f"{folder} does not load on {base}", "check its base model"):
            load_weights(model.module, trained.weights, str(folder))
    if quantize is not None:
        if getattr(model.module.config, "quantization_config", None) is not None:
            raise UsageError(f"quantize: got {quantize!r} for {base}, whose files are quantized, expected null")
        quantized.to_device(model.module, model.decoder_path, device, quantize)
    if config is None:
        return model.with_module(model.module, name=str(folder))

    with required_by("load_model", "peft", "accelerate"):
        import peft

    remedy = "check its base_model_name_or_path" if trained is None else "check model.model_path of its config.yaml"
    with loading(f"the adapter {folder} does not load on {base}", remedy):
        config = {**folder_checks.match_targets(config, folder, model.module), "inference_mode": True}
        if trained is not None:
            tensors = {name: tensor.to(device) for name, tensor in trained.lora.items()}
        else:
            tensors = peft.load_peft_weights(
                str(folder),
                device=str(device),
                key_mapping=getattr(model.module, "_checkpoint_conversion_mapping", None),
            )
        folder_checks.check_adapter_tensors(folder, config, tensors, model.module)
        # As peft.PeftModel.from_pretrained does, with the configuration whose patterns are resolved.
        wrapped = peft.PeftModel(model.module, peft.LoraConfig.from_peft_type(**config))
        peft.set_peft_model_state_dict(wrapped, tensors)
        if quantize is None:
            module = wrapped.merge_and_unload(safe_merge=True)
        else:
            module = wrapped.get_base_model()
            quantized.check_adapter_layers(module, str(folder))
    return model.with_module(module.eval(), name=str(folder))

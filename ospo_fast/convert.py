"""`ospo-fast convert`: models and LoRA adapters between transformers' layout and that of DeepSeek and its trainer.

torch is imported once the arguments are checked.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import (
    check_hub_model,
    download,
    find_base,
    find_folder,
    find_model,
    find_original,
    has_base,
    load_model,
    loading,
)
from ospo_fast.models import folder_checks as checks
from ospo_fast.models.deepseek_config import is_deepseek
from ospo_fast.models.trainer_files import TrainerCheckpoint, is_trainer_file, write_trainer_lora
from ospo_fast.models.vocabulary import base_folder
from ospo_fast.records import os_errors, write_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ospo_fast.models.adapter import Adapter

logger = logging.getLogger(__name__)

MODELS = ("transformers", "deepseek")
ADAPTERS = {
    "peft": "a .ckpt of the official trainer with LoRA",
    "official-lora": "a folder with a LoRA adapter of peft",
}
TARGETS = (*MODELS, *ADAPTERS)
_OTHER_BASE = "name its own base model with --base"
_OTHER = {"deepseek": "transformers", "transformers": "deepseek", "adapter": "official-lora"}


def convert(source: str, out: Path, *, to: str | None = None, base: str | None = None) -> dict[str, Any]:
    """Convert a checkpoint into a new folder, which is written whole or not at all.

    Values and dtype stay as they are, but the VQ model that `base` adds gets the dtype of the language model.

    Args:
        source: a model in any layout, a LoRA adapter, or a `.ckpt` of the official trainer; see `load_model`. Adapters
            become merged models with `to` transformers or deepseek.
        out: missing or empty.
        to: one of `TARGETS`. Default: the other layout; of a `.ckpt` with LoRA peft, of one with all weights
            transformers.
        base: the base model of an adapter or `.ckpt`, in place of the one that it names; of a Lumina-mGPT the Anole
            whose VQ model it uses; of an Emu3.5 the folder of its vision tokenizer.

    Returns:
        {"out", "from", "to", "dtype"}.

    Raises:
        UsageError: an unknown or impossible target, a folder that is not empty, or a base for a model without one.
        OspoError: the checkpoint is missing, damaged or contradictory, or has no counterpart in the other layout.

    """
    if to is not None and to not in TARGETS:
        raise UsageError(f"--to: got {to!r:.60}, expected one of {', '.join(TARGETS)}.")
    with os_errors("read", out):
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise UsageError(f"convert: {out} exists and is no empty folder; name a new folder.")
    path = _find(source)
    for folder in (str(path), base or str(path)):
        inside = Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder))
        if inside and os.path.isdir(folder):  # noqa: PTH112 (Path.is_dir raises for long names)
            raise UsageError(f"convert: {out} is in {folder}, which is converted; name a folder outside of it.")
    original = find_original(path) if path.is_dir() and not has_base(path) else None
    if original is not None and base is None:
        raise UsageError(f"--base: got none, expected {original.BASE} {source}; name it.")
    if base is not None:
        if not has_base(path) and original is None:
            raise UsageError(f"--base: got {base!r:.60}, and {source} is a whole model; leave the option out.")
        find_model(base) if original is None else original.check_base(base)
    elif has_base(path):
        find_model(source)  # names a base model that is not there
    kind = "ckpt" if is_trainer_file(path) else "adapter" if has_base(path) else _layout(path)
    trained = TrainerCheckpoint.read(path) if kind == "ckpt" else None
    if original is not None:
        to = to or "transformers"
    if to is None:
        to = ("peft" if trained.lora else "transformers") if trained else _OTHER[kind]
    if to in ADAPTERS and not (trained is not None and trained.lora if to == "peft" else kind == "adapter"):
        raise UsageError(f"--to {to}: got {source}, expected {ADAPTERS[to]}; use --to {' or --to '.join(MODELS)}.")
    if to in ADAPTERS:
        dtype = _convert_adapter(path, out, base or find_base(path), trained)
    else:
        dtype = _convert_model(path, out, to, base, original)
    return {"out": str(out), "from": kind, "to": to, "dtype": str(dtype).removeprefix("torch.")}


def _find(source: str) -> Path:
    """Return the folder or file of a checkpoint; one of the hub is downloaded."""
    path = find_folder(source)
    if path is None:
        check_hub_model(source)
        path = download(source)
    return path


def _layout(folder: Path) -> str:
    return "deepseek" if is_deepseek(checks.read_json(folder / "config.json")) else "transformers"


def _convert_model(path: Path, out: Path, to: str, base: str | None, original: Any) -> torch.dtype:
    """Write a whole model, of an adapter the merged one. original: see `find_original`. Returns its dtype."""
    import torch

    from ospo_fast.models import deepseek, load_on_base
    from ospo_fast.models.janus import JanusUnifiedModel

    dtype, unused = _stored(path, base)
    with torch.no_grad():  # never quantized: what is written should be exact
        if original is not None:
            model = original.load_original(path, base, dtype)
        elif has_base(path):
            model = load_on_base(path, torch.device("cpu"), dtype, base=base)
        else:
            model = load_model(path, device="cpu", dtype=dtype)
    if to == "deepseek" and not isinstance(model, JanusUnifiedModel):
        raise UsageError(
            f"convert: {path} is a {model.module.config.model_type!r} model, expected a Janus model, the only "
            "kind that DeepSeek's layout is for; use --to transformers"
        )

    values = {**model.module.state_dict(), **unused}
    if bad := [name for name, tensor in values.items() if not tensor.isfinite().all()]:
        logger.warning("%s has %d tensors with values that are not finite (%s, …)", path, len(bad), bad[0])

    def save(folder: Path) -> None:
        if isinstance(model, JanusUnifiedModel) and to == "deepseek":
            deepseek.save_deepseek(model, folder, unused)
            return
        model.save(folder)
        if unused:
            from safetensors.torch import save_file

            tensors = {name: tensor.contiguous() for name, tensor in unused.items()}
            save_file(tensors, folder / deepseek.UNUSED_FILE, metadata={"format": "pt"})

    write_folder(out, save)
    return dtype


def _stored(path: Path, base: str | None) -> tuple[torch.dtype, dict[str, Tensor]]:
    """Return the dtype of the weights of a checkpoint, and the tensors that only DeepSeek's layout has."""
    from ospo_fast.models import deepseek
    from ospo_fast.models.deepseek_names import is_unused
    from ospo_fast.models.tensor_files import common_dtype, open_tensors

    if has_base(path):
        weights = TrainerCheckpoint.read(path).weights if is_trainer_file(path) else {}
        if not weights:
            return _stored(_find(base or find_base(path)), None)
        tensors, unused = weights, deepseek.find_unused(weights)
    elif _layout(path) == "deepseek":
        tensors = open_tensors(checks.weight_files(path, pickled=True))
        unused = deepseek.find_unused(tensors)
    else:
        tensors = open_tensors(checks.weight_files(path))
        file = path / deepseek.UNUSED_FILE
        unused = deepseek.find_unused(open_tensors([file])) if file.is_file() else {}
    used = {name: tensor for name, tensor in tensors.items() if not is_unused(name)}
    return common_dtype(used, str(path)), unused


def _convert_adapter(path: Path, out: Path, base: str, trained: TrainerCheckpoint | None) -> torch.dtype:
    """Write LoRA matrices in the other form. Returns their dtype."""
    from huggingface_hub import try_to_load_from_cache

    from ospo_fast.models.tensor_files import common_dtype, open_tensors

    folder = find_folder(base)
    named = base if folder is None else str(folder.resolve())
    if trained is None:
        named = named.replace("deepseek-community/", "deepseek-ai/") if folder is None else named
        if folder is not None and (has_base(folder) or _layout(folder) != "deepseek"):
            logger.warning(
                "%s is not in DeepSeek's layout, and the official code loads no other: convert it too, and name the "
                "result with --base",
                base,
            )
        config, tensors = checks.check_adapter(path), open_tensors([path / checks.ADAPTER_WEIGHTS])
        dtype: torch.dtype = common_dtype(tensors, str(path))
        at = base_folder(base)
        file = try_to_load_from_cache(at, "config.json") if isinstance(at, str) else at / "config.json"
        found = checks.read_json(Path(file)) if isinstance(file, (str, Path)) else {}
        if found and not is_deepseek(found) and found.get("model_type") != "janus":
            raise UsageError(
                f"--to official-lora: got {path} on a {found.get('model_type')!r:.60} model, expected an adapter of a "
                "Janus, the only kind that the official trainer has; use --to transformers."
            )
        if isinstance(at, Path):
            with loading(f"the adapter {path} does not load on {base}", _OTHER_BASE):
                checks.check_adapter_fits(path, config, tensors, at)
        write_folder(out, lambda place: write_trainer_lora(place, config, tensors, named, path))
        return dtype
    tensors, config = trained.lora, trained.lora_config(named)
    dtype = common_dtype(tensors, str(path))
    model = load_model(base, device="cpu", dtype=_stored(_find(base), None)[0])
    with loading(f"the adapter {path} does not load on {base}", _OTHER_BASE):
        checks.check_adapter_tensors(path, config, tensors, model.module)
    _check_same_base(model, trained, base)

    def save(place: Path) -> None:
        import peft
        from safetensors.torch import save_file

        peft.LoraConfig.from_peft_type(**config, inference_mode=True).save_pretrained(str(place))
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, place / checks.ADAPTER_WEIGHTS, metadata={"format": "pt"})

    write_folder(out, save)
    return dtype


def _check_same_base(model: Adapter, trained: TrainerCheckpoint, base: str) -> None:
    """Raise OspoError unless the frozen weights of a checkpoint with LoRA are those of the base model."""
    import torch

    from ospo_fast.models.deepseek import load_weights, restore_tensors

    if not trained.weights:
        return
    own = restore_tensors(model.module.state_dict())
    for name, tensor in own.items():
        stored = trained.weights.get(name)
        if stored is not None and (stored.shape != tensor.shape or not torch.equal(stored.to(tensor.dtype), tensor)):
            raise OspoError(
                f"convert: {name} of {trained.path} is not that of {base}, so the adapter does not belong to this base "
                "model; name its own with --base, or convert the merged model: --to transformers"
            )
    load_weights(model.module, trained.weights, str(trained.path))  # names what is missing

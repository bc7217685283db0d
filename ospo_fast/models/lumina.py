"""Lumina-mGPT in its own layout: the language model of a Chameleon alone, with norms of queries and keys per shard.

transformers' layout has one row of such a norm for each head, and the VQ model: `load_original` puts the weights into
an Anole, which has the same VQ model and its decoder of pixels. Only safetensors are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import OspoError
from ospo_fast.models import folder_checks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ospo_fast.models.adapter import Adapter

BASE = "an Anole, whose VQ model is that of"
KEYS = ("mask_image_logits", "z_loss_weight")  # in its configuration only
_HEAD_NORMS = (".q_norm.", ".k_norm.")


def is_lumina(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a Lumina-mGPT, in any layout."""
    return config.get("model_type") == "chameleon" and any(key in config for key in KEYS)


def is_original(folder: Path) -> bool:
    """Return whether a folder is a Lumina-mGPT without a VQ model."""
    if not is_lumina(folder_checks.read_json(folder / "config.json")):
        return False
    return not any(
        name.startswith("model.vqmodel.") for name in folder_checks.tensor_shapes(folder_checks.weight_files(folder))
    )


def refuse_original(folder: Path) -> None:
    """Raise OspoError for a folder that has to be converted first."""
    if is_original(folder):
        raise OspoError(
            f"model: {folder} is a Lumina-mGPT without the VQ model of its images; convert it: ospo-fast convert "
            f"{folder} NEW_FOLDER --to transformers --base leloy/Anole-7b-v0.1-hf"
        )


def check_base(base: str) -> None:
    """Raise OspoError for a base that is no model."""
    from ospo_fast.models import find_model

    find_model(base)


def load_original(folder: Path, base: str, dtype: torch.dtype) -> Adapter:
    """Load a Lumina-mGPT on the CPU, with the VQ model and the processor of `base`, an Anole in transformers' layout.

    Raises:
        OspoError: the base is another model, or has other sizes.

    """
    import torch

    from ospo_fast.models import load_model
    from ospo_fast.models.chameleon import ChameleonUnifiedModel

    model = load_model(base, device="cpu", dtype=dtype)
    if not isinstance(model, ChameleonUnifiedModel):
        raise OspoError(f"--base: {base} is no Chameleon, expected an Anole, whose VQ model a Lumina-mGPT uses")
    module, heads = model.module, model.module.config
    counts = {".q_norm.": heads.num_attention_heads, ".k_norm.": heads.num_key_value_heads}
    own = {name: weight for name, weight in module.state_dict().items() if not name.startswith("model.vqmodel.")}
    with torch.no_grad():
        for name, tensor in _tensors(folder):
            kind = next((kind for kind in _HEAD_NORMS if kind in name), None)
            if kind is not None and len(tensor) and counts[kind] % len(tensor) == 0:
                tensor = tensor.repeat_interleave(counts[kind] // len(tensor), 0)
            target = own.pop(name, None)
            if target is None or target.shape != tensor.shape:
                raise OspoError(
                    f"convert: {folder} has a tensor {name} {tuple(tensor.shape)}, which {base} does not have in that "
                    "shape; name the Anole of its size with --base"
                )
            target.copy_(tensor)
    if own:
        raise OspoError(f"convert: {folder} lacks {len(own)} tensors ({min(own)}, …); download it again")
    config = folder_checks.read_json(folder / "config.json")
    for key in (*KEYS, "max_position_embeddings"):
        if key in config:
            setattr(module.config, key, config[key])
    return model.with_module(module, name=str(folder))


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in folder_checks.weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)

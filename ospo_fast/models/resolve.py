"""The adapter of what a user holds: an adapter, or a module of transformers, also inside of a wrapper."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import nn

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.families import FAMILIES, find_family
from ospo_fast.models.folder_checks import check_kind

_ADAPTER = ("decoder", "head", "grid", "image_prompt", "embed_codes")
_CLASSES = " or ".join(family.model_class for family in FAMILIES.values() if not family.is_own)
_EXPECTED = f"what ospo_fast.load_model returns, or a {_CLASSES} of transformers"


def resolve_model(model: Any, processor: Any = None) -> UnifiedModel:
    """Return the adapter of `model`.

    Args:
        model: an adapter, or a module of transformers of one of the families (`models.families`). The latter may be
            inside of a PeftModel, torch.compile or DistributedDataParallel.
        processor: that of a module. Without it the adapter takes token ids only, and the module has to be a Janus.

    Raises:
        UsageError: another kind of model or processor; a processor for an adapter, which has one.
        OspoError: what `load_model` refuses; weights that are sharded or offloaded; an adapter of peft that acts in the
            forward pass of the whole model.

    """
    if not isinstance(model, nn.Module) and all(hasattr(model, name) for name in _ADAPTER):
        if processor is not None:
            raise UsageError(f"processor: got one with a {type(model).__name__}, which has its own; leave it out")
        return cast("UnifiedModel", model)
    module = _unwrap(model)
    _check_module(module)
    from ospo_fast.models.janus import JanusTokenModel

    config, path = module.config, module.name_or_path
    name, family = path or type(module).__name__, find_family(module.config.to_dict(), path)
    if processor is None and family.model_type != "janus":
        raise UsageError(
            f"processor: got none, expected the {family.processor_class} of {name}, whose tokens its images need; pass "
            f"processor={family.processor_class}.from_pretrained(…)"
        )
    if processor is None:
        return cast("UnifiedModel", JanusTokenModel(module, name=name))
    for part in ("tokenizer", "image_processor", "apply_chat_template"):
        if not hasattr(processor, part):
            raise UsageError(
                f"processor: got {type(processor).__name__}, expected a {family.processor_class} "
                f"({family.processor_class}.from_pretrained)"
            )
    templates = getattr(config, "template_set", None)
    try:
        adapter = cast("UnifiedModel", family.adapt(module, processor, name=name))
    finally:  # the module is the user's: what an adapter records for files that the pipeline saves is taken back
        module.name_or_path = path
        if templates is None and hasattr(config, "template_set"):
            del config.template_set
    if family.model_type != "janus":
        return adapter
    settings = module.generation_config
    stored = getattr(settings, "generation_kwargs", None) or {}
    for what, own, expected in (
        ("image_token", adapter.image_id, config.image_token_id),
        ("boi_token", adapter.boi_id, stored.get("boi_token_id")),
        ("pad_token", adapter.pad_id, getattr(settings, "pad_token_id", None)),
        ("bos_token", adapter.bos_id, getattr(settings, "bos_token_id", None)),
    ):
        if expected is not None and own != expected:
            raise UsageError(
                f"processor: its {what} has id {own}, that of the model is {expected}; pass the model's own processor, "
                "or correct the model's generation_config"
            )
    return adapter


def _unwrap(model: Any) -> Any:
    """The transformers module inside of wrappers that do not change what its parts compute."""
    while isinstance(model, nn.Module):
        kind = type(model).__name__
        if "_orig_mod" in model._modules:  # torch.compile's
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif kind == "FullyShardedDataParallel":
            raise OspoError(f"model: got {kind}, expected whole weights; generate with the unsharded module")
        elif (peft := sys.modules.get("peft")) and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
            _check_peft(model)
            model = model.base_model.model
        else:
            break
    return model


def _check_peft(model: Any) -> None:
    """Raise OspoError for adapters that act in the forward pass of the PeftModel, not in the layers of its model."""
    names = model.active_adapter if isinstance(model.active_adapter, (list, tuple)) else [model.active_adapter]
    for name in names:
        config = model.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        acts = config.is_prompt_learning or kind in ("XLORA", "POLY")
        if acts or getattr(config, "alora_invocation_tokens", None) is not None:
            raise OspoError(
                f"model: the {kind} adapter {name!r} acts in the forward pass of the whole model, which image "
                "generation does not call; expected an adapter in its layers, such as LoRA"
            )


def _check_module(module: Any) -> None:
    config = getattr(module, "config", None)
    if getattr(config, "model_type", None) == "multi_modality":
        raise OspoError(
            f"model: {type(module).__name__} is of DeepSeek's own classes, expected {_EXPECTED}; give its folder to "
            "load_model"
        )
    names = {family.model_class.rpartition(":")[2] for family in FAMILIES.values()}
    modules = ("transformers.models.", "ospo_fast.models.")
    kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith(modules)}
    if names.isdisjoint(kinds):
        raise UsageError(f"model: got {type(module).__name__}, expected {_EXPECTED}")
    check_kind(module.config.to_dict(), module.name_or_path or type(module).__name__)
    for name, weight in module.named_parameters():
        if weight.is_meta:
            raise OspoError(f"model: {name} is on the meta device, expected weights in memory; load them on one device")
        if not weight.numel() or hasattr(weight, "placements"):
            raise OspoError(f"model: {name} is sharded, expected whole weights; gather them first")

"""What the fused decoder would skip: hooks, patched forwards and other classes in the modules that generate."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ospo_fast.models.architectures import find_architecture
from ospo_fast.models.base import UnifiedModel

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
# Their results depend on one row alone, and they take rows (M, D) as well as (B, S, D).
_ROW_WISE = frozenset(
    (
        nn.Linear, nn.Embedding, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
        nn.Identity, nn.Dropout, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.LayerNorm, nn.RMSNorm,
    )
)  # fmt: skip
# Also those of these modules. peft's adapters of linear layers are maps of one row.
_ROW_WISE_MODULES = (
    "peft.tuners.", "peft.utils.other", "bitsandbytes.nn", "transformers.activations", "transformers.integrations.",
)  # fmt: skip
_JANUS = ("JanusVQVAEHead", "JanusVQVAEAlignerMLP")
_NORMS = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")
_ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_PROJECTIONS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
_ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


def find_override(model: UnifiedModel, *, text: bool = False) -> str | None:
    """Return what makes the decoder or its head compute something else than the fused decoder, or None.

    Checked are the decoder with its embeddings, the head, and the embeddings of image codes; with `text` the language
    model's head in place of the last two. Adapters of linear layers are no override: `projections` runs them.
    """
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        return "torch has a global forward hook for all modules"
    return next(_overrides(model, text), None)


def _overrides(model: UnifiedModel, text: bool) -> Iterator[str]:
    """Each override with the name of its module."""
    decoder: Any = model.decoder
    used: set[type] = set()

    def check(name: str, module: Any, kind: type) -> Iterator[str]:
        used.add(type(module))
        if found := _changed(module, kind):
            yield f"{name} {found}"

    def check_rows(name: str, module: Any) -> Iterator[str]:
        for path, part in [(name, module)] if type(module) is nn.Linear else _named_modules(name, module):
            used.add(type(part))
            if found := _changed_rows(part):
                yield f"{path} {found}"

    known = find_architecture(decoder)
    if known is None:
        yield f"the decoder is a {type(decoder).__name__}, which the fused decoder does not know"
        return
    names, library = known
    kinds: dict[str, Any] = {
        name: getattr(library, getattr(names, name)) for name in ("decoder", "attention", "mlp", "rotary", "norm")
    }
    yield from check("the decoder", decoder, kinds["decoder"])
    yield from check("rotary_emb", decoder.rotary_emb, kinds["rotary"])
    if getattr(decoder.rotary_emb, "rope_type", "default") == "longrope":
        yield "rotary_emb has the type longrope, which depends on the length of the sequence"
    yield from check("norm", decoder.norm, kinds["norm"])
    yield from check("layers", decoder.layers, nn.ModuleList)
    yield from check_rows("embed_tokens", decoder.embed_tokens)
    config, scaling = decoder.config, None
    for i, layer in enumerate(decoder.layers):
        layer_kind = getattr(library, next((n for n in names.layers if n == type(layer).__name__), names.layers[0]))
        if found := _changed(layer, layer_kind):
            yield f"layers.{i} {found}"
            return  # its parts may have other names
        used.add(layer_kind)
        attention, mlp = layer.self_attn, layer.mlp
        yield from check(f"layers.{i}.self_attn", attention, kinds["attention"])
        yield from check(f"layers.{i}.mlp", mlp, kinds["mlp"])
        for name in _NORMS:
            if hasattr(layer, name):
                yield from check(f"layers.{i}.{name}", getattr(layer, name), kinds["norm"])
        for name in _HEAD_NORMS:
            if hasattr(attention, name):
                head_kind = getattr(library, names.head_norm) if names.head_norm else kinds["norm"]
                yield from check(f"layers.{i}.self_attn.{name}", getattr(attention, name), head_kind)
        for name in _ATTENTION_PROJECTIONS:
            yield from check_rows(f"layers.{i}.self_attn.{name}", getattr(attention, name))
        for name in _MLP_PROJECTIONS:
            if hasattr(mlp, name):
                yield from check_rows(f"layers.{i}.mlp.{name}", getattr(mlp, name))
        act_name = "act_fn" if hasattr(mlp, "act_fn") else "activation_fn"
        activation = getattr(mlp, act_name)
        if type(activation).__name__ not in ("SiLU", "SiLUActivation"):
            yield f"layers.{i}.mlp.{act_name} is a {type(activation).__name__}, expected SiLU"
        yield from check_rows(f"layers.{i}.mlp.{act_name}", activation)
        scaling = attention.scaling if scaling is None else scaling
        if attention.scaling != scaling:
            yield f"layers.{i}.self_attn has a scaling of its own"
        if getattr(attention, "sliding_window", None) is not None:
            yield f"layers.{i}.self_attn has a sliding window"
        if attention.config is not config:
            yield f"layers.{i}.self_attn has a configuration of its own"
    if len(decoder.layers) > config.num_hidden_layers or not getattr(config, "is_causal", True):
        yield "the decoder's configuration has fewer layers, or is not causal"
    if text:
        whole: Any = model.module
        if hasattr(whole, "get_output_embeddings"):
            yield from check_rows("lm_head", whole.get_output_embeddings())
    else:
        yield from check_rows("head", model.head)
        for i, module in enumerate(getattr(model, "code_embedding", ())):
            yield from check_rows(f"code_embedding.{i}", module)
    for kind in used:
        if not _is_original(kind):
            yield f"the class {kind.__name__} has a patched forward"
    yield from _functions(library, config)


def _functions(library: Any, config: Any) -> Iterator[str]:
    """Functions of transformers that were replaced, and a registered attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in ("apply_rotary_pos_emb", "rotate_half", "repeat_kv", "create_causal_mask", "eager_attention_forward"):
        if not _is_own(getattr(library, name, None)):
            yield f"{library.__name__}.{name} was replaced"
    implementation = config._attn_implementation or "eager"
    functions = [
        ALL_ATTENTION_FUNCTIONS.get(implementation, getattr(library, "eager_attention_forward", None)),
        ALL_MASK_ATTENTION_FUNCTIONS.get(implementation, None),
    ]
    if implementation not in _ATTENTIONS or not all(map(_in_libraries, functions)):
        yield f"the attention implementation {implementation!r} is not one of transformers"


def _is_own(function: Any) -> bool:
    """Return whether a function is one of `_LIBRARIES`, also where the package `kernels` made a module of it."""
    if isinstance(function, nn.Module) and type(function).__module__.startswith("kernels."):
        cells: Any = type(function).forward.__closure__ or ()
        return _changed(function, type(function)) is None and all(_in_libraries(cell.cell_contents) for cell in cells)
    return _in_libraries(function)


def _named_modules(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((f"{name}.{path}" if path else name, part) for path, part in module.named_modules())


def _changed_rows(module: nn.Module) -> str | None:
    """Say how a part of a linear layer, head or embedding is more than a function of rows; None if it is not."""
    kind = type(module)
    janus = kind.__name__ in _JANUS and kind.__module__.startswith("transformers.models.janus.")
    if janus or kind in _ROW_WISE or kind.__module__.startswith(_ROW_WISE_MODULES):
        return _changed(module, kind)
    return f"is a {kind.__name__}"


def _changed(module: Any, kind: Any) -> str | None:
    """Say what a call of the module does beyond the forward of class `kind`; None if nothing."""
    if type(module) is not kind:
        return f"is a {type(module).__name__}, expected {kind.__name__}"
    attributes = vars(module)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        for hook in attributes[name].values() if attributes[name] else ():
            if not _has_no_effect(hook):
                return f"has a {name[1:-1].replace('_', ' ')} ({getattr(hook, '__qualname__', type(hook).__name__)})"
    if "forward" in attributes:
        forward = attributes["forward"]
        # A bound method of the module itself is what remains where a patch was taken back.
        if getattr(forward, "__func__", None) is not kind.forward or forward.__self__ is not module:
            return "has a patched forward"
    return None


def is_changed(module: nn.Module) -> bool:
    """Return whether a call of the module does more than the forward of its class as its library wrote it."""
    global_hooks = torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks
    kind = type(module)
    return bool(global_hooks) or _changed(module, kind) is not None or not _is_original(kind)


def _has_no_effect(hook: Any) -> bool:
    """Return whether a hook leaves values as they are.

    Those of transformers that record outputs are installed for good at the first such call, and record only during
    one. Others make embeddings require a gradient.
    """
    library = str(getattr(hook, "__module__", "")).split(".")[0]
    name = str(getattr(hook, "__name__", ""))
    known = name == "output_capturing_hook" or name.startswith("make_inputs_require_grad")
    return known and library in ("transformers", "peft") and _in_libraries(hook)


def _is_original(kind: Any) -> bool:
    """Return whether the forward of a class, and its call, are those that its library wrote."""
    return _is_original_forward(kind, kind.forward, kind.__call__)


@functools.lru_cache(maxsize=256)
def _is_original_forward(kind: type, forward: Any, call: Any) -> bool:
    if forward is nn.Module.forward:  # of a container, which is not called
        return _in_libraries(call)
    owner = next((base for base in kind.__mro__ if "forward" in vars(base)), kind)
    function = forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    named = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    return (
        named == (f"{owner.__qualname__}.forward", owner.__module__) and _in_libraries(forward) and _in_libraries(call)
    )


def _in_libraries(function: Any) -> bool:
    """Return whether the code of a function, and of all that it wraps, is in a file of `_LIBRARIES`."""
    folders = _folders(tuple(name in sys.modules for name in _LIBRARIES))
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(folders):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


@functools.cache
def _folders(imported: tuple[bool, ...]) -> tuple[str, ...]:
    found = []
    for name, present in zip(_LIBRARIES, imported, strict=True):
        file = getattr(sys.modules.get(name), "__file__", None)
        if present and file:
            found.append(str(Path(file).parent) + os.sep)
    return tuple(found)

"""Modules as heads: their plain weights, and adapters of peft.

A head is used by its weights and not called. What else its modules do is either followed here or refused.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.errors import OpError
from ospo_fast.oom import out_of_memory
from ospo_fast.ops._sharded_weights import check_accumulates, check_present, check_shards, gather_parameter
from ospo_fast.ops.head import Head

_REMEDY = "pass ospo_fast.Head(weight, bias, proj_weight, proj_bias) with its plain weights"
# Names of projection, activation and output layer in transformers' JanusVQVAEHead and in DeepSeek's vision_head.
_LAYER_NAMES = (
    ("proj_out", "activation_fn", "vision_head"),
    ("output_mlp_projector", "vision_activation", "vision_head"),
)
# Modules that run their layers in turn, as was found for this forward and these settings.
_CHECKED: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_LINEAR_FORWARD = nn.Linear.forward  # before anything patches the class
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks on the calls of every module. torch changes these dictionaries in place.
_GLOBAL_HOOKS: Any = tuple(getattr(torch.nn.modules.module, f"_global{name}") for name in _HOOKS)
# Hooks that may be skipped. Those of FSDP2 and DeepSpeed gather sharded weights, which is done by `_gather` or by the
# user's own context. The others only observe, to count operations for example.
_SKIPPED = (
    "torch.distributed.fsdp.", "torch.distributed._composable.replicate_with_fsdp", "deepspeed.",
    "torch.utils.module_tracker", "torch.distributed._tools.", "torch.distributed.tensor.debug.",
)  # fmt: skip


@dataclass(eq=False, slots=True)
class ResolvedHead:
    """A head as `token_logprobs` computes it: logits = head(hidden) + lora_inputs · lora_weightᵀ."""

    hidden: Tensor  # (..., D) input of `head`; features, if the projection was called as a module
    head: Head
    lora_inputs: Tensor | None = None  # (N, R) = scaling · A(dropout(hidden)) of all active adapters
    lora_weight: Tensor | None = None  # (V, R), the B of all active adapters
    check_adapters: Callable[[], None] | None = None  # raises if the adapters have changed since

    @property
    def lora(self) -> tuple[Tensor | None, Tensor | None]:
        """lora_inputs and lora_weight."""
        return self.lora_inputs, self.lora_weight

    def to(self, dtype: torch.dtype) -> ResolvedHead:
        """Return all tensors in another dtype; gradients reach the original ones."""
        lora_inputs, lora_weight = (None if t is None else t.to(dtype) for t in self.lora)
        return replace(
            self, hidden=self.hidden.to(dtype), head=self.head.to(dtype), lora_inputs=lora_inputs,
            lora_weight=lora_weight,
        )  # fmt: skip


def resolve_head(op: str, module: Head | nn.Module, hidden: Tensor, process_group: Any = None) -> ResolvedHead:
    """Return what `token_logprobs` needs of a head, whose output layer may be split over a process group."""
    if isinstance(module, Head):
        return ResolvedHead(hidden, check_shards(module, hidden, process_group))
    if not isinstance(module, nn.Module):
        raise OpError(f"{op}: head is {type(module).__name__}, expected nn.Linear, a Linear-GELU-Linear module or Head")
    if type(module) is nn.Linear:  # at once, because looking for adapters takes longer than the product of one row
        attributes = vars(module)
        weights = attributes["_parameters"]
        patched = nn.Linear.forward is not _LINEAR_FORWARD or "bias" not in weights
        if torch.compiler.is_compiling():  # makes torch.compile look for a forward of its own at every call
            patched = patched or getattr(module.forward, "__func__", None) is not _LINEAR_FORWARD
        if not patched and _is_called_as_is(attributes) and type(weights.get("weight")) is nn.Parameter:
            head = Head(weights["weight"], weights["bias"])
        else:
            head = Head(*linear_tensors(module, "head"))
        return ResolvedHead(hidden, check_shards(head, hidden, process_group))
    called = called_module(module)
    projection, output = None, called
    if _adapter_layer(called) is None:
        if not any(_adapter_layer(part) is not None for part in called.children()):
            return ResolvedHead(hidden, check_shards(Head.of(called), hidden, process_group))
        check_called_as_is(called)
        projection, activation, output = mlp_layers(called)
        projection, output = called_module(projection), called_module(output)
        check_exact_gelu(activation)
    _check_hidden(op, hidden, output if projection is None else projection)
    checks = []
    if projection is not None:
        # Its features take no more memory than the hidden states, so autograd may keep them.
        if (layer := _adapter_layer(projection)) is not None:
            checks.append(_adapters_unchanged(op, layer))
            hidden = F.gelu(_call_adapters(op, layer, hidden).to(hidden.dtype))
        else:
            plain = Head(*linear_tensors(projection, "projection"))
            hidden = F.gelu(check_shards(plain, hidden, None)(hidden))
    lora: tuple[Tensor | None, Tensor | None] = None, None
    if (layer := _adapter_layer(output)) is None:
        head = Head(*linear_tensors(output, "output layer"))
    else:
        checks.append(_adapters_unchanged(op, layer))
        head, lora = _lora_head(op, layer, hidden)
        # Of A, which was called, hooks of DeepSpeed gather the weight when its backward starts.
        weights = [layer.lora_B[name].weight for name in _active_adapters(layer)]
        checks.append(functools.partial(check_accumulates, weights))

    def check_adapters() -> None:
        for check in checks:
            check()

    return ResolvedHead(hidden, check_shards(head, hidden, process_group), *lora, check_adapters)


# ---------------------------------------------------------------- plain modules


def head_of(module: nn.Module) -> Head:
    """Return the weights of a module; see `Head.of`."""
    module = called_module(module)
    for part in module.modules():
        if _adapter_layer(part) is not None and _active_adapters(part):
            raise OpError(
                f"Head.of: {type(part).__name__} has a LoRA adapter, which plain weights do not hold; pass the module "
                "itself to token_logprobs or OSPOLoss, or merge the adapter (merge_and_unload)"
            )
    if isinstance(module, nn.Linear) or _adapter_layer(module) is not None:
        return Head(*linear_tensors(module, "head"))
    check_called_as_is(module)
    projection, activation, output = mlp_layers(module)
    check_exact_gelu(activation)
    return Head(*linear_tensors(output, "output layer"), *linear_tensors(projection, "projection"))


def mlp_layers(module: nn.Module) -> list[Any]:
    """Return projection, activation and output layer of a Linear-GELU-Linear module."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module) == 3:
        return list(module)
    for names in _LAYER_NAMES:
        projection, activation, output = names
        # Not by hasattr alone: wrappers have the attributes of what they wrap.
        if {projection, output} <= vars(module)["_modules"].keys() and hasattr(module, activation):
            _check_forward(module, names)
            return [getattr(module, name) for name in names]
    raise OpError(
        f"Head.of: {type(module).__name__} is not a known head (nn.Linear or Linear-GELU-Linear); "
        f"if it computes weight·gelu(proj·x) or weight·x, {_REMEDY}"
    )


def _check_forward(module: nn.Module, names: Sequence[str]) -> None:
    """Raise OpError if the forward of a module that is known by its names does more than its layers in turn."""
    parts: dict[str, Any] = vars(module)
    held = {**parts["_parameters"], **parts["_buffers"], **parts["_modules"]}
    others = [name for name, part in held.items() if part is not None and name not in names]
    if others:  # even if the result is the same now, such as that of a scale that is 1 before training
        raise OpError(
            f"Head.of: {type(module).__name__} has {others[0]!r}, expected {', '.join(names)} alone; if its forward "
            f"does not use it, {_REMEDY}"
        )
    settings = tuple((k, v) for k, v in parts.items() if isinstance(v, (bool, int, float, str, type(None))))
    if error := _difference(module, names, settings):
        raise OpError(f"Head.of: the forward of {type(module).__name__} {error}")


def _difference(module: nn.Module, names: Sequence[str], settings: tuple[Any, ...]) -> str:
    """Say how the forward of a module differs from its layers in turn; empty if it does not.

    Compares both, once for each module, mode and plain attributes, on rows whose logits reach from small ones to 50.
    """
    if torch.compiler.is_compiling():  # traced by itself, after a graph break in its caller
        torch._dynamo.skip_frame("guards would read the keys of _CHECKED, which come and go")
    layers = [getattr(module, name) for name in names]
    state = type(module).forward, settings
    tensors = [*module.parameters(), *module.buffers()]
    whole = all(type(t) in (Tensor, nn.Parameter) and t.numel() > 0 and not t.is_meta for t in tensors)
    if _CHECKED.get(module) == state or not whole:
        return ""
    width = next((layer.in_features for layer in layers[0].modules() if hasattr(layer, "in_features")), None)
    if width is None:
        return ""  # refused by others
    dtype = tensors[0].dtype
    row = torch.linspace(-1, 1, width, dtype=torch.float32, device=tensors[0].device)
    rows = torch.stack([row, row.flip(0), (7 * row).sin()]).to(dtype)

    def in_turn(x: Tensor) -> Any:
        return layers[2](layers[1](layers[0](x)))

    same = True
    try:
        size = _run_once(in_turn, rows).abs().max().item()
        for x in (rows, rows * (50 / max(size, 1e-3))):
            one, other = _run_once(module, x.unsqueeze(0)), _run_once(in_turn, x.unsqueeze(0))
            bound = 16 * torch.finfo(dtype).eps * other.abs().max().item()
            same = same and one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=bound, equal_nan=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        return (
            f"failed on hidden states (1, 3, {width}), expected weight·gelu(proj·x + proj_bias) + bias "
            f"({type(error).__name__}: {error}); {_REMEDY}"
        )
    if not same:
        return (
            "computes something else than its projection, activation and output layer in turn, expected "
            f"weight·gelu(proj·x + proj_bias) + bias; {_REMEDY}, and scale or cap the logits with temperature= and "
            "softcap="
        )
    _CHECKED[module] = state
    return ""


# What torch.compiler.assume_constant_result sets (see `_dispatch`): torch.compile runs it when it traces a caller.
_difference._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run_once(run: Callable[[Tensor], Any], rows: Tensor) -> Tensor:
    devices = [rows.device] if rows.is_cuda else []
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False), torch.random.fork_rng(devices):
        torch.manual_seed(0)  # the same dropout of adapters
        result: Tensor = run(rows)
        return result


def linear_tensors(module: nn.Module, role: str) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a layer that does nothing else, gathered if FSDP2 has sharded them."""
    if type(module) is not nn.Linear:
        module = called_module(module)
        while (layer := _adapter_layer(module)) is not None and not _active_adapters(layer):
            _check_adapter_layer("Head.of", layer)
            module = layer.base_layer
    own = not isinstance(module, nn.Linear) or type(module).forward is not _LINEAR_FORWARD
    if own or type(module).__call__ is not nn.Module.__call__:
        raise OpError(f"Head.of: its {role} is {type(module).__name__}, expected nn.Linear; {_REMEDY}")
    weight: Any = module.weight
    bias: Any = module.bias
    if type(weight) is not nn.Parameter and hasattr(weight, "placements"):
        return gather_parameter(weight, bias, functools.partial(check_called_as_is, module))
    if type(weight) is Tensor and not torch.compiler.is_compiling() and weight.untyped_storage().nbytes() == 0:
        check_present("Head", "weight", weight.new_empty(0))  # FSDP1 has freed its memory
    check_called_as_is(module)
    return weight, bias


def check_called_as_is(module: nn.Module, own_forward: bool = False) -> None:
    """Raise OpError if a call of the module would do more than its class does: hooks, or a forward set on the object.

    own_forward: the class sets the forward on the object.
    """
    attributes = vars(module)
    if _is_called_as_is(attributes):
        return
    found = []
    for name, hooks_of_all in zip(_HOOKS, _GLOBAL_HOOKS, strict=True):
        kind = name[1:-1].replace("_", " ")
        for scope, hooks in (("", attributes[name] or {}), ("global ", hooks_of_all)):
            found += [f"{scope}{kind} {_name(h)}" for h in hooks.values() if not _may_be_skipped(h)]
    if "forward" in attributes and not own_forward and not _moves_inputs_only(module):
        found.append("forward set on the instance")
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise OpError(
                f"Head.of: accelerate offloads the weights of {type(module).__name__} (AlignDevicesHook with "
                "offload=True), expected weights on a device; keep the head on one in device_map, or use "
                "accelerate.hooks.remove_hook_from_module"
            )
    if found:
        raise OpError(
            f"Head.of: {type(module).__name__} has a {found[0]}, which would be skipped, because a head is used by its "
            "weights and not called; expected a module without hooks; remove it (token_logprobs has softcap= and "
            f"temperature=, and hidden can be scaled before), or {_REMEDY}"
        )


def _is_called_as_is(attributes: dict[str, Any]) -> bool:
    for_all = _GLOBAL_HOOKS
    return not (
        attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"] or "forward" in attributes
        or for_all[0] or for_all[1] or for_all[2] or for_all[3]
    )  # fmt: skip


def is_plain_linear(module: nn.Linear) -> bool:
    """Return whether an nn.Linear is called as it is, with parameters that no parametrization replaces."""
    attributes = vars(module)
    weights = attributes["_parameters"]
    plain = nn.Linear.forward is _LINEAR_FORWARD and "bias" in weights and type(weights.get("weight")) is nn.Parameter
    replaced = "weight" in attributes or "bias" in attributes  # set on the object, which hides the parameter
    return plain and not replaced and _is_called_as_is(attributes)


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))


def _may_be_skipped(hook: Any) -> bool:
    owner = getattr(hook, "__self__", hook)
    module = getattr(owner, "__module__", None) or type(owner).__module__
    return module.startswith(_SKIPPED)


def _moves_inputs_only(module: nn.Module) -> bool:
    """Whether accelerate has set the forward, to move inputs to the device of weights that stay where they are."""
    hook: Any = getattr(module, "_hf_hook", None)
    original = getattr(module, "_old_forward", None)
    moves = type(hook).__name__ == "AlignDevicesHook" and not hook.offload and not hook.no_grad
    return moves and getattr(original, "__func__", None) is type(module).forward


def check_exact_gelu(activation: Any) -> None:
    """Raise OpError unless the activation is the erf GELU."""
    name = getattr(activation, "__name__", type(activation).__name__)
    if isinstance(activation, nn.GELU) and type(activation).forward is nn.GELU.forward:
        exact, name = activation.approximate == "none", f"nn.GELU(approximate={activation.approximate!r})"
    else:
        # GELUActivation is the erf form of transformers; its tanh forms have other names.
        exact = activation is F.gelu or type(activation).__name__ == "GELUActivation"
    if not exact:
        raise OpError(f"Head.of: the activation is {name}, expected the exact erf GELU, nn.GELU(); use another loss")
    if isinstance(activation, nn.Module):
        check_called_as_is(activation)


# ---------------------------------------------------------------- adapters of peft, by the names of its attributes


def called_module(module: Any) -> Any:
    """Return the module that a call of a wrapper runs.

    Wrappers are those of torch.compile, a PeftModel, and peft's `modules_to_save`, which calls the trained copy, or
    the original module if it is disabled.
    """
    parts = vars(module)["_modules"]
    if "_orig_mod" in parts:
        check_called_as_is(module, own_forward=True)
        return called_module(parts["_orig_mod"])
    if "base_model" in parts and hasattr(module, "peft_config"):
        check_called_as_is(module)
        check_called_as_is(module.base_model)
        return called_module(module.get_base_model())
    if not ("modules_to_save" in parts and "original_module" in parts):
        return module
    check_called_as_is(module)
    names = module.active_adapters
    if module.disable_adapters or not names or any(name not in module.modules_to_save for name in names):
        return called_module(module.original_module)
    return called_module(module.modules_to_save[names[0]])


def _adapter_layer(module: Any) -> Any:
    """Return the module if peft wraps a layer by it."""
    return module if isinstance(module, nn.Module) and hasattr(module, "base_layer") else None


def _active_adapters(layer: Any) -> list[str]:
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A] if hasattr(layer, "lora_A") else ["?"]


def _adapter_state(layer: Any) -> tuple[Any, ...]:
    return bool(layer.disable_adapters), tuple(layer.active_adapters), tuple(layer.merged_adapters)


def _check_adapter_layer(op: str, layer: Any) -> None:
    """Raise OpError for hooks, and for adapters that a call of the layer would unmerge first."""
    if layer.disable_adapters and layer.merged:
        # Unmerging changes the weights, so it is left to the user.
        raise OpError(
            f"{op}: the adapters {list(layer.merged_adapters)} of the head are disabled while merged into its weight, "
            "expected one or the other; unmerge them first (layer.unmerge())"
        )
    check_called_as_is(layer)


def _adapters_unchanged(op: str, layer: Any) -> Callable[[], None]:
    """Check an adapted layer; return a function for the backward that raises if its adapters are others by then."""
    _check_adapter_layer(op, layer)
    used, before = set(_active_adapters(layer)), _adapter_state(layer)

    def check() -> None:
        now = _adapter_state(layer)
        if now[-1] != before[-1] or not used <= set(_active_adapters(layer)):
            raise OpError(
                f"{op}: the head's adapters are (disabled, active, merged) = {now} in the backward, but were {before} "
                "in the forward; their gradients would be wrong or missing; call backward before adapters are "
                "disabled, switched or merged"
            )

    return check


def _lora_head(op: str, layer: Any, hidden: Tensor) -> tuple[Head, tuple[Tensor | None, Tensor | None]]:
    """Return the base layer as a head, and lora_inputs and lora_weight of the active adapters."""
    names = _active_adapters(layer)
    head = Head(*linear_tensors(layer.base_layer, "base layer"))
    if not names:
        return head, (None, None)
    low, weights = _low_rank(op, layer, names, hidden)
    inputs = [part.reshape(-1, part.shape[-1]) for part in low]
    # In the dtype of the adapters, which is often wider than that of the head. Adapters of several dtypes: the widest.
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in (*low, *weights)))
    return head, tuple(torch.cat([t.to(dtype) for t in parts], dim=1) for parts in (inputs, weights))  # type: ignore[return-value]


def _call_adapters(op: str, layer: Any, x: Tensor) -> Tensor:
    """Call an adapted layer, with its weights gathered if FSDP2 has sharded them."""
    for name, parameter in layer.named_parameters():
        check_present("Head", name, parameter)
    if not any(hasattr(parameter, "placements") for parameter in layer.parameters()):
        return layer(x)  # type: ignore[no-any-return]  # adapters of any kind
    weight, bias = linear_tensors(layer.base_layer, "base layer")
    _check_dtype(op, x, weight)
    y = F.linear(x, weight, bias)
    for low, weight in zip(*_low_rank(op, layer, _active_adapters(layer), x), strict=True):
        y = y + F.linear(low, weight)
    return y


def _low_rank(op: str, layer: Any, names: list[str], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return scaling · A(dropout(x)) (..., r) and B (V, r) of each of the adapters, which are plain LoRA."""
    # By the bases, because FSDP2 changes the class itself.
    bases = [c for c in type(layer).__mro__ if c.__name__ == "Linear" and c.__module__.startswith("peft.tuners.lora")]
    plain = bool(bases) and type(layer).forward is vars(bases[0])["forward"]
    variants = [name for name in names if name in getattr(layer, "lora_variant", {})] if plain else []
    biased = [name for name in names if plain and layer.lora_B[name].bias is not None]
    if names and (not plain or variants or biased):
        what = f"{type(layer).__module__}.{type(layer).__name__}"
        if variants:
            what += f" with a variant of LoRA (such as DoRA) for {variants}"
        elif biased:
            what += f" with lora_bias for {biased}"
        raise OpError(
            f"{op}: the head is {what}, expected LoRA adapters of peft's lora.Linear; remove the head from "
            "target_modules, or merge the adapter (merge_and_unload)"
        )
    low, weights = [], []
    for name in names:
        a, b = layer.lora_A[name], layer.lora_B[name]
        for part in (a, b):
            check_present("Head", f"weight of adapter {name!r}", part.weight)
        (a_weight, _), (b_weight, _) = (linear_tensors(part, f"adapter {name!r}") for part in (a, b))
        x = layer._cast_input_dtype(x, a_weight.dtype)
        dropped = layer.lora_dropout[name](x)
        # Called, because hooks of DeepSpeed gather its weight, also for the backward.
        projected = a(dropped) if a_weight is a.weight else F.linear(dropped, a_weight)
        low.append(projected * layer.scaling[name])
        weights.append(b_weight)
    return low, weights


def _check_dtype(op: str, hidden: Tensor, weight: Tensor) -> None:
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        got = f"hidden is {hidden.dtype}, the head is {weight.dtype}"
        raise OpError(f"{op}: {got}; cast one of them or run under torch.autocast")


def _check_hidden(op: str, hidden: Tensor, layer: Any) -> None:
    """Raise OpError for hidden states that a layer with adapters, which is called here, would not take."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    weight = getattr(layer, "weight", None)
    if weight is None or weight.numel() == 0:
        return  # refused by others
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        expected = f"(..., {weight.shape[1]}), the head's width"
        raise OpError(f"{op}: hidden has shape {tuple(hidden.shape)}, expected {expected}")
    if not hasattr(weight, "placements"):  # those are gathered in the dtype of FSDP2's mixed precision
        _check_dtype(op, hidden, weight)
    if hidden.device != weight.device:
        raise OpError(f"{op}: hidden is on {hidden.device}, the head on {weight.device}; move them to one device")

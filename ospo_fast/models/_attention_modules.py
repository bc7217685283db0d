"""The attention modules of a transformers model, in the order of its `output_attentions`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ospo_fast.errors import OspoError
from ospo_fast.packages import required_by

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"  # the name of transformers' AttentionInterface in its model files
_KINDS = ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions")


@dataclass(frozen=True, eq=False)
class Layer:
    """One entry of `output_attentions`."""

    module: nn.Module  # whose output has the weights
    index: int  # of the weights in that output
    callers: tuple[nn.Module, ...]  # modules inside, or `module` itself, that call transformers' AttentionInterface
    registries: tuple[Any, ...]  # the AttentionInterface objects that they ask


@dataclass(frozen=True, eq=False)
class AttentionLayers:
    """The attention layers of one kind of a model."""

    owner: Any  # the transformers model that they belong to
    layers: tuple[Layer, ...]
    kind: str | None  # the name in the model's output; None: "attentions"

    @property
    def is_cross(self) -> bool:
        """Whether the keys are those of an encoder."""
        return self.kind == "cross_attentions"

    @property
    def heads(self) -> int | None:
        """The number of query heads by the configuration, None if it has none."""
        side, config = "encoder" if self.kind == "encoder_attentions" else "decoder", self.owner.config
        count = getattr(config, f"{side}_attention_heads", None) or getattr(config, "num_attention_heads", None)
        return None if count is None else int(count)

    @property
    def implementation(self) -> str:
        """The name of the attention that the owner runs."""
        return self.owner.config._attn_implementation or "eager"


def find_attention(model: Any, kind: str | None) -> AttentionLayers:
    """Find the layers whose attention `output_attentions` returns under the name `kind`.

    Args:
        model: an adapter, or a module that holds a transformers model.
        kind: "attentions", or for an encoder-decoder "decoder_attentions", "cross_attentions" or "encoder_attentions".
            None: "attentions", which an encoder-decoder does not have.

    Raises:
        OspoError: there are none, or which of them is meant is not clear.

    """
    with required_by("AttentionCapture", "transformers"):
        from transformers import PreTrainedModel

    root = getattr(model, "module", None) if hasattr(model, "decoder") and hasattr(model, "image_prompt") else model
    if not isinstance(root, nn.Module):
        raise OspoError(f"capture: got a {type(model).__name__}, expected a model adapter or a transformers module")
    whole = whole_model(root)
    if whole is None:
        raise OspoError(
            f"capture: {type(root).__name__} holds no transformers model, whose attention goes through transformers' "
            "AttentionInterface"
        )
    if kind is not None and kind not in _KINDS:
        raise OspoError(f"capture: attentions is {kind!r}, expected one of {', '.join(_KINDS)}")
    encoder_decoder = bool(getattr(whole.config, "is_encoder_decoder", False))
    if encoder_decoder and kind in (None, "attentions"):
        raise OspoError(
            f"capture: {type(whole).__name__} is an encoder-decoder; give attentions='decoder_attentions', "
            "'cross_attentions' or 'encoder_attentions'"
        )
    part = whole.get_encoder() if kind == "encoder_attentions" and encoder_decoder else whole.get_decoder()
    if not isinstance(part, PreTrainedModel):  # some encoders call the head that predicts tokens a decoder
        part = whole
    name = "cross_attentions" if kind == "cross_attentions" else "attentions"
    finders: list[Callable[[Any], Iterator[Layer]]] = [functools.partial(_recorded, name=name)]
    if name == "attentions":
        finders.append(_in_blocks)
    for find in finders:
        for owner in part.modules():
            if isinstance(owner, PreTrainedModel) and (layers := tuple(find(owner))):
                return AttentionLayers(owner, layers, kind)
    raise OspoError(
        f"capture: {type(part).__name__} names no modules for {kind or name}; use a transformers model that returns "
        "them with output_attentions=True"
    )


def whole_model(root: nn.Module) -> Any:
    """The outermost transformers model of a module, None if it has none."""
    from transformers import PreTrainedModel

    return next((module for module in root.modules() if isinstance(module, PreTrainedModel)), None)


def check_readable(attention: AttentionLayers) -> None:
    """Raise OspoError if the attention of the layers cannot be read. It gives the reason and the remedy."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = attention.implementation
    family = type(attention.owner).__name__
    if name.startswith("paged|"):
        raise OspoError(
            f"capture: {family} runs {name!r}, which writes to a shared cache; load it with attn_implementation='sdpa'"
        )
    if name != "eager" and name not in ALL_ATTENTION_FUNCTIONS:
        raise OspoError(
            f"capture: the attention implementation {name!r} is not in transformers' AttentionInterface; "
            "load the model with attn_implementation='sdpa'"
        )
    for layer in attention.layers:
        own = type(layer.module).__name__
        if any(hasattr(layer.module, part) for part in ("lambda_q1", "lambda_init")):
            raise OspoError(
                f"capture: {own} is differential attention: its output is the difference of two attentions, so the "
                "weights of one do not say which keys it reads; use another model"
            )
        if not layer.callers and name != "eager":
            raise OspoError(
                f"capture: {own} computes {name!r} attention itself, not through transformers' AttentionInterface, and "
                "returns no weights; load the model with attn_implementation='eager'"
            )


def _recorded(owner: Any, name: str) -> Iterator[Layer]:
    """The modules that transformers itself records for an output (`_can_record_outputs`)."""
    specs = (getattr(owner, "_can_record_outputs", None) or {}).get(name, [])
    wanted = [
        (
            target if isinstance(target := getattr(spec, "target_class", spec), type) else None,
            target if isinstance(target, str) else getattr(spec, "class_name", None),
            f".{place.strip('.')}." if (place := getattr(spec, "layer_name", None)) else "",
            getattr(spec, "index", 1),
        )
        for spec in (specs if isinstance(specs, list) else [specs])
    ]
    for path, module in _own_modules(owner):
        for target, suffix, place, index in wanted:
            matches = isinstance(module, target) if target else suffix is not None and path.endswith(suffix)
            if matches and place in f"{path}.":
                yield _layer(module, index)
                break


def _own_modules(owner: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules below `owner`, without those of other transformers models inside it."""
    from transformers import PreTrainedModel

    found: list[tuple[str, nn.Module]] = []

    def visit(parent: nn.Module, path: str) -> None:
        for name, child in parent._modules.items():
            if child is None:
                continue
            if child._modules:
                if isinstance(child, PreTrainedModel):
                    continue
                visit(child, f"{path}.{name}")
            found.append((f"{path}.{name}", child))

    visit(owner, "")
    return found


def _in_blocks(owner: Any) -> Iterator[Layer]:
    """The attention module of each block of an older model file, which records its attentions in a loop."""
    count = getattr(owner.config, "num_hidden_layers", None)
    blocks = next((m for _, m in _own_modules(owner) if isinstance(m, nn.ModuleList) and len(m) == count), ())
    for block in blocks:
        found = [module for module in _outermost(block) if type(module).__name__.endswith("Attention")]
        if len(found) != 1:
            return
        yield _layer(found[0], 1)


def _outermost(parent: nn.Module) -> Iterator[nn.Module]:
    for child in parent.children():
        yield child
        if not type(child).__name__.endswith("Attention"):
            yield from _outermost(child)


def _layer(module: nn.Module, index: int) -> Layer:
    parts = [module, *(part for _, part in _own_modules(module))]
    kinds: list[tuple[nn.Module, Any]] = [(part, type(part)) for part in parts]
    found = {part: registries for part, kind in kinds if (registries := _registries(kind))}
    return Layer(module, index, tuple(found), tuple({id(r): r for rs in found.values() for r in rs}.values()))


@functools.cache
def _registries(module_type: Any) -> list[Any]:
    """The AttentionInterface objects that methods of a module ask for their attention function."""
    found = []
    for kind in module_type.__mro__:
        if kind is nn.Module:
            break
        for method in vars(kind).values():
            function: Any = inspect.unwrap(method) if callable(method) else None
            names = getattr(getattr(function, "__code__", None), "co_names", ())
            if _REGISTRY in names and "get_interface" in names and _REGISTRY in function.__globals__:
                found.append(function.__globals__[_REGISTRY])
    return found

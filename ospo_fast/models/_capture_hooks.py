"""What runs inside a model while `AttentionCapture` captures it. torch.compile does not enter these functions.

A module of its own, because torch.compiler.disable imports torch._dynamo, which takes as long as importing torch.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from ospo_fast.models._column_probabilities import AttentionCall
from ospo_fast.models.capture import _ACTIVE, _OWNERS, AttentionCapture

# The reason is part of torch's error where a graph break is not allowed.
_run_eagerly = functools.partial(
    torch.compiler.disable,
    reason="AttentionCapture reads the attention; compile without fullgraph, or generate() with disable_compile=True",
)


def get_interface(registry: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `get_interface` of an AttentionInterface during captures.

    The model asks for its attention as always: its configuration and masks stay the same, each module file gives its
    own eager function, and modules that are not captured only run what they got.
    """
    function = type(registry).get_interface(registry, name, default)
    return functools.partial(_attend, function)


def _find_active(module: Any) -> tuple[AttentionCapture, int] | None:
    """The capture of a module in this thread, and the index of its layer. Other threads only run the model."""
    active = _ACTIVE.get(id(module))
    return active if active is not None and active[0]._thread == threading.get_ident() else None


@_run_eagerly
def _attend(function: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    active = _find_active(module)
    if active is None:
        return function(module, *args, **kwargs)
    capture, index = active
    return capture._run(index, AttentionCall.from_args(function, module, args, kwargs))


@_run_eagerly
def before_pass(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for capture in _OWNERS.get(id(owner), ()):
        if capture._thread == threading.get_ident():
            capture._begin_pass(args, kwargs)


@_run_eagerly
def after_layer(module: Any, _: tuple[Any, ...], output: Any) -> None:
    active = _find_active(module)
    if active is not None:
        capture, index = active
        capture._read_output(index, output)

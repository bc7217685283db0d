"""Replace attributes for a while: of any object in a `with` block, or whenever a model runs its forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self

ABSENT: Any = object()  # as a value: the object has no attribute of that name of its own
Patch = tuple[Any, str, Any]  # owner, name of the attribute, value


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give `owner` an attribute of its own, `ABSENT` for none, and restore the previous one at the end."""
    previous = vars(owner).get(name, ABSENT)
    _assign(owner, name, value)
    try:
        yield
    finally:
        _assign(owner, name, previous)


def _assign(owner: Any, name: str, value: Any) -> None:
    if value is not ABSENT:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)


class Enabled:
    """Handle of patches that are in force while a model runs its forward. `undo`, or the end of `with`, removes them.

    Forward hooks apply the patches: they survive what wraps the model or its forward later, such as DDP, FSDP2 or the
    autocast of Accelerate.

    Args:
        models: the modules whose calls count.
        patches: computes the patches of a model, at each of its calls.

    """

    def __init__(self, models: Iterable[nn.Module], patches: Callable[[nn.Module], Iterable[Patch]]) -> None:
        self._patches = patches
        self._open: list[ExitStack] = []
        self._hooks = []
        for model in models:
            self._hooks.append(model.register_forward_pre_hook(self._apply))
            # Before the hooks of an earlier handle: the last patches to be applied are the first to be removed.
            self._hooks.append(model.register_forward_hook(self._remove, prepend=True, always_call=True))

    def undo(self) -> None:
        """Remove the patches. A second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._open:  # called during a forward
            self._open.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _apply(self, model: nn.Module, _: Any) -> None:
        with ExitStack() as stack:
            for patch in self._patches(model):
                stack.enter_context(replaced(*patch))
            self._open.append(stack.pop_all())

    def _remove(self, *_: Any) -> None:
        if self._open:  # empty if `_apply` failed
            self._open.pop().close()

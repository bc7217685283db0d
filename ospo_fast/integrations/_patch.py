"""Replace attributes for a while: of any object in a `with` block, or functions of a library for some models."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from ospo_fast.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

ABSENT: Any = object()  # as a value: the object has no attribute of that name of its own
# Owner and name of a library's function, and what makes its replacement from it, which asks for `running_head`.
Function = tuple[Any, str, Callable[[Any], Any]]


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


@dataclass(eq=False)
class _Replaced:
    theirs: Any
    ours: Any
    users: int = 0


_REPLACED: dict[tuple[Any, str], _Replaced] = {}
_LOCK = threading.RLock()  # a garbage collection inside may end another handle
# The handle and the model whose forward runs, in this thread.
_RUNNING: ContextVar[tuple[Enabled, Any] | None] = ContextVar("running", default=None)


def running_head() -> nn.Module | None:
    """Return the output head of the model that runs its forward in this thread, if its handle is in force."""
    running = _RUNNING.get()
    if running is None or not running[0].in_force:
        return None
    head: nn.Module = running[1].get_output_embeddings()
    return head


class Enabled:
    """Handle: functions of a library compute otherwise for some models. `undo`, or the end of `with`, ends it.

    For other models, and in other threads, the functions remain what they were. A model is known by a forward of its
    own around its previous one. What wraps that later, such as DDP, FSDP2 or the autocast of Accelerate, does not
    matter.

    Args:
        models: models of transformers whose calls count.
        functions: what is replaced.

    """

    def __init__(self, models: Iterable[Any], functions: Iterable[Function]) -> None:
        self.in_force = True
        functions = list(functions)
        for function in functions:
            _replace(*function)
        # Also when the models are deleted, if no one keeps the handle.
        self._end = weakref.finalize(self, _restore, [(owner, name) for owner, name, _ in functions])
        self._end.atexit = False
        self._unmark = [self._mark(model) for model in models]

    def undo(self) -> None:
        """Restore what was before. A second call does nothing."""
        self.in_force = False
        for unmark in self._unmark:
            unmark()
        self._unmark.clear()
        self._end()

    def __enter__(self) -> Self:
        if not self.in_force:
            raise UsageError("use_ospo_fast: this handle was undone, expected a new one; call use_ospo_fast again")
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    @contextmanager
    def _runs(self, model: Any) -> Iterator[None]:
        # Hooks could say so too, but torch does not call them after a KeyboardInterrupt.
        token = _RUNNING.set((self, model) if self.in_force else _RUNNING.get())
        try:
            yield
        finally:
            _RUNNING.reset(token)

    def _mark(self, model: Any) -> Callable[[], None]:
        """Give a model a forward that says that it runs; return what removes it."""
        own = vars(model).get("forward", ABSENT)
        is_method = own is ABSENT or isinstance(own, MethodType)
        function = own if not is_method else type(model).forward if own is ABSENT else own.__func__

        # A method, not a closure over the model, so that copies of the model run their own forward.
        @functools.wraps(function)
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            with self._runs(module):
                return (type(module).forward if own is ABSENT else function)(module, *args, **kwargs)

        @functools.wraps(function)
        def plain_forward(*args: Any, **kwargs: Any) -> Any:  # of a function that was set on the model
            with self._runs(model):
                return own(*args, **kwargs)

        ours = MethodType(forward, model) if is_method else plain_forward
        model.forward = ours

        def unmark() -> None:
            if vars(model).get("forward") is ours:  # otherwise it is wrapped, and passes calls on
                _assign(model, "forward", own)

        return unmark


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    with _LOCK:
        found, now = _REPLACED.get((owner, name)), getattr(owner, name)
        if found is None or now is not found.ours:
            found = _REPLACED[owner, name] = _Replaced(now, make(now), 0 if found is None else found.users)
            setattr(owner, name, found.ours)
        found.users += 1


def _restore(places: Iterable[tuple[Any, str]]) -> None:
    with _LOCK:
        for owner, name in places:
            found = _REPLACED[owner, name]
            found.users -= 1
            if found.users == 0:
                del _REPLACED[owner, name]
                if getattr(owner, name) is found.ours:
                    setattr(owner, name, found.theirs)

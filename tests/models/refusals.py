"""What tests of refused checkpoints have in common."""

from pathlib import Path
from typing import Any

import pytest

from ospo_fast.errors import OspoError
from ospo_fast.models import load_model


def refuse(name: str | Path, *words: str) -> None:
    """Check that a model is refused with a message of one line that holds these words."""
    with pytest.raises(OspoError) as caught:
        load_model(name)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


class Code:
    """An object whose pickle writes a file when it is loaded by code that trusts it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import pathlib; pathlib.Path({str(self.target)!r}).touch(); raise SystemExit",)

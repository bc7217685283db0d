"""Object-centric self-improving preference optimisation (OSPO) for text-to-image models, made fast.

The public names, each imported from its module on first use, so that `import ospo_fast` costs nothing and the
operations need torch and numpy only.
"""

import importlib
from typing import TYPE_CHECKING

from ospo_fast._version import __version__

if TYPE_CHECKING:
    from ospo_fast.generation import ImageGenerator
    from ospo_fast.loss import OSPOLoss, OSPOLossConfig
    from ospo_fast.models import load_model
    from ospo_fast.models.capture import AttentionCapture
    from ospo_fast.ops import (
        Head,
        attention_columns,
        object_masks,
        otsu_threshold,
        preference_loss,
        sample_codes,
        sequence_logprobs,
        token_logprobs,
        token_weights,
    )
    from ospo_fast.stages.select import select_pair

__all__ = [
    "AttentionCapture",
    "Head",
    "ImageGenerator",
    "OSPOLoss",
    "OSPOLossConfig",
    "__version__",
    "attention_columns",
    "load_model",
    "object_masks",
    "otsu_threshold",
    "preference_loss",
    "sample_codes",
    "select_pair",
    "sequence_logprobs",
    "token_logprobs",
    "token_weights",
]

_HOME = {
    "AttentionCapture": "ospo_fast.models.capture",
    "Head": "ospo_fast.ops",
    "ImageGenerator": "ospo_fast.generation",
    "OSPOLoss": "ospo_fast.loss",
    "OSPOLossConfig": "ospo_fast.loss",
    "attention_columns": "ospo_fast.ops",
    "load_model": "ospo_fast.models",
    "object_masks": "ospo_fast.ops",
    "otsu_threshold": "ospo_fast.ops",
    "preference_loss": "ospo_fast.ops",
    "sample_codes": "ospo_fast.ops",
    "select_pair": "ospo_fast.stages.select",
    "sequence_logprobs": "ospo_fast.ops",
    "token_logprobs": "ospo_fast.ops",
    "token_weights": "ospo_fast.ops",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

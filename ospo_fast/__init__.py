"""Object-centric self-improving preference optimization (OSPO) for text-to-image models.

Each public name is imported from its module on first use, so that `import ospo_fast` imports nothing and the
operations need only torch and numpy.
"""

import importlib
from typing import TYPE_CHECKING

from ospo_fast._version import __version__

if TYPE_CHECKING:
    from ospo_fast.generation import ImageGenerator, exact_logprobs
    from ospo_fast.loss import OSPOLoss, OSPOLossConfig
    from ospo_fast.models import load_model
    from ospo_fast.models.capture import AttentionCapture
    from ospo_fast.ops import (
        Head,
        attention_columns,
        cross_entropy,
        object_masks,
        otsu_threshold,
        preference_loss,
        sample_codes,
        sequence_logprobs,
        token_logprobs,
        token_weights,
    )
    from ospo_fast.report.overlay import show
    from ospo_fast.stages.select import select_pair

__all__ = [
    "AttentionCapture",
    "Head",
    "ImageGenerator",
    "OSPOLoss",
    "OSPOLossConfig",
    "__version__",
    "attention_columns",
    "cross_entropy",
    "exact_logprobs",
    "load_model",
    "object_masks",
    "otsu_threshold",
    "preference_loss",
    "sample_codes",
    "select_pair",
    "sequence_logprobs",
    "show",
    "token_logprobs",
    "token_weights",
]

# Modules of the public names that are not in `ospo_fast.ops`.
_MODULES = {
    "AttentionCapture": "models.capture",
    "ImageGenerator": "generation",
    "OSPOLoss": "loss",
    "OSPOLossConfig": "loss",
    "exact_logprobs": "generation",
    "load_model": "models",
    "select_pair": "stages.select",
    "show": "report.overlay",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"ospo_fast.{_MODULES.get(name, 'ops')}")
    value: object = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

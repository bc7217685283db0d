"""Operations, one per file: contract, checks, PyTorch reference, dispatch. They know no model and no stage."""

from .attention_columns import attention_columns
from .cross_entropy import cross_entropy
from .head import Head
from .object_masks import ObjectMasks, object_masks
from .otsu import otsu_threshold
from .preference_loss import PreferenceLoss, preference_loss
from .sample_codes import sample_codes
from .sequence_logprobs import sequence_logprobs
from .token_logprobs import IGNORE_INDEX, token_logprobs
from .token_weights import token_weights

__all__ = [
    "IGNORE_INDEX",
    "Head",
    "ObjectMasks",
    "PreferenceLoss",
    "attention_columns",
    "cross_entropy",
    "object_masks",
    "otsu_threshold",
    "preference_loss",
    "sample_codes",
    "sequence_logprobs",
    "token_logprobs",
    "token_weights",
]

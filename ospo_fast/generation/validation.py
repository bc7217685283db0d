"""Checks of arguments. Each raises UsageError, or OspoError where the model is at fault."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.layout import image_layout
from ospo_fast.ops._dispatch import is_integer


def check_positive(name: str, value: int, hint: str = "") -> None:
    """Require an integer of 1 or more."""
    if not is_whole_number(value) or value < 1:
        raise UsageError(f"{name}: got {value!r}, expected a positive number{hint}")


def check_batch_size(batch_size: int | None) -> None:
    """Require None or a positive number."""
    if batch_size is not None:
        check_positive("batch_size", batch_size, ", or None to fit the memory")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Require one of the choices."""
    if value not in choices:
        raise UsageError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: float, expected: str, limit: float = math.inf) -> None:
    """Require a finite number of 0 or more, and at most `limit`."""
    if not is_number(value) or not math.isfinite(value) or not 0 <= value <= limit:
        raise UsageError(f"{name}: got {value!r}, expected {expected}")


def is_number(value: Any) -> bool:
    """Return whether a value is a number, of any library, and no bool."""
    if isinstance(value, (bool, str, bytes)):
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return True


def is_whole_number(value: Any) -> bool:
    """Return whether a value is an integer, of any library, and no bool."""
    return hasattr(value, "__index__") and is_number(value)


def check_window(jacobi_window: int) -> None:
    """Require 0, or an integer of 2 or more."""
    if type(jacobi_window) is not int or jacobi_window < 0 or jacobi_window == 1:
        raise UsageError(
            f"jacobi_window: got {jacobi_window!r}, expected an integer of 2 or more, the codes per step, "
            "or 0 to generate them one by one"
        )


def check_ids(name: str, ids: Tensor, model: UnifiedModel, new_tokens: int) -> None:
    """Require a 1-D integer prompt that leaves `new_tokens` of the model's positions free."""
    if ids.dim() != 1 or not is_integer(ids):
        raise UsageError(f"{name}: got {ids.dtype} {tuple(ids.shape)}, expected a 1-D tensor of token ids")
    if len(ids) == 0:
        raise UsageError(f"{name}: got no token, expected at least one")
    embeddings: Any = model.decoder.embed_tokens
    count = len(embeddings.weight)  # adapters of embeddings have no num_embeddings
    smallest, largest = _extremes(ids)
    if smallest < 0 or largest >= count:
        raise UsageError(
            f"{name}: got ids from {smallest} to {largest}, expected 0 to {count - 1}, the vocabulary of {model.name}"
        )
    if len(ids) + new_tokens > model.max_positions:
        raise UsageError(
            f"{name}: got {len(ids)} tokens, expected at most {model.max_positions - new_tokens} "
            f"({model.name} has {model.max_positions} positions and needs {new_tokens} for the answer); shorten it"
        )


def check_guidance_has_effect(cond: Tensor, uncond: Tensor, prompted: Tensor) -> None:
    """Require that logits (N, V) with and without the prompt differ. Equal ones mean that the prompt has no effect.

    prompted (N,) bool on the CPU: rows with another prompt than the unconditional one. Other rows, and rows that are
    not finite, are skipped.
    """
    eps = torch.finfo(cond.dtype).eps
    kept = prompted.to(cond.device) & (cond.isfinite() & uncond.isfinite()).all(1)
    cond, uncond = cond[kept].float(), uncond[kept].float()
    if not len(cond):
        return
    spread = float(cond.max() - cond.min())
    # Of each logit by itself: an untrained model moves its logits by less than bfloat16 rounds the largest of them.
    rounding = 2 * eps * torch.maximum(cond.abs(), uncond.abs()) + 1e-4 * spread
    if spread > 0 and bool(((cond - uncond).abs() <= rounding).all()):
        raise OspoError(
            "guidance: the logits with and without the prompt are equal, so guidance would do nothing; "
            "check that the model is trained and its weights are complete, or pass guidance_scale=1"
        )


def check_codes(codes: Tensor, images: int, model: UnifiedModel) -> None:
    """Require the codes (N, T) of `images` images of the model."""
    expected = f"({images}, {image_layout(model).codes}), those of an image of {model.name} for each prompt"
    if not isinstance(codes, Tensor) or not is_integer(codes) or codes.shape != (images, image_layout(model).codes):
        got = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
        raise UsageError(f"codes: got {got}, expected integers {expected}")
    smallest, largest = _extremes(codes)
    if codes.numel() and not 0 <= smallest <= largest < model.num_codes:
        raise UsageError(
            f"codes: got values from {smallest} to {largest}, expected 0 to {model.num_codes - 1}, "
            f"the codebook of {model.name}; leave out images that failed, which have -1"
        )


def _extremes(tensor: Tensor) -> tuple[int, int]:
    """Return the smallest and largest of integers of any dtype, unsigned ones too; (0, 0) of none."""
    values = tensor.detach().cpu().numpy()  # torch compares no uint64
    return (int(values.min()), int(values.max())) if values.size else (0, 0)

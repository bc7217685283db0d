"""Attention maps and object masks of a pair."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ospo_fast.errors import Failure, attempt
from ospo_fast.files import load_tensors
from ospo_fast.ops.object_masks import mask_iou
from ospo_fast.records import SIDES, Pair
from ospo_fast.report.load import find_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = dict[str, dict[str, NDArray[Any]]]

PARTS = ("maps", "masks", "union")


def load_masks(root: Path, pair: Pair) -> Arrays | Failure:
    """Load the arrays of a pair by side: "maps" and "masks" (O, H, W), and "union" (H, W)."""
    if not pair.get("mask_path"):
        return Failure(pair.get("mask_reason") or "this pair has no masks")
    path = find_file(root, pair["mask_path"], f"masks/{Path(pair['mask_path']).name}")
    if isinstance(path, Failure):
        return path
    tensors = attempt(load_tensors, "masks", path, "run the stage masks with --no-resume")
    if isinstance(tensors, Failure):
        return Failure(f"{path.name} cannot be read")
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items() if not tensor.is_complex()}
    missing = [name for name in (f"{side}_{part}" for side in SIDES for part in PARTS) if name not in arrays]
    if missing:
        return Failure(f"{path.name} has no {', '.join(missing)}")
    sides = {side: {part: arrays[f"{side}_{part}"] for part in PARTS} for side in SIDES}
    shape = sides[SIDES[0]]["maps"].shape
    shapes = {"maps": shape, "masks": shape, "union": shape[1:]}
    if len(shape) != 3 or any(side[part].shape != shapes[part] for side in sides.values() for part in PARTS):
        return Failure(f"{path.name} holds arrays of unexpected shape")
    if 0 in shape[1:] or not all(np.isfinite(array).all() for side in sides.values() for array in side.values()):
        return Failure(f"{path.name} holds no masks, or values that are not finite")
    return sides


def encode_masks(arrays: Arrays) -> dict[str, Any]:
    """The arrays for the page's script, as base64 bytes row by row: maps in 0…255, masks 0 or 1."""
    return {
        "grid": list(arrays[SIDES[0]]["union"].shape),
        "iou": union_iou(arrays),
        **{
            side: {
                "maps": [_base64(255 * scale(array)) for array in parts["maps"]],
                "masks": [_base64(array > 0) for array in parts["masks"]],
                "union": _base64(parts["union"] > 0),
                "coverage": coverage(parts["union"]),
            }
            for side, parts in arrays.items()
        },
    }


def scale(array: NDArray[Any]) -> NDArray[np.float64]:
    """Compute (x − min) / (max − min); zeros for a constant map."""
    values = array.astype(np.float64)
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros(values.shape)


def coverage(union: NDArray[Any]) -> float:
    """The share of the grid inside a mask."""
    return float(np.mean(union > 0))


def union_iou(arrays: Arrays) -> float | None:
    """IoU of the chosen and the rejected mask; None if both are empty."""
    return mask_iou(*(torch.from_numpy(arrays[side]["union"]) for side in SIDES))


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(np.rint(array.astype(np.float64)).astype(np.uint8).tobytes()).decode("ascii")

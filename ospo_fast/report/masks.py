"""Attention maps and object masks of an item, in the form that the page draws, and figures about them."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ospo_fast.report.load import Record

SIDES = ("chosen", "rejected")
PARTS = ("maps", "masks", "union")


def load_masks(root: Path, record: Record) -> dict[str, Any] | str:
    """The arrays of an item by side, {"chosen": {"maps", "masks", "union"}, "rejected": …}, or a reason for none.

    Arrays are (O, H, W), (O, H, W) and (H, W), as the masks stage writes them.
    """
    where = record.get("mask_path")
    if not where:
        return str(record.get("mask_reason") or "this item has no mask")
    candidates = [root / str(where), root / "masks" / f"{record.get('item_id')}.safetensors"]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        return f"{candidates[0].name} is missing"
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(found)
    except (SafetensorError, OSError, ValueError, KeyError):
        return f"{found.name} cannot be read"
    sides: dict[str, Any] = {}
    for side in SIDES:
        missing = [name for name in (f"{side}_{part}" for part in PARTS) if name not in arrays]
        if missing:
            return f"{found.name} lacks {', '.join(missing)}"
        parts = {part: arrays[f"{side}_{part}"] for part in PARTS}
        if parts["maps"].ndim != 3 or parts["masks"].shape != parts["maps"].shape:
            return f"{found.name} holds arrays of unexpected shape"
        sides[side] = parts
    return sides


def drawable(sides: dict[str, Any]) -> dict[str, Any]:
    """The arrays as base64 bytes: maps min-max scaled to 0–255, masks 0 or 1, row by row."""
    height, width = sides["chosen"]["maps"].shape[1:]
    return {
        "grid": [height, width],
        **{
            side: {
                "maps": [_bytes(scaled(array) * 255) for array in parts["maps"]],
                "masks": [_bytes(array > 0) for array in parts["masks"]],
                "union": _bytes(parts["union"] > 0),
                "coverage": coverage(parts["union"]),
            }
            for side, parts in sides.items()
        },
        "iou": overlap(sides["chosen"]["union"], sides["rejected"]["union"]),
    }


def scaled(array: NDArray[Any]) -> NDArray[np.float64]:
    """(x − min) / (max − min) over the map; zeros where the map is constant or holds no finite value."""
    values = np.asarray(array, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape)
    low, high = values[finite].min(), values[finite].max()
    values = np.where(finite, values, low)
    return (values - low) / (high - low) if high > low else np.zeros(values.shape)


def coverage(union: NDArray[Any]) -> float:
    """Share of the grid's cells that the mask covers."""
    return float(np.mean(union > 0))


def overlap(one: NDArray[Any], other: NDArray[Any]) -> float | None:
    """Intersection over union of two masks; None where both are empty or their shapes differ."""
    if one.shape != other.shape:
        return None
    either = np.count_nonzero((one > 0) | (other > 0))
    return float(np.count_nonzero((one > 0) & (other > 0)) / either) if either else None


def entropy(array: NDArray[Any]) -> float | None:
    """−Σ p log p / log(H·W) of a map divided by its sum, in [0, 1]: 1 is spread evenly; None for an empty map."""
    values = np.asarray(array, dtype=np.float64).clip(min=0)
    total = values.sum()
    if not np.isfinite(total) or total <= 0 or values.size < 2:
        return None
    shares = values[values > 0] / total
    return float(-(shares * np.log(shares)).sum() / np.log(values.size))


def _bytes(array: NDArray[Any]) -> str:
    return base64.b64encode(np.rint(np.asarray(array, dtype=np.float64)).astype(np.uint8).tobytes()).decode("ascii")

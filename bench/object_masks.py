"""object_masks against the loop that it replaces: min-max, scikit-image's Otsu and a threshold for each object."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from _measure import interleaved, row, show, write
from skimage.filters import threshold_otsu

import ospo_fast
from ospo_fast.ops.otsu import otsu_threshold_reference


def skimage_masks(maps: torch.Tensor) -> np.ndarray:  # (B, O, H, W)
    masks = np.empty(maps.shape, np.uint8)
    for image, objects in zip(masks, maps.numpy(), strict=True):
        for mask, x in zip(image, objects, strict=True):
            x = (x - x.min()) / (x.max() - x.min() + np.float32(1e-8))
            mask[...] = x > threshold_otsu(x) * np.float32(0.8)
    return masks


def skimage_thresholds(maps: torch.Tensor) -> np.ndarray:
    return np.array([threshold_otsu(x) for x in maps.flatten(0, 1).numpy()])


def run(out: Path, quick: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, objects, H, W = shape = (2, 2, 24, 24) if quick else (32, 4, 24, 24)
    maps = partial(torch.rand, shape)
    check = maps()
    assert np.array_equal(ospo_fast.object_masks(check.to(device)).masks.cpu().numpy(), skimage_masks(check))
    assert np.array_equal(ospo_fast.otsu_threshold(check.to(device)).flatten().cpu().numpy(), skimage_thresholds(check))

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        fresh = maps()
        return fresh, fresh.to(device)

    rows = []
    for op, variants in {
        "object_masks": {
            "ospo_fast": lambda _, x: ospo_fast.object_masks(x),
            "scikit-image": lambda x, _: skimage_masks(x),
        },
        "otsu_threshold": {
            "ospo_fast": lambda _, x: ospo_fast.otsu_threshold(x),
            "torch": lambda _, x: otsu_threshold_reference(x),
            "scikit-image": lambda x, _: skimage_thresholds(x),
        },
    }.items():
        times = interleaved(variants, inputs, seconds=0.02 if quick else 0.3)
        rows += [row(op, name, {"B": B, "O": objects, "H": H, "W": W}, "fp32", time) for name, time in times.items()]
    write(rows, out, "object_masks")
    show(rows)

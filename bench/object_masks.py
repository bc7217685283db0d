"""object_masks, token_weights and otsu_threshold, compared with their PyTorch references and the official computation.

The official computation is, for each object, min-max normalization, scikit-image's Otsu and a threshold; for the
weights of each image, a convolution.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _measure import chosen, interleaved, row, show, write
from skimage.filters import threshold_otsu

import ospo_fast
from ospo_fast.ops.object_masks import object_masks_reference
from ospo_fast.ops.otsu import otsu_threshold_reference
from ospo_fast.ops.token_weights import token_weights_reference


def skimage_masks(maps: torch.Tensor) -> np.ndarray:  # (B, O, H, W)
    masks = np.empty(maps.shape, np.uint8)
    for image, objects in zip(masks, maps.numpy(), strict=True):
        for mask, x in zip(image, objects, strict=True):
            x = (x - x.min()) / (x.max() - x.min() + np.float32(1e-8))
            mask[...] = x > threshold_otsu(x) * np.float32(0.8)
    return masks


def skimage_thresholds(maps: torch.Tensor) -> np.ndarray:
    return np.array([threshold_otsu(x) for x in maps.flatten(0, 1).numpy()])


def conv2d_weights(masks: torch.Tensor) -> torch.Tensor:  # (B, H, W)
    axis = torch.exp(-0.5 * torch.arange(-2.0, 3.0, device=masks.device) ** 2)
    kernel = (axis[:, None] * axis / axis.sum() ** 2).expand(1, 1, 5, 5)
    weights = []
    for mask in masks.float():
        blurred = F.conv2d(mask[None, None], kernel, padding=2)
        low, high = blurred.min(), blurred.max()
        weights.append(1 + ((blurred - low) / (high - low + 1e-8)).clamp(0, 1).flatten())
    return torch.stack(weights)


def run(out: Path, quick: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, objects, H, W = shape = (2, 2, 24, 24) if quick else (32, 4, 24, 24)
    maps = partial(torch.rand, shape)
    check = maps()
    assert np.array_equal(ospo_fast.object_masks(check.to(device)).masks.cpu().numpy(), skimage_masks(check))
    assert np.array_equal(ospo_fast.otsu_threshold(check.to(device)).flatten().cpu().numpy(), skimage_thresholds(check))

    union = ospo_fast.object_masks(check.to(device)).union
    expected = conv2d_weights(union.cpu())  # on the CPU: a GPU may round convolutions to TF32
    torch.testing.assert_close(ospo_fast.token_weights(union).cpu(), expected, rtol=2e-6, atol=0)

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        fresh = maps()
        return fresh, fresh.to(device)

    rows, one = [], torch.zeros(1, device=device)
    for op, variants in {
        "object_masks": {
            "ospo_fast": lambda _, x: ospo_fast.object_masks(x),
            "torch": lambda _, x: object_masks_reference(x),
            "scikit-image": lambda x, _: skimage_masks(x),
            # The time of an empty kernel is the floor of kernels that move a few hundred kilobytes.
            **({"one launch": lambda _, x: one.zero_()} if device == "cuda" else {}),
        },
        "token_weights": {
            "ospo_fast": lambda _, x: ospo_fast.token_weights(x[:, 0] > 0.7),
            "torch": lambda _, x: token_weights_reference(x[:, 0] > 0.7),
            "conv2d loop": lambda _, x: conv2d_weights(x[:, 0] > 0.7),
        },
        "otsu_threshold": {
            "ospo_fast": lambda _, x: ospo_fast.otsu_threshold(x),
            "torch": lambda _, x: otsu_threshold_reference(x),
            "scikit-image": lambda x, _: skimage_thresholds(x),
        },
    }.items():
        if not chosen(op):
            continue
        # scikit-image takes a thousand times as long as a GPU kernel: limit its turns.
        max_turns = 100 if device == "cuda" else 1000
        times = interleaved(variants, inputs, seconds=0.02 if quick else 0.3, max_turns=max_turns)
        floor = times["one launch"].median_ms if "one launch" in times else None
        for name, time in times.items():
            more = {} if floor is None else {"floor_ms": floor, "share": round(floor / time.median_ms, 4)}
            rows.append(row(op, name, {"B": B, "O": objects, "H": H, "W": W}, "fp32", time, **more))
        write(rows, out, "object_masks")
    show(rows)

"""Copies between devices: of small tensors without host synchronization, and to the CPU for float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)  # device types
_ALIGNMENT = 16  # bytes: what Triton specializes kernels for


def to_device_packed(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy CPU tensors to a device, contiguous, in one transfer: they are packed in pinned memory."""
    if device.type == "cpu":
        return [tensor.contiguous() for tensor in tensors]
    sizes = [-(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, tensor in zip(packed.split(sizes), tensors, strict=True):
        _view_as(part, tensor).copy_(tensor)
    on_device = packed.to(device, non_blocking=packed.is_pinned())
    return [_view_as(part, tensor) for part, tensor in zip(on_device.split(sizes), tensors, strict=True)]


def widen(x: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device does not have it. It has a gradient."""
    return (x.cpu() if x.device.type in WITHOUT_FLOAT64 else x).double()


def _view_as(part: Tensor, tensor: Tensor) -> Tensor:
    return part[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)

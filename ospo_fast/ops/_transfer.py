"""Copy small tensors to a device without host synchronization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: what Triton specializes kernels for


def to_device_packed(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy CPU tensors to a device, contiguous, in one transfer: they are packed in pinned memory."""
    if device.type == "cpu":
        return [tensor.contiguous() for tensor in tensors]
    sizes = [-(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, tensor in zip(packed.split(sizes), tensors, strict=True):
        _view_as(part, tensor).copy_(tensor)
    on_device = packed.to(device, non_blocking=True)
    return [_view_as(part, tensor) for part, tensor in zip(on_device.split(sizes), tensors, strict=True)]


def _view_as(part: Tensor, tensor: Tensor) -> Tensor:
    return part[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)

"""Small tensors to a device, without waiting for what it is at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 16  # bytes: what Triton compiles kernels for


def to_device_packed(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on a device, contiguous: packed in pinned memory, so that one copy brings them over."""
    if device.type == "cpu":
        return [tensor.contiguous() for tensor in tensors]
    sizes = [-(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED for tensor in tensors]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, tensor in zip(packed.split(sizes), tensors, strict=True):
        _as(part, tensor).copy_(tensor)
    on_device = packed.to(device, non_blocking=True)
    return [_as(part, tensor) for part, tensor in zip(on_device.split(sizes), tensors, strict=True)]


def _as(part: Tensor, tensor: Tensor) -> Tensor:
    """The bytes of a part as a tensor of this one's dtype and shape."""
    return part[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)

"""Attention maps of each head by itself, for the search of layers and heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ospo_fast.models.capture import AttentionCapture


class HeadCapture(AttentionCapture):
    """`AttentionCapture` that also keeps the maps of each head, at as many times the memory."""

    per_head = True

    def __init__(self, model: Any, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self._heads = self._heads or tuple(range(self._attention.heads or 0))
        self.heads: tuple[int, ...] = self._heads  # in ascending order

    @property
    def head_maps(self) -> Tensor:
        """(layers, heads, B, O, H, W), in the order of `layers` and `heads`."""
        maps, heads = self._captured(), len(self.heads)
        maps = maps.view(len(maps), -1, heads, *maps.shape[2:]).transpose(1, 2)
        return self._with_grid(maps)

    @property
    def layer_maps(self) -> Tensor:
        """(layers, B, O, H, W): the mean of `head_maps`."""
        return self.head_maps.mean(1)

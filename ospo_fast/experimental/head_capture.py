"""Attention maps of each head by itself, for the search of layers and heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ospo_fast.models.capture import AttentionCapture
from ospo_fast.ops.attention_columns import ColumnRequest


class HeadCapture(AttentionCapture):
    """`AttentionCapture` that also keeps the maps of each head, at as many times the memory.

    Each head is passed to `attention_columns` as a separate sequence with one head.
    """

    def __init__(self, model: Any, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self._heads = self._heads or tuple(range(self._decoder.config.num_attention_heads))
        self.heads: tuple[int, ...] = self._heads  # in ascending order

    @property
    def head_maps(self) -> Tensor:
        """(layers, heads, B, O, H, W), in the order of `layers` and `heads`."""
        maps, heads = self._captured(), len(self.heads)
        layers, sequences, objects, _ = maps.shape
        return maps.view(layers, sequences // heads, heads, objects, *self._grid).transpose(1, 2)

    @property
    def layer_maps(self) -> Tensor:
        """(layers, B, O, H, W): the mean of `head_maps`."""
        return self.head_maps.mean(1)

    def _build_request(self, q: Tensor, mask: Tensor | None) -> ColumnRequest:
        request, heads = super()._build_request(q, mask), len(self.heads)
        fields: dict[str, Any] = {name: value for name, value in vars(request).items() if isinstance(value, Tensor)}
        return replace(request, **{name: value.repeat_interleave(heads, 0) for name, value in fields.items()})

    def _select_heads(self, q: Tensor, k: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The captured heads as sequences (B · heads, 1, …): views where B is 1."""
        q, k, lse = super()._select_heads(q, k, lse)
        return q.flatten(0, 1)[:, None], k.flatten(0, 1)[:, None], None if lse is None else lse.flatten(0, 1)[:, None]

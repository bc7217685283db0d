"""The engine's cache as a cache of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaModel

if TYPE_CHECKING:
    from ospo_fast.generation.decoder import Cache

# The argument of decoders that takes a cache. Newer versions of transformers have a new name.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class StoredCache(transformers.Cache):
    """Rows of `cache` for one pass that begins at position `start`.

    rows: (B,) int64, or a slice. positions: `layer_idx` of a layer → its place in `cache`.
    """

    def __init__(self, cache: Cache, rows: Tensor | slice, start: int, positions: Mapping[int, int]) -> None:
        self.passed = [_StoredLayer(cache, positions.get(i, -1), rows, start) for i in range(max(positions) + 1)]
        super().__init__(layers=self.passed)
        self._start, self._used = start, set(positions)

    @property
    def is_complete(self) -> bool:
        """Whether every layer has stored its keys and values."""
        return all(self.passed[i].length > self._start for i in self._used)


class _StoredLayer(DynamicLayer):
    def __init__(self, cache: Cache, position: int, rows: Tensor | slice, start: int) -> None:
        super().__init__()
        self.is_initialized = True
        self.length = start
        self._keys, self._values, self._rows = cache.keys[position], cache.values[position], rows

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[-2]
        result = []
        for stored, new in ((self._keys, key_states), (self._values, value_states)):
            # Layers may be on several devices, and rotary embeddings may widen the dtype.
            stored[self._rows, :, start : self.length] = new.to(stored)
            result.append(stored[self._rows, :, : self.length].to(new))
        return result[0], result[1]

    def get_seq_length(self) -> int:
        return self.length

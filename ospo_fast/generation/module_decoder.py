"""Forward pass by the modules of the decoder, where hooks, patched forwards or other classes have to take effect."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ospo_fast.errors import OspoError
from ospo_fast.generation.decoder import PREFILL, Buffers, Cache, Decoder, InferenceDecoder
from ospo_fast.generation.overrides import find_override
from ospo_fast.models.base import UnifiedModel

logger = logging.getLogger(__name__)


def build_decoder(model: UnifiedModel, *, text: bool = False) -> Decoder:
    """Return the `InferenceDecoder` of a model, or with a warning its `ModuleDecoder` if the former skips something.

    text: see `find_override`.
    """
    reason = find_override(model, text=text)
    if reason is None:
        return InferenceDecoder(model)
    warn_of_modules(reason)
    return ModuleDecoder(model)


def warn_of_modules(reason: str) -> None:
    """Log why generation is slower than it could be."""
    logger.warning("%s: generating with the model's own modules, which is slower than the fused decoder", reason)


class ModuleDecoder(Decoder):
    """The decoder of `model`, whose modules run as they are.

    Modules are called as in transformers' `generate`: with whole prompts (B, S, D), then with one token (B, 1, D) of
    each sequence and the cache. A pass runs sequences of one length, because every attention has a mask of its own for
    them. There are no padding rows, which hooks would see. So rows are the same in any batch up to rounding alone.
    """

    calls_modules = True

    def __init__(self, model: UnifiedModel) -> None:
        module: Any = model.decoder
        config = getattr(module, "config", None)
        sizes = ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
        missing = [name for name in sizes if not hasattr(config, name)]
        missing += [] if hasattr(module, "layers") else ["layers"]
        if missing:
            raise OspoError(f"model: the decoder {type(module).__name__} has no {missing[0]}, expected a Llama decoder")
        super().__init__(model)
        self.layers = list(module.layers)
        indices = [getattr(getattr(layer, "self_attn", None), "layer_idx", i) for i, layer in enumerate(self.layers)]
        if len(set(indices)) < len(indices):
            raise OspoError(
                f"model: the layers of the decoder have layer_idx {indices}, expected different ones, by which a cache "
                "tells them apart; number them"
            )
        self._positions = {index: i for i, index in enumerate(indices)}
        self._checked = False

    def refresh(self) -> None:
        """See `Decoder`: nothing was copied."""
        self._checked = False

    def text_logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder`: as in `generate`, of the last token of each sequence (M, 1, D)."""
        return self.model.text_logits(hidden[:, None])[:, 0]

    def pad_rows(self, rows: int, batch_size: int, row_bytes: int) -> int:
        """See `Decoder`."""
        return rows

    def run_padded(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """See `Decoder`."""
        return function(x)

    def __call__(self, x: Tensor, cache: Cache, start: int) -> Tensor:
        """See `Decoder`."""
        rows = slice(0, len(x))
        if not start or x.shape[1] == 1 or self._has_masks():
            return self._run(x, cache, rows, start)
        # Without a mask, attention may take the first query for the first key: token by token none is needed.
        return torch.cat([self._run(x[:, i : i + 1], cache, rows, start + i) for i in range(x.shape[1])], 1)

    def prefill(
        self, prompts: Sequence[Tensor], cache: Cache, cache_rows: Sequence[int], *, exact: bool = False
    ) -> Tensor:
        """See `Decoder`."""
        last = torch.empty(len(prompts), self.width, device=self.device, dtype=self.dtype)
        for length, same in _groups(map(len, prompts)).items():
            size = max(1, PREFILL // length)
            for part in (same[i : i + size] for i in range(0, len(same), size)):
                x = self.model.embed_tokens(torch.stack([prompts[i] for i in part]).to(self.device))
                rows = torch.tensor([cache_rows[i] for i in part], device=self.device)
                last[part] = self._run(x, cache, rows, 0)[:, -1]
        return last

    def step(
        self,
        x: Tensor,
        cache: Cache,
        cache_rows: Tensor,
        lengths: Tensor,
        buffers: Buffers | None = None,
        *,
        shared_slots: bool = False,
        positions: Tensor | None = None,
    ) -> Tensor:
        """See `Decoder`."""
        hidden = torch.zeros_like(x)
        groups = _groups(lengths.tolist())
        groups.pop(-1, None)
        # Shorter ones first: with shared_slots, longer ones read what these store.
        for length in sorted(groups):
            rows = torch.tensor(groups[length], device=x.device)
            own = {} if positions is None else {"position_ids": positions[:, rows, None]}
            hidden[rows] = self._run(x[rows, None], cache, cache_rows[rows], length, **own)[:, 0]
        return hidden

    def _run(self, x: Tensor, cache: Cache, rows: Tensor | slice, start: int, **options: Tensor) -> Tensor:
        """Run x (B, S, D) at positions start … start+S−1 of `rows` → hidden states (B, S, D)."""
        from ospo_fast.generation.stored_cache import CACHE_ARGUMENT, StoredCache

        past = StoredCache(cache, rows, start, self._positions)
        hidden = self._forward(x, **{CACHE_ARGUMENT: past}, use_cache=True, **options)
        if not self._checked and x.shape[1] > 1 and not start:
            self._checked = True
            if not past.is_complete:
                self._check_cache(x[:1])
        return hidden

    def _has_masks(self) -> bool:
        """Whether transformers makes a mask for the attention of the decoder."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        config: Any = self.model.decoder.config
        return (config._attn_implementation or "eager") in ALL_MASK_ATTENTION_FUNCTIONS

    def _forward(self, x: Tensor, **options: Any) -> Tensor:
        result = self.model.decoder(inputs_embeds=x, **options)
        hidden: Tensor = result if isinstance(result, Tensor) else result[0]
        if hidden.shape != x.shape:
            raise OspoError(
                f"model: the decoder returned hidden states {tuple(hidden.shape)} for embeddings {tuple(x.shape)}, "
                "expected the same shape; fix its hooks or its forward"
            )
        return hidden.to(x)

    def _check_cache(self, x: Tensor) -> None:
        """Require that the last position of x (1, S, D) has the same result with a cache and without.

        A layer that stores no keys may be one that has been made to skip its attention, or one that ignores the cache.
        """
        cache, before = Cache(self, 1, x.shape[1]), x.shape[1] - 1
        self._run(x[:, :before], cache, slice(0, 1), 0)
        expected = self._forward(x, use_cache=False)[:, -1]
        found = self._run(x[:, before:], cache, slice(0, 1), before)[:, 0]
        bound = torch.finfo(x.dtype).eps ** 0.5 * expected.abs().max()
        if not bool((found - expected).abs().max() <= bound):
            raise OspoError(
                "model: a layer of the decoder does not store its keys and values in the cache, and the result for a "
                "token behind the cache is another one than in the whole sequence; expected attention that calls the "
                "update of the cache that it is given"
            )


def _groups(keys: Iterable[Hashable]) -> dict[Any, list[int]]:
    """Positions of each key."""
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return groups

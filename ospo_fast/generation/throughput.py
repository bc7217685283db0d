"""Speed of image generation, and the bytes that every implementation has to read."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.layout import image_layout
from ospo_fast.models.quantized import stored_bytes


@dataclass(frozen=True)
class Throughput:
    """Speed of code generation, without the decoding of pixels."""

    images: int
    seconds: float
    streamed_bytes: int  # weights once per step, keys and values of every row
    codes: int = 0  # of all images
    steps: int = 0  # decoder passes of all images, prefill included

    @property
    def images_per_second(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def gb_per_second(self) -> float:
        """10⁹ bytes of weights, keys and values per second."""
        return self.streamed_bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def codes_per_step(self) -> float:
        """Mean codes of an image per step: 1 unless `jacobi_window` allows more."""
        return self.codes / self.steps if self.steps else 1.0

    def __add__(self, other: Throughput) -> Throughput:
        """Sum of two, one after the other."""
        return Throughput(*map(operator.add, astuple(self), astuple(other)))

    def metrics(self) -> dict[str, float]:
        """Return images, images_s, gb_s, and codes_step unless it is 1."""
        metrics = {"images": self.images, "images_s": self.images_per_second, "gb_s": self.gb_per_second}
        if self.codes_per_step != 1:
            metrics["codes_step"] = self.codes_per_step
        return {name: round(value, 4) for name, value in metrics.items()}

    @property
    def bandwidth(self) -> str:
        """Return the bandwidth, and codes per step unless 1, for a progress bar."""
        text = f"{self.gb_per_second:.1f} GB/s"
        return text if self.codes_per_step == 1 else f"{text}, {self.codes_per_step:.2f} codes per step"


def weight_bytes(model: UnifiedModel) -> int:
    """Return the bytes of weights that one step reads: of the decoder's layers and of the head."""
    decoder: Any = model.decoder
    return stored_bytes(decoder.layers, model.head)


def streamed_bytes(
    model: UnifiedModel, lengths: Sequence[int], branches: int, steps: Sequence[int] | None = None
) -> int:
    """Return the bytes that one batch of images has to read, for prompts of these lengths.

    branches: rows per image. steps: decoder passes per image, prefill included; by default one per code.
    """
    config: Any = model.decoder.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position: int = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    tokens = image_layout(model).tokens
    steps = [tokens] * len(lengths) if steps is None else steps
    # A step reads what the cache holds by then: the prompt, and over all steps half of the codes.
    cached = sum(n * length + n * (tokens + 1) // 2 for n, length in zip(steps, lengths, strict=True))
    return max(steps, default=0) * weight_bytes(model) + branches * cached * position

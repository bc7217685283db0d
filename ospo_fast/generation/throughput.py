"""How fast images are drawn, and the bytes that no implementation can spare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ospo_fast.models.base import UnifiedModel


@dataclass(frozen=True)
class Throughput:
    """How fast codes were drawn, without the decoding of pixels."""

    images: int
    seconds: float
    streamed_bytes: int  # the weights once a step, and every row's keys and values: what no implementation can spare
    codes: int = 0  # of all images
    steps: int = 0  # that every image took, prompts included, added up

    @property
    def images_per_second(self) -> float:
        """Images drawn in a second."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def gb_per_second(self) -> float:
        """10⁹ bytes of weights, keys and values in a second."""
        return self.streamed_bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def codes_per_step(self) -> float:
        """Codes that a step drew of an image, on average: 1 unless `jacobi_window` has it draw several."""
        return self.codes / self.steps if self.steps else 1.0

    def __add__(self, other: Throughput) -> Throughput:
        """Of both, one after the other."""
        return Throughput(
            self.images + other.images,
            self.seconds + other.seconds,
            self.streamed_bytes + other.streamed_bytes,
            self.codes + other.codes,
            self.steps + other.steps,
        )

    def figures(self) -> dict[str, float]:
        """images, images_s, gb_s, codes_step where it is not 1: numbers for a report."""
        found = {"images": self.images, "images_s": self.images_per_second, "gb_s": self.gb_per_second}
        if self.codes_per_step != 1:
            found["codes_step"] = self.codes_per_step
        return {name: round(value, 4) for name, value in found.items()}

    def __str__(self) -> str:
        """`10.52 images/s, 2345.6 GB/s`."""
        return f"{self.images_per_second:.2f} images/s, {self.beside_rate}"

    @property
    def beside_rate(self) -> str:
        """`2345.6 GB/s, 2.31 codes a step`: what a progress bar does not say by itself."""
        said = f"{self.gb_per_second:.1f} GB/s"
        if self.codes_per_step != 1:
            said += f", {self.codes_per_step:.2f} codes a step"
        return said


def weight_bytes(model: UnifiedModel) -> int:
    """Bytes of weights that one step reads: of the decoder's layers and of the head."""
    decoder: Any = model.decoder
    weights = [*decoder.layers.parameters(), *model.head.parameters()]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def streamed_bytes(
    model: UnifiedModel, lengths: Sequence[int], branches: int, steps: Sequence[int] | None = None
) -> int:
    """Bytes that drawing one batch must read, for prompts of these lengths and `branches` rows of each.

    steps: how many every image took, the prompt included; by default one a code.
    """
    config: Any = model.decoder.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position: int = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    tokens = model.grid[0] * model.grid[1]
    steps = [tokens] * len(lengths) if steps is None else steps
    # Each step reads what there is: half of the codes, taken over all steps.
    cached = sum(n * length + n * (tokens + 1) // 2 for n, length in zip(steps, lengths, strict=True))
    return max(steps, default=0) * weight_bytes(model) + branches * cached * position

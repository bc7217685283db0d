"""What a stage may ask of a unified model, and nothing else.

A unified model writes text and draws images with one decoder: an image is `grid[0] * grid[1]` codes of a codebook,
drawn token by token after a begin-of-image token. Stages and the generation engine are written against this protocol;
an adapter (`models/janus.py`) fills it in for one family of checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

Message = dict[str, Any]
"""One chat turn: {"role": "user" | "assistant" | "system", "content": str}."""

Offset = tuple[int, int]
"""Half-open span of characters (start, end)."""


@runtime_checkable
class UnifiedModel(Protocol):
    """A text-and-image model. Ids are int64; tensors lie on `device`, images are PIL images in RGB."""

    name: str  # what the user asked for: "shapes", a hub name or a folder
    module: nn.Module  # the whole transformers model
    decoder: nn.Module  # the language model without its head (LlamaModel), called with inputs_embeds
    head: nn.Module  # hidden (..., D) → logits (..., num_codes) of the image codes
    grid: tuple[int, int]  # rows, columns of codes; an image has T = rows * columns of them
    num_codes: int
    hidden_size: int
    max_positions: int
    bos_id: int
    pad_id: int
    boi_id: int  # begin of image
    eoi_id: int  # end of image
    image_id: int  # placeholder of one embedded image patch
    eos_ids: tuple[int, ...]  # any of them ends a text
    yes_ids: tuple[int, ...]  # single-token spellings of the answer yes
    no_ids: tuple[int, ...]
    templates: str  # default template set: "shapes" or "janus"

    @property
    def device(self) -> torch.device:
        """Where the model lies, and every tensor that its methods return unless they say otherwise."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's weights."""
        ...

    def image_prompt(self, prompt: str) -> Tensor:
        """Ids (S,) on the CPU that make the model draw `prompt`: chat template applied, last id is begin-of-image."""
        ...

    def image_prompt_offsets(self, prompt: str) -> tuple[Tensor, list[Offset | None]]:
        """The same ids, and for each the characters of `prompt` it stands for; None for a token of the template."""
        ...

    def unconditional(self, ids: Tensor) -> Tensor:
        """The guidance partner of `ids` (S,): same length, BOS, padding in place of the prompt, begin-of-image."""
        ...

    def chat(self, messages: list[Message], *, image: bool = False) -> Tensor:
        """Ids (S,) on the CPU, ready to generate the next assistant turn.

        With `image`, begin-of-image, T placeholders and end-of-image stand at the start of the last user message.
        """
        ...

    def detokenize(self, ids: Tensor | Sequence[int]) -> str:
        """The text of ids (S,), without special tokens."""
        ...

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Text ids (...) → embeddings (..., D)."""
        ...

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Image codes (...) → decoder input embeddings (..., D), as used while drawing."""
        ...

    def embed_images(self, images: list[Image]) -> Tensor:
        """Images → embeddings (N, T, D) of the understanding side, which replace the placeholders of a chat prompt."""
        ...

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) → logits (..., V) over the text vocabulary."""
        ...

    def decode_codes(self, codes: Tensor) -> list[Image]:
        """Codes (N, T) → images."""
        ...

    def encode_images(self, images: list[Image]) -> Tensor:
        """Images → codes (N, T) int64."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the weights (safetensors), the configuration and the processor to a folder that load_model reads."""
        ...

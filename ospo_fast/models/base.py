"""The protocol of a unified model: everything that the stages and the generation engine may ask of it.

A unified model generates text and images with one decoder. An image is `grid[0] * grid[1]` codes of a codebook, which
are generated one by one after a begin-of-image token. An adapter (`models/janus.py`) implements the protocol for one
family of checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

TEMPLATE_SETS = ("janus", "shapes")  # that ship with the package; a model may name no other

Message = dict[str, Any]
"""One chat turn: {"role": "user" | "assistant" | "system", "content": str}."""

Offset = tuple[int, int]
"""Half-open span of characters (start, end)."""


def default_layers(skip: int | Sequence[int], count: int) -> list[int]:
    """Return the layers of `count` that are left after `skip`; see `capture.AttentionCapture`."""
    if isinstance(skip, int):
        return list(range(skip, count - skip) if count > 2 * skip else range(count))
    return [layer for layer in range(count) if layer not in skip]


@runtime_checkable
class UnifiedModel(Protocol):
    """A text-and-image model. Ids are int64; results are on `device` unless stated otherwise; images are RGB (PIL)."""

    name: str  # as given by the user: "shapes", a hub name or a folder
    module: nn.Module  # the whole transformers model
    decoder: nn.Module  # the language model without its head (LlamaModel), called with inputs_embeds
    head: nn.Module  # hidden (..., D) → logits (..., num_codes) of the image codes
    grid: tuple[int, int]  # rows and columns of codes; an image has T = rows * columns codes
    num_codes: int
    hidden_size: int
    max_positions: int
    bos_id: int
    pad_id: int
    boi_id: int  # begin of image
    eoi_id: int  # end of image
    image_id: int  # placeholder of one embedded image patch
    eos_ids: tuple[int, ...]  # end-of-text tokens
    yes_ids: tuple[int, ...]  # single-token spellings of the answer yes
    no_ids: tuple[int, ...]
    templates: str  # default template set: "shapes" or "janus"

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's weights."""

    def image_prompt(self, prompt: str) -> Tensor:
        """Ids (S,) on the CPU that make the model generate an image of `prompt`.

        The chat template is applied. The last id is begin-of-image. An adapter may also have `normalize_prompt`, which
        returns the form of a prompt that records keep (`stages.prompt_files.normalized`).
        """

    def image_prompt_offsets(self, prompt: str) -> tuple[Tensor, list[Offset | None]]:
        """The ids of `image_prompt`, and the character span of each in `prompt`; None for tokens of the template."""

    def unconditional(self, ids: Tensor) -> Tensor:
        """The unconditional prompt for guidance of ids (S,): same length, with padding in place of the prompt."""

    def chat(self, messages: list[Message], *, image: bool = False) -> Tensor:
        """Ids (S,) on the CPU, ready to generate the next assistant turn.

        With `image`, begin-of-image, T placeholders and end-of-image are put before the text of the last user message.
        """

    def tokens(self, value: str | Tensor | Sequence[int]) -> list[str]:
        """The tokens of a text by itself, or of ids (S,), as the tokenizer spells them; a text gets no special ones."""

    def detokenize(self, ids: Tensor | Sequence[int]) -> str:
        """The text of ids (S,), without special tokens."""

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Text ids (...) → embeddings (..., D)."""

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Image codes (...) → decoder input embeddings (..., D) for image generation."""

    def embed_images(self, images: list[Image]) -> Tensor:
        """Images → embeddings (N, T, D) for image understanding, which replace the placeholders of a chat prompt."""

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) → logits (..., V) over the text vocabulary."""

    def decode_codes(self, codes: Tensor) -> list[Image]:
        """Codes (N, T) → images. Their pixels do not depend on the other images of a call."""

    def encode_images(self, images: list[Image]) -> Tensor:
        """Images → codes (N, T) int64, which do not depend on the other images of a call."""

    def save(self, path: str | Path) -> None:
        """Write weights (safetensors), configuration and processor to a folder that `load_model` reads."""

"""The protocol of a unified model: everything that the stages and the generation engine may ask of it.

A unified model generates text and images with one decoder. An image is a sequence of codes of a codebook, which are
generated one by one after its prompt, with structure tokens between them where the family has some
(`models/layout.py`). An adapter implements the protocol for one family of checkpoints (`models/families.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from ospo_fast.models.layout import ImageLayout

TEMPLATE_SETS = ("janus", "shapes", "shapes-large")  # that ship with the package; a model may name no other

Message = dict[str, Any]
"""One chat turn: {"role": "user" | "assistant" | "system", "content": str}."""

Offset = tuple[int, int]
"""Half-open span of characters (start, end)."""


def default_layers(skip: int | Sequence[int], count: int) -> list[int]:
    """Return the layers of `count` that are left after `skip`; see `capture.AttentionCapture`."""
    if isinstance(skip, int):
        return list(range(skip, count - skip) if count > 2 * skip else range(count))
    return [layer for layer in range(count) if layer not in skip]


def run_check(model: object, name: str) -> None:
    """Run a check of an adapter that has it: `check_generation`, `check_chat` or `check_pixels`, see `Adapter`."""
    check = getattr(model, name, None)
    if check is not None:
        check()


@runtime_checkable
class UnifiedModel(Protocol):
    """A text-and-image model. Ids are int64; results are on `device` unless stated otherwise; images are RGB (PIL)."""

    name: str  # as given by the user: "shapes", a hub name or a folder
    module: nn.Module  # the whole transformers model
    decoder: nn.Module  # the language model without its head (LlamaModel), called with inputs_embeds
    grid: tuple[int, int]  # rows and columns of codes of the image
    layout: ImageLayout  # of the T codes of an image and the tokens between them; `image_layout` where there is none
    num_codes: int  # K, of the codebook; codes are 0 … K−1 wherever they are in the vocabulary
    hidden_size: int
    max_positions: int
    bos_id: int
    pad_id: int
    boi_id: int  # begin of image: the last token of an image prompt
    eoi_id: int  # end of image
    image_id: int  # placeholder of one embedded image patch
    eos_ids: tuple[int, ...]  # end-of-text tokens
    yes_ids: tuple[int, ...]  # single-token spellings of the answer yes
    no_ids: tuple[int, ...]
    templates: str  # default template set: "shapes" or "janus"

    @property
    def head(self) -> nn.Module:
        """Module of hidden (..., D) → logits (..., K) of the image codes."""

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
        """The unconditional prompt (S',) for guidance of the image prompt ids (S,), on the CPU.

        It ends in the same token. Its length may be another one, and is the same for prompts of one length.
        """

    def chat(self, messages: list[Message], *, image: bool = False) -> Tensor:
        """Ids (S,) on the CPU, ready to generate the next assistant turn.

        With `image`, P placeholders `image_id`, between the tokens that mark an image, are put before the text of the
        last user message.
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
        """Images → embeddings (N, P, D) for image understanding, which replace the P placeholders of a chat prompt."""

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) → logits (..., V) over the text vocabulary."""

    def decode_codes(self, codes: Tensor) -> list[Image]:
        """Codes (N, T) of all grids → images. Their pixels do not depend on the other images of a call."""

    def encode_images(self, images: list[Image]) -> Tensor:
        """Images → codes (N, T) int64, which do not depend on the other images of a call."""

    def save(self, path: str | Path) -> None:
        """Write weights (safetensors), configuration and processor to a folder that `load_model` reads."""

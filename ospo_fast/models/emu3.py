"""Emu3 (arXiv 2409.18869): text and image codes in one vocabulary; transformers' `Emu3ForConditionalGeneration`.

Generation and chat are two checkpoints, Emu3-Gen and Emu3-Chat, of one architecture. Formats are those of the official
code (baaivision/Emu3, `emu3/mllm/processing_emu3.py` and `image_generation.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ospo_fast.errors import OspoError
from ospo_fast.models.adapter import (
    VocabularyAdapter,
    check_positions,
    fit_images,
    refuse_other_multiples,
    remembered_size,
)
from ospo_fast.models.base import Message
from ospo_fast.models.families import find_half
from ospo_fast.models.layout import ImageLayout

# In place of the prompt, for guidance; of the official script.
_NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
_AREA = 720 * 720  # pixels
_SYSTEM = "You are a helpful assistant."
_END_OF_ROW = "<|extra_200|>"


class Emu3UnifiedModel(VocabularyAdapter):
    """Adapter of an Emu3 model and its processor. `UnifiedModel` documents the members.

    image_size: any multiple of the factor of the VQ model, 8 in the published ones; default: the processor's area.
    """

    decoder_path = "model.text_model"
    special_tokens = VocabularyAdapter.special_tokens | {"boi_id": "image_wrapper_token"}

    def __init__(self, module: Any, processor: Any, *, name: str, image_size: tuple[int, int] | None = None) -> None:
        self._factor = int(module.model.vqmodel.spatial_scale_factor)
        grid = self._find_grid(processor, image_size or remembered_size(module), name)
        for token in ("boi_token", "eof_token"):
            self.vocabulary_id(processor, getattr(processor.tokenizer, token, None), name, module.config)
        end_of_row = self.vocabulary_id(processor, _END_OF_ROW, name, module.config)
        check_positions(name, grid[0] * grid[1], module.config.text_config)
        self.layout = ImageLayout.rows(grid, end_of_row)
        self._end_of_row = end_of_row
        super().__init__(
            module, processor, name=name, text=module.config.text_config,
            code_ids=module.model.vocabulary_mapping.img2bpe,
            num_codes=int(module.config.vq_config.codebook_size),
        )  # fmt: skip
        if self._half is not None:  # save_pretrained writes this entry: a copy has another name
            module.config.emu3_half = self._half
        negative = self._encode(f"{self._prefix}{_NEGATIVE}{self._suffix}")["input_ids"]
        self._negative = torch.tensor(negative, dtype=torch.long)

    def _find_grid(self, processor: Any, image_size: tuple[int, int] | None, name: str) -> tuple[int, int]:
        if image_size is None:
            # Processors say both since transformers 5.23.
            area, ratio = getattr(processor, "image_area", _AREA), getattr(processor, "ratio", "1:1")
            height, width = processor.calculate_generate_size(ratio, area, self._factor)
            return int(height), int(width)
        refuse_other_multiples(name, image_size, self._factor)
        return image_size[0] // self._factor, image_size[1] // self._factor

    @property
    def _half(self) -> str | None:
        return find_half(self.module.config.to_dict(), self.name)

    def check_generation(self) -> None:
        """Raise OspoError for Emu3-Chat: the two checkpoints differ in nothing but their weights and their names."""
        if self._half == "chat":
            raise OspoError(
                f"model: {self.name} is the half of Emu3 that chats, expected that for images; use Emu3-Gen"
            )

    def check_chat(self) -> None:
        """Raise OspoError for Emu3-Gen."""
        if self._half == "gen":
            raise OspoError(
                f"model: {self.name} is the half of Emu3 that generates images, expected that for chats; name "
                "Emu3-Chat in prompts.model, perturb.model, questions.model and score.model"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of images in pixels."""
        return self.grid[0] * self._factor, self.grid[1] * self._factor

    def unconditional(self, ids: Tensor) -> Tensor:
        """See `UnifiedModel`: the negative prompt of the official script."""
        return self._negative

    # Text

    def _split_template(self) -> tuple[str, str]:
        return str(self._tokenizer.bos_token), self._size_text()

    def _size_text(self) -> str:
        tokenizer, (height, width) = self._tokenizer, self.grid
        return f"{tokenizer.boi_token}{height}*{width}{tokenizer.image_wrapper_token}"

    def _chat_text(self, messages: list[Message], image: bool) -> str:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": _SYSTEM}, *messages]
        return str(self._tokenizer.bos_token) + self._render_image_chat(messages, image)

    def _image_text(self) -> str:
        tokenizer, (height, width) = self._tokenizer, self.grid
        placeholders = tokenizer.image_token * (height * (width + 1))
        return f"{self._size_text()}{placeholders}{tokenizer.eof_token}{tokenizer.eoi_token}"

    # Pixels and codes

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """See `UnifiedModel`: the codes, with an end of row behind the last row too."""
        return self._embed_rows(images, self._end_of_row)

    def _decode(self, codes: Tensor) -> Tensor:
        processing = self.processor.image_processor
        pixels: Tensor = self.module.model.vqmodel.decode(codes.view(-1, *self.grid)).float()
        mean, std = (pixels.new_tensor(value)[:, None, None] for value in (processing.image_mean, processing.image_std))
        return pixels * std + mean

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[2:]] * len(pixels), device=pixels.device)
        return torch.stack(self.module.model.vqmodel.encode(pixels, sizes, return_dict=True).image_tokens).flatten(1)

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        processing = self.processor.image_processor
        return fit_images(images, self.image_size, processing.image_mean, processing.image_std).to(
            self.device, self.dtype
        )

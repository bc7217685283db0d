"""Emu3.5 (arXiv 2510.26583): text and image codes in one vocabulary, decoder layers of Qwen3, pixels of an IBQ model.

transformers has no class of it. `Emu35ForCausalLM` is made of parts of transformers, and `ospo-fast convert` writes the
published files into a folder of it (`models.emu3_5_files`). Formats are those of the official code (baaivision/Emu3.5):
`configs/example_config_t2i.py`, `src/utils/logits_processor.py`, `src/vision_tokenizer/`.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, ChameleonVQVAEConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

from ospo_fast.errors import OspoError
from ospo_fast.models.adapter import (
    ImagesOnly,
    VocabularyAdapter,
    check_positions,
    fit_images,
    refuse_other_multiples,
    remembered_size,
)
from ospo_fast.models.chameleon import VQDecoder
from ospo_fast.models.layout import ImageLayout

_GRID = (55, 73)  # the default of the official script, which calls it 4:3
_TASK = " for t2i task"
_BEFORE, _AFTER = "You are a helpful assistant{task}. USER: ", " ASSISTANT: <|extra_100|>"
_END_OF_ROW = "<|extra_200|>"
_ROWS = 512  # codes that are looked up at once


class Emu35Config(Qwen3Config):
    """The configuration of a Qwen3, and `vq_config`, that of a `ChameleonVQVAE`."""

    model_type = "emu3_5"


class Emu35ForCausalLM(Qwen3ForCausalLM):
    """A Qwen3 with an IBQ model (arXiv 2412.02692) in `vqmodel`: encoder, codebook, and decoder of pixels."""

    config_class = Emu35Config
    config: Emu35Config

    def __init__(self, config: Emu35Config) -> None:
        super().__init__(config)
        vq = ChameleonVQVAEConfig(**config.vq_config)
        self.vqmodel = ChameleonVQVAE(vq)
        self.vqmodel.decoder = VQDecoder(vq)
        self.vqmodel.requires_grad_(False)
        self.post_init()


class Emu35UnifiedModel(ImagesOnly, VocabularyAdapter):
    """Adapter of an Emu3.5 and its processor. `UnifiedModel` documents the members.

    None of the official tasks is a question about an image, so that there is no chat here. The official model may write
    a text first, and begins the image itself; here the prompt of an image ends behind begin-of-image and its size.
    image_size: any multiple of the pixels of a code, 16 in the published ones.
    """

    decoder_path = "model"
    special_tokens = VocabularyAdapter.special_tokens | {"boi_id": "image_wrapper_token"}

    def __init__(self, module: Any, processor: Any, *, name: str, image_size: tuple[int, int] | None = None) -> None:
        config = module.config
        self._vq = ChameleonVQVAEConfig(**config.vq_config)
        self._factor = 2 ** (len(self._vq.channel_multiplier) - 1)
        grid = self._find_grid(image_size or remembered_size(module), name)
        for token in ("<|extra_100|>", getattr(processor.tokenizer, "boi_token", None)):
            self.vocabulary_id(processor, token, name, config)
        end_of_row = self.vocabulary_id(processor, _END_OF_ROW, name, config)
        check_positions(name, grid[0] * grid[1], config)
        self.layout = ImageLayout.rows(grid, end_of_row)
        count = int(self._vq.num_embeddings)
        tokens = [f"<|visual token {n:06d}|>" for n in range(count)]
        first = self.vocabulary_id(processor, tokens[0], name, config)
        for n, own in enumerate(processor.tokenizer.convert_tokens_to_ids(tokens)):
            if own != first + n:
                raise OspoError(
                    f"model: the tokenizer of {name} gives {tokens[n]!r} the id {own}, expected {first + n}, because "
                    "codes follow one another; use the tokenizer of the published model"
                )
        ids = dict(enumerate(range(first, first + count)))
        super().__init__(module, processor, name=name, text=config, code_ids=ids, num_codes=count)
        self.eos_ids = ()  # it writes no text here
        empty = self._encode(f"{self._tokenizer.bos_token}{_BEFORE.format(task='')}{self._suffix}")["input_ids"]
        self._unconditional = torch.tensor(empty, dtype=torch.long)

    def _find_grid(self, image_size: tuple[int, int] | None, name: str) -> tuple[int, int]:
        if image_size is None:
            return _GRID
        refuse_other_multiples(name, image_size, self._factor)
        return image_size[0] // self._factor, image_size[1] // self._factor

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of images in pixels."""
        return self.grid[0] * self._factor, self.grid[1] * self._factor

    def unconditional(self, ids: Tensor) -> Tensor:
        """See `UnifiedModel`: the chat without its task and its text."""
        return self._unconditional

    # Text

    def _split_template(self) -> tuple[str, str]:
        tokenizer, (height, width) = self._tokenizer, self.grid
        start = f"{tokenizer.boi_token}{height}*{width}{tokenizer.image_wrapper_token}"
        return f"{tokenizer.bos_token}{_BEFORE.format(task=_TASK)}", f"{_AFTER}{start}"

    # Pixels and codes

    def _decode(self, codes: Tensor) -> Tensor:
        vq = self.module.vqmodel
        latent = vq.quantize.embedding(codes).transpose(1, 2).unflatten(2, self.grid)
        pixels: Tensor = vq.decoder(vq.post_quant_conv(latent)).float()
        return (pixels + 1) / 2

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """The code of a vector z is the argmax of e · z over the vectors e of the codebook, not the nearest of them."""
        vq = self.module.vqmodel
        latents, codebook = vq.quant_conv(vq.encoder(pixels)).flatten(2).transpose(1, 2), vq.quantize.embedding.weight
        codes = [[(rows @ codebook.T).argmax(-1) for rows in latent.split(_ROWS)] for latent in latents]
        return torch.stack([torch.cat(parts) for parts in codes])

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        return fit_images(images, self.image_size, [0.5] * 3, [0.5] * 3).to(self.device, self.dtype)


AutoConfig.register("emu3_5", Emu35Config, exist_ok=True)  # else transformers warns when it loads the tokenizer

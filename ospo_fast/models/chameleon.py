"""Chameleon (arXiv 2405.09818), Anole and Lumina-mGPT: transformers' `ChameleonForConditionalGeneration`.

Formats are those of the official code: facebookresearch/chameleon (`inference/chameleon.py`), GAIR-NLP/anole
(`text2image.py`), and Alpha-VLLM/Lumina-mGPT (`inference_solver.py`, `data/item_processor.py`). transformers has no
decoder of pixels for them: `VQDecoder` reads the tensors `model.vqmodel.decoder.*`, which Anole's checkpoints have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ospo_fast.errors import OspoError
from ospo_fast.models.adapter import (
    VocabularyAdapter,
    check_positions,
    fit_images,
    refuse_other_multiples,
    refuse_other_size,
    remembered_size,
)
from ospo_fast.models.base import Message
from ospo_fast.models.layout import ImageLayout
from ospo_fast.models.lumina import is_lumina

_DECODER = "model.vqmodel.decoder."
# Tokens of Lumina-mGPT: the end of a row, and sizes in pairs of codes from 0 on.
_END_OF_ROW, _FIRST_SIZE = "<reserved08799>", 8800
_LUMINA_SIDE = 768  # pixels, of the images of Lumina-mGPT


class ChameleonUnifiedModel(VocabularyAdapter):
    """Adapter of a Chameleon, Anole or Lumina-mGPT model and its processor. `UnifiedModel` documents the members.

    image_size: of Lumina-mGPT, multiples of 32 pixels; the others know one size.
    """

    decoder_path = "model"

    def __init__(self, module: Any, processor: Any, *, name: str, image_size: tuple[int, int] | None = None) -> None:
        config, vq = module.config, module.config.vq_config
        self._factor = 2 ** (len(vq.channel_multiplier) - 1)
        self._is_lumina = is_lumina(config.to_dict())
        side = vq.resolution // self._factor
        if self._is_lumina:
            grid = self._lumina_grid(processor, config, image_size or remembered_size(module), name)
            self._end_of_row = self.vocabulary_id(processor, _END_OF_ROW, name, config)
            check_positions(name, grid[0] * grid[1], config)
            self.layout = ImageLayout.rows(grid, self._end_of_row)
        else:
            refuse_other_size(name, image_size, [(vq.resolution, vq.resolution)])
            self.layout = ImageLayout(((side, side),))
        mapping = module.model.vocabulary_mapping
        super().__init__(
            module, processor, name=name, text=config, code_ids=mapping.img2bpe, num_codes=int(vq.num_embeddings)
        )
        sep = self._special_id("sep_token")
        self.eos_ids = tuple(dict.fromkeys((*self.eos_ids, sep)))  # it ends every turn
        suffix = self._encode(self._suffix)["input_ids"]
        start = suffix[suffix.index(self.boi_id) :] if self.boi_id in suffix else []
        if start != self._tokenizer.convert_tokens_to_ids(self._start_tokens()):
            raise OspoError(
                f"model: the tokenizer of {name} splits {self._start_text()!r}, expected one token for each part; use "
                "the tokenizer of the published model"
            )
        # Official guidance has no text: begin-of-sequence and begin-of-image; of Lumina-mGPT the image alone.
        self._unconditional = torch.tensor(start if self._is_lumina else [self.bos_id, *start])
        self.boi_id = start[-1]

    def _lumina_grid(
        self, processor: Any, config: Any, image_size: tuple[int, int] | None, name: str
    ) -> tuple[int, int]:
        unit, size = 2 * self._factor, image_size or (_LUMINA_SIDE, _LUMINA_SIDE)
        refuse_other_multiples(name, size, unit, of="a size token")
        for side in size:
            self.vocabulary_id(processor, _size_token(side // unit), name, config)
        return size[0] // self._factor, size[1] // self._factor

    @classmethod
    def load_rest(cls, module: Any, files: list[Path]) -> None:
        """Add the decoder of pixels, where the checkpoint has it."""
        from safetensors import safe_open

        tensors = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    if key.startswith(_DECODER):
                        tensors[key.removeprefix(_DECODER)] = file.get_tensor(key)
        if tensors:
            with torch.device("meta"):
                decoder = VQDecoder(module.config.vq_config)
            weight = module.model.vqmodel.post_quant_conv.weight
            decoder.load_state_dict({k: v.to(weight) for k, v in tensors.items()}, assign=True)
            module.model.vqmodel.decoder = decoder.requires_grad_(False)

    def check_generation(self) -> None:
        """Raise OspoError for a checkpoint without decoder, as Meta's, which is not trained to generate images."""
        if not hasattr(self.module.model.vqmodel, "decoder"):
            raise OspoError(
                f"model: {self.name} has no decoder of pixels ({_DECODER}*), like Meta's Chameleon, which was released "
                "for text alone; use Anole (leloy/Anole-7b-v0.1-hf), or add these tensors to the folder"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of images in pixels."""
        return self.grid[0] * self._factor, self.grid[1] * self._factor

    def unconditional(self, ids: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        return self._unconditional

    # Text

    def text_logits(self, hidden: Tensor) -> Tensor:
        """See `UnifiedModel`: a text has no image codes, as in the forward pass of transformers."""
        logits = super().text_logits(hidden)
        return logits.index_fill(-1, self._code_ids, torch.finfo(logits.dtype).min)

    def _special_token(self, kind: str) -> str | None:
        """The tokenizer need not name the tokens of images: the processor knows them."""
        names = {"boi_token": "image_start_token", "eoi_token": "image_end_token", "image_token": "image_token"}
        return getattr(self.processor, names[kind]) if kind in names else super()._special_token(kind)

    def _split_template(self) -> tuple[str, str]:
        before, after = str(self._tokenizer.bos_token), f"{self._tokenizer.sep_token}{self._start_text()}"
        if self._is_lumina:
            height, width = self.image_size
            before += f"Generate an image of {width}x{height} according to the following prompt:\n"
        return before, after

    def _start_text(self) -> str:
        return "".join(self._start_tokens())

    def _start_tokens(self) -> list[str]:
        """Begin-of-image, and of Lumina-mGPT the size."""
        sizes = [_size_token(side // 2) for side in self.grid] if self._is_lumina else []
        return [str(self.processor.image_start_token), *sizes]

    def _chat_text(self, messages: list[Message], image: bool) -> str:
        # There are no names of roles: every turn is its text, and ends in a token.
        last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
        turns = []
        for n, message in enumerate(messages):
            text = self._image_text() * (image and n == last) + message["content"]
            turns.append(f"{text}\n" if message["role"] == "system" else f"{text}{self._tokenizer.sep_token}")
        return str(self._tokenizer.bos_token) + "".join(turns)

    def _image_text(self) -> str:
        height, width = self.grid
        count = height * (width + self._is_lumina)
        return f"{self._start_text()}{self.processor.image_token * count}{self.processor.image_end_token}"

    # Pixels and codes

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """See `UnifiedModel`: the codes; of Lumina-mGPT with an end of row behind each row, the last one too."""
        return self._embed_rows(images, self._end_of_row) if self._is_lumina else super().embed_images(images)

    def _decode(self, codes: Tensor) -> Tensor:
        vq = self.module.model.vqmodel
        self.check_generation()
        latent = vq.quantize.embedding(codes).transpose(1, 2).unflatten(2, self.grid)
        pixels: Tensor = vq.decoder(vq.post_quant_conv(latent)).float()
        return (pixels.clamp(-1, 1) + 1) / 2

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.module.model.vqmodel.encode(pixels, return_dict=True).image_tokens
        return found.view(len(pixels), -1)

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        return fit_images(images, self.image_size, [0.5] * 3, [0.5] * 3).to(self.device, self.dtype)


def _size_token(count: int) -> str:
    return f"<reserved{_FIRST_SIZE + count:05d}>"


class VQDecoder(nn.Module):
    """Decoder of the VQ model (Esser et al. 2021, arXiv 2012.09841), with the tensor names of its checkpoints.

    Latents (N, C, H, W) → pixels (N, 3, F·H, F·W) in about [−1, 1], with F = 2^(levels − 1).
    """

    def __init__(self, config: Any) -> None:
        from transformers.models.chameleon.modeling_chameleon import (
            ChameleonVQVAEEncoderAttnBlock as Attention,
        )
        from transformers.models.chameleon.modeling_chameleon import (
            ChameleonVQVAEEncoderResnetBlock as Block,
        )

        super().__init__()
        widths = [config.base_channels * factor for factor in config.channel_multiplier]
        width, resolution = widths[-1], config.resolution // 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid: Any = nn.Module()
        self.mid.block_1 = Block(config, width, width)
        self.mid.attn_1 = Attention(width) if config.attn_type == "vanilla" else nn.Identity()
        self.mid.block_2 = Block(config, width, width)
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            stage: Any = nn.Module()
            stage.block, stage.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                stage.block.append(Block(config, width, widths[level]))
                width = widths[level]
                if resolution in (config.attn_resolutions or ()):
                    stage.attn.append(Attention(width))
            if level:
                stage.upsample = nn.Module()
                stage.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
                resolution *= 2
            self.up.insert(0, stage)
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, getattr(config, "out_channels", 3), 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Decode latents."""
        x, mid, stages = self.conv_in(latent), self.mid, list(self.up)
        x = mid.block_2(mid.attn_1(mid.block_1(x)))
        stage: Any
        for stage in reversed(stages):
            for n, block in enumerate(stage.block):
                x = block(x)
                if len(stage.attn):
                    x = stage.attn[n](x)
            if hasattr(stage, "upsample"):
                x = stage.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        pixels: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return pixels

"""GLM-Image, the autoregressive part: transformers' `GlmImageForConditionalGeneration`.

It generates a preview, then the image, of codes on three axes of rotary positions, and answers no questions. diffusers'
`GlmImagePipeline` makes pixels of the codes. Formats are those of transformers' `GlmImageProcessor` and of that
pipeline (`generate_prior_tokens`). There is no guidance in the official code: use guidance_scale 1. With another one,
the unconditional prompt is an empty one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models.adapter import PROBE, ImagesOnly, VocabularyAdapter, check_positions, fit_images, remembered_size
from ospo_fast.models.layout import ImageLayout

_UNIT = 32  # pixels of a code of the image
_TARGET = 1152, 768  # pixels, of processors that do not say it: those before transformers 5.23
_PREVIEW = 16  # codes of a side of a square preview


class GlmImageUnifiedModel(ImagesOnly, VocabularyAdapter):
    """Adapter of a GLM-Image model and its processor. `UnifiedModel` documents the members.

    image_size: multiples of 32 pixels, of a ratio of at most 4; default: that of the processor.
    """

    decoder_path = "model.language_model"
    special_tokens = VocabularyAdapter.special_tokens | {"boi_id": "bos_token", "eoi_id": "eos_token"}

    def __init__(self, module: Any, processor: Any, *, name: str, image_size: tuple[int, int] | None = None) -> None:
        image_size = image_size or remembered_size(module)
        default = getattr(processor, "target_h", _TARGET[0]), getattr(processor, "target_w", _TARGET[1])
        size = image_size or (int(default[0]) // _UNIT * _UNIT, int(default[1]) // _UNIT * _UNIT)
        if any(side < _UNIT or side % _UNIT for side in size) or max(size) > 4 * min(size):
            raise UsageError(
                f"image_size: got {size[0]}x{size[1]}, expected multiples of {_UNIT} with a ratio of at most 4, which "
                f"{name} knows"
            )
        grid = size[0] // _UNIT, size[1] // _UNIT
        ratio = grid[0] / grid[1]
        preview = int(math.sqrt(ratio) * _PREVIEW), int(math.sqrt(1 / ratio) * _PREVIEW)
        check_positions(name, grid[0] * grid[1], module.config.text_config)  # before lists of that many are made
        self.layout = ImageLayout((preview, grid), positions=_positions((preview, grid)))
        self._pipeline: Any = None
        # save_pretrained writes this entry, so a fine-tuned copy has the pixels of its base model.
        for folder in (Path(name), Path(name).parent):
            if (folder / "model_index.json").is_file():
                module.config.pixel_pipeline = str(folder.resolve())
        for token in (processor.grid_bos_token, processor.grid_eos_token):
            self.vocabulary_id(processor, token, name)
        count = int(module.config.vq_config.num_embeddings)
        super().__init__(
            module, processor, name=name, text=module.config.text_config,
            code_ids=dict(enumerate(range(count))), num_codes=count,
        )  # fmt: skip
        self.eos_ids = ()  # it writes no text
        for attribute, key in (("boi_id", "image_start_token_id"), ("eoi_id", "image_end_token_id")):
            if (own := getattr(self, attribute)) != (expected := int(getattr(module.config, key))):
                raise OspoError(
                    f"model: the tokenizer of {name} gives the token of {key} the id {own}, config.json {expected}; "
                    "use the tokenizer of the published model"
                )
        empty = self._encode(f"{self._prefix}{self._suffix}")["input_ids"]
        self._unconditional = torch.tensor(empty, dtype=torch.long)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of images in pixels."""
        return self.grid[0] * _UNIT, self.grid[1] * _UNIT

    def unconditional(self, ids: Tensor) -> Tensor:
        """See `UnifiedModel`: an empty prompt."""
        return self._unconditional

    # Text

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Raise OspoError: there is no head of text."""
        self.check_chat()
        return hidden

    def _split_template(self) -> tuple[str, str]:
        turns = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
        before, after = PROBE, ""
        if self.processor.chat_template is not None:
            before = self._render_chat(turns, add_generation_prompt=False)
        before, found, after = before.partition(PROBE)
        if not found:
            raise OspoError(f"model: the chat template of {self.name} does not contain the user's text unchanged")
        start, end = self.processor.grid_bos_token, self.processor.grid_eos_token
        sizes = "".join(f"{start}{height} {width}{end}" for height, width in reversed(self.layout.grids))
        return before, f"{after}{sizes}{self._tokenizer.bos_token}"

    def _encode(self, text: str, *, offsets: bool = False) -> dict[str, Any]:
        # Its tokenizer adds nothing, and the token that it names as begin-of-sequence is begin-of-image.
        return dict(
            self._tokenize(
                self._tokenizer,
                text,
                add_special_tokens=False,
                return_offsets_mapping=offsets,
                return_attention_mask=False,
            )
        )

    # Pixels and codes

    def check_pixels(self) -> None:
        """Raise OspoError unless the pipeline that makes pixels is there, with diffusers."""
        from ospo_fast.packages import check_installed

        self._pipeline_folder()
        check_installed(f"Images of {self.name}", "diffusers", extra="glm")

    def _pipeline_folder(self) -> str:
        folder = str(getattr(self.module.config, "pixel_pipeline", ""))
        if not folder or not (Path(folder) / "model_index.json").is_file():
            raise OspoError(
                f"model: {self.name} has no pipeline that makes pixels of its codes"
                f"{f' (there is no model_index.json in {folder})' if folder else ''}; give the whole folder of "
                "zai-org/GLM-Image, of which this is the part vision_language_encoder"
            )
        return folder

    def _load_pipeline(self) -> Any:
        self.check_pixels()
        from ospo_fast.models import folder_checks, loading

        folder = self._pipeline_folder()
        for part in Path(folder).iterdir():
            if part.is_dir():
                folder_checks.refuse_pipes(part)
                folder_checks.refuse_code(part)
        with loading(f"the pipeline {folder} cannot be loaded", "download zai-org/GLM-Image again"):
            from diffusers import GlmImagePipeline

            found = GlmImagePipeline.from_pretrained(
                folder,
                vision_language_encoder=None,
                torch_dtype=self.dtype,
                use_safetensors=True,
                local_files_only=True,
            )
        found.set_progress_bar_config(disable=True)
        return found.to(self.device)

    def _decode(self, codes: Tensor) -> Tensor:
        self._pipeline = self._pipeline or self._load_pipeline()
        grid = codes[:, -self.grid[0] * self.grid[1] :].view(-1, 1, *self.grid).float()
        prior = F.interpolate(grid, scale_factor=2.0, mode="nearest").long().flatten(1)
        height, width = self.image_size
        # Its prompt is read for quoted texts alone. Noise of one seed: the pixels depend on the codes alone.
        found = [
            self._pipeline(
                prompt="", height=height, width=width, prior_token_ids=row[None], output_type="pt",
                generator=torch.Generator("cpu").manual_seed(0),
            ).images
            for row in prior
        ]  # fmt: skip
        return torch.cat(found)

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        """Images → patches (N, T, 3 · P²) of the preview, then of the image, which is read at half its size."""
        processing, side = self.processor.image_processor, int(self.module.config.vision_config.patch_size)
        parts = []
        for height, width in self.layout.grids:
            size = height * side, width * side
            pixels = fit_images(images, size, processing.image_mean, processing.image_std)
            parts.append(F.unfold(pixels, side, stride=side).transpose(1, 2))
        return torch.cat(parts, 1).to(self.device, self.dtype)

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        model, codes = self.module.model, []
        for grid, part in zip(self.layout.grids, pixels.split([h * w for h, w in self.layout.grids], 1), strict=True):
            grids = torch.tensor([[1, *grid]] * len(part), device=part.device)
            features = model.visual(part.flatten(0, 1), grid_thw=grids, return_dict=True).pooler_output
            features = features.view(len(part), *grid, -1).permute(0, 3, 1, 2)
            # Image by image, as transformers does.
            codes.append(torch.stack([model.vqmodel.encode(image[None]).image_tokens for image in features]))
        return torch.cat(codes, 1)


def _positions(grids: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    """Positions (time, height, width) of the codes of grids, from the end of the prompt."""
    axes: tuple[list[int], list[int], list[int]] = [], [], []
    start = 0
    for height, width in grids:
        for row in range(height):
            for column in range(width):
                for axis, offset in zip(axes, (0, row, column), strict=True):
                    axis.append(start + offset)
        start += max(height, width)
    return tuple(map(tuple, axes))

"""Janus, Janus-Pro and the embedded Shapes model: transformers' `JanusForConditionalGeneration` behind the protocol."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models.adapter import PROBE, Adapter, ModuleAdapter, refuse_other_size
from ospo_fast.models.base import Message
from ospo_fast.models.layout import ImageLayout


class _JanusModule(ModuleAdapter):
    """The members of `UnifiedModel` that need the transformers module alone."""

    decoder_path, head_path = "model.language_model", "model.generation_head"

    def __init__(self, module: Any, **arguments: Any) -> None:
        config = module.config
        side = int(config.vq_config.num_patches)
        self.layout = ImageLayout(((side, side),))
        self.num_codes = int(config.vq_config.num_embeddings)
        super().__init__(module, text=config.text_config, **arguments)

    @property
    def _core(self) -> Any:
        return self.module.model

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self._core.generation_embeddings.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        dtype: torch.dtype = self._core.generation_embeddings.weight.dtype
        return dtype

    @property
    def code_embedding(self) -> tuple[nn.Module, ...]:
        """The modules that `embed_codes` runs."""
        return self._core.generation_embeddings, self._core.generation_aligner

    def unconditional(self, ids: Tensor) -> Tensor:
        """See `UnifiedModel`: of the same length, with padding in place of the prompt."""
        out = torch.full_like(ids, self.pad_id)
        out[0] = self.bos_id
        out[-1] = self.boi_id
        return out

    def embed_codes(self, codes: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        embedded: Tensor = self.module.prepare_embeddings_for_image_generation(codes.to(self.device))
        return embedded


class JanusTokenModel(_JanusModule):
    """A Janus model without its processor, for `ImageGenerator`: token ids → codes.

    The special ids are those that transformers' own image generation takes from the generation configuration.
    Raises OspoError if one of them is not stored.
    """

    def __init__(self, module: Any, *, name: str) -> None:
        super().__init__(module, name=name)
        self.bos_id = self._stored_id("bos_token_id")
        self.pad_id = self._stored_id("pad_token_id")
        self.boi_id = self._stored_id("boi_token_id")

    def image_prompt(self, prompt: str) -> Tensor:
        """Raise UsageError: texts need a tokenizer."""
        raise UsageError(
            f"prompts: got a text ({prompt[:60]!r}), expected token ids (S,), because the model has no processor; "
            "pass processor=JanusProcessor.from_pretrained(…), or use ospo_fast.load_model"
        )

    def _stored_id(self, name: str) -> int:
        settings, place = self.module.generation_config, f"generation_config.{name}"
        found = getattr(settings, name, None)
        if name == "boi_token_id":
            place = "generation_config.generation_kwargs['boi_token_id']"
            found = (getattr(settings, "generation_kwargs", None) or {}).get(name)
        count = int(self.module.config.text_config.vocab_size)
        if type(found) is not int or not 0 <= found < count:
            raise OspoError(
                f"model: {place} of {self.name} is {found!r}, expected a token id from 0 to {count - 1}; set it, or "
                "pass processor=JanusProcessor.from_pretrained(…)"
            )
        return found


class JanusUnifiedModel(_JanusModule, Adapter):
    """Adapter of a Janus model and its processor. `UnifiedModel` documents the members."""

    def __init__(self, module: Any, processor: Any, *, name: str, image_size: tuple[int, int] | None = None) -> None:
        side = int(module.config.vision_config.image_size)
        refuse_other_size(name, image_size, [(side, side)])
        _check_processor(processor.image_processor, side, name)
        super().__init__(module, processor=processor, name=name)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of images in pixels."""
        size = self.processor.image_processor.size
        return int(size["height"]), int(size["width"])

    # Text

    def _split_template(self) -> tuple[str, str]:
        turns = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
        before, found, after = self._render_chat(turns).partition(PROBE)
        if not found:
            raise OspoError(f"model: the chat template of {self.name} does not contain the user's text unchanged")
        return before, after + str(self._tokenizer.boi_token)

    def _chat_text(self, messages: list[Message], image: bool) -> str:
        # The templates of converted checkpoints write "System: " before a system message and end-of-text after it. In
        # DeepSeek's code, whose form the models were trained with, it is a text and an empty line before the turns.
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        turns = [
            {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
            for m in (messages if system is None else messages[1:])
        ]
        if image:
            users = [turn for turn in turns if turn["role"] == "user"]
            users[-1]["content"].insert(0, {"type": "image"})
        text = self._render_chat(turns)
        if system is not None:
            text = (system and f"{system}\n\n") + text
        elif self.processor.use_default_system_prompt:
            from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

            text = DEFAULT_SYSTEM_PROMPT + text
        token = self._tokenizer.image_token
        if text.count(token) != int(image):
            raise UsageError(f"messages: the text holds the image token {token!r}; remove it")
        return text.replace(token, self._image_text())

    def _image_text(self) -> str:
        tokenizer = self._tokenizer
        return str(tokenizer.boi_token + tokenizer.image_token * self.layout.codes + tokenizer.eoi_token)

    # Pixels and codes

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """See `UnifiedModel`: by the encoder of vision."""
        if not images:
            return torch.empty(0, self.layout.codes, self.hidden_size, device=self.device, dtype=self.dtype)
        features: Tensor = self._core.get_image_features(self._pixels(images), return_dict=True).pooler_output
        return features

    def _decode(self, codes: Tensor) -> Tensor:
        mean, std = self._image_statistics(self.device)
        pixels: Tensor = self._core.vqmodel.decode(codes).float()
        return pixels * std[:, None, None] + mean[:, None, None]

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        vq = self._core.vqmodel
        # The decoder normalizes the codebook to unit vectors, so the nearest code has the largest cosine.
        # JanusVQVAE.encode compares vectors that are not normalized and finds other codes.
        codebook = nn.functional.normalize(vq.quantize.embedding.weight.float(), dim=-1)
        latent = vq.quant_conv(vq.encoder(pixels)).float()  # (N, E, H, W)
        nearest: Tensor = (latent.flatten(2).transpose(1, 2) @ codebook.T).argmax(-1)
        return nearest

    @property
    def is_tied(self) -> bool:
        """Whether the head of text is the embedding, which a config.json may say of weights that differ."""
        return bool(self.module.lm_head.weight is self._core.language_model.embed_tokens.weight)

    def complete_config(self) -> None:
        """Store what a saved copy needs: whether the head is tied, and what transformers' image generation reads.

        The latter is begin-of-image, and the ids of unconditional prompts.
        """
        config = self.module.config
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = self.is_tied
        if self.module.generation_config is None:
            from transformers import GenerationConfig

            self.module.generation_config = GenerationConfig()
        settings = self.module.generation_config
        settings.generation_kwargs = {
            **(getattr(settings, "generation_kwargs", None) or {}),
            "boi_token_id": self.boi_id,
        }
        for name, found in (("bos_token_id", self.bos_id), ("pad_token_id", self.pad_id)):
            if getattr(settings, name) is None:
                setattr(settings, name, found)
        # Of a configuration with this mark, transformers loads no entries that it does not know.
        settings._from_model_config = False

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        """Images → normalized pixels (N, 3, H, W), as the processor makes them."""
        processing = self.processor.image_processor
        width, height = int(processing.size["width"]), int(processing.size["height"])
        pixels = torch.empty(len(images), 3, height, width, dtype=torch.float32, device="cpu")
        mean, std = self._image_statistics("cpu")
        for i, image in enumerate(images):
            rgb = image.convert("RGB")
            if rgb.size == (width, height):
                # Nothing to resize or pad: 100 times faster than the processor.
                values = torch.from_numpy(np.array(rgb)).float() * processing.rescale_factor
                pixels[i] = ((values - mean) / std).permute(2, 0, 1)
            else:
                pixels[i] = torch.as_tensor(processing(rgb, return_tensors="pt")["pixel_values"][0])
        return pixels.to(self.device, self.dtype)

    def _image_statistics(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (3,) of the processor's normalization, in fp32."""
        processing = self.processor.image_processor
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=device)
            for values in (processing.image_mean, processing.image_std)
        )
        return mean, std


def _check_processor(processing: Any, side: int, name: str) -> None:
    """Raise OspoError unless the size of the processor's images is that of the model: both allocate it."""
    size = {key: processing.size[key] for key in ("height", "width")}
    least = getattr(processing, "min_size", 1)
    if size != {"height": side, "width": side} or not 0 <= least <= side:
        raise OspoError(
            f"model: the image processor of {name} has the size {size} and min_size {least}, expected {side}, the "
            "image_size of the vision model, and at most that; use the model's own processor"
        )

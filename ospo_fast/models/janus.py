"""Janus, Janus-Pro and the embedded Shapes model: transformers' `JanusForConditionalGeneration` behind the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models.base import Message, Offset
from ospo_fast.oom import BatchSizeLimit

_PROBE = "OSPO PROBE 7"  # stands for the prompt while the chat template's frame is read off
_VQ_PIXELS = 16 * 384 * 384  # of images that go through the VQ model at once: about 2 GB of activations in bf16


class JanusUnifiedModel:
    """Adapter over a Janus model and its processor; see `UnifiedModel` for what each member means."""

    def __init__(self, module: Any, processor: Any, *, name: str) -> None:
        self.name = name
        self.module: Any = module
        self.processor = processor
        self._tokenizer = processor.tokenizer
        if not self._tokenizer.is_fast:
            raise OspoError(f"model: {name} has a slow tokenizer, expected a fast one (tokenizer.json)")
        core = module.model
        self.decoder: nn.Module = core.language_model
        self.head: nn.Module = core.generation_head
        self._core = core

        config = module.config
        side = int(config.vq_config.num_patches)
        self.grid = (side, side)
        self.num_codes = int(config.vq_config.num_embeddings)
        self.hidden_size = int(config.text_config.hidden_size)
        self.max_positions = int(config.text_config.max_position_embeddings)
        # The marker travels with every save_pretrained, so that a fine-tuned copy is spoken to as its origin was.
        self.templates: str = getattr(config, "template_set", None) or ("shapes" if name == "shapes" else "janus")
        config.template_set = self.templates
        # What peft records as the base of an adapter: something that load_model takes.
        module.name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name

        self.bos_id = self._special("bos_token")
        self.pad_id = self._special("pad_token")
        self.boi_id = self._special("boi_token")
        self.eoi_id = self._special("eoi_token")
        self.image_id = self._special("image_token")
        self.eos_ids = self._ends()
        self.yes_ids = self._words("yes", "Yes")
        self.no_ids = self._words("no", "No")
        self._frame = self._read_frame()
        size = processor.image_processor.size
        at_once = max(1, min(64, _VQ_PIXELS // int(size["height"] * size["width"])))
        self._vq = BatchSizeLimit(at_once, "image", "free some, or draw with a smaller batch_size")

    def replaced(self, module: Any, *, name: str) -> JanusUnifiedModel:
        """The same processor around another module, with the template set of this one."""
        module.config.template_set = self.templates
        return JanusUnifiedModel(module, self.processor, name=name)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = self._core.generation_embeddings.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        dtype: torch.dtype = self._core.generation_embeddings.weight.dtype
        return dtype

    # Text

    def image_prompt(self, prompt: str) -> Tensor:
        """See `UnifiedModel`; UsageError for an empty prompt, a control token or a word the tokenizer does not know."""
        return self.image_prompt_offsets(prompt)[0]

    def image_prompt_offsets(self, prompt: str) -> tuple[Tensor, list[Offset | None]]:
        """See `UnifiedModel`; UsageError as `image_prompt`."""
        text = prompt.strip()
        if not text:
            raise UsageError("prompt: got an empty string, expected a description of an image")
        before, after = self._frame
        skipped = len(prompt) - len(prompt.lstrip())
        encoded = self._encode(before + text + after, offsets=True)
        ids: list[int] = encoded["input_ids"]
        spans: list[Offset | None] = []
        for start, end in encoded["offset_mapping"]:
            start, end = max(start - len(before), 0), min(end - len(before), len(text))
            if start >= end:
                spans.append(None)
                continue
            # Some tokenizers count the space before a word to the word.
            inner = text[start:end]
            start += len(inner) - len(inner.lstrip()) if inner.strip() else 0
            end = start + len(inner.strip()) if inner.strip() else end
            spans.append((start + skipped, end + skipped))
        controls = {self.boi_id, self.eoi_id, self.image_id}
        if any(span is not None and i in controls for i, span in zip(ids, spans, strict=True)):
            raise UsageError(f"prompt: {prompt[:60]!r} holds a control token of the model; take it out")
        unknown = self._tokenizer.unk_token_id
        missed = [s for i, s in zip(ids, spans, strict=True) if s is not None and i == unknown]
        if missed:
            words = ", ".join(repr(word) for word in dict.fromkeys(prompt[start:end] for start, end in missed))
            raise UsageError(
                f"prompt: {prompt[:60]!r} holds words that {self.name} does not know ({words}); use words that it knows"
            )
        return torch.tensor(ids, dtype=torch.long), spans

    def unconditional(self, ids: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        out = torch.full_like(ids, self.pad_id)
        out[0] = self.bos_id
        out[-1] = self.boi_id
        return out

    def chat(self, messages: list[Message], *, image: bool = False) -> Tensor:
        """See `UnifiedModel`; UsageError where a message holds the image token, or an image has no user message."""
        if not messages:
            raise UsageError("messages: got none, expected at least one chat turn")
        turns = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        if image:
            users = [turn for turn in turns if turn["role"] == "user"]
            if not users:
                raise UsageError("messages: an image needs a user message to stand in, got none")
            users[-1]["content"].insert(0, {"type": "image"})
        text: str = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if self.processor.use_default_system_prompt and messages[0]["role"] != "system":
            text = DEFAULT_SYSTEM_PROMPT + text
        mark = self._tokenizer.image_token
        if text.count(mark) != int(image):
            raise UsageError(f"messages: the text holds {mark!r}, which stands for an image; take it out")
        patches = self.grid[0] * self.grid[1]
        text = text.replace(mark, self._tokenizer.boi_token + mark * patches + self._tokenizer.eoi_token)
        return torch.tensor(self._encode(text)["input_ids"], dtype=torch.long)

    def detokenize(self, ids: Tensor | Sequence[int]) -> str:
        """See `UnifiedModel`."""
        plain = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return str(self._tokenizer.decode(plain, skip_special_tokens=True)).strip()

    def text_logits(self, hidden: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        logits: Tensor = self.module.lm_head(hidden)
        return logits

    # Embeddings

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        embedded: Tensor = self._core.language_model.embed_tokens(ids.to(self.device))
        return embedded

    def embed_codes(self, codes: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        embedded: Tensor = self.module.prepare_embeddings_for_image_generation(codes.to(self.device))
        return embedded

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """See `UnifiedModel`."""
        if not images:
            return torch.empty(0, self.grid[0] * self.grid[1], self.hidden_size, device=self.device, dtype=self.dtype)
        features: Tensor = self._core.get_image_features(self._pixels(images), return_dict=True).pooler_output
        return features

    # Pixels and codes

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> list[Image.Image]:
        """See `UnifiedModel`; UsageError for codes of another grid or codebook, OspoError where no memory is left."""
        tokens = self.grid[0] * self.grid[1]
        if codes.dim() != 2 or codes.shape[1] != tokens:
            raise UsageError(f"codes: got shape {tuple(codes.shape)}, expected (N, {tokens})")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise UsageError(f"codes: got values outside 0…{self.num_codes - 1}, the codebook of {self.name}")
        processing = self.processor.image_processor
        mean, std = (torch.tensor(v, device=self.device) for v in (processing.image_mean, processing.image_std))
        codes = codes.to(self.device, torch.long)

        def decode(part: slice) -> list[Image.Image]:
            rows = codes[part]
            pixels = self._core.vqmodel.decode(_paired(rows))[: len(rows)].float().permute(0, 2, 3, 1)
            # Truncated, not rounded: what the processor's postprocess and the official code do.
            levels = ((pixels * std + mean) * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
            return [Image.fromarray(image) for image in levels]

        return [image for _, images in self._vq.run(len(codes), decode) for image in images]

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """See `UnifiedModel`; images are resized and padded as the processor does."""
        vq = self._core.vqmodel
        # The decoder reads a codebook of unit vectors, so the nearest code is the one of the largest cosine;
        # JanusVQVAE.encode compares unnormalised vectors and finds others.
        codebook = nn.functional.normalize(vq.quantize.embedding.weight.float(), dim=-1)

        def encode(part: slice) -> Tensor:
            pixels = self._pixels(images[part])
            latent = vq.quant_conv(vq.encoder(_paired(pixels)))[: len(pixels)].float()  # (N, E, H, W)
            nearest: Tensor = (latent.flatten(2).transpose(1, 2) @ codebook.T).argmax(-1)
            return nearest

        codes = [found for _, found in self._vq.run(len(images), encode)]
        tokens = self.grid[0] * self.grid[1]
        return torch.cat(codes) if codes else torch.empty((0, tokens), dtype=torch.long, device=self.device)

    def save(self, path: str | Path) -> None:
        """See `UnifiedModel`; OspoError where the folder cannot be written."""
        try:
            self.module.save_pretrained(str(path))
            self.processor.save_pretrained(str(path))
        except OSError as error:
            raise OspoError(f"model: cannot write to {path} ({error.strerror or error})") from error

    # Inside

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        """Images → normalised pixels (N, 3, H, W) as the processor makes them."""
        processing = self.processor.image_processor
        width, height = int(processing.size["width"]), int(processing.size["height"])
        pixels = torch.empty(len(images), 3, height, width)
        mean, std = (torch.tensor(values) for values in (processing.image_mean, processing.image_std))
        for i, image in enumerate(images):
            rgb = image.convert("RGB")
            if rgb.size == (width, height):
                # Nothing to resize or pad: a hundred times faster than the processor.
                values = torch.from_numpy(np.array(rgb)).float() * processing.rescale_factor
                pixels[i] = ((values - mean) / std).permute(2, 0, 1)
            else:
                pixels[i] = torch.as_tensor(processing(rgb, return_tensors="pt")["pixel_values"][0])
        return pixels.to(self.device, self.dtype)

    def _encode(self, text: str, *, offsets: bool = False) -> dict[str, Any]:
        bos = self._tokenizer.bos_token
        return dict(
            self._tokenizer(
                text,
                add_special_tokens=not (bos and text.startswith(bos)),
                return_offsets_mapping=offsets,
                return_attention_mask=False,
                return_tensors=None,
            )
        )

    def _read_frame(self) -> tuple[str, str]:
        """The text that the chat template and the processor put before and after the prompt of an image."""
        turns = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
        text: str = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, found, after = text.partition(_PROBE)
        if not found:
            raise OspoError(f"model: the chat template of {self.name} does not hold the user's text as it is")
        return before, after + str(self._tokenizer.boi_token)

    def _special(self, kind: str) -> int:
        token = getattr(self._tokenizer, kind, None)
        number = None if token is None else self._tokenizer.convert_tokens_to_ids(token)
        if number is None:
            raise OspoError(f"model: the tokenizer of {self.name} has no {kind}, which drawing and answering need")
        return int(number)

    def _ends(self) -> tuple[int, ...]:
        told = getattr(self.module.generation_config, "eos_token_id", None)
        more = told if isinstance(told, (list, tuple)) else [told]
        ids = [self._special("eos_token"), *(int(i) for i in more if i is not None)]
        return tuple(dict.fromkeys(ids))

    def _words(self, *words: str) -> tuple[int, ...]:
        found = []
        for word in words:
            ids = self._tokenizer(word, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != self._tokenizer.unk_token_id:
                found.append(int(ids[0]))
        if not found:
            raise OspoError(f"model: the tokenizer of {self.name} has no single token for any of {', '.join(words)}")
        return tuple(dict.fromkeys(found))


def _paired(batch: Tensor) -> Tensor:
    """A batch of one doubled: convolutions of a single image take other kernels and round otherwise."""
    return torch.cat((batch, batch)) if len(batch) == 1 else batch

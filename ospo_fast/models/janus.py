"""Janus, Janus-Pro and the embedded Shapes model: transformers' `JanusForConditionalGeneration` behind the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ospo_fast.errors import OspoError, UsageError, check_text, is_panic
from ospo_fast.models.base import Message, Offset
from ospo_fast.models.vocabulary import check_words, find_vocabulary
from ospo_fast.oom import BatchSizeLimit, short

_PROBE = "OSPO PROBE 7"  # stands for the prompt while the chat template is split
# Per pass of the VQ model. On a GPU about 2 GB of activations in bf16; on a CPU larger passes gain little.
_VQ_PIXELS = {"cuda": 16 * 384 * 384, "cpu": 4 * 48 * 48}


class _JanusModule:
    """The members of `UnifiedModel` that need the transformers module alone."""

    bos_id: int
    pad_id: int
    boi_id: int

    def __init__(self, module: Any, *, name: str) -> None:
        self.name = name
        self.module: Any = module
        config = module.config
        side = int(config.vq_config.num_patches)
        self.grid = (side, side)
        self.num_codes = int(config.vq_config.num_embeddings)
        self.hidden_size = int(config.text_config.hidden_size)
        self.max_positions = int(config.text_config.max_position_embeddings)

    # Read at every use: they may be replaced in the module, such as by a compiled one.
    @property
    def _core(self) -> Any:
        return self.module.model

    @property
    def decoder(self) -> nn.Module:
        """See `UnifiedModel`."""
        decoder: nn.Module = self._core.language_model
        return decoder

    @decoder.setter
    def decoder(self, module: nn.Module) -> None:
        self._core.language_model = module

    @property
    def head(self) -> nn.Module:
        """See `UnifiedModel`."""
        head: nn.Module = self._core.generation_head
        return head

    @head.setter
    def head(self, module: nn.Module) -> None:
        self._core.generation_head = module

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
        """See `UnifiedModel`."""
        out = torch.full_like(ids, self.pad_id)
        out[0] = self.bos_id
        out[-1] = self.boi_id
        return out

    def text_logits(self, hidden: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        logits: Tensor = self.module.lm_head(hidden)
        return logits

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        embedded: Tensor = self._core.language_model.embed_tokens(ids.to(self.device))
        return embedded

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


class JanusUnifiedModel(_JanusModule):
    """Adapter of a Janus model and its processor. `UnifiedModel` documents the members."""

    def __init__(self, module: Any, processor: Any, *, name: str) -> None:
        self.processor = processor
        self._tokenizer = processor.tokenizer
        if not self._tokenizer.is_fast:
            raise OspoError(f"model: {name} has a slow tokenizer, expected a fast one (tokenizer.json)")
        super().__init__(module, name=name)
        self._vocabulary = find_vocabulary(getattr(self._tokenizer, "backend_tokenizer", None))
        config = module.config
        # save_pretrained writes this entry, so a fine-tuned copy gets the templates of its base model.
        self.templates: str = getattr(config, "template_set", None) or ("shapes" if name == "shapes" else "janus")
        config.template_set = self.templates
        # peft records this as the base model of an adapter; load_model must accept it.
        module.name_or_path = str(Path(name).resolve()) if Path(name).exists() else name

        self.bos_id = self._special_id("bos_token")
        self.pad_id = self._special_id("pad_token")
        self.boi_id = self._special_id("boi_token")
        self.eoi_id = self._special_id("eoi_token")
        self.image_id = self._special_id("image_token")
        eos = getattr(module.generation_config, "eos_token_id", None)
        more = eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
        self.eos_ids = tuple(dict.fromkeys([self._special_id("eos_token"), *map(int, more)]))
        self._control_ids = self._find_control_ids()
        self.yes_ids = self.single_token_ids("yes", "Yes")
        self.no_ids = self.single_token_ids("no", "No")
        self._prefix, self._suffix = self._split_template()
        size = self._check_image_size()
        pixels = _VQ_PIXELS.get(self.device.type, _VQ_PIXELS["cuda"])
        batch_size = max(1, min(64, pixels // int(size["height"] * size["width"])))
        self._vq_limit = BatchSizeLimit(batch_size, "image", "free some, or use a smaller batch_size", fills=True)

    def with_module(self, module: Any, *, name: str) -> JanusUnifiedModel:
        """An adapter of another module with the processor and the template set of this one."""
        module.config.template_set = self.templates
        return JanusUnifiedModel(module, self.processor, name=name)

    # Text

    def image_prompt(self, prompt: str) -> Tensor:
        """See `UnifiedModel`. Raises UsageError for an empty prompt, a control token or an unknown word."""
        return self.image_prompt_offsets(prompt)[0]

    def normalize_prompt(self, prompt: str) -> str:
        """Return a prompt as the model reads it: words that a closed vocabulary has in lower case alone, in lower case.

        Other models tell case apart, and their prompts stay as they are.
        """
        return prompt if self._vocabulary is None else self._vocabulary.normalize(prompt)

    def image_prompt_offsets(self, prompt: str) -> tuple[Tensor, list[Offset | None]]:
        """See `UnifiedModel`. Raises UsageError like `image_prompt`."""
        prompt = self.normalize_prompt(check_text("prompt", prompt))
        text = prompt.strip()
        if not text:
            raise UsageError("prompt: got an empty string, expected a description of an image")
        stripped = prompt.index(text)
        encoded = self._encode(self._prefix + text + self._suffix, offsets=True)
        ids: list[int] = encoded["input_ids"]
        spans: list[Offset | None] = []
        for start, end in encoded["offset_mapping"]:
            start, end = max(start - len(self._prefix), 0), min(end - len(self._prefix), len(text))
            if start >= end:
                spans.append(None)
                continue
            word = text[start:end].strip()
            if word:  # some tokenizers count the space before a word as part of it
                start = text.index(word, start)
                end = start + len(word)
            spans.append((start + stripped, end + stripped))
        own = [(i, span) for i, span in zip(ids, spans, strict=True) if span is not None]
        self._refuse_control_tokens("prompt", prompt)
        unknown = [prompt[slice(*span)] for i, span in own if i == self._tokenizer.unk_token_id]
        check_words(self.name, prompt, unknown, self._vocabulary)
        return torch.tensor(ids, dtype=torch.long), spans

    def chat(self, messages: list[Message], *, image: bool = False) -> Tensor:
        """See `UnifiedModel`. Raises UsageError for a text with a control token, or an image without user message."""
        if not messages:
            raise UsageError("messages: got none, expected at least one chat turn")
        for message in messages:
            self._refuse_control_tokens("messages", check_text("messages", message["content"]))
        # The templates of converted checkpoints write "System: " before a system message and end-of-text after it. In
        # DeepSeek's code, whose form the models were trained with, it is a text and an empty line before the turns.
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        turns = [
            {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
            for m in (messages if system is None else messages[1:])
        ]
        if image:
            users = [turn for turn in turns if turn["role"] == "user"]
            if not users:
                raise UsageError("messages: an image belongs to a user message, got none")
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
        patches = self.grid[0] * self.grid[1]
        text = text.replace(token, self._tokenizer.boi_token + token * patches + self._tokenizer.eoi_token)
        return torch.tensor(self._encode(text)["input_ids"], dtype=torch.long)

    def tokens(self, value: str | Tensor | Sequence[int]) -> list[str]:
        """See `UnifiedModel`."""
        if isinstance(value, str):
            return list(self._tokenize(self._tokenizer.tokenize, value))
        plain = value.tolist() if isinstance(value, Tensor) else list(value)
        return list(self._tokenize(self._tokenizer.convert_ids_to_tokens, plain))

    def detokenize(self, ids: Tensor | Sequence[int]) -> str:
        """See `UnifiedModel`."""
        plain = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return str(self._tokenize(self._tokenizer.decode, plain, skip_special_tokens=True)).strip()

    def single_token_ids(self, *words: str) -> tuple[int, ...]:
        """Return the ids of the words that are one known token. Raises OspoError if none is."""
        encoded = [self._tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        found = [ids[0] for ids in encoded if len(ids) == 1 and ids[0] != self._tokenizer.unk_token_id]
        if not found:
            raise OspoError(f"model: the tokenizer of {self.name} has no single token for any of {', '.join(words)}")
        return tuple(dict.fromkeys(found))

    # Embeddings

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """See `UnifiedModel`."""
        if not images:
            return torch.empty(0, self.grid[0] * self.grid[1], self.hidden_size, device=self.device, dtype=self.dtype)
        features: Tensor = self._core.get_image_features(self._pixels(images), return_dict=True).pooler_output
        return features

    # Pixels and codes

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> list[Image.Image]:
        """See `UnifiedModel`. Raises UsageError for another grid or codebook, OspoError if one image exceeds memory."""
        tokens = self.grid[0] * self.grid[1]
        if codes.dim() != 2 or codes.shape[1] != tokens:
            raise UsageError(f"codes: got shape {tuple(codes.shape)}, expected (N, {tokens})")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise UsageError(f"codes: got values outside 0…{self.num_codes - 1}, the codebook of {self.name}")
        mean, std = self._image_statistics(self.device)
        codes = codes.to(self.device, torch.long)

        def decode(rows: Tensor) -> list[Image.Image]:
            pixels = self._core.vqmodel.decode(self._fill_pass(rows))[: len(rows)].float().permute(0, 2, 3, 1)
            # Truncated, not rounded, as the processor's postprocess and the official code do.
            levels = ((pixels * std + mean) * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
            return [Image.fromarray(image) for image in levels]

        return [image for _, images in self._vq_limit.run([codes], decode) for image in images]

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """See `UnifiedModel`. Images are resized and padded by the processor."""
        vq = self._core.vqmodel
        # The decoder normalizes the codebook to unit vectors, so the nearest code has the largest cosine.
        # JanusVQVAE.encode compares vectors that are not normalized and finds other codes.
        codebook = nn.functional.normalize(vq.quantize.embedding.weight.float(), dim=-1)

        def encode(part: list[Image.Image]) -> Tensor:
            pixels = self._pixels(part)
            latent = vq.quant_conv(vq.encoder(self._fill_pass(pixels)))[: len(pixels)].float()  # (N, E, H, W)
            nearest: Tensor = (latent.flatten(2).transpose(1, 2) @ codebook.T).argmax(-1)
            return nearest

        empty = torch.empty((0, self.grid[0] * self.grid[1]), dtype=torch.long, device=self.device)
        return torch.cat([empty, *(codes for _, codes in self._vq_limit.run([images], encode))])

    def save(self, path: str | Path) -> None:
        """See `UnifiedModel`. Raises OspoError if the folder cannot be written."""
        self.complete_config()
        try:
            self.module.save_pretrained(str(path))
            self.processor.save_pretrained(str(path))
        except OSError as error:
            raise OspoError(f"model: cannot write to {path} ({error.strerror or error})") from error

    # Helpers

    def _fill_pass(self, rows: Tensor) -> Tensor:
        """Repeat the first row up to the size of a pass of the VQ model.

        Convolutions of another number of images use other kernels, which round differently. In passes of one size an
        image has the same bits at every place and with any neighbors.
        """
        missing = self._vq_limit.max_size - len(rows)
        return torch.cat((rows, rows[:1].expand(missing, *rows.shape[1:]))) if missing > 0 else rows

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

    def _check_image_size(self) -> dict[str, int]:
        """Return the size of the processor's images, which must be that of the model: both allocate it."""
        processing, side = self.processor.image_processor, int(self.module.config.vision_config.image_size)
        size = {name: processing.size[name] for name in ("height", "width")}
        least = getattr(processing, "min_size", 1)
        if size != {"height": side, "width": side} or not 0 <= least <= side:
            raise OspoError(
                f"model: the image processor of {self.name} has the size {size} and min_size {least}, expected "
                f"{side}, the image_size of the vision model, and at most that; use the model's own processor"
            )
        return size

    def _image_statistics(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (3,) of the processor's normalization, in fp32."""
        processing = self.processor.image_processor
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=device)
            for values in (processing.image_mean, processing.image_std)
        )
        return mean, std

    def _encode(self, text: str, *, offsets: bool = False) -> dict[str, Any]:
        bos = self._tokenizer.bos_token
        add_bos = not (bos and text.startswith(bos))
        return dict(
            self._tokenize(
                self._tokenizer,
                text,
                add_special_tokens=add_bos,
                return_offsets_mapping=offsets,
                return_attention_mask=False,
            )
        )

    def _tokenize(self, function: Any, value: Any, **options: Any) -> Any:
        """Call the tokenizer, or a function of it. Raises OspoError where its own expressions take too long."""
        try:
            return function(value, **options)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise OspoError(
                f"model: the tokenizer of {self.name} fails ({short(error)}); use the tokenizer.json of the published "
                "model"
            ) from error

    def _render_chat(self, turns: list[dict[str, Any]]) -> str:
        """Apply the chat template of the checkpoint, which runs in the sandbox of transformers."""
        try:
            text: str = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template can raise any error
            raise OspoError(
                f"model: the chat template of {self.name} cannot be applied ({short(error)}); "
                "use a checkpoint whose template takes such a chat"
            ) from error
        return text

    def _find_control_ids(self) -> frozenset[int]:
        """Return the ids that no user's text may hold. A tokenizer can also have words among its added tokens."""
        added = self._tokenizer.added_tokens_decoder.items()
        marked = [i for i, token in added if token.special or (token.content[:1], token.content[-1:]) == ("<", ">")]
        known = (self.bos_id, self.pad_id, self.boi_id, self.eoi_id, self.image_id, *self.eos_ids)
        return frozenset((*marked, *self._tokenizer.all_special_ids, *known))

    def _refuse_control_tokens(self, argument: str, text: str) -> None:
        encoded = self._tokenize(
            self._tokenizer, text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
        )
        unknown, spelled = self._tokenizer.unk_token_id, str(self._tokenizer.unk_token)
        for i, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # A word that the tokenizer does not know has the id of the token for unknown words, which is a control
            # token only where the text spells it.
            token = text[start:end].strip()
            if i in self._control_ids and (i != unknown or token.casefold() == spelled.casefold()):
                raise UsageError(f"{argument}: {text[:60]!r} holds a control token of the model, {token!r}; remove it")

    def _split_template(self) -> tuple[str, str]:
        """The text before and after the prompt of an image."""
        turns = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
        text = self._render_chat(turns)
        before, found, after = text.partition(_PROBE)
        if not found:
            raise OspoError(f"model: the chat template of {self.name} does not contain the user's text unchanged")
        return before, after + str(self._tokenizer.boi_token)

    def _special_id(self, kind: str) -> int:
        token = getattr(self._tokenizer, kind, None)
        number = None if token is None else self._tokenizer.convert_tokens_to_ids(token)
        if number is None:
            raise OspoError(f"model: the tokenizer of {self.name} has no {kind}, which generation needs")
        return int(number)

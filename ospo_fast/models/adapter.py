"""What the adapters of all families share: prompts, chats, tokens, and passes of the VQ model.

A family says the rest (`docs/families.md`): `layout`, the places of decoder and heads, the texts around a prompt, the
unconditional prompt, and how codes are embedded, decoded and encoded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ospo_fast.config import MODEL_FILES
from ospo_fast.errors import Failure, OspoError, UsageError, attempt, check_text, is_panic
from ospo_fast.models.base import Message, Offset
from ospo_fast.models.control_tokens import ENCODED, find_control_ids, refuse_control_tokens
from ospo_fast.models.layout import ImageLayout, embed_image
from ospo_fast.models.quantized import is_quantized
from ospo_fast.models.vocabulary import check_words, find_vocabulary
from ospo_fast.oom import BatchSizeLimit, short

PROBE = "OSPO PROBE 7"  # stands for the prompt while the chat template is split
# Per pass of the VQ model. On a GPU about 2 GB of activations in bf16; on a CPU larger passes gain little.
_VQ_PIXELS = {"cuda": 16 * 384 * 384, "cpu": 4 * 48 * 48}


def refuse_other_size(name: str, image_size: tuple[int, int] | None, known: Sequence[tuple[int, int]]) -> None:
    """Raise UsageError for an image size that a model does not know."""
    if image_size is not None and tuple(image_size) not in known:
        sizes = ", ".join(f"{height}x{width}" for height, width in known)
        raise UsageError(
            f"image_size: got {image_size[0]}x{image_size[1]}, expected a size that {name} knows: {sizes}; leave it "
            "out for its own"
        )


def refuse_other_multiples(name: str, image_size: tuple[int, int], pixels: int, *, of: str = "a code") -> None:
    """Raise UsageError for an image size that is no multiple of the pixels of a code, or of what counts them."""
    if any(side < pixels or side % pixels for side in image_size):
        raise UsageError(
            f"image_size: got {image_size[0]}x{image_size[1]}, expected multiples of {pixels}, the pixels of {of} of "
            f"{name}"
        )


def checked_id(config: Any, name: str, token: str, number: int) -> int:
    """Return the id of a token. Raises OspoError unless it is that of the vocabulary in config.json, where one is.

    transformers gives a token that the tokenizer lacks, and tokenizer_config.json names, an id of its own.
    """
    known = getattr(config, "vocabulary_map", None) or {}
    expected = known.get(token)
    other = next((name for name, i in known.items() if i == number and name != token), None)
    if (expected is not None and expected != number) or (expected is None and other is not None):
        raise OspoError(
            f"model: the tokenizer of {name} gives {token!r} the id {number}, which config.json gives "
            f"{other!r}; use the tokenizer of the published model"
        )
    return number


def remembered_size(module: Any) -> tuple[int, int] | None:
    """Return the image size (height, width) that a saved copy was made with, None for that of its family."""
    size = getattr(module.config, "generated_size", None)
    if size is None:
        return None
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int for side in size)):
        raise OspoError(
            f"model: generated_size in config.json is {size!r:.60}, expected height and width in pixels; remove "
            "the entry"
        )
    return size[0], size[1]


def check_positions(name: str, tokens: int, text: Any) -> None:
    """Raise OspoError if the tokens of an image leave none of the positions of a decoder for its prompt."""
    if tokens >= int(text.max_position_embeddings):
        raise OspoError(
            f"model: an image of {name} takes {tokens} tokens, expected fewer than its {text.max_position_embeddings} "
            "positions; set a smaller image_size"
        )


def fit_images(
    images: Sequence[Image.Image], size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Scale images to cover (height, width), crop around the center, and normalize → (N, 3, H, W) fp32 on the CPU."""
    pixels = torch.empty(len(images), 3, *size, dtype=torch.float32)
    center, scale = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    for n, image in enumerate(images):
        rgb = image.convert("RGB")
        if rgb.size != size[::-1]:
            rgb = ImageOps.fit(rgb, size[::-1], Image.Resampling.BICUBIC)
        pixels[n] = (torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 255 - center) / scale
    return pixels


class ModuleAdapter(ABC):
    """The members of `UnifiedModel` that need the transformers module alone."""

    decoder_path: ClassVar[str]  # within the module
    head_path: ClassVar[str]
    module: Any
    layout: ImageLayout
    num_codes: int
    hidden_size: int
    max_positions: int
    bos_id: int
    pad_id: int
    boi_id: int

    def __init__(self, module: Any, *, name: str, text: Any) -> None:
        self.name = name
        self.module = module
        self.hidden_size, self.max_positions = int(text.hidden_size), int(text.max_position_embeddings)

    @property
    def grid(self) -> tuple[int, int]:
        """See `UnifiedModel`. It can be set to that of shorter images where an image is one grid of codes alone."""
        return self.layout.grid

    @grid.setter
    def grid(self, grid: tuple[int, int]) -> None:
        if len(self.layout.grids) > 1 or self.layout.structure or self.layout.positions is not None:
            raise OspoError(
                f"model: the grid of {self.name} was set, expected its own; load it with another image_size"
            )
        self.layout = ImageLayout((grid,))

    # Read at every use: they may be replaced in the module, such as by a compiled one.
    @property
    def decoder(self) -> nn.Module:
        """See `UnifiedModel`."""
        found: nn.Module = self.module.get_submodule(self.decoder_path)
        return found

    @decoder.setter
    def decoder(self, module: nn.Module) -> None:
        self.module.set_submodule(self.decoder_path, module)

    @property
    def head(self) -> nn.Module:
        """See `UnifiedModel`."""
        found: nn.Module = self.module.get_submodule(self.head_path)
        return found

    @head.setter
    def head(self, module: nn.Module) -> None:
        self.module.set_submodule(self.head_path, module)

    @property
    @abstractmethod
    def code_embedding(self) -> tuple[nn.Module, ...]:
        """The modules that `embed_codes` runs."""

    @abstractmethod
    def unconditional(self, ids: Tensor) -> Tensor:
        """See `UnifiedModel`."""

    @abstractmethod
    def embed_codes(self, codes: Tensor) -> Tensor:
        """See `UnifiedModel`."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self._embeddings.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        dtype: torch.dtype = self._embeddings.weight.dtype
        return dtype

    def text_logits(self, hidden: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        logits: Tensor = self.module.lm_head(hidden)
        return logits

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        embedded: Tensor = self._embeddings(ids.to(self.device))
        return embedded

    @property
    def _embeddings(self) -> Any:
        return self.decoder.embed_tokens


class Adapter(ModuleAdapter):
    """Adapter of a module and its processor. `UnifiedModel` documents the members.

    A family defines what is abstract here. Its `__init__` sets `layout` and `num_codes`, then calls that of this class.

    Args:
        module: of transformers.
        processor: its tokenizer, chat template and image processor.
        name: as given by the user.
        text: the configuration of the decoder.

    """

    special_tokens: ClassVar[dict[str, str]] = {
        "bos_id": "bos_token",
        "pad_id": "pad_token",
        "boi_id": "boi_token",
        "eoi_id": "eoi_token",
        "image_id": "image_token",
    }
    """Attribute of this class → attribute of the tokenizer that holds the token."""

    bos_id: int
    eoi_id: int
    image_id: int

    def __init__(self, module: Any, processor: Any, *, name: str, text: Any) -> None:
        super().__init__(module, name=name, text=text)
        self.processor = processor
        self._tokenizer = processor.tokenizer
        if not self._tokenizer.is_fast:
            raise OspoError(f"model: {name} has a slow tokenizer, expected a fast one (tokenizer.json)")
        check_positions(name, self.layout.tokens, text)
        self._vocabulary = find_vocabulary(getattr(self._tokenizer, "backend_tokenizer", None))
        config = module.config
        # save_pretrained writes this entry, so a fine-tuned copy gets the templates of its base model.
        self.templates: str = getattr(config, "template_set", None) or (name if name in MODEL_FILES else "janus")
        config.template_set = self.templates
        # peft records this as the base model of an adapter; load_model must accept it.
        module.name_or_path = str(Path(name).resolve()) if Path(name).exists() else name
        for attribute, token in self.special_tokens.items():
            setattr(self, attribute, self._special_id(token))
        eos = getattr(module.generation_config, "eos_token_id", None)
        more = eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
        self.eos_ids = tuple(dict.fromkeys([self._special_id("eos_token"), *map(int, more)]))
        self._control_ids = self._find_control_ids()
        self.yes_ids, self.no_ids = ((), ()) if isinstance(attempt(self.check_chat), Failure) else self._answer_ids()
        self._prefix, self._suffix = self._split_template()
        height, width = self.image_size
        pixels = _VQ_PIXELS.get(self.device.type, _VQ_PIXELS["cuda"])
        batch_size = max(1, min(64, pixels // (height * width)))
        self._vq_limit = BatchSizeLimit(batch_size, "image", "free some, or use a smaller batch_size", fills=True)

    def check_generation(self) -> None:
        """Raise OspoError for a checkpoint of the family that generates no images."""

    def check_chat(self) -> None:
        """Raise OspoError for a checkpoint of the family that does not chat."""

    def check_pixels(self) -> None:
        """Raise OspoError if `decode_codes` lacks what it needs."""

    # What a family says

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width of images in pixels."""

    @abstractmethod
    def _split_template(self) -> tuple[str, str]:
        """The text before and after the prompt of an image."""

    @abstractmethod
    def _chat_text(self, messages: list[Message], image: bool) -> str:
        """The text of a chat. With `image`, the last user message begins with `_image_text`."""

    @abstractmethod
    def _image_text(self) -> str:
        """The text of an image in a chat: its placeholders, and the tokens around them."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """Codes (N, T) → pixels (N, 3, H, W), of which [0, 1] is shown."""

    @abstractmethod
    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels of `_pixels` → codes (N, T)."""

    @abstractmethod
    def _pixels(self, images: list[Image.Image]) -> Tensor:
        """Images → pixels (N, 3, H, W) for the encoder, of this device and dtype."""

    @classmethod
    def load_rest(cls, module: Any, files: list[Path]) -> None:
        """Load tensors of the weight files that the class of transformers has not, into a module on the CPU."""

    def with_module(self, module: Any, *, name: str) -> Adapter:
        """An adapter of another module with the processor, the template set and the image size of this one."""
        module.config.template_set = self.templates
        return type(self)(module, self.processor, name=name, image_size=self.image_size)  # type: ignore[call-arg]

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
        self.check_chat()
        if not messages:
            raise UsageError("messages: got none, expected at least one chat turn")
        for message in messages:
            self._refuse_control_tokens("messages", check_text("messages", message["content"]))
        if image and not any(message["role"] == "user" for message in messages):
            raise UsageError("messages: an image belongs to a user message, got none")
        return torch.tensor(self._encode(self._chat_text(messages, image))["input_ids"], dtype=torch.long)

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

    def _answer_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The spellings of yes and of no."""
        return self.single_token_ids("yes", "Yes"), self.single_token_ids("no", "No")

    # Pixels and codes

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """See `UnifiedModel`: the image as it would be generated."""
        return embed_image(self, self.encode_images(images))

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> list[Image.Image]:
        """See `UnifiedModel`. Raises UsageError for another grid or codebook, OspoError if one image exceeds memory."""
        tokens = self.layout.codes
        if codes.dim() != 2 or codes.shape[1] != tokens:
            raise UsageError(f"codes: got shape {tuple(codes.shape)}, expected (N, {tokens})")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise UsageError(f"codes: got values outside 0…{self.num_codes - 1}, the codebook of {self.name}")
        codes = codes.to(self.device, torch.long)

        def decode(rows: Tensor) -> list[Image.Image]:
            pixels = self._decode(self._fill_pass(rows))[: len(rows)].float().permute(0, 2, 3, 1)
            # Truncated, not rounded, as Janus' processor and its official code do.
            levels = (pixels * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
            return [Image.fromarray(image) for image in levels]

        return [image for _, images in self._vq_limit.run([codes], decode) for image in images]

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """See `UnifiedModel`. Images are resized to the size of the model."""

        def encode(part: list[Image.Image]) -> Tensor:
            return self._encode_pixels(self._fill_pass(self._pixels(part)))[: len(part)]

        empty = torch.empty((0, self.layout.codes), dtype=torch.long, device=self.device)
        return torch.cat([empty, *(codes for _, codes in self._vq_limit.run([images], encode))])

    def save(self, path: str | Path) -> None:
        """See `UnifiedModel`. Raises OspoError if the folder cannot be written, UsageError for a quantized model."""
        if is_quantized(self.module):
            raise UsageError(
                f"save: {self.name} was loaded with quantize, expected whole weights; load it without, and save that"
            )
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

    def complete_config(self) -> None:
        """Store in the configurations what a saved copy needs."""

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

    def _render_image_chat(self, messages: list[Message], image: bool) -> str:
        """Apply the chat template; with `image`, the last user message begins with `_image_text`."""
        turns = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        if image:
            [turn for turn in turns if turn["role"] == "user"][-1]["content"].insert(0, {"type": "image"})
        text, token = self._render_chat(turns), str(self._tokenizer.image_token)
        if text.count(token) != int(image):
            raise UsageError(f"messages: the text holds the image token {token!r}; remove it")
        return text.replace(token, self._image_text()) if image else text

    def _render_chat(self, turns: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Apply the chat template of the checkpoint, which runs in the sandbox of transformers."""
        try:
            text: str = self.processor.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template can raise any error
            raise OspoError(
                f"model: the chat template of {self.name} cannot be applied ({short(error)}); "
                "use a checkpoint whose template takes such a chat"
            ) from error
        return text

    def _find_control_ids(self) -> frozenset[int]:
        """Return the ids that no user's text may hold."""
        known = (self.bos_id, self.pad_id, self.boi_id, self.eoi_id, self.image_id, *self.eos_ids)
        return find_control_ids(self._tokenizer, known)

    def _refuse_control_tokens(self, argument: str, text: str) -> None:
        encoded = self._tokenize(self._tokenizer, text, **ENCODED)
        refuse_control_tokens(argument, text, self._tokenizer, encoded, self._control_ids)

    def _special_id(self, kind: str) -> int:
        token = self._special_token(kind)
        number = None if token is None else self._tokenizer.convert_tokens_to_ids(token)
        if number is None or (number == self._tokenizer.unk_token_id and token != self._tokenizer.unk_token):
            raise OspoError(
                f"model: the tokenizer of {self.name} has no {kind}, which generation needs; use the tokenizer of the "
                "published model"
            )
        return checked_id(self.module.config, self.name, str(token), int(number))

    def _special_token(self, kind: str) -> str | None:
        return getattr(self._tokenizer, kind, None)


def _rows_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer of this weight and bias: parameters, or rows of parameters, which get their gradients."""
    head = nn.Linear(1, 1, bias=False)
    if not isinstance(weight, nn.Parameter):
        del head.weight, head.bias
    head.weight, head.bias = weight, bias  # type: ignore[assignment]
    head.in_features, head.out_features = weight.shape[1], weight.shape[0]
    return head.eval()


# Of configurations: what forward passes of transformers do to the logits behind lm_head.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class ImagesOnly:
    """Members of the adapter of a family that only generates images. To be named before the other base class."""

    name: str

    def check_chat(self) -> None:
        """Raise OspoError."""
        raise OspoError(
            f"model: {self.name} only generates images, expected a model that chats; name a vision-language model in "
            "prompts.model, perturb.model, questions.model and score.model"
        )

    def _chat_text(self, messages: list[Message], image: bool) -> str:
        self.check_chat()
        return ""

    def _image_text(self) -> str:
        self.check_chat()
        return ""


class VocabularyAdapter(Adapter):
    """A family whose image codes are ids of the vocabulary of the decoder. Their head is rows of `lm_head`.

    Args:
        module, processor, name, text: see `Adapter`.
        code_ids: code → id, of every code.
        num_codes: K.

    """

    head_path = "lm_head"

    def __init__(
        self, module: Any, processor: Any, *, name: str, text: Any, code_ids: Mapping[int, int], num_codes: int
    ) -> None:
        missing = [code for code in range(num_codes) if code not in code_ids]
        if missing or len(code_ids) != num_codes:
            raise OspoError(
                f"model: the vocabulary of {name} has ids for {len(code_ids)} codes, expected the {num_codes} of its "
                "VQ model; use the config.json of the published model"
            )
        if len(set(code_ids.values())) != num_codes:
            raise OspoError(
                f"model: the vocabulary of {name} has one id for several codes, expected {num_codes} different ones; "
                "use the config.json of the published model"
            )
        self.num_codes = num_codes
        self.code_ids = torch.tensor([code_ids[code] for code in range(num_codes)])
        rows = len(module.lm_head.weight)
        if int(self.code_ids.min()) < 0 or int(self.code_ids.max()) >= rows:
            raise OspoError(
                f"model: ids of codes of {name} are up to {int(self.code_ids.max())}, expected at most {rows - 1}, the "
                "last row of its lm_head; use the config.json of the published model"
            )
        for key in _LOGIT_CHANGES:
            if (value := getattr(text, key, None)) not in (None, 1):
                raise OspoError(
                    f"model: {key} of {name} is {value!r:.60}, expected none: logits are those of lm_head as they are; "
                    "use a model without it, or an adapter whose head applies it"
                )
        first = int(self.code_ids[0])
        self._slice = None
        if torch.equal(self.code_ids, torch.arange(first, first + num_codes)):
            self._slice = slice(first, first + num_codes)
        self._head: tuple[tuple[Any, ...], nn.Linear] | None = None
        super().__init__(module, processor, name=name, text=text)
        self._code_ids = self.code_ids.to(self.device)
        named = (self.bos_id, self.pad_id, self.boi_id, self.eoi_id, self.image_id, *self.eos_ids)
        own = {*named, *(token for _, token in self.layout.structure)}
        if taken := sorted(own.intersection(self.code_ids.tolist())):
            raise OspoError(
                f"model: the tokenizer of {name} gives {self._tokenizer.convert_ids_to_tokens(taken[0])!r} the id "
                f"{taken[0]}, which is an image code of the model; use the tokenizer of the published model"
            )

    @staticmethod
    def vocabulary_id(processor: Any, token: str | None, name: str, config: Any = None) -> int:
        """Return the id of a structure token.

        Raises OspoError if the tokenizer lacks it, splits it in a text, or has it at another id than `config` says.
        """
        tokenizer = processor.tokenizer
        number = None if token is None else tokenizer.convert_tokens_to_ids(token)
        if number is None or number == tokenizer.unk_token_id:
            raise OspoError(
                f"model: the tokenizer of {name} has no token {token!r}, which its images need; use the "
                "tokenizer of the published model"
            )
        if list(tokenizer(token, add_special_tokens=False)["input_ids"]) != [number]:
            raise OspoError(
                f"model: the tokenizer of {name} splits {token!r} in a text, expected one token; use the tokenizer of "
                "the published model"
            )
        return checked_id(config, name, str(token), int(number))

    @property  # type: ignore[misc] # without the setter of the base class: the rows have no module of their own
    def head(self) -> nn.Module:
        """The rows of `lm_head` for the codes, in their order: its own memory where the ids follow one another."""
        full = self.module.lm_head
        attributes = vars(full)
        hooked = attributes.get("_forward_hooks") or attributes.get("_forward_pre_hooks") or "forward" in attributes
        if type(full) is not nn.Linear or hooked:
            raise OspoError(
                f"model: lm_head of {self.name} is a {type(full).__name__}{' with hooks' if hooked else ''}, expected "
                "a plain nn.Linear, whose rows of the image codes are read; leave it as it was loaded"
            )
        weight, bias = full.weight, full.bias
        rows: Any = self._slice or self._code_ids.to(weight.device)
        if torch.is_grad_enabled() and weight.requires_grad:
            return _rows_of(weight[rows], None if bias is None else bias[rows])
        key = (id(full), weight.data_ptr(), weight.dtype, weight.device)
        if self._head is None or self._head[0] != key:
            head = _rows_of(
                nn.Parameter(weight.detach()[rows], requires_grad=False),
                None if bias is None else nn.Parameter(bias.detach()[rows], requires_grad=False),
            )
            self._head = key, head
        elif not self._slice:  # copies, of weights that may have changed
            head = self._head[1]
            head.weight.data.copy_(weight.detach()[rows])
            if bias is not None:
                head.bias.data.copy_(bias.detach()[rows])
        return self._head[1]

    @property
    def code_embedding(self) -> tuple[nn.Module, ...]:
        """The modules that `embed_codes` runs."""
        return (self._embeddings,)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """See `UnifiedModel`. A code that is none fails, as an id that is none."""
        ids = nn.functional.embedding(codes.to(self._code_ids.device), self._code_ids[:, None])
        return self.embed_tokens(ids[..., 0])

    def _embed_rows(self, images: list[Image.Image], end_of_row: int) -> Tensor:
        """Images → embeddings (N, H · (W + 1), D) of their codes, with a structure token behind every row."""
        codes = self.encode_images(images)
        rows = self._code_ids[codes].view(len(codes), *self.grid)
        return self.embed_tokens(torch.cat([rows, rows.new_full((*rows.shape[:2], 1), end_of_row)], -1).flatten(1))

    def _answer_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # Byte-level tokenizers write the space before a word into its token.
        return self.single_token_ids("yes", "Yes", " yes", " Yes"), self.single_token_ids("no", "No", " no", " No")

    def _find_control_ids(self) -> frozenset[int]:
        return super()._find_control_ids() | frozenset(self.code_ids.tolist())

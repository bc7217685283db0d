"""Chat models: language models of transformers behind their chat template, with or without image input.

They do what a unified model does with texts, and generate no images. torch and transformers are imported when one is
opened.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.config import MODEL_FILES
from ospo_fast.errors import Failure, OspoError, UsageError, attempt, check_text
from ospo_fast.files import reason
from ospo_fast.models import find_model, folder_checks, hub_config, load_model, loading, resolve_placement
from ospo_fast.models.base import Message, UnifiedModel
from ospo_fast.models.control_tokens import ENCODED, find_control_ids, refuse_control_tokens
from ospo_fast.models.deepseek_config import is_deepseek
from ospo_fast.models.families import FAMILIES
from ospo_fast.models.trainer_files import is_trainer_file
from ospo_fast.work import count

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

_IMAGE_KEYS = ("vision", "image", "vq_config")  # in the keys of a configuration whose model takes images
_EXAMPLE = "such as Qwen/Qwen3-VL-8B-Instruct"
_REMEDY = f"name a chat model of transformers, {_EXAMPLE}"
_VISION_REMEDY = f"name a vision-language model of transformers, {_EXAMPLE}"
_PROBES = "OSPO PROBE 7", "OSPO PROBE 8"  # texts that show what a chat template keeps
_ENDLESS = 2**62  # positions of a model whose configuration names no limit


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Name the setting or option that a model comes from in the errors of the block about it."""
    try:
        yield
    except OspoError as error:
        text = str(error)
        if option == "model" or not text.startswith("model: "):
            raise
        raise type(error)(f"{option}: {text.removeprefix('model: ')}") from error


def is_unified(name: str, option: str = "model", *, images: bool = True) -> bool:
    """Return whether a model is a unified model of this package, before torch is imported.

    Raises OspoError, which names `option`, for one that cannot be found or, with `images`, takes no images.
    """
    with naming(option):
        folder = Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser raises for unknown users)
        if name in MODEL_FILES or (folder / "adapter_config.json").is_file() or is_trainer_file(folder):
            find_model(name)
            return True
        if os.path.isdir(folder):  # noqa: PTH112 (Path.is_dir raises for long names)
            path = folder / "config.json"
            folder_checks.refuse_pipes(folder)
        else:
            find_model(name)  # refuses what is no name on the hub
            path = hub_config(name)
        config = folder_checks.read_json(path)
        if is_deepseek(config) or config.get("model_type") in FAMILIES:
            folder_checks.check_kind(config, name)
            family = FAMILIES.get(config["model_type"])
            if family is not None and not family.chats_as(config, name):
                raise OspoError(f"model: {name} only generates images, expected a model that chats; {_VISION_REMEDY}")
            find_model(name)
            return True
        if images and not any(mark in key for key in config for mark in _IMAGE_KEYS):
            raise OspoError(
                f"model: {name} is a {config.get('model_type')!r:.60} model without an image input (config.json has no "
                f"vision_config); {_VISION_REMEDY}"
            )
        if os.path.isdir(folder):  # noqa: PTH112
            folder_checks.refuse_code(folder)
            folder_checks.weight_files(folder)
        return False


def check_model(name: str, option: str, *, images: bool) -> None:
    """Raise OspoError for a model that `open_text_model` refuses, as far as that is known without its weights."""
    if not is_unified(name, option, images=images):
        ChatModel(name, option=option, images=images)


def open_text_model(
    name: str,
    option: str,
    *,
    device: str | torch.device | None,
    dtype: str | None,
    images: bool = True,
    image_size: tuple[int, int] | None = None,
    quantize: str | None = None,
) -> TextModel:
    """Load a unified model, or of a chat model its processor; that loads its weights when they are used.

    Args:
        name: a unified model, see `load_model`, or any language model of transformers with a chat template.
        option: the setting or option that names it, for errors.
        device: see `load_model`.
        dtype: see `load_model`.
        images: it is asked about images, and has to take them.
        image_size: of a unified model, see `load_model`.
        quantize: of a unified model, see `load_model`.

    """
    if is_unified(name, option, images=images):
        with naming(option):
            model = load_model(name, device=device, dtype=dtype, image_size=image_size, quantize=quantize)
            model.check_chat()
            return model
    return ChatModel(name, option=option, device=device, dtype=dtype, images=images)


class ChatModel:
    """A language model of transformers with a chat template. The weights are loaded when they are used first.

    Arguments: see `open_text_model`. Raises OspoError, which names the option, for a model that writes no texts, has no
    chat template or, with `images`, takes none.
    """

    templates = "janus"  # the default template set, see `UnifiedModel`

    def __init__(
        self,
        name: str,
        *,
        option: str = "model",
        device: str | torch.device | None = None,
        dtype: str | None = None,
        images: bool = True,
    ) -> None:
        self.name, self.option = name, option
        self._source = os.path.expanduser(name)  # noqa: PTH111
        self._remedy = _VISION_REMEDY if images else _REMEDY
        self._module: Any = None
        with naming(option):
            self.device, self.dtype = resolve_placement(device, dtype)
            self._model_class, self.max_positions = self._find_class(images)
            self._processor = self._open_processor(images)
            tokenizer = getattr(self._processor, "tokenizer", None if images else self._processor)
            if tokenizer is None or (images and getattr(self._processor, "image_processor", None) is None):
                raise OspoError(f"model: {name} has no processor of texts and images; {self._remedy}")
            if not getattr(tokenizer, "is_fast", False):
                raise OspoError(f"model: {name} has no fast tokenizer (tokenizer.json); {self._remedy}")
            folder_checks.check_token_ids(self._source, tokenizer, known=False)
            self._tokenizer: Any = tokenizer
            self._control_ids = find_control_ids(tokenizer)
            whole = images or getattr(self._processor, "chat_template", None)
            self._renderer: Any = self._processor if whole else tokenizer
            user = {"role": "user", "content": _PROBES[0]}
            if _PROBES[0] not in self._render([user], image=images):
                raise OspoError(f"model: the chat template of {name} does not keep the user's text; {self._remedy}")
            found = attempt(self._render, [{"role": "system", "content": _PROBES[1]}, user], image=images)
            self._takes_system = not isinstance(found, Failure) and _PROBES[1] in found
            if images:
                self.yes_ids, self.no_ids = self.token_ids("yes", "Yes"), self.token_ids("no", "No")

    def prompt(self, messages: Sequence[Message], *, image: bool = False) -> str:
        """Return the text of a chat, ready to generate the next assistant turn.

        With `image`, the template's mark of an image is put before the text of the last user message. Where the
        template takes no system turn, its text comes before that of the first user turn.

        Raises:
            UsageError: a text with a control token, or no message.
            OspoError: the template takes no such chat.

        """
        if not messages:
            raise UsageError("messages: got none, expected at least one chat turn")
        for message in messages:
            text = check_text("messages", message["content"])
            encoded = self._tokenizer(text, **ENCODED)
            refuse_control_tokens("messages", text, self._tokenizer, encoded, self._control_ids)
        if messages[0]["role"] == "system" and not self._takes_system:
            messages = _without_system(messages)
        return self._render(messages, image=image)

    def chat(self, messages: Sequence[Message], *, image: bool = False) -> Tensor:
        """Return the ids (S,) of `prompt` on the CPU. An image counts as one token: its size is not known here."""
        import torch

        text = self.prompt(messages, image=image)
        encoded = self._tokenizer(text, return_attention_mask=False, **self._special(text))
        return torch.tensor(encoded["input_ids"], dtype=torch.long)

    def detokenize(self, ids: Tensor) -> str:
        """Return the text of ids (S,), without special tokens."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()

    def token_ids(self, *words: str) -> tuple[int, ...]:
        """Return the ids of the words that are one known token, with or without a space before them.

        Raises OspoError if none is.
        """
        encoded = [self._tokenizer.encode(space + w, add_special_tokens=False) for w in words for space in ("", " ")]
        found = [ids[0] for ids in encoded if len(ids) == 1 and ids[0] != self._tokenizer.unk_token_id]
        if not found:
            raise OspoError(
                f"{self.option}: the tokenizer of {self.name} has no single token for the answer {words[0]!r}, whose "
                "probability is asked for; name another model"
            )
        return tuple(dict.fromkeys(found))

    def encode(self, image: Image, messages: Sequence[Message]) -> Any:
        """Return what the module takes of a question about an image: a batch of one, on the device.

        Raises:
            UsageError: see `prompt`.
            OspoError: the processor does not take the image, or the model has too few positions.

        """
        text = self.prompt(messages, image=True)
        with naming(self.option), loading(f"{self.name} does not take this image", self._remedy):
            inputs = self._processor(images=[image], text=[text], return_tensors="pt", **self._special(text))
            length = int(inputs["input_ids"].shape[1])
            if length > self.max_positions:
                raise OspoError(
                    f"model: image and question have {length} tokens, at most {self.max_positions} fit {self.name}; "
                    "use smaller images or shorter questions"
                )
            return inputs.to(self.device, self.dtype)  # converts floating-point inputs alone

    def answer(self, inputs: Any, answers: Sequence[Sequence[int]]) -> list[float]:
        """Return the probability of each answer, given by the ids of its spellings, to what `encode` returned.

        It is the sum over the spellings in the distribution of the next token. Raises OspoError.
        """
        import torch

        module = self.load()
        with naming(self.option), loading(f"{self.name} cannot answer", self._remedy), torch.inference_mode():
            probs = module(**inputs).logits[0, -1].float().softmax(-1)
            count(tokens=int(inputs["input_ids"].shape[1]))
            return [float(probs[list(ids)].sum().clamp(max=1.0)) for ids in answers]  # a sum can round to more

    def load(self) -> Any:
        """Return the transformers model, loaded at the first call."""
        if self._module is None:
            with naming(self.option), loading(f"{self.name} cannot be loaded", self._remedy):
                module, info = self._model_class.from_pretrained(
                    self._source,
                    dtype=self.dtype,
                    output_loading_info=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
                folder_checks.refuse_missing(info["missing_keys"], self.name, self._remedy)
                folder_checks.refuse_unknown(info["unexpected_keys"], module, self.name, self._remedy)
                self._module = module.to(self.device).eval()
        return self._module

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: those of the model's generation settings and of the tokenizer."""
        eos = getattr(self.load().generation_config, "eos_token_id", None)
        more = eos if isinstance(eos, (list, tuple)) else [eos]
        return tuple(dict.fromkeys(int(i) for i in (*more, self._tokenizer.eos_token_id) if i is not None))

    def _find_class(self, images: bool) -> tuple[Any, int]:
        """Return the class of transformers that loads the model, and the number of its positions."""
        import transformers

        with loading(f"the configuration of {self.name} cannot be loaded", self._remedy):
            found = transformers.AutoConfig.from_pretrained(self._source, trust_remote_code=False)
            text = found.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None)
        positions = positions if isinstance(positions, int) and positions > 0 else _ENDLESS
        if type(found) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return transformers.AutoModelForImageTextToText, positions
        if not images and type(found) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            return transformers.AutoModelForCausalLM, positions
        raise OspoError(f"model: {self.name} is a {found.model_type!r} model, which writes no answers; {self._remedy}")

    def _open_processor(self, images: bool) -> Any:
        from transformers import AutoProcessor, AutoTokenizer

        with loading(f"the processor of {self.name} cannot be loaded", self._remedy):
            try:
                return AutoProcessor.from_pretrained(self._source, trust_remote_code=False)
            except ImportError as error:  # processors of some models need further packages, for images
                if not images:
                    return AutoTokenizer.from_pretrained(self._source, trust_remote_code=False)
                raise OspoError(
                    f"model: {self.name} needs a package that is not installed ({reason(error)[:120]}); install it, or "
                    f"{self._remedy}"
                ) from error

    def _render(self, messages: Sequence[Message], *, image: bool) -> str:
        turns = [dict(message) for message in messages]
        if self._renderer is not self._tokenizer:  # templates of tokenizers take plain texts
            for turn in turns:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        if image:
            users = [turn for turn in turns if turn["role"] == "user"]
            if not users:
                raise UsageError("messages: an image belongs to a user message, got none")
            users[-1]["content"].insert(0, {"type": "image"})
        with loading(f"{self.name} takes no chat{' with an image' if image else ' of this form'}", self._remedy):
            return str(self._renderer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _special(self, text: str) -> dict[str, bool]:
        """Return the options of the tokenizer for a rendered chat, some of which begin with special tokens already."""
        bos = self._tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


TextModel = UnifiedModel | ChatModel
"""What runs the text stages."""


def _without_system(messages: Sequence[Message]) -> list[Message]:
    system, *rest = messages
    first = next((n for n, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        return [{**system, "role": "user"}, *rest]
    rest[first] = {**rest[first], "content": f"{system['content']}\n\n{rest[first]['content']}"}
    return rest

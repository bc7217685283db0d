"""Judges: models that answer questions about images, with the probabilities of their answers."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ospo_fast.config import Config
from ospo_fast.errors import Failure, OspoError, UsageError, attempt
from ospo_fast.evaluation.questions import Question
from ospo_fast.files import reason
from ospo_fast.models import find_model, folder_checks, hub_config, load_model, loading
from ospo_fast.models.trainer_files import is_trainer_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ospo_fast.models.adapter import Adapter

SELF = "self"
MAX_CHATS = 10_000
OPEN_QUESTION = "{} Answer in one word."
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_IMAGE_KEYS = ("vision", "image", "vq_config")  # in the keys of a configuration whose model takes images
_REMEDY = "name a vision-language model of transformers, such as Qwen/Qwen3-VL-8B-Instruct"

Verdict = dict[str, float]
"""{"p_yes", "p_no", "p_expected"}: probabilities of the answers yes and no, and of the expected answer."""


class Judge(Protocol):
    """A model that answers questions about images."""

    name: str

    def check(self, questions: Sequence[Question]) -> None:
        """Raise UsageError or OspoError for questions that it cannot be asked, or answers that it cannot give."""

    def answer(
        self, images: Sequence[Image], questions: Sequence[Sequence[Question]], *, progress: bool = False
    ) -> list[list[Verdict]]:
        """Answer the questions about each image. Raises OspoError if a probability is not finite."""


def spellings(answer: str) -> tuple[str, ...]:
    """Return how a model may write an answer of one word: lower case, capitalized, and a number as a digit."""
    words = [answer, answer.lower(), answer.capitalize()]
    if answer.lower() in _NUMBERS:
        words.append(str(_NUMBERS.index(answer.lower())))
    return tuple(dict.fromkeys(words))


def asked_text(question: Question) -> str:
    """Return how a unified model is asked, within its template for yes/no questions."""
    return question.text if question.answer in ("yes", "no") else OPEN_QUESTION.format(question.text)


def is_unified(name: str) -> bool:
    """Return whether a judge is a unified model of this package, before torch is imported.

    Raises OspoError for a judge that cannot be found, or takes no images.
    """
    folder = Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser raises for unknown users)
    if name == "shapes" or (folder / "adapter_config.json").is_file() or is_trainer_file(folder):
        find_model(name)
        return True
    if os.path.isdir(folder):  # noqa: PTH112 (Path.is_dir raises for long names)
        path = folder / "config.json"
        folder_checks.refuse_pipes(folder)
    else:
        find_model(name)  # refuses what is no name on the hub
        path = hub_config(name)
    config = folder_checks.read_json(path)
    if config.get("model_type") in ("janus", "multi_modality"):
        find_model(name)
        return True
    if not any(mark in key for key in config for mark in _IMAGE_KEYS):
        raise OspoError(
            f"--judge: {name} is a {config.get('model_type')!r:.60} model without an image input (config.json has no "
            f"vision_config); {_REMEDY}"
        )
    if os.path.isdir(folder):  # noqa: PTH112
        folder_checks.refuse_code(folder)
        folder_checks.weight_files(folder)
    return False


@contextlib.contextmanager
def naming_option() -> Iterator[None]:
    """Name --judge in the errors of the block about a model."""
    try:
        yield
    except OspoError as error:
        text = str(error)
        raise type(error)(f"--judge: {text.removeprefix('model: ')}" if text.startswith("model: ") else text) from error


def open_judge(name: str, config: Config) -> Judge:
    """Load a judge: a unified model, or of another model its processor; that loads its weights at the first answer."""
    if not is_unified(name):
        return VisionJudge(name, config)
    return UnifiedJudge(load_model(name, device=config.device, dtype=config.dtype), config)


class UnifiedJudge:
    """A unified model, asked as by the stage `score`: the probability of an answer is that of its likeliest spelling.

    Questions with another answer than yes or no are asked for one word.
    """

    def __init__(self, model: Adapter, config: Config) -> None:
        from ospo_fast.stages.text_sampling import load_model_templates

        self.name, self.model, self._batch_size = model.name, model, config.score.batch_size
        self._templates = load_model_templates(model, config)
        self._chats: dict[str, Tensor | Failure] = {}

    def check(self, questions: Sequence[Question]) -> None:
        """See `Judge`."""
        if len(self._chats) > MAX_CHATS:  # of a server that runs for days
            self._chats.clear()
        for question in dict.fromkeys(questions):
            text = asked_text(question)
            # An image prompt has no unknown words and no control tokens either.
            for found in (attempt(self.model.image_prompt, text), self._chat(text)):
                if isinstance(found, Failure):
                    raise UsageError(
                        f"questions: {question.text[:60]!r} cannot be asked of {self.name}: {found.reason.rstrip('.')}."
                    )
            self._ids(question.answer)

    def answer(
        self, images: Sequence[Image], questions: Sequence[Sequence[Question]], *, progress: bool = False
    ) -> list[list[Verdict]]:
        """See `Judge`."""
        from ospo_fast.generation import answer_questions

        rows = answer_questions(
            self.model,
            images,
            [[asked_text(question) for question in asked] for asked in questions],
            template=self._chat,  # type: ignore[arg-type] # `check` refuses failures
            expected=[[self._ids(question.answer) for question in asked] for asked in questions],
            batch_size=self._batch_size,
            progress=progress,
        )
        return [[_finite({k: row[k] for k in _KEYS}, self.name) for row in asked] for asked in rows]

    def _chat(self, text: str) -> Tensor | Failure:
        from ospo_fast.stages.text_sampling import chat_ids

        if text not in self._chats:
            self._chats[text] = chat_ids(self.model, self._templates, "vqa", {"question": text}, image=True)
        return self._chats[text]

    def _ids(self, answer: str) -> tuple[int, ...]:
        return self.model.single_token_ids(*spellings(answer))


_KEYS = ("p_yes", "p_no", "p_expected")


class VisionJudge:
    """A vision-language model of transformers, asked one question of one image at a time.

    The chat has the image and then the question, "… Answer in one word." as in the evaluation of GenEval 2. The
    probability of an answer is the sum over its spellings that are one token, with or without a space before it, in the
    distribution of the next token.
    """

    def __init__(self, name: str, config: Config) -> None:
        from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoProcessor

        self.name, self._config, self._model = name, config, None
        self._source = os.path.expanduser(name)  # noqa: PTH111
        with loading(f"the processor of the judge {name} cannot be loaded", _REMEDY), _package_named(name):
            found = AutoConfig.from_pretrained(self._source, trust_remote_code=False)
            if type(found) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
                raise OspoError(f"--judge: {name} is a {found.model_type!r} model, which writes no answers; {_REMEDY}")
            self._processor: Any = AutoProcessor.from_pretrained(self._source, trust_remote_code=False)
        self._tokenizer: Any = getattr(self._processor, "tokenizer", None)
        if self._tokenizer is None or getattr(self._processor, "image_processor", None) is None:
            raise OspoError(f"--judge: {name} has no processor of texts and images; {_REMEDY}")
        self._ids: dict[str, tuple[int, ...]] = {}

    def check(self, questions: Sequence[Question]) -> None:
        """See `Judge`."""
        for answer in dict.fromkeys(("yes", "no", *(question.answer for question in questions))):
            self._answer_ids(answer)
        self._prompt(questions[0].text)

    def answer(
        self, images: Sequence[Image], questions: Sequence[Sequence[Question]], *, progress: bool = False
    ) -> list[list[Verdict]]:
        """See `Judge`."""
        from tqdm.auto import tqdm

        total = sum(map(len, questions))
        with tqdm(total=total, unit="question", delay=2, disable=not progress) as bar:
            answers = []
            for image, asked in zip(images, questions, strict=True):
                answers.append([self._ask(image, question) for question in asked])
                bar.update(len(asked))
        return answers

    def _ask(self, image: Image, question: Question) -> Verdict:
        import torch

        model = self._load()
        with loading(f"the judge {self.name} cannot answer {question.text[:60]!r}", _REMEDY), torch.inference_mode():
            inputs = self._processor(images=[image], text=[self._prompt(question.text)], return_tensors="pt")
            inputs = inputs.to(model.device, model.dtype)  # converts floating-point inputs alone
            probs = model(**inputs).logits[0, -1].float().softmax(-1)
            answers = dict(zip(_KEYS, ("yes", "no", question.answer), strict=True))
            return _finite(
                {key: float(probs[list(self._answer_ids(a))].sum()) for key, a in answers.items()}, self.name
            )

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": OPEN_QUESTION.format(question)}]
        with loading(f"the judge {self.name} takes no chat with an image", _REMEDY):
            return str(
                self._processor.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
                )
            )

    def _answer_ids(self, answer: str) -> tuple[int, ...]:
        if answer not in self._ids:
            words = [space + word for word in spellings(answer) for space in ("", " ")]
            encoded = [self._tokenizer.encode(word, add_special_tokens=False) for word in words]
            found = [ids[0] for ids in encoded if len(ids) == 1 and ids[0] != self._tokenizer.unk_token_id]
            if not found:
                raise OspoError(
                    f"--judge: the tokenizer of {self.name} has no single token for the answer {answer!r}, whose "
                    "probability is asked for; name another judge"
                )
            self._ids[answer] = tuple(dict.fromkeys(found))
        return self._ids[answer]

    def _load(self) -> Any:
        if self._model is None:
            from transformers import AutoModelForImageTextToText

            from ospo_fast.models import resolve_placement

            device, dtype = resolve_placement(self._config.device, self._config.dtype)
            with loading(f"the judge {self.name} cannot be loaded", _REMEDY):
                module, info = AutoModelForImageTextToText.from_pretrained(
                    self._source,
                    dtype=dtype,
                    output_loading_info=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
                folder_checks.refuse_missing(info["missing_keys"], self.name, _REMEDY)
                self._model = module.to(device).eval()
        return self._model


@contextlib.contextmanager
def _package_named(name: str) -> Iterator[None]:
    """Turn an ImportError of transformers, whose processors of some models need further packages, into an OspoError."""
    try:
        yield
    except ImportError as error:
        raise OspoError(
            f"--judge: {name} needs a package that is not installed ({reason(error)[:120]}); install it, or {_REMEDY}"
        ) from error


def _finite(verdict: Verdict, name: str) -> Verdict:
    if not all(map(math.isfinite, verdict.values())):
        raise OspoError(f"The answers of the judge {name} are not finite; check its weights, or use dtype=float32.")
    return {key: min(1.0, p) for key, p in verdict.items()}  # a sum can round to more

"""Judges: models that answer questions about images, with the probabilities of their answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from ospo_fast.config import Config, image_size
from ospo_fast.errors import Failure, OspoError, UsageError, attempt
from ospo_fast.evaluation.questions import Question
from ospo_fast.models.base import Message
from ospo_fast.models.chat import ChatModel, open_text_model

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ospo_fast.models.adapter import Adapter

SELF = "self"
MAX_CHATS = 10_000
OPEN_QUESTION = "{} Answer in one word."
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

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


def open_judge(name: str, config: Config, option: str = "--judge") -> Judge:
    """Load a judge: a unified model, or of another model its processor; that loads its weights at the first answer.

    Raises OspoError, which names `option`, for a model that cannot be found or cannot answer.
    """
    own = name == config.model
    model = open_text_model(
        name,
        option,
        device=config.device,
        dtype=config.dtype,
        image_size=image_size(config) if own else None,  # another model has its own
        # Another judge keeps whole weights: it should judge the images of all models in the same way.
        quantize=config.quantize if own else None,
    )
    if isinstance(model, ChatModel):
        return VisionJudge(model)
    return UnifiedJudge(cast("Adapter", model), config)


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

    def __init__(self, model: ChatModel) -> None:
        self.name, self.model = model.name, model
        self._ids: dict[str, tuple[int, ...]] = {}

    def check(self, questions: Sequence[Question]) -> None:
        """See `Judge`."""
        for answer in dict.fromkeys(question.answer for question in questions):
            self._answer_ids(answer)
        for text in dict.fromkeys(question.text for question in questions):
            if isinstance(found := attempt(self.model.prompt, _messages(text), image=True), Failure):
                raise UsageError(
                    f"questions: {text[:60]!r} cannot be asked of {self.name}: {found.reason.rstrip('.')}."
                )

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
        wanted = [self.model.yes_ids, self.model.no_ids, self._answer_ids(question.answer)]
        found = self.model.answer(self.model.encode(image, _messages(question.text)), wanted)
        return _finite(dict(zip(_KEYS, found, strict=True)), self.name)

    def _answer_ids(self, answer: str) -> tuple[int, ...]:
        if answer not in self._ids:
            self._ids[answer] = self.model.token_ids(*spellings(answer))
        return self._ids[answer]


def _messages(question: str) -> list[Message]:
    return [{"role": "user", "content": OPEN_QUESTION.format(question)}]


def _finite(verdict: Verdict, name: str) -> Verdict:
    if not all(map(math.isfinite, verdict.values())):
        raise OspoError(f"The answers of the judge {name} are not finite; check its weights, or use dtype=float32.")
    return verdict

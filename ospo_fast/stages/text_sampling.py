"""Sampling of texts from the chat templates of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ospo_fast.config import Config, TextConfig, model_family
from ospo_fast.errors import Failure, attempt
from ospo_fast.models.chat import ChatModel, TextModel
from ospo_fast.records import Record
from ospo_fast.stages.templates import TemplateSet, load_templates

if TYPE_CHECKING:
    from torch import Tensor


def load_model_templates(model: TextModel, config: Config) -> TemplateSet:
    """Load the template set that the configuration names, or else that of the model."""
    return load_templates(config.templates or model.templates)


def load_named_templates(name: str, config: Config) -> TemplateSet:
    """Do `load_model_templates` for the name of a model, which is not loaded."""
    return load_templates(config.templates or model_family(name) or "janus")


def template_variables(record: Record) -> dict[str, str]:
    """Return the template variables that a record gives."""
    return {
        "prompt": record["prompt"],
        "kind": record.get("kind") or "",  # a field may be null
        "sub_category": record.get("sub_category") or "",
        "concepts": record.get("concepts_and_relations") or "",
        "relation": record.get("relation") or "",
    }


def chat_ids(
    model: TextModel, templates: TemplateSet, stage: str, variables: dict[str, Any], *, image: bool = False
) -> Tensor | Failure:
    """Render and tokenize the chat of a stage to ids (S,).

    A Failure if the chat cannot be rendered, holds control tokens or leaves no position for an answer.
    """
    messages = attempt(templates.messages, stage, **variables)
    if isinstance(messages, Failure):
        return messages
    ids: Tensor | Failure = attempt(model.chat, messages, image=image)
    if not isinstance(ids, Failure) and len(ids) >= model.max_positions:
        return Failure(
            f"{len(ids)} tokens leave no position for an answer in the model's {model.max_positions} positions"
        )
    return ids


def sample_text(
    model: TextModel,
    templates: TemplateSet,
    stage: str,
    settings: TextConfig,
    variables: Sequence[dict[str, Any]],
    seeds: Sequence[int],
) -> list[str | Failure]:
    """Sample one answer to the template `stage` for each dict of variables and its seed.

    Fields of `settings` that are not None override the sampling settings of the template. An answer is a Failure if its
    chat cannot be tokenized or its logits are not finite.
    """
    from ospo_fast.generation import generate_chat_text, generate_text

    sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 512} | templates.sampling(stage)
    sampling |= {name: value for name in sampling if (value := getattr(settings, name, None)) is not None}
    answers: list[Any] = [chat_ids(model, templates, stage, values) for values in variables]
    rows = [n for n, chat in enumerate(answers) if not isinstance(chat, Failure)]
    chats = [answers[n] for n in rows]
    given = {"seeds": [seeds[n] for n in rows], "batch_size": settings.batch_size, **sampling}
    if isinstance(model, ChatModel):
        texts = generate_chat_text(model, chats, **given)
    else:
        texts = generate_text(model, chats, progress=False, on_error="skip", **given)
    for n, text in zip(rows, texts, strict=True):
        answers[n] = text
    return answers

"""Control tokens of a tokenizer, which no text of a user may hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ospo_fast.errors import UsageError

ENCODED = {"add_special_tokens": False, "return_offsets_mapping": True, "return_attention_mask": False}
"""How a text is tokenized for `refuse_control_tokens`."""


def find_control_ids(tokenizer: Any, known: Iterable[int] = ()) -> frozenset[int]:
    """Return the ids that no user's text may hold, and `known`. Words among the added tokens are not among them."""
    added = tokenizer.added_tokens_decoder.items()
    marked = [i for i, token in added if token.special or (token.content[:1], token.content[-1:]) == ("<", ">")]
    return frozenset((*marked, *tokenizer.all_special_ids, *known))


def refuse_control_tokens(
    argument: str, text: str, tokenizer: Any, encoded: Mapping[str, Any], control_ids: frozenset[int]
) -> None:
    """Raise UsageError if a text, tokenized as `ENCODED`, holds a control token."""
    unknown, spelled = tokenizer.unk_token_id, str(tokenizer.unk_token)
    for i, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # A word that the tokenizer does not know has the id of the token for unknown words, which is a control token
        # only where the text spells it.
        token = text[start:end].strip()
        if i in control_ids and (i != unknown or token.casefold() == spelled.casefold()):
            raise UsageError(f"{argument}: {text[:60]!r} holds a control token of the model, {token!r}; remove it")

"""Which pairs train, and which are held out for validation. Light to import: `ospo_fast.stages.train` imports torch."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from ospo_fast.config import Config
from ospo_fast.errors import UsageError
from ospo_fast.records import ItemPair, Record, iter_pairs, stable_hash
from ospo_fast.stages.train_settings import uses_stored_masks

logger = logging.getLogger(__name__)


def category_of(record: Record) -> str:
    """Return the category of a prompt, which metrics are named by."""
    return str(record.get("t2i_category") or record.get("kind") or "other")


def select_training_pairs(records: Iterable[Record], config: Config) -> list[ItemPair]:
    """Return the pairs to train on and to validate with: those with a mask if the loss uses stored masks.

    `max_pairs_per_kind` and `max_pairs` limit them. Order and choice depend only on the ids.
    """
    pairs = list(iter_pairs(records))
    usable = _usable(pairs, config)
    if len(usable) < len(pairs):
        logger.warning("skipping %d of %d pairs, which have no object mask", len(pairs) - len(usable), len(pairs))
    return _limited(usable, config)


def select_training_prompts(records: Iterable[Record], config: Config) -> list[ItemPair]:
    """Return the items that GRPO trains on, with no pair; see `select_training_pairs` for the limits."""
    return _limited([ItemPair(record["item_id"], record, {}) for record in records], config)


def _usable(pairs: Iterable[ItemPair], config: Config) -> list[ItemPair]:
    return [item for item in pairs if not uses_stored_masks(config) or item.pair.get("mask_path")]


def _limited(usable: list[ItemPair], config: Config) -> list[ItemPair]:
    settings = config.train
    ranked = sorted(usable, key=lambda item: (stable_hash(config.seed, "cap", item.pair_id), item.pair_id))
    if settings.max_pairs_per_kind is not None:
        counts: Counter[str] = Counter()
        usable, ranked = ranked, []
        for item in usable:
            kind = item.record.get("kind") or item.record.get("sub_category", "")
            counts[kind] += 1
            if counts[kind] <= settings.max_pairs_per_kind:
                ranked.append(item)
    return sorted(ranked[: settings.max_pairs], key=lambda item: item.pair_id)


def held_out_ids(pairs: Sequence[ItemPair], config: Config) -> set[str]:
    """Return the ids of up to `train.validation_pairs` of the pairs, which do not train.

    Each category gives the same share of its prompts, up to one. Pairs of a prompt stay together: where those of the
    next prompt are too many, it trains. The choice depends on `seed` and the prompts alone.

    Raises:
        UsageError: no pair would be left to train on, or could be held out.

    """
    count = config.train.validation_pairs
    if not count:
        return set()
    prompts: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    categories: dict[str, str] = {}  # of a prompt, which can be one of two
    for item in sorted(
        pairs, key=lambda item: (stable_hash(config.seed, "validation", item.record["prompt"]), item.pair_id)
    ):
        prompt = item.record["prompt"]
        category = categories.setdefault(prompt, category_of(item.record))
        prompts[category].setdefault(prompt, []).append(item.pair_id)
    order = sorted(
        ((number + 0.5) / len(own), category, ids)
        for category, own in prompts.items()
        for number, ids in enumerate(own.values())
    )
    chosen: set[str] = set()
    for *_, ids in order:
        if len(chosen) + len(ids) <= count:
            chosen.update(ids)
    if not 0 < len(chosen) < len(pairs):
        raise UsageError(
            f"train.validation_pairs: got {count}, expected a number that leaves pairs to train on and holds out all "
            f"pairs of at least one prompt; there are {len(pairs)} pairs of {len(order)} prompts."
        )
    return chosen


def check_held_out(config: Config, records: Iterable[Record]) -> None:
    """Raise UsageError if the pairs of these records cannot be split; see `held_out_ids`."""
    if config.train.validation_pairs:
        held_out_ids(_limited(_usable(iter_pairs(records), config), config), config)

"""GPUs that plans and MFU know: memory, and peak rates of arithmetic and memory."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU, by the data sheet of its maker."""

    name: str
    pattern: str  # of the name that torch gives it
    memory: int  # bytes
    flops: float  # FLOP/s of dense bf16 matrix products, without sparsity
    bandwidth: float  # bytes per second of its memory


def _card(name: str, pattern: str, gigabytes: int, teraflops: float, gigabytes_s: float) -> Card:
    return Card(name, pattern, gigabytes * 10**9, teraflops * 1e12, gigabytes_s * 1e9)


# Of NVIDIA's data sheets, whose "with sparsity" rates are halved. The first card whose pattern is found is taken.
CARDS = (
    _card("h100-pcie", r"H100 PCIe", 80, 756, 2000),
    _card("h100-nvl", r"H100 NVL", 94, 835, 3900),
    _card("h100", r"H100 80GB HBM3$", 80, 989, 3350),
    _card("h200", r"H200$", 141, 989, 4800),
    _card("b200", r"B200$", 180, 2250, 7700),
    _card("a100-80", r"A100.*80GB", 80, 312, 1935),
    _card("a100-40", r"A100.*40GB", 40, 312, 1555),
    _card("l40s", r"L40S$", 48, 362, 864),
    _card("l4", r"L4$", 24, 121, 300),
)
CARD_NAMES = tuple(card.name for card in CARDS)


def find_card(name: str) -> Card | None:
    """Return the card of a name of this table, or of the name that torch gives a device. None: it is unknown.

    A part of a card (MIG) is unknown: it has other rates.
    """
    found = (card for card in CARDS if name == card.name or re.search(card.pattern, name))
    return None if " MIG " in name else next(found, None)

"""Moved to `ospo_fast.experimental.skinny_linear`."""

from ospo_fast.experimental.skinny_linear import ROWS, skinny_linear

__all__ = ["ROWS", "skinny_linear"]

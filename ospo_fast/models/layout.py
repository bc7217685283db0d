"""The layout of an image: which of the tokens behind an image prompt are codes, and what the others are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ospo_fast.errors import OspoError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ospo_fast.models.base import UnifiedModel


@dataclass(frozen=True)
class ImageLayout:
    """The N tokens of an image behind its prompt: T codes, and structure tokens, which are given and not sampled.

    Args:
        grids: rows and columns of each grid of codes, in the order of the sequence. The last one is the image; grids
            before it are previews of the same image.
        structure: (position, text id) of each structure token, by position in 0 … N−1: ends of rows, for example.
        positions: of a decoder with several axes of rotary positions, the positions of the N tokens on each axis, less
            the length of the prompt. None: the tokens are at the positions that follow the prompt.

    """

    grids: tuple[tuple[int, int], ...]
    structure: tuple[tuple[int, int], ...] = ()
    positions: tuple[tuple[int, ...], ...] | None = field(default=None, repr=False)

    @classmethod
    def rows(cls, grid: tuple[int, int], end_of_row: int) -> ImageLayout:
        """Return the layout of one grid with a structure token between its rows."""
        height, width = grid
        return cls((grid,), tuple((row * (width + 1) - 1, end_of_row) for row in range(1, height)))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image."""
        return self.grids[-1]

    @functools.cached_property
    def codes(self) -> int:
        """T, the codes of all grids."""
        return sum(height * width for height, width in self.grids)

    @functools.cached_property
    def tokens(self) -> int:
        """N, the tokens of an image."""
        return self.codes + len(self.structure)

    @functools.cached_property
    def code_positions(self) -> tuple[int, ...]:
        """The positions of the T codes among the N tokens."""
        given = {position for position, _ in self.structure}
        return tuple(position for position in range(self.tokens) if position not in given)

    @functools.cached_property
    def grid_positions(self) -> tuple[int, ...]:
        """The positions of the codes of the image, which is the last grid, among the N tokens."""
        return self.code_positions[self.codes - self.grid[0] * self.grid[1] :]

    def spread(self, codes: Tensor, fill: int) -> Tensor:
        """Put codes (…, T) at their positions → (…, N), with `fill` at those of structure tokens."""
        if not self.structure:
            return codes
        tokens = codes.new_full((*codes.shape[:-1], self.tokens), fill)
        tokens[..., list(self.code_positions)] = codes
        return tokens

    def masks(self, masks: Tensor) -> Tensor | list[Tensor]:
        """Return masks (B, H, W) of the image as `OSPOLoss` takes them: with those of the previews before them.

        A cell of a preview has the mean over what it covers.
        """
        from torch.nn.functional import interpolate

        if len(self.grids) == 1:
            return masks
        if tuple(masks.shape[1:]) != self.grid:
            raise OspoError(f"masks: got the shape {tuple(masks.shape)}, expected (B, {self.grid[0]}, {self.grid[1]})")
        values = masks if masks.is_floating_point() else masks.float()
        return [interpolate(values[:, None], grid, mode="area")[:, 0] for grid in self.grids[:-1]] + [masks]

    def rotary_positions(self, lengths: Sequence[int], total: int, device: torch.device) -> Tensor:
        """Return the positions (A, B, total) of prompts of these lengths, of the image behind each, and of padding."""
        import torch

        assert self.positions is not None
        rows = torch.arange(total).repeat(len(self.positions), len(lengths), 1)
        image = torch.tensor(self.positions)
        for n, length in enumerate(lengths):
            rows[:, n, length : length + self.tokens] = length + image[:, : total - length]
        return rows.to(device)


def image_layout(model: UnifiedModel) -> ImageLayout:
    """Return the layout of a model; of one that has no `layout`, the codes of its `grid` alone."""
    layout: ImageLayout | None = getattr(model, "layout", None)
    return layout or ImageLayout((model.grid,))


def embed_image(model: UnifiedModel, codes: Tensor) -> Tensor:
    """Return the decoder's input embeddings (B, N, D) of images, from their codes (B, T)."""
    layout, embeds = image_layout(model), model.embed_codes(codes)
    if not layout.structure:
        return embeds
    import torch

    places, ids = (list(column) for column in zip(*layout.structure, strict=True))
    sequence = embeds.new_empty(len(codes), layout.tokens, embeds.shape[-1])
    sequence[:, list(layout.code_positions)] = embeds
    sequence[:, places] = model.embed_tokens(torch.tensor(ids)).to(embeds)
    return sequence

"""All cells of a feature pyramid as the rows of one matrix, for layers that read some of them only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.constants import constant


@dataclass(frozen=True)
class CellMatrix:
    """Rows in the order level, image, row, column."""

    cells: Tensor
    """(M, channels) float32."""
    num_images: int
    sizes: tuple[tuple[int, int], ...]
    """Rows and columns of each level."""

    def first_cells(self) -> Tensor:
        """(levels,) int64, where each level begins."""
        counts = [self.num_images * height * width for height, width in self.sizes[:-1]]
        return constant(list(itertools.accumulate(counts, initial=0)), self.cells.device, torch.int64)

    def heights(self) -> Tensor:
        """(levels,) int64."""
        return constant([height for height, _ in self.sizes], self.cells.device, torch.int64)

    def widths(self) -> Tensor:
        """(levels,) int64."""
        return constant([width for _, width in self.sizes], self.cells.device, torch.int64)


def cell_matrix(pyramid: Sequence[Tensor]) -> CellMatrix:
    """One copy of all levels, each (B, channels, h, w), that all layers share which read cells."""
    channels = pyramid[0].shape[1]
    cells = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, channels) for level in pyramid]).float()
    return CellMatrix(cells, pyramid[0].shape[0], tuple((level.shape[2], level.shape[3]) for level in pyramid))

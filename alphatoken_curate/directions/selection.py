"""Some of a batch's positions, looked up among the rows a linear map saw."""

from __future__ import annotations

import torch
from torch import Tensor


class Selection:
    """N positions, given by their flat index (N,) int64, rising, out of `total` in (B, T - start)."""

    def __init__(self, positions: Tensor, total: int) -> None:
        self.positions, self.total = positions, total
        self._places: Tensor | None = None

    def rows(self, where: Tensor | None, *tensors: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Of tensors (n, d) whose rows belong to flat positions `where` (n,) (None: all, in order), the selected rows.

        Returns (k,) which of the N positions they are, None meaning all N in order, and tensors (k, d).
        """
        if where is None:
            if len(self.positions) == self.total:
                return None, tensors
            return None, tuple(x.index_select(0, self.positions) for x in tensors)
        if self._places is None:
            self._places = self.positions.new_full((self.total,), -1)
            self._places[self.positions] = torch.arange(len(self.positions), device=self.positions.device)
        places = self._places[where]
        kept = (places >= 0).nonzero().squeeze(1)
        return places[kept], tuple(x.index_select(0, kept) for x in tensors)

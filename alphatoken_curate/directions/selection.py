"""Some of a batch's positions, looked up among the rows a linear map saw."""

from __future__ import annotations

import torch
from torch import Tensor


class Selection:
    """N positions, given by their flat index (N,) int64, rising, out of `total` in (B, T - start)."""

    def __init__(self, positions: Tensor, total: int) -> None:
        self.positions, self.total = positions, total
        self._at: dict[torch.device, Tensor] = {}  # the same, wherever tensors are
        self._places: dict[torch.device, Tensor] = {}

    def rows(self, where: Tensor | None, *tensors: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Of tensors (n, d) whose rows belong to flat positions `where` (n,) (None: all, in order), the selected rows.

        Returns (k,) which of the N positions they are, None meaning all N in order, and tensors (k, d), where they are.
        """
        if where is None:
            if len(self.positions) == self.total:
                return None, tensors
            return None, tuple(x.index_select(0, self._positions_at(x.device)) for x in tensors)
        places = self._places_at(where.device)[where]
        kept = (places >= 0).nonzero().squeeze(1)
        return places[kept], tuple(x.index_select(0, kept) for x in tensors)

    def _positions_at(self, device: torch.device) -> Tensor:
        if device not in self._at:
            self._at[device] = self.positions.to(device)
        return self._at[device]

    def _places_at(self, device: torch.device) -> Tensor:
        """(total,) which of the N positions each is, or -1."""
        if device not in self._places:
            positions = self._positions_at(device)
            self._places[device] = places = positions.new_full((self.total,), -1)
            places[positions] = torch.arange(len(positions), device=device)
        return self._places[device]

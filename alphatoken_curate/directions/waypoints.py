"""What a rehearsal keeps of itself where its segments meet: states, the way back, and what came of it.

Each is a name on a shelf, so that who is killed goes on from there. k is how many steps were taken before; a part is
of outcomes that go back together, through one window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate.directions.optimisers import State
from alphatoken_curate.directions.shelves import Shelf
from alphatoken_curate.errors import CurateError

VALUES = "values-{}"
"""The name of what the outcomes of a part owe to tokens, once it is there."""

_STATE, _DIGEST, _ADJOINT = "state-{}", "digest-{}", "adjoint-{}-{}"


class Waypoints:
    """States, digests, adjoints and values on a shelf. `names` of the weights, `slots` of the optimiser for each."""

    def __init__(self, shelf: Shelf, names: Sequence[str], slots: int) -> None:
        self.shelf, self.names, self.slots = shelf, names, slots

    def named(self, state: State) -> dict[str, Tensor]:
        """Its tensors by name, as a shelf takes them."""
        found = {f"weight {name}": w for name, w in zip(self.names, state.weights, strict=True)}
        for n, slot in enumerate(state.slots):
            found |= {f"slot {n} {name}": s for name, s in zip(self.names, slot, strict=True)}
        return found

    def of_named(self, tensors: Mapping[str, Tensor]) -> State:
        """The state that was named so."""
        return State(
            [tensors[f"weight {name}"] for name in self.names],
            tuple([tensors[f"slot {n} {name}"] for name in self.names] for n in range(self.slots)),
        )

    # --------------------------------------------------------------------------------------------------------- states

    def keep_state(self, k: int, state: State, told: Sequence[float]) -> None:
        """Keep a state, its digest, and what is to be known of the steps before it."""
        self.shelf.put(_STATE.format(k), self.named(state))
        about = {"sha256": state.digest(), "told": torch.tensor(told, dtype=torch.float64)}
        self.shelf.put(_DIGEST.format(k), about)

    def has_state(self, k: int) -> bool:
        """Whether a state is kept, and its digest."""
        return self.has_digest(k) and self.shelf.has(_STATE.format(k))

    def has_digest(self, k: int) -> bool:
        """Whether the digest of a state is kept, which says what taking its steps again must end in."""
        return self.shelf.has(_DIGEST.format(k))

    def state(self, k: int) -> tuple[State, list[float]] | None:
        """A state and what was told with it; None where they are not kept."""
        found, about = self.shelf.get(_STATE.format(k)), self.shelf.get(_DIGEST.format(k))
        return None if found is None or about is None else (self.of_named(found), about["told"].tolist())

    def told(self, k: int) -> list[float]:
        """What was told with a state, whether that is still kept or not."""
        return self._required(_DIGEST.format(k), k)["told"].tolist()

    def is_same(self, k: int, state: State) -> bool:
        """Whether a state is that whose digest is kept, bit by bit."""
        kept = self.shelf.get(_DIGEST.format(k))
        return kept is not None and torch.equal(kept["sha256"].cpu(), state.digest())

    def drop_state(self, k: int, *, digest: bool = False) -> None:
        """Forget a state, and its digest with it where nothing will be held against that."""
        self.shelf.drop(_STATE.format(k))
        if digest:
            self.shelf.drop(_DIGEST.format(k))

    # ------------------------------------------------------------------------------------------------------- way back

    def keep_adjoints(self, part: str, k: int, adjoints: Sequence[State], sums: NDArray[np.float64]) -> None:
        """One by one, so that no more than one is held twice; the sums come last, by which all are there."""
        name = _ADJOINT.format(part, k)
        for n, adjoint in enumerate(adjoints):
            self.shelf.put(f"{name}-{n}", self.named(adjoint))
        self.shelf.put(name, {"sums": torch.from_numpy(sums)})

    def has_adjoints(self, part: str, k: int) -> bool:
        """Whether the way back has come to k."""
        return self.shelf.has(_ADJOINT.format(part, k))

    def adjoints(self, part: str, k: int) -> tuple[list[State], NDArray[np.float64]]:
        """Adjoints at k, and the sums so far."""
        name = _ADJOINT.format(part, k)
        sums = self.sums(part, k)
        each = (self._required(f"{name}-{n}", k) for n in range(sums.shape[1]))
        return [self.of_named(one) for one in each], sums

    def sums(self, part: str, k: int) -> NDArray[np.float64]:
        """What tokens have got by k."""
        return self._required(_ADJOINT.format(part, k), k)["sums"].cpu().numpy().copy()

    def drop_adjoints(self, part: str, k: int, outcomes: int) -> None:
        """Forget them."""
        name = _ADJOINT.format(part, k)
        for one in (name, *(f"{name}-{n}" for n in range(outcomes))):
            self.shelf.drop(one)

    # --------------------------------------------------------------------------------------------------------- values

    def keep_values(self, part: str, sums: NDArray[np.float64], root_share: float) -> None:
        """Keep what came of a part."""
        share = torch.tensor([root_share], dtype=torch.float64)
        self.shelf.put(VALUES.format(part), {"sums": torch.from_numpy(sums), "root_share": share})

    def has_values(self, part: str) -> bool:
        """Whether a part is done."""
        return self.shelf.has(VALUES.format(part))

    def values(self, part: str) -> tuple[NDArray[np.float64], float]:
        """What came of a part."""
        found = self._required(VALUES.format(part))
        return found["sums"].cpu().numpy(), float(found["root_share"])

    def _required(self, name: str, k: int | None = None) -> dict[str, Tensor]:
        found = self.shelf.get(name)
        if found is None:
            where = "" if k is None else f" behind step {k}"
            raise CurateError(f"What the rehearsal kept{where} is not all there. Delete its files.")
        return found

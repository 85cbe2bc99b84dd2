"""What blocks that do not train give, kept: a rehearsal asks for a batch three times, and for its rows in others.

Rows are taken from the batch they train in, whether it is kept or computed once more: in a batch of another width the
same row comes out otherwise by its last bits, and what is kept must change none. In memory while there is room, then on
a shelf, where there is one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any, Protocol

from torch import Tensor, nn

from alphatoken_curate.engine.tangents import leaves

ROOM = 1 << 30
"""Bytes that are kept in memory; what was used longest ago goes first."""


class Shelf(Protocol):
    """Where tensors lie by name (`directions.shelves` has some)."""

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a copy."""
        ...

    def get(self, name: str) -> dict[str, Tensor] | None:
        """A copy of what was kept under a name; None where nothing was."""
        ...

    def drop(self, name: str) -> None:
        """Forget it, where it is there."""
        ...


class Below:
    """Some of a model's first blocks, whose output for a batch is computed once while there is room for it.

    `shelf`: where what leaves memory goes, until it is forgotten.
    """

    def __init__(self, blocks: list[nn.Module], room: int | None = None) -> None:
        self.blocks, self.room = blocks, ROOM if room is None else room
        self.shelf: Shelf | None = None
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._shelved: dict[Hashable, str] = {}
        self._held, self._names = 0, count()

    @contextmanager
    def kept(self, key: Hashable, *, new: bool = True) -> Iterator[None]:
        """Inside this block a forward of the batch that `key` stands for begins above these blocks, if it can.

        Without `new` what is not kept yet is not kept now: it is computed in another way than is asked for later.
        """
        found = self.output(key)
        if not self.blocks or (found is None and not new):
            yield
            return
        undo = self._listen(key) if found is None else self._skip(found)
        try:
            yield
        finally:
            undo()
        self._make_room()

    @contextmanager
    def given(self, output: Any) -> Iterator[None]:
        """Inside this block a forward begins above these blocks, which are taken to give this."""
        undo = self._skip(output)
        try:
            yield
        finally:
            undo()

    def output(self, key: Hashable) -> Any:
        """What these blocks gave for a batch; None where that is not kept. Of the last batch it is."""
        if key in self._kept:
            self._kept.move_to_end(key)
        elif self.shelf is not None and (found := self.shelf.get(self._shelved.get(key, ""))) is not None:
            self._keep(key, found["output"])
            self._make_room()
        return self._kept.get(key)

    def forget(self, keys: Iterable[Hashable] | None = None) -> None:
        """Keep nothing of some batches any more, or of any."""
        for key in [*self._kept, *self._shelved] if keys is None else keys:
            self._held -= _bytes(self._kept.pop(key, None))
            if self.shelf is not None and key in self._shelved:
                self.shelf.drop(self._shelved.pop(key))

    def _keep(self, key: Hashable, output: Any) -> None:
        self._kept[key] = output
        self._held += _bytes(output)

    def _make_room(self) -> None:
        while self._held > self.room and len(self._kept) > 1:
            key, output = self._kept.popitem(last=False)
            self._held -= _bytes(output)
            if self.shelf is not None and isinstance(output, Tensor) and key not in self._shelved:
                self._shelved[key] = f"below {next(self._names)}"
                self.shelf.put(self._shelved[key], {"output": output})

    def _listen(self, key: Hashable) -> Any:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            self._keep(key, output)

        return self.blocks[-1].register_forward_hook(note).remove

    def _skip(self, output: Any) -> Any:
        """Have each of the blocks give what the last of them gave; only that goes on."""
        held = [vars(block).get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = lambda *_, **__: output

        def undo() -> None:
            for block, forward in zip(self.blocks, held, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

        return undo


def _bytes(output: Any) -> int:
    return sum(x.nbytes for x in leaves(output) if isinstance(x, Tensor))

"""How a long job tells what it does. The library itself never prints: callers pass something that listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Listens to a job: its stages, the tokens done in each, and what the user should know."""

    def stage(self, name: str, tokens: int) -> None:
        """A stage of `tokens` tokens begins; of 0 tokens, one whose length is not known."""

    def advance(self, tokens: int) -> None:
        """That many more are done."""

    def note(self, text: str) -> None:
        """Something the user should know, said once."""

    def warn(self, text: str) -> None:
        """Something that needs the user's attention, said once."""


class Silent:
    """Listens to nothing."""

    def stage(self, name: str, tokens: int) -> None:
        """Nothing."""

    def advance(self, tokens: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

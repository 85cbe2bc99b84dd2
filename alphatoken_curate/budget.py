"""How many padded tokens run together: resolved once, written down before use, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import orjson

from alphatoken_curate.atomic import atomic_file
from alphatoken_curate.errors import CurateError, FingerprintError, StoredDataError
from alphatoken_curate.fingerprint import Json, canonical, differing
from alphatoken_curate.manifest import Plan, decode
from alphatoken_curate.models import free_memory
from alphatoken_curate.progress import Progress

NAME = "run.json"
"""In artifacts/: the run's fingerprint fields and its plan, written before anything is computed.

`run-00001.json` and so on are those of later generations."""

LEAST = 64
"""A budget below this many tokens is not halved again."""

_AUTO = {"cpu": 2048, "cuda": 16384}

_DECIDE_TOKENS = {
    "tokens": {"data", "target", "target_rows", "tokenizer", "template", "turns", "max_length", "seed"},
    "target_tokens": {"data", "target", "target_rows", "tokenizer", "template", "turns", "max_length", "seed"},
    "retention_tokens": {"retention", "tokenizer", "template", "turns", "max_length"},
    "prompt_tokens": {"fisher", "fisher_prompts", "tokenizer", "template", "turns", "max_length"},
    "kind": {"data"},
    "beta": {"data"},
}
"""Fields that follow from others; digests of tokens differ alone where a template writes today's date."""

T = TypeVar("T")


def auto_tokens(device: str) -> int:
    """What `--batch-tokens auto` is on a type of device."""
    return _AUTO.get(device, _AUTO["cpu"])


class Budget:
    """The token budget of a generation, kept in `artifacts/run.json` beside the fields it was begun with.

    `plans`: those of the shards of generation 0, which a later generation begins with. Raises FingerprintError, naming
    what differs, where something was computed with other fields.
    """

    def __init__(
        self,
        run: Path,
        fields: Mapping[str, Json],
        batch_tokens: int | Literal["auto"],
        device: str,
        progress: Progress,
        *,
        generation: int = 0,
        plans: Sequence[Plan] = (),
    ) -> None:
        self.path = run / "artifacts" / (f"run-{generation:05d}.json" if generation else NAME)
        self.progress = progress
        self.fields = dict(fields)
        stored = self._read()
        if generation and stored and differing(stored["fields"], self.fields):
            stored = {}  # of another checkpoint, of whose shards none was finished: the number is free
        planned = {str(shard): asdict(plan) for shard, plan in enumerate(plans)}
        self._shards: dict[str, dict[str, int]] = stored.get("shards", planned)
        # Settings that failed before anything was computed (a --layers the model has not) bind nobody.
        begun = bool(self._shards) or any(self.path.parent.glob("*.safetensors"))
        if begun and stored:
            _check_same(run, stored["fields"], self.fields)
        self.tokens = auto_tokens(device) if batch_tokens == "auto" else batch_tokens
        self.halvings = 0
        if self._shards:
            self._resume(self._shards["0" if generation else max(self._shards, key=int)])
        if not stored or differing(stored["fields"], self.fields):
            self._write()

    def plan(self, shard: int) -> Plan:
        """The plan of a shard that was begun."""
        return Plan(**self._shards[str(shard)])

    def spend(self, work: Callable[[int], T], shard: int | None = None) -> T:
        """Run `work(batch_tokens)`; when memory runs out, halve the budget and begin the work again, whole.

        The plan of a shard is written before it is used, and used again when the run is resumed.
        """
        if str(shard) in self._shards:
            self._resume(self._shards[str(shard)])
        while True:
            if shard is not None:
                self._note(shard)
            try:
                return work(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if self.tokens // 2 < LEAST:
                    raise CurateError(
                        f"Memory ran out with {self.tokens} tokens in a batch. Use fewer --layers, a shorter"
                        " --max-length or a device with more memory; what is finished is kept."
                    ) from error
            self._halve()

    def _halve(self) -> None:
        free_memory()
        self.tokens //= 2
        self.halvings += 1
        self.progress.note(f"Memory ran out: --batch-tokens is halved to {self.tokens} from here on.")

    def _resume(self, plan: Mapping[str, int]) -> None:
        self.tokens, self.halvings = plan["batch_tokens"], plan["halvings"]

    def _note(self, shard: int) -> None:
        plan = {"batch_tokens": self.tokens, "halvings": self.halvings}
        if self._shards.get(str(shard)) != plan:
            self._shards[str(shard)] = plan
            self._write()

    def _write(self) -> None:
        with atomic_file(self.path) as sink:
            sink.write(canonical({"fields": self.fields, "shards": self._shards}) + b"\n")

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {}
        try:
            stored = orjson.loads(self.path.read_bytes())
            plans = {int(shard): decode(Plan, plan) for shard, plan in stored["shards"].items()}
            if isinstance(stored["fields"], dict) and all(plan.batch_tokens > 0 for plan in plans.values()):
                return dict(stored)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise StoredDataError(f"{self.path}: damaged. Delete it and run the same command again.")


def _check_same(run: Path, stored: Mapping[str, Json], fields: Mapping[str, Json]) -> None:
    names = _causes(differing(stored, fields), stored, fields)
    if names:
        raise FingerprintError(
            f"{run}: it was made with other settings or inputs: {', '.join(names)}."
            " Give the ones it was made with, or another folder with -o.",
            names,
        )


def _causes(names: tuple[str, ...], stored: Mapping[str, Json], fields: Mapping[str, Json]) -> tuple[str, ...]:
    """What the user changed, without the fields that merely follow from it."""
    follow = {name for name, causes in _DECIDE_TOKENS.items() if causes.intersection(names)}
    if "model" in names and all(of.get("model") == of.get("reference") for of in (stored, fields)):
        follow.add("reference")
    return tuple(name for name in names if name not in follow)


def _out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

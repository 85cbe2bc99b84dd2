"""How many padded tokens run together: settled once, written down before use, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from alphatoken_curate.config import OF_OPTIMISER, OF_REHEARSAL
from alphatoken_curate.errors import CurateError, FingerprintError, StoredDataError
from alphatoken_curate.models.devices import free_memory
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.atomic import atomic_file
from alphatoken_curate.runs.documents import Unreadable, decode, sealed, unsealed
from alphatoken_curate.runs.fingerprint import Json, differing, told_apart
from alphatoken_curate.runs.manifest import Plan
from alphatoken_curate.runs.schema import SCHEMA_VERSION
from alphatoken_curate.runs.shards import listed, read_footer, values_folder

NAME = "run.json"
"""In artifacts/: the run's fingerprint fields and its plan, written before anything is computed.

`run-00001.json` and so on are those of later generations."""

LEAST = 64
"""A budget below this many tokens is not halved again."""

_OF_CHATS = (
    *("tokenizer", "template", "chat_template", "chat_template_kwargs", "assistant_specials"),
    *("turns", "max_length", "template_date", "map"),
)

_DECIDE_TOKENS = {
    "tokens": {"data", "subset", "split", "limit", "target", "target_rows", "seed", *_OF_CHATS},
    "target_tokens": {"data", "target", "target_rows", "seed", *_OF_CHATS},
    "retention_tokens": {"retention", *_OF_CHATS},
    "prompt_tokens": {"fisher", "fisher_prompts", *_OF_CHATS},
    "template": {"chat_template"},
    "groups": {"target_groups", "direction", "data", "target", "target_rows", "limit", "map", "subset", "split"},
    **{name: {"direction"} for name in OF_REHEARSAL},
    **{name: {"direction", "rehearse_optimizer"} for names in OF_OPTIMISER.values() for name in names},
    "kind": {"data", "limit", "map", "subset", "split"},
    "data": {"limit", "subset", "split"},
    "beta": {"data"},
}
"""Fields that follow from others; digests of tokens differ alone where releases of libraries make others."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """What a run folder keeps of its budget, and of what the run was begun with."""

    fields: Mapping[str, Any]
    first: int | None = None
    """What the run was begun with, before any halving; None until `auto` is settled."""
    plan: Plan | None = None
    """What new work is begun with."""
    shards: Mapping[str, Plan] = field(default_factory=dict)
    """The plans of the shards that were begun, by number."""


class Budget:
    """The token budget of a generation, kept in `artifacts/run.json` beside the fields it was begun with.

    `batch_tokens`: `auto` is settled by `decide`, unless it was in an earlier attempt. `plans`: those of the shards of
    generation 0, which a later generation begins with. Raises FingerprintError, naming what differs, where something
    was computed with other fields.
    """

    def __init__(
        self,
        run: Path,
        fields: Mapping[str, Json],
        batch_tokens: int | Literal["auto"],
        progress: Progress,
        *,
        generation: int = 0,
        plans: Sequence[Plan] = (),
    ) -> None:
        self.path = run / "artifacts" / (f"run-{generation:05d}.json" if generation else NAME)
        self.progress = progress
        stored = self._read()
        if generation and stored is not None and differing(stored.fields, fields):
            stored = None  # of another checkpoint, of whose shards none was finished: the number is free
        # Settings that failed before anything was computed (a --layers the model has not) bind nobody.
        begun = any(self.path.parent.glob("*.safetensors")) or bool(plans if stored is None else stored.shards)
        if begun and stored is not None:
            _check_same(run, stored.fields, fields)
        same = stored is not None and not differing(stored.fields, fields)
        if stored is not None and same and stored.plan is not None and (begun or batch_tokens == "auto"):
            self._record = stored
        else:
            given = None if batch_tokens == "auto" else Plan(batch_tokens=batch_tokens)
            plan = plans[0] if plans else given
            first = None if plan is None else plan.batch_tokens
            planned = {str(shard): one for shard, one in enumerate(plans)}
            self._record = _Record(fields=dict(fields), first=first, plan=plan, shards=planned)
        if self._record != stored:
            self._write()

    @property
    def first(self) -> int | None:
        """What the run was begun with, before any halving; None where `auto` is not settled."""
        return self._record.first

    @property
    def tokens(self) -> int:
        """What new work is begun with."""
        return self._settled().batch_tokens

    def decide(self, find: Callable[[], int]) -> None:
        """Settle `auto` by `find` and write it down; where it is settled, do nothing."""
        if self._record.plan is None:
            found = find()
            self._record = replace(self._record, first=found, plan=Plan(batch_tokens=found))
            self._write()

    def plan(self, shard: int) -> Plan:
        """The plan of a shard that was begun."""
        return self._record.shards[str(shard)]

    def spend(self, work: Callable[[int], T], shard: int | None = None) -> T:
        """Run `work(batch_tokens)`; when memory runs out, halve the budget and begin the work again, whole.

        A budget is written down before it is used: that of a shard beside its number, to be used again when the shard
        is made again, and every halving, of whatever work.
        """
        plan = self._settled()
        if shard is not None:
            plan = self._record.shards.get(str(shard), plan)
        while True:
            self._note(shard, plan)
            try:
                return work(plan.batch_tokens)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if plan.batch_tokens // 2 < LEAST:
                    raise CurateError(
                        f"Memory ran out with {plan.batch_tokens} tokens in a batch. Use fewer --layers, a shorter"
                        " --max-length or a device with more memory; what is finished is kept."
                    ) from error
            # Not above: there the error still holds what was computed.
            free_memory()
            plan = Plan(batch_tokens=plan.batch_tokens // 2, halvings=plan.halvings + 1)
            self.progress.warn(f"Memory ran out: --batch-tokens is halved to {plan.batch_tokens} from here on.")

    def _settled(self) -> Plan:
        if self._record.plan is None:
            raise RuntimeError("--batch-tokens auto is used before it is settled by decide()")
        return self._record.plan

    def _note(self, shard: int | None, plan: Plan) -> None:
        """Write down what is about to be used."""
        noted = self._record
        if plan.batch_tokens < self._settled().batch_tokens:
            noted = replace(noted, plan=plan)
        if shard is not None:
            noted = replace(noted, shards={**noted.shards, str(shard): plan})
        if noted != self._record:
            self._record = noted
            self._write()

    def _write(self) -> None:
        with atomic_file(self.path) as sink:
            sink.write(sealed(asdict(self._record)))

    def _read(self) -> _Record | None:
        if not self.path.is_file():
            return None
        try:
            found = decode(_Record, unsealed(self.path.read_bytes()))
        except Unreadable:
            found = None
        if found is None or not _is_sound(found):
            raise StoredDataError(f"{self.path}: damaged. Delete it and run the same command again.")
        return found


def begun_with(run: Path) -> Mapping[str, Json]:
    """The fingerprint fields that a run was begun with, as far as they can be read; without any, none."""
    try:
        return decode(_Record, unsealed((run / "artifacts" / NAME).read_bytes())).fields
    except (OSError, Unreadable):
        pass
    try:
        return read_footer(next(iter(listed(values_folder(run, 0)).values()))).fields
    except (StopIteration, OSError, StoredDataError):
        return {}


def _is_sound(record: _Record) -> bool:
    plans = [*record.shards.values(), *([record.plan] if record.plan is not None else [])]
    settled = (record.plan is not None) == (record.first is not None) and (record.plan is not None or not plans)
    counts = [plan.batch_tokens for plan in plans] + ([record.first] if record.first is not None else [])
    return settled and min(counts, default=1) > 0 and all(shard.isdecimal() for shard in record.shards)


def older(run: Path, version: object) -> FingerprintError:
    """The error of a run of another schema version, which can be read and masked, and not gone on with."""
    return FingerprintError(
        f"{run}: schema version {version}, and this release writes {SCHEMA_VERSION}: the two do not go into one run."
        " It can be read, masked, verified and exported as it is. To score its rows anew, name another folder:"
        f" alphatoken-curate score --config {run}/config.yaml -o ANOTHER",
        ("schema_version",),
    )


def _check_same(run: Path, stored: Mapping[str, Json], fields: Mapping[str, Json]) -> None:
    if stored.get("schema_version") != fields.get("schema_version"):
        raise older(run, stored.get("schema_version"))
    names = _causes(differing(stored, fields), stored, fields)
    if names:
        raise FingerprintError(
            f"{run}: it was made with other settings or inputs: {told_apart(names, stored, fields)}."
            " Give the ones it was made with, or another folder with -o.",
            names,
            stored,
        )


def _causes(names: tuple[str, ...], stored: Mapping[str, Json], fields: Mapping[str, Json]) -> tuple[str, ...]:
    """What the user changed, without the fields that merely follow from it."""
    follow = {name for name, causes in _DECIDE_TOKENS.items() if causes.intersection(names)}
    if "model" in names and all(of.get("model") == of.get("reference") for of in (stored, fields)):
        follow.add("reference")
    day = "template_date"
    if set(names) - follow - {day} and not (stored.get(day) and fields.get(day)):
        follow.add(day)  # other rows, or another template, of which only one writes a date
    return tuple(name for name in names if name not in follow)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of whatever device."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

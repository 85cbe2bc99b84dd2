"""How many padded tokens run together: settled once and written down before use; less for a shard that needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from alphatoken_curate.config import OF_OPTIMISER, OF_REHEARSAL
from alphatoken_curate.errors import FingerprintError, StoredDataError, UsageError
from alphatoken_curate.progress import Progress
from alphatoken_curate.runs.atomic import atomic_file
from alphatoken_curate.runs.documents import LATER, Unreadable, decode, sealed, unsealed
from alphatoken_curate.runs.fingerprint import Json, differing, told_apart
from alphatoken_curate.runs.manifest import Plan
from alphatoken_curate.runs.schema import SCHEMA_VERSION, VERSIONS
from alphatoken_curate.runs.shards import listed, read_footer, values_folder
from alphatoken_curate.wording import pasted

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
    "precondition_iterations": {"precondition"},
    **{name: {"direction"} for name in OF_REHEARSAL},
    **{name: {"direction", "rehearse_optimizer"} for names in OF_OPTIMISER.values() for name in names},
    "rehearse_lora_alpha": {"direction", "rehearse_lora"},
    "rehearse_root": {"direction", "rehearse_optimizer", "rehearse_lora"},
    "parameters": {"rehearse_lora"},
    "kind": {"data", "limit", "map", "subset", "split"},
    "data": {"limit", "subset", "split"},
    "beta": {"data"},
    "rehearse_simpo": {"data", "direction"},
}
"""Fields that follow from others; digests of tokens differ alone where releases of libraries make others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """What a run folder keeps of its budget, and of what the run was begun with."""

    fields: Mapping[str, Any]
    first: int | None = None
    """What all work is begun with; None until `auto` is settled."""
    threads: int | None = None
    """Threads of each process on a CPU, where they were named: others may round otherwise."""
    taken: int | None = field(default=None, metadata=LATER)
    """Those that torch took by itself, where they were not."""
    versions: Mapping[str, str] = field(default_factory=dict, metadata=LATER)
    """Of what computed first, by name."""
    shards: Mapping[str, Plan] = field(default_factory=dict)
    """The plans of shards for which memory ran out, by number."""
    tasks: Mapping[str, Plan] = field(default_factory=dict, metadata=LATER)
    """Likewise of what comes before the shards, by name: in other batches sums round otherwise."""


class Budget:
    """The token budget of a generation, kept in `artifacts/run.json` beside the fields it was begun with.

    `batch_tokens`: `auto` is settled by `decide`, unless it was in an earlier attempt. `threads`: those that are named.
    `versions`: of what computes here. `own_threads`: those that torch takes here by itself, where an engine may have
    set others by now. `plans`: those of the shards of generation 0, which a later generation begins with. Without
    `writes` it must be settled, and stays as it is. Raises FingerprintError, naming what differs, where something was
    computed with other fields, and UsageError where a part names other threads.
    """

    def __init__(
        self,
        run: Path,
        fields: Mapping[str, Json],
        batch_tokens: int | Literal["auto"],
        progress: Progress,
        *,
        threads: int | None = None,
        versions: Mapping[str, str] | None = None,
        own_threads: int | None = None,
        generation: int = 0,
        plans: Sequence[Plan] = (),
        writes: bool = True,
    ) -> None:
        self.path = run / "artifacts" / (f"run-{generation:05d}.json" if generation else NAME)
        self._plans, self._writes, self.generation, self._versions = plans, writes, generation, dict(versions or {})
        self._noted: dict[str, Plan] = {}
        stored = self._read()
        if generation and stored is not None and differing(stored.fields, fields):
            stored = None  # of another checkpoint, of whose shards none was finished: the number is free
        # Settings that failed before anything was computed (a --layers the model has not) bind nobody.
        self._begun = begun = any(self.path.parent.glob("*.safetensors")) or bool(
            listed(values_folder(run, generation))
        )
        if begun and stored is not None:
            _check_same(run, stored.fields, fields)
        same = stored is not None and not differing(stored.fields, fields)
        given = plans[0].batch_tokens if plans else None if batch_tokens == "auto" else batch_tokens
        self._taken_here = taken = _taken(self._versions, own_threads)
        own = _Record(
            fields=dict(fields),
            first=given,
            threads=threads,
            taken=taken if threads is None else None,
            versions=self._versions,
        )
        if stored is not None and same and stored.first is not None and (begun or batch_tokens == "auto"):
            begins = replace(own, first=stored.first, shards=stored.shards, tasks=stored.tasks)
            self._record = stored if begun else begins
        else:
            self._record = own
        self._tell_of_others(threads, None if plans else batch_tokens, run, progress)
        if self._record != stored:
            self._write()

    @property
    def is_settled(self) -> bool:
        """Whether something was computed by it already."""
        return self._begun and self._record.first is not None

    @property
    def first(self) -> int | None:
        """What all work is begun with; None where `auto` is not settled."""
        return self._record.first

    @property
    def threads(self) -> int | None:
        """Threads of each process on a CPU, as they were named; None leaves them to torch."""
        return self._record.threads

    @property
    def threads_to_take(self) -> int | None:
        """The same, or as torch took them where the run was begun; None where it takes as many here by itself."""
        taken = self._record.taken
        return self._record.threads or (None if taken == self._taken_here else taken)

    @property
    def odd_versions(self) -> str:
        """What computes here in other versions than what computed first, by name with both; empty without any."""
        each = ((name, self._record.versions.get(name, now), now) for name, now in self._versions.items())
        return ", ".join(f"{name} {now} (begun with {then})" for name, then, now in each if self._begun and then != now)

    def decide(self, find: Callable[[], int]) -> None:
        """Settle `auto` by `find` and write it down; where it is settled, do nothing."""
        if self._record.first is None:
            self._record = replace(self._record, first=find())
            self._write()

    def plan(self, of: int | str | None = None) -> Plan:
        """What the work of a shard, by number, of another task, by name, or any other is begun with."""
        if self._record.first is None:
            raise RuntimeError("--batch-tokens auto is used before it is settled by decide()")
        if isinstance(of, str):
            return self._record.tasks.get(of) or Plan(batch_tokens=self._record.first)
        planned = self._plans[of] if of is not None and of < len(self._plans) else None
        noted = self._noted.get(str(of)) or self._record.shards.get(str(of))
        return noted or planned or Plan(batch_tokens=self._record.first)

    def note(self, of: int | str, plan: Plan) -> None:
        """Note the plan of a task, where it is another than it was begun with: it is made again by the same.

        Those of shards are written down once there are an eighth more than were, and by `flush`: all of them are
        written each time. A shard that is there says itself how it was made, should this process end before.
        """
        if self._record.first is None or plan == self.plan(of):
            return
        if isinstance(of, str):
            self._record = replace(self._record, tasks={**self._record.tasks, of: plan})
            self._write()
            return
        self._noted[str(of)] = plan
        if 8 * len(self._noted) > len(self._record.shards):
            self.flush()

    def flush(self) -> None:
        """Write down what is noted and not written."""
        if self._noted:
            self._record = replace(self._record, shards={**self._record.shards, **self._noted})
            self._noted.clear()
            self._write()

    def _tell_of_others(
        self, threads: int | None, batch_tokens: int | Literal["auto"] | None, run: Path, progress: Progress
    ) -> None:
        """Say that settings are without effect which are others than those that the run was begun with."""
        if threads not in (None, self.threads, self._record.taken):
            begun = _with(self.threads, self._record.taken)
            self._refuse(f"--threads {threads}", begun, f"the run was begun {begun}.", run, progress)
        if batch_tokens not in (None, "auto", self._record.first):
            begun = f"with {self._record.first}"
            why = (
                f"{run} was begun {begun}, and sums round otherwise in other batches. For others give another folder"
                f" with -o, and --reuse {pasted(run)}."
            )
            self._refuse(f"--batch-tokens {batch_tokens}", begun, why, run, progress)

    def _refuse(self, told: str, begun: str, why: str, run: Path, progress: Progress) -> None:
        if not self._writes:
            raise UsageError(f"{told}: {run} was prepared {begun}. Leave it out: parts take the run's.")
        progress.warn(f"{told} is without effect: {why}")

    def _write(self) -> None:
        if not self._writes:
            return
        with atomic_file(self.path) as sink:
            sink.write(sealed(asdict(self._record)))

    def _read(self) -> _Record | None:
        if not self.path.is_file():
            return None
        try:
            document = unsealed(self.path.read_bytes())
            about = document.get("fields")
            if isinstance(about, dict) and about.get("schema_version") in set(VERSIONS) - {SCHEMA_VERSION}:
                return _Record(fields=about)  # of an earlier release, which planned otherwise
            found = decode(_Record, document)
        except Unreadable:
            found = None
        if found is None or not _is_sound(found):
            raise StoredDataError(f"{self.path}: damaged. Delete it and run the same command again.")
        return found


def begun_with(run: Path) -> Mapping[str, Json]:
    """The fingerprint fields that a run was begun with, as far as they can be read; without any, none."""
    try:
        found = unsealed((run / "artifacts" / NAME).read_bytes()).get("fields")
        if isinstance(found, dict):
            return found
    except (OSError, Unreadable):
        pass
    try:
        return read_footer(next(iter(listed(values_folder(run, 0)).values()))).fields
    except (StopIteration, OSError, StoredDataError):
        return {}


def _is_sound(record: _Record) -> bool:
    counts = [plan.batch_tokens for plan in (*record.shards.values(), *record.tasks.values())]
    counts += [count for count in (record.first, record.threads, record.taken) if count is not None]
    settled = record.first is not None or not (record.shards or record.tasks)
    return settled and min(counts, default=1) > 0 and all(shard.isdecimal() for shard in record.shards)


def halved(plan: Plan) -> Plan:
    """The plan to go on with when memory ran out by this one."""
    return Plan(batch_tokens=plan.batch_tokens // 2, halvings=plan.halvings + 1)


def _with(threads: int | None, taken: int | None) -> str:
    if threads is not None:
        return f"with {threads}"
    return "without it" if taken is None else f"without it, with {taken}"


def _taken(versions: Mapping[str, str], own_threads: int | None) -> int | None:
    """Threads that torch takes by itself on a CPU; None of what computes elsewhere."""
    if versions.get("device") != "cpu":
        return None
    import torch

    return own_threads or torch.get_num_threads()


def older(run: Path, version: object) -> FingerprintError:
    """The error of a run of another schema version, which can be read and masked, and not gone on with."""
    return FingerprintError(
        f"{run}: schema version {version}, and this release writes {SCHEMA_VERSION}: the two do not go into one run."
        " It can be read, masked, verified and exported as it is. To score its rows anew, name another folder:"
        f" alphatoken-curate score --config {pasted(run / 'config.yaml')} -o ANOTHER",
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

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from tiny_files import Notes

from alphatoken_curate import FingerprintError, StoredDataError, UsageError
from alphatoken_curate.progress import Silent
from alphatoken_curate.runs.manifest import Plan
from alphatoken_curate.runs.shards import shard_name, values_folder
from alphatoken_curate.scoring.budget import Budget, halved, out_of_memory

FIELDS = {"model": "a", "reference": "b", "tokens": "t", "seed": 0, "data": [["x", "y"]]}


SHARD = b'{"fields": {}, "first": 9, "threads": null, "shards": {"0": %s}}'


def budget(run: Path, tokens: Any = 1000, fields: dict[str, Any] | None = None, notes: Any = None) -> Budget:
    return Budget(run, FIELDS if fields is None else fields, tokens, notes or Silent())


def stored(run: Path, name: str = "run.json") -> Any:
    return orjson.loads((run / "artifacts" / name).read_bytes())


def never() -> int:
    raise AssertionError("settled already")


def computed(run: Path) -> None:
    """As if something was."""
    (run / "artifacts" / "target-00000.safetensors").write_bytes(b"")


def test_auto_is_settled_once_and_written_down(tmp_path: Path) -> None:
    made = budget(tmp_path, "auto")
    assert made.first is None and stored(tmp_path)["first"] is None
    with pytest.raises(RuntimeError, match="before it is settled"):
        made.plan()
    made.decide(lambda: 4096)
    made.decide(never)
    assert made.first == 4096 == stored(tmp_path)["first"] and made.plan() == Plan(batch_tokens=4096)
    again = budget(tmp_path, "auto")  # even where nothing was computed yet
    again.decide(never)
    assert again.first == 4096
    # A number binds from the first thing that was computed; until then another may be named.
    assert budget(tmp_path, 100).first == 100
    notes = Notes()
    computed(tmp_path)
    assert budget(tmp_path, 100, notes=notes).first == budget(tmp_path, "auto", notes=notes).first == 100
    assert not notes.warnings
    assert budget(tmp_path, 300, notes=notes).first == 100
    assert len(notes.warnings) == 1
    assert notes.warnings[0].startswith(f"--batch-tokens 300 is without effect: {tmp_path} was begun with 100, and")
    with pytest.raises(UsageError, match=r"--batch-tokens 300: .* was prepared with 100\. Leave it out"):
        Budget(tmp_path, FIELDS, 300, Silent(), writes=False)


def test_a_shard_that_was_written_binds_too(tmp_path: Path) -> None:
    budget(tmp_path, 100)
    folder = values_folder(tmp_path, 0)
    folder.mkdir(parents=True)
    (folder / shard_name(3)).write_bytes(b"")
    assert budget(tmp_path, 300).first == 100
    with pytest.raises(FingerprintError):
        budget(tmp_path, fields=FIELDS | {"seed": 1})


def test_a_number_needs_no_settling(tmp_path: Path) -> None:
    made = budget(tmp_path, 1000)
    made.decide(never)
    assert made.first == 1000 == stored(tmp_path)["first"]


def test_the_plan_of_a_shard_is_noted_where_memory_ran_out(tmp_path: Path) -> None:
    made = budget(tmp_path)
    written = (tmp_path / "artifacts" / "run.json").read_bytes()
    made.note(0, made.plan(0))
    assert (tmp_path / "artifacts" / "run.json").read_bytes() == written  # of a shard by plan nothing is written
    less = halved(halved(made.plan(4)))
    made.note(4, less)
    assert less == Plan(batch_tokens=250, halvings=2) and stored(tmp_path)["shards"] == {"4": asdict(less)}
    assert (made.plan(), made.plan(0), made.plan(4)) == (Plan(batch_tokens=1000), Plan(batch_tokens=1000), less)
    computed(tmp_path)
    again = budget(tmp_path, 5000)
    assert (again.plan(3), again.plan(4)) == (Plan(batch_tokens=1000), less)
    written = (tmp_path / "artifacts" / "run.json").read_bytes()
    again.note(4, less)
    assert (tmp_path / "artifacts" / "run.json").read_bytes() == written


def test_the_plans_of_many_shards_are_not_written_anew_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, sizes = budget(tmp_path), []
    plain = Budget._write
    monkeypatch.setattr(Budget, "_write", lambda self: (sizes.append(len(self._record.shards)), plain(self)))
    for shard in range(1000):
        made.note(shard, Plan(batch_tokens=500, halvings=1))
        assert made.plan(shard).halvings == 1
    assert sum(sizes) < 12 * 1000 and sizes[:9] == [*range(1, 9), 10]  # in all a few times what is kept in the end
    assert len(stored(tmp_path)["shards"]) < 1000
    made.flush()
    made.flush()
    assert len(stored(tmp_path)["shards"]) == 1000 == sizes[-1] != sizes[-2]


def test_a_later_generation_begins_with_the_plans_of_the_first(tmp_path: Path) -> None:
    plans = [Plan(batch_tokens=800), Plan(batch_tokens=400, halvings=1)]

    def later(fields: dict[str, Any]) -> Budget:
        return Budget(tmp_path, fields, 800, Silent(), generation=1, plans=plans)

    made = later(FIELDS)
    assert made.first == 800 and [made.plan(), made.plan(0), made.plan(1)] == [plans[0], *plans]
    made.note(1, halved(plans[1]))
    computed(tmp_path)
    assert later(FIELDS).plan(1) == Plan(batch_tokens=200, halvings=2)
    assert later(FIELDS | {"model": "c"}).plan(1) == plans[1]  # another checkpoint takes the number
    assert stored(tmp_path, "run-00001.json")["fields"]["model"] == "c"


def test_threads_that_were_named_stay_once_something_was_computed(tmp_path: Path) -> None:
    def threaded(threads: int | None, notes: Any = None) -> int | None:
        return Budget(tmp_path, FIELDS, 1000, notes or Silent(), threads=threads).threads

    assert threaded(2) == 2 and threaded(None) is None and threaded(3) == 3 == stored(tmp_path)["threads"]
    computed(tmp_path)
    notes = Notes()
    assert threaded(None, notes) == threaded(3, notes) == 3 and not notes.warnings
    assert threaded(1, notes) == 3
    assert notes.warnings == ["--threads 1 is without effect: the run was begun with 3."]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_what_says_that_memory_ran_out(error: BaseException) -> None:
    assert out_of_memory(error) and not out_of_memory(RuntimeError("shapes"))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"seed": 1}, ("seed",)),
        ({"data": [], "tokens": "u"}, ("data",)),
        ({"seed": 1, "tokens": "u"}, ("seed",)),
        ({"tokens": "u"}, ("tokens",)),
        ({"tokens": "u", "model": "c"}, ("model", "tokens")),
        ({"reference": "c"}, ("reference",)),
        ({"new": 1}, ("new",)),
    ],
)
def test_another_fingerprint_is_refused_by_its_causes(
    changes: dict[str, Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    budget(tmp_path)
    computed(tmp_path)
    written = (tmp_path / "artifacts" / "run.json").read_bytes()
    with pytest.raises(
        FingerprintError, match=r" now\), ".join(rf"{name} \(.* in the run, .*" for name in names)
    ) as caught:
        budget(tmp_path, fields=FIELDS | changes)
    assert caught.value.fields == names
    assert (tmp_path / "artifacts" / "run.json").read_bytes() == written


def test_what_was_never_begun_binds_nobody(tmp_path: Path) -> None:
    budget(tmp_path)
    budget(tmp_path, fields=FIELDS | {"seed": 1})
    (tmp_path / "artifacts" / "fisher.safetensors").write_bytes(b"")
    with pytest.raises(FingerprintError):
        budget(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"fields": {}}',
        b'{"fields": [], "shards": {}}',
        b'{"fields": {}, "shards": []}',
        b'{"fields": {}, "first": null, "threads": null, "shards": []}',
        b'{"fields": {}, "first": null, "shards": {}}',
        b'{"fields": {}, "first": 0, "threads": null, "shards": {}}',
        b'{"fields": {}, "first": 9, "threads": 0, "shards": {}}',
        b'{"fields": {}, "first": null, "threads": null, "shards": {"0": {"batch_tokens": 9, "halvings": 0}}}',
        SHARD % b"{}",
        SHARD % b'{"batch_tokens": -1, "halvings": 0}',
        SHARD % b'{"batch_tokens": "9", "halvings": 0}',
        SHARD % b'{"batch_tokens": 0, "halvings": 0}',
        SHARD % b'{"batch_tokens": 9, "halvings": 0, "more": 1}',
        SHARD.replace(b'"0"', b'"x"') % b'{"batch_tokens": 9, "halvings": 0}',
        b"\xff",
    ],
)
def test_a_damaged_record_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "run.json").write_bytes(content)
    with pytest.raises(StoredDataError, match=r"run\.json: damaged.*run the same command again"):
        budget(tmp_path)


def test_the_damaged_records_are_nearly_sound(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "run.json").write_bytes(SHARD % b'{"batch_tokens": 9, "halvings": 0}')
    computed(tmp_path)
    assert budget(tmp_path, fields={}).plan(0) == Plan(batch_tokens=9)


def test_every_flipped_bit_of_a_record_is_seen(tmp_path: Path) -> None:
    budget(tmp_path)
    computed(tmp_path)
    path = tmp_path / "artifacts" / "run.json"
    whole = path.read_bytes()
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(StoredDataError, match=r"run\.json: damaged"):
            budget(tmp_path)


def test_the_record_of_another_schema_version_is_told(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    budget(run, fields=FIELDS | {"schema_version": 1})
    computed(run)
    with pytest.raises(FingerprintError, match="schema version 1, and this release writes") as caught:
        budget(run, fields=FIELDS | {"schema_version": 2})
    assert caught.value.fields == ("schema_version",)
    assert f"score --config '{run}/config.yaml' -o ANOTHER" in str(caught.value)

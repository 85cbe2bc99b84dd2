from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from tiny_files import Notes

from alphatoken_curate import CurateError, FingerprintError, StoredDataError
from alphatoken_curate.progress import Silent
from alphatoken_curate.runs.manifest import Plan
from alphatoken_curate.scoring.budget import LEAST, Budget

FIELDS = {"model": "a", "reference": "b", "tokens": "t", "seed": 0, "data": [["x", "y"]]}


SHARD = b'{"fields": {}, "first": 9, "plan": {"batch_tokens": 9, "halvings": 0}, "shards": {"0": %s}}'


def budget(run: Path, tokens: Any = 1000, fields: dict[str, Any] | None = None, notes: Any = None) -> Budget:
    return Budget(run, FIELDS if fields is None else fields, tokens, notes or Silent())


def fails(times: int, error: BaseException) -> Any:
    """Work that runs out of memory so many times and then returns the budget it was given."""
    left = [times]

    def work(tokens: int) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return tokens

    return work


def stored(run: Path, name: str = "run.json") -> Any:
    return orjson.loads((run / "artifacts" / name).read_bytes())


def never() -> int:
    raise AssertionError("settled already")


def test_auto_is_settled_once_and_written_down(tmp_path: Path) -> None:
    made = budget(tmp_path, "auto")
    assert made.first is None and stored(tmp_path)["plan"] is None
    with pytest.raises(RuntimeError, match="before it is settled"):
        made.spend(fails(0, MemoryError()))
    made.decide(lambda: 4096)
    made.decide(never)
    assert made.first == made.tokens == 4096
    assert stored(tmp_path)["first"] == 4096 and stored(tmp_path)["plan"] == {"batch_tokens": 4096, "halvings": 0}
    again = budget(tmp_path, "auto")  # even where nothing was computed yet
    again.decide(never)
    assert again.tokens == 4096
    # A number binds from the first thing that was computed; until then another may be named.
    assert budget(tmp_path, 100).tokens == 100
    (tmp_path / "artifacts" / "target-00000.safetensors").write_bytes(b"")
    assert budget(tmp_path, 300).tokens == budget(tmp_path, "auto").tokens == 100


def test_a_number_needs_no_settling(tmp_path: Path) -> None:
    made = budget(tmp_path, 1000)
    made.decide(never)
    assert made.first == made.tokens == 1000 and stored(tmp_path)["first"] == 1000


def test_a_halving_before_any_shard_is_written_down_at_once(tmp_path: Path) -> None:
    def work(tokens: int) -> int:
        found = stored(tmp_path)
        assert found["plan"]["batch_tokens"] == tokens and found["shards"] == {} and found["first"] == 1000
        if tokens > 300:
            raise MemoryError
        return tokens

    assert budget(tmp_path).spend(work) == 250
    (tmp_path / "artifacts" / "fisher.safetensors").write_bytes(b"")
    again = budget(tmp_path, "auto")
    assert (again.tokens, again.first) == (250, 1000)
    again.spend(fails(0, MemoryError()), 0)
    assert again.plan(0) == Plan(batch_tokens=250, halvings=2)


def test_a_later_generation_begins_with_the_plans_of_the_first(tmp_path: Path) -> None:
    plans = [Plan(batch_tokens=800), Plan(batch_tokens=400, halvings=1)]

    def later(fields: dict[str, Any]) -> Budget:
        return Budget(tmp_path, fields, 800, Silent(), generation=1, plans=plans)

    made = later(FIELDS)
    assert made.tokens == 800 and [made.spend(fails(0, MemoryError()), n) for n in (0, 1)] == [800, 400]
    assert made.spend(fails(1, MemoryError()), 1) == 200 and made.tokens == 200
    assert later(FIELDS).plan(1) == Plan(batch_tokens=200, halvings=2)
    assert later(FIELDS | {"model": "c"}).plan(1) == plans[1]  # another checkpoint takes the number
    assert stored(tmp_path, "run-00001.json")["fields"]["model"] == "c"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_running_out_of_memory_halves_and_says_so(error: BaseException, tmp_path: Path) -> None:
    notes = Notes()
    made = budget(tmp_path, notes=notes)
    assert made.spend(fails(2, error), 0) == 250
    assert (made.plan(0).batch_tokens, made.plan(0).halvings) == (250, 2)
    assert [note.split("halved to ")[1].split()[0] for note in notes.warnings] == ["500", "250"]
    assert made.spend(fails(0, error), 1) == 250  # from here on


def test_other_errors_pass(tmp_path: Path) -> None:
    made = budget(tmp_path)
    for error in (RuntimeError("shapes"), ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            made.spend(fails(1, error), 0)
    assert made.tokens == 1000


def test_there_is_an_end_to_halving(tmp_path: Path) -> None:
    with pytest.raises(CurateError, match=r"Memory ran out with 125 tokens.*--layers"):
        budget(tmp_path).spend(fails(99, MemoryError()), 0)
    assert LEAST > 125 // 2
    assert budget(tmp_path / "small", 1).spend(fails(0, MemoryError()), 0) == 1


def test_the_plan_is_on_disk_before_it_is_used(tmp_path: Path) -> None:
    def work(tokens: int) -> int:
        assert stored(tmp_path)["shards"]["4"]["batch_tokens"] == tokens
        if tokens > 300:
            raise MemoryError
        return tokens

    assert budget(tmp_path).spend(work, 4) == 250


def test_a_resumed_run_uses_what_was_recorded(tmp_path: Path) -> None:
    first = budget(tmp_path)
    first.spend(fails(0, MemoryError()), 0)
    first.spend(fails(2, MemoryError()), 1)
    written = (tmp_path / "artifacts" / "run.json").read_bytes()
    again = budget(tmp_path, 5000)
    assert again.tokens == 250 and (again.plan(0).batch_tokens, again.plan(1).batch_tokens) == (1000, 250)
    assert again.spend(fails(0, MemoryError()), 0) == 1000
    assert again.spend(fails(0, MemoryError()), 1) == 250
    assert (tmp_path / "artifacts" / "run.json").read_bytes() == written
    assert again.spend(fails(0, MemoryError()), 2) == 250
    assert budget(tmp_path).plan(2).halvings == 2


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
    budget(tmp_path).spend(fails(0, MemoryError()), 0)
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
        b'{"fields": {}, "plan": null, "first": null, "shards": []}',
        b'{"fields": {}, "plan": null, "first": 9, "shards": {}}',
        b'{"fields": {}, "plan": {"batch_tokens": 9, "halvings": 0}, "first": null, "shards": {}}',
        b'{"fields": {}, "plan": {"batch_tokens": 9, "halvings": 0}, "first": 0, "shards": {}}',
        b'{"fields": {}, "plan": {"batch_tokens": 9, "halvings": 0}, "first": 9, "shards": {"0": {}}}',
        b'{"fields": {}, "plan": null, "first": null, "shards": {"0": {"batch_tokens": 9, "halvings": 0}}}',
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
    assert budget(tmp_path, fields={}).plan(0) == Plan(batch_tokens=9)


def test_every_flipped_bit_of_a_record_is_seen(tmp_path: Path) -> None:
    budget(tmp_path).spend(fails(0, MemoryError()), 0)
    path = tmp_path / "artifacts" / "run.json"
    whole = path.read_bytes()
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(StoredDataError, match=r"run\.json: damaged"):
            budget(tmp_path)


def test_the_record_of_another_schema_version_is_told(tmp_path: Path) -> None:
    budget(tmp_path, fields=FIELDS | {"schema_version": 1}).spend(fails(0, MemoryError()), 0)
    with pytest.raises(FingerprintError, match="schema version 1, and this release writes") as caught:
        budget(tmp_path, fields=FIELDS | {"schema_version": 2})
    assert caught.value.fields == ("schema_version",)

"""Several processes score as one does: the same bytes, whoever of them dies, and nothing stays behind."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pooled
import pytest
import torch
from safetensors.torch import save_file
from tiny_files import Notes, contents, pair_records, token_records, write_jsonl

from alphatoken_curate import CurateError, InputError, ScoreConfig, UsageError, refresh, score
from alphatoken_curate.engine.capture import ScoringModel
from alphatoken_curate.errors import FingerprintError
from alphatoken_curate.progress import Silent
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.atomic import TEMPORARY
from alphatoken_curate.runs.manifest import Plan
from alphatoken_curate.scoring import processes
from alphatoken_curate.scoring.engines import Here
from alphatoken_curate.scoring.pool import AHEAD, Member, Pool
from alphatoken_curate.scoring.processes import CARDS, Local, cards_of
from alphatoken_curate.scoring.reference import ReferencePass
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.spawned import environment, portable
from alphatoken_curate.scoring.spec import ScorerSpec
from alphatoken_curate.scoring.worker import Stage, Task


@pytest.fixture
def settings(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    return {
        "data": write_jsonl(tmp_path / "rows.jsonl", token_records(42, longest=18)),
        "target": write_jsonl(tmp_path / "target.jsonl", token_records(40, seed=5)),
        "model": models["tuned"],
        "reference": models["base"],
        "rows_per_shard": 7,
        "batch_tokens": 200,
        "threads": 1,
        "precondition": "adam",
        "fisher_rows": 40,
    }


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv(pooled.MARKS, str(folder))
    return folder


def everyone_dies_once(patch: pytest.MonkeyPatch) -> None:
    """A worker in each stage, at its first task."""
    for name in ("losses", "fisher"):
        patch.setattr(ReferencePass, name, getattr(pooled, name))
    for name in ("gradient", "moments", "score"):
        patch.setattr(ShardScorer, name, getattr(pooled, name))


@pytest.mark.long
def test_workers_that_die_in_each_stage_change_no_byte(
    settings: dict[str, Any], tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, notes, engine = score(ScoreConfig(**settings), tmp_path / "one"), Notes(), Local(2)
    with monkeypatch.context() as patch:
        everyone_dies_once(patch)
        two = score(ScoreConfig(**settings), tmp_path / "two", notes, engine)
    assert {path.name for path in marks.iterdir()} == {"losses", "fisher", "gradient", "moments", "score"}
    assert two.shards_scored == one.shards_scored == 6 and not notes.warnings
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert not engine._members
    tokens = dict(notes.stages)
    assert all(notes.done[name] >= tokens[name] > 0 for name in ("reference losses", "scoring"))


@pytest.mark.long
def test_memory_that_runs_out_for_a_shard_is_its_own_matter(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardScorer, "score", pooled.scored_short_of_memory)
    settings["batch_tokens"], notes = 400, Notes()
    one = score(ScoreConfig(**settings), tmp_path / "one")
    score(ScoreConfig(**settings), tmp_path / "two", notes, Local(2))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    told = [f"Memory ran out: --batch-tokens is halved to {tokens} for shard 1." for tokens in (200, 100)]
    assert notes.warnings == told
    plans = [Plan(batch_tokens=100, halvings=2) if n == 1 else Plan(batch_tokens=400) for n in range(6)]
    assert list(one.manifest.generations[0].plan) == plans


@pytest.mark.long
def test_a_shard_that_always_kills_is_named_and_the_others_are_kept(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ShardScorer, "score", pooled.scored_but_one)
        with pytest.raises(CurateError, match=r"shard 1: its worker was killed by SIGKILL, 3 times\. All else is kept"):
            score(ScoreConfig(**settings), run, engine=Local(2))
    assert sorted(shards.listed(shards.values_folder(run, 0))) == [0, 2, 3, 4, 5]
    assert not [path for path in run.rglob("*") if TEMPORARY.fullmatch(path.name)]
    assert score(ScoreConfig(**settings), run).shards_scored == 1  # goes on in one process
    score(ScoreConfig(**settings), tmp_path / "whole")
    assert contents(run) == contents(tmp_path / "whole")


@pytest.mark.long
def test_what_a_worker_refuses_is_refused_here(settings: dict[str, Any], tmp_path: Path) -> None:
    save_file({"another": torch.zeros(2, 2)}, tmp_path / "fisher.safetensors")
    settings |= {"fisher": str(tmp_path / "fisher.safetensors")}
    with pytest.raises(UsageError, match="it has no tensor") as caught:
        score(ScoreConfig(**settings), tmp_path / "run", engine=Local(2))
    assert caught.value.__notes__ and "In a worker" in caught.value.__notes__[0]


def test_errors_of_workers_can_be_handed_over() -> None:
    import pickle

    for error in (
        InputError("a"),
        FingerprintError("b", ("model",), {"model": "x"}),
        ZeroDivisionError("c"),
        pickle.PicklingError("d"),
        KeyError(threading.Lock()),
    ):
        found = pickle.loads(pickle.dumps(portable(error)))
        kind = RuntimeError if isinstance(error, pickle.PicklingError | KeyError) else type(error)
        assert type(found) is kind and str(error) in str(found) and "In a worker" in found.__notes__[0]
        if isinstance(error, FingerprintError):
            assert (found.fields, found.stored) == (("model",), {"model": "x"})


@pytest.mark.long
def test_what_a_worker_cannot_hand_over_is_an_error_that_names_it(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardScorer, "score", pooled.scored_but_kept)
    told = r"shard 0: a worker cannot hand over what came of it \(cannot pickle '_thread\.lock' object\)\."
    with pytest.raises(CurateError, match=told):
        score(ScoreConfig(**settings), tmp_path / "run", engine=Local(1))


def test_what_cannot_be_sent_is_told_and_a_closed_pipe_is_one() -> None:
    ours, theirs = multiprocessing.Pipe()
    [task] = numbered(1, in_order=False).tasks
    processes._say(theirs, ("done", threading.Lock()), task)
    what, told = ours.recv()
    assert what == "failed" and str(told).startswith("task 0: a worker cannot hand over what came of it (cannot pickle")
    ours.close()
    with pytest.raises(BrokenPipeError):
        processes._say(theirs, ("done", 1), task)


class LastFirst(Pool[int]):
    """Workers of which that with the last task is done first; those at task `deadly` die. Nothing is computed."""

    def __init__(self, workers: int, deadly: int | None = None) -> None:
        super().__init__(workers)
        self.deadly, self._workers, self._beginning = deadly, workers, cast("Any", object())
        self.given: list[int] = []

    def device(self, name: str) -> str:
        return name

    def sharing(self) -> int:
        return 1

    def _most(self, _: Any) -> int:
        return 1

    def _start(self, _: Any) -> int:
        return len(self._members)

    def _hand(self, member: Member[int], message: Any) -> None:
        assert member.task is not None
        self.given.append(member.task[0])

    def _hear(self) -> Iterator[tuple[Member[int], str, Any]]:
        for member in [one for one in self._members if not one.ready]:
            yield member, "ready", None
        busy = {one.task[0]: one for one in self._members if one.task is not None}
        last = self.deadly if self.deadly in busy else max(busy, default=None)
        if last is not None:
            yield busy[last], *(("died", "was lost") if last == self.deadly else ("done", last))

    def _stop(self, members: Any) -> None:
        pass


def numbered(count: int, *, in_order: bool) -> Stage:
    tasks = [Task(what=f"task {n}", call=numbered, arguments=(), plan=Plan(batch_tokens=1)) for n in range(count)]
    return Stage(name="numbers", tokens=0, of="model", tasks=tasks, in_order=in_order)


def test_what_is_wanted_in_order_does_not_pile_up_behind_a_slow_task() -> None:
    engine, done = LastFirst(3), set[int]()
    held = 0
    for n, _ in engine.run(numbered(40, in_order=True), Silent()):
        done.add(n)
        first = min(set(range(41)) - done)
        assert max(engine.given) <= first + 3 * AHEAD
        held = max(held, sum(one > first for one in done))
    assert done == set(range(40)) and held == 3 * AHEAD
    engine = LastFirst(3)
    assert [n for n, _ in engine.run(numbered(40, in_order=False), Silent())][-1] == 0


@pytest.mark.parametrize("in_order", [True, False])
def test_a_task_that_is_lost_ends_what_is_wanted_in_order(in_order: bool) -> None:
    engine, done = LastFirst(3, deadly=5), set[int]()
    with pytest.raises(CurateError, match="task 5: its worker was lost, 3 times"):
        for n, _ in engine.run(numbered(40, in_order=in_order), Silent()):
            done.add(n)
    assert (done == set(range(40)) - {5}) is not in_order
    assert engine.given.count(5) == 3


def test_batches_that_were_halved_before_the_shards_are_made_again_so(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in other batches round otherwise, so that what was halved is written down, and begun with."""
    settings, one = settings | {"precondition": "none"}, tmp_path / "one"
    with monkeypatch.context() as patch:
        patch.setattr(ShardScorer, "gradient", pooled.gradient_short_of_memory)
        score(ScoreConfig(**settings), tmp_path / "two")
        patch.setattr(ShardScorer, "score", pooled.scored_but_kept)
        with pytest.raises(TypeError):
            score(ScoreConfig(**settings), one)
    plans = json.loads((one / "artifacts" / "run.json").read_text())["tasks"]
    assert plans == {"the target gradient, part 1": {"batch_tokens": 100, "halvings": 1}}
    made = one / "artifacts" / "target-00000.safetensors"
    before = made.read_bytes()
    made.unlink()
    score(ScoreConfig(**settings), one)
    assert made.read_bytes() == before and contents(one) == contents(tmp_path / "two")


_SCRIPT = """
import sys
import pooled
from alphatoken_curate.cli.main import main
from alphatoken_curate.scoring.scorer import ShardScorer
if __name__ == "__main__":
    ShardScorer.score = pooled.scored_never
    sys.argv[0] = "alphatoken-curate"
    main()
"""


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_command(
    how: signal.Signals, settings: dict[str, Any], tmp_path: Path, marks: Path
) -> None:
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(_SCRIPT)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "data"]
    command = [sys.executable, str(script), "score", settings["data"], "-o", str(run), "--workers=2", *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as began:
        _wait(lambda: len(list(marks.iterdir())) == 2, 120)
        asked = time.monotonic()
        if how == signal.SIGINT:
            os.killpg(began.pid, how)  # as a terminal does: all of them get it
        else:
            began.kill()
        _, told = began.communicate(timeout=60)
    _wait(lambda: not any(_alive(int(path.name)) for path in marks.iterdir()), 15)
    assert time.monotonic() - asked < 15
    if how == signal.SIGINT:
        assert began.returncode == 130 and "Traceback" not in told and "leaked" not in told, told
        assert not [path for path in run.rglob("*") if TEMPORARY.fullmatch(path.name)]
    score(ScoreConfig(**settings), run)
    score(ScoreConfig(**settings), tmp_path / "whole")
    assert contents(run) == contents(tmp_path / "whole")


def _wait(ready: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_takes_the_card_that_fewest_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of one which died, and not the next in turn."""
    monkeypatch.setattr(processes, "cards_of", lambda _: ["4", "7"])
    seen: list[str | None] = []

    class Process:
        def __init__(self, **_: Any) -> None:
            seen.append(os.environ.get(CARDS))

        def start(self) -> None:
            """Nothing."""

    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", Process)
    engine: Any = Local(2)
    beginning: Any = SimpleNamespace(spec=SimpleNamespace(device="cuda"))
    monkeypatch.setattr("multiprocessing.connection.Connection.send", lambda *_: None)
    members = engine._members
    for _ in range(2):
        members.append(Member(engine._start(beginning)))
    del members[1]
    members.append(Member(engine._start(beginning)))
    assert seen == ["4", "7", "7"]


@pytest.mark.long
def test_a_rehearsal_leaves_threads_as_they_were(settings: dict[str, Any], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        changes = {"direction": "rehearsal", "rehearse_lr": 1e-3, "precondition": "none"}
        score(ScoreConfig(**settings | changes), tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.long
def test_a_script_without_a_guard_is_told_of_it(settings: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from alphatoken_curate import ScoreConfig, score\n"
        "from alphatoken_curate.scoring.processes import Local\n"
        f"score(ScoreConfig(**{settings!r}), {str(tmp_path / 'run')!r}, engine=Local(2))\n"
    )
    ended = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert 'must stand below `if __name__ == "__main__":`' in ended.stderr.splitlines()[-1]


ALIKE: dict[str, dict[str, Any]] = {
    "exact": {"estimator": "exact", "target_groups": 4},
    "influence": {"estimator": "influence", "parameters": "all", "precondition": "none"},
    "ekfac": {"precondition": "ekfac", "estimator": "exact+influence"},
    "astra": {"precondition": "astra", "precondition_iterations": 2, "target_groups": 2},
    "generate": {"precondition": "kfac", "fisher": "generate", "fisher_new_tokens": 6},
    "lookahead": {"precondition": "none", "drift": "lookahead", "lookahead_lr": 0.1, "reference": None},
    "rehearsal": {"precondition": "none", "direction": "rehearsal", "rehearse_lr": 1e-3},
}


def _of_kinds() -> Iterator[Any]:
    often = {"sft": ("exact", "influence"), "preference": ("exact",)}
    for name, changes in ALIKE.items():
        for kind, names in often.items():
            marks = pytest.mark.long if name in names else pytest.mark.slow
            yield pytest.param(changes, kind, id=f"{name}-{kind}", marks=marks)


@pytest.mark.parametrize(("changes", "kind"), list(_of_kinds()))
def test_any_number_of_workers_writes_the_same_bytes(
    kind: str, changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= changes
    if kind == "preference":
        settings["data"] = write_jsonl(tmp_path / "pairs.jsonl", pair_records(42))
    runs = {workers: tmp_path / f"run{workers}" for workers in (1, 2, 3)}
    for workers, run in runs.items():
        score(ScoreConfig(**settings), run, engine=None if workers == 1 else Local(workers))
    assert contents(runs[2]) == contents(runs[1]) == contents(runs[3])


@pytest.mark.long
def test_refresh_keeps_its_workers_from_one_checkpoint_to_the_next(
    settings: dict[str, Any], models: dict[str, str], tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        score(ScoreConfig(**settings), tmp_path / name)
    seen: list[set[int | None]] = []
    engine = Local(2)
    for n, model in enumerate((models["base"], models["tuned"])):
        refresh(tmp_path / "one", model)
        refresh(
            tmp_path / "two",
            model,
            engine=engine,
            told=lambda _: seen.append({one.handle.process.pid for one in engine._members}),
        )
        assert manifest.read(tmp_path / "two").generations[-1].generation == n + 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one") and len(seen) == 2 and not engine._members


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1])
def test_a_checkpoint_takes_the_place_of_the_one_before(
    workers: int, settings: dict[str, Any], tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory: two models may be more than a card holds."""
    run, out = tmp_path / "run", tmp_path / "out"
    score(ScoreConfig(**settings), run)
    for n, model in enumerate((settings["reference"], settings["model"])):
        shutil.copytree(model, out / f"checkpoint-{n + 1}")
    monkeypatch.setattr(ShardScorer, "score", pooled.scored_by_one_model)
    plain, beside = ScorerSpec.load, list[int]()

    def load(self: ScorerSpec, source: Any) -> Any:
        beside.append(sum(isinstance(one, ScoringModel) for one in gc.get_objects()))
        return plain(self, source)

    monkeypatch.setattr(ScorerSpec, "load", load)
    gc.collect()
    assert len(refresh(run, out, engine=Local(workers) if workers else Here())) == 2
    assert {path.name for path in marks.iterdir()} == {"checkpoint-1", "checkpoint-2"} and not any(beside)


def test_cards_are_dealt_out_as_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cards_of("cpu") == []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv(CARDS, raising=False)
    assert cards_of("cuda") == ["0", "1", "2"]
    monkeypatch.setenv(CARDS, "4,7")
    assert cards_of("cuda") == ["4", "7"]
    for device in ("cuda:1", "mps"):
        with pytest.raises(UsageError, match=f"--device {device}: workers take cards by themselves"):
            Local(2).device(device)
    with environment({CARDS: "7"}):
        assert os.environ[CARDS] == "7"
    assert os.environ[CARDS] == "4,7"


@pytest.mark.parametrize("workers", [0, -1, 5000])
def test_a_number_of_workers_is_checked(workers: int) -> None:
    with pytest.raises(UsageError, match="--workers"):
        Local(workers)


@pytest.mark.long
def test_this_process_loads_no_model_where_workers_do(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a model was loaded here")

    monkeypatch.setattr(ScoringModel, "__init__", never)
    assert score(ScoreConfig(**settings), tmp_path / "run", engine=Local(1)).shards_scored == 6

"""Actors of a Ray cluster score as one process does: the same bytes, whichever of them or their machines is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pooled
import pytest
import torch
from page_lines import check_lines, lines_of
from safetensors.torch import save_file
from tiny_files import Notes, contents, token_records, write_jsonl

from alphatoken_curate import CurateError, Ray, ScoreConfig, UsageError, score
from alphatoken_curate.cli import workers
from alphatoken_curate.scoring.reference import ReferencePass
from alphatoken_curate.scoring.rehearse import RehearsalScorer
from alphatoken_curate.scoring.scorer import ShardScorer


@pytest.fixture
def settings(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    return {
        "data": write_jsonl(tmp_path / "rows.jsonl", token_records(84, longest=18)),
        "target": write_jsonl(tmp_path / "target.jsonl", token_records(40, seed=5)),
        "model": models["tuned"],
        "reference": models["base"],
        "rows_per_shard": 7,
        "batch_tokens": 200,
        "threads": 1,
        "fisher_rows": 40,
    }


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray, whose workers can import the modules of tests, and which writes nothing into the home folder."""
    monkeypatch.setenv(pooled.MARKS, str(tmp_path / "marks"))
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = pytest.importorskip("ray")
    yield found
    found.shutdown()
    assert not (tmp_path / ".ray").exists()


def test_actors_that_die_change_no_byte(
    ray: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(ScoreConfig(**settings), tmp_path / "one")
    notes = Notes()
    with monkeypatch.context() as patch:
        patch.setattr(ReferencePass, "losses", pooled.losses)
        patch.setattr(ShardScorer, "gradient", pooled.gradient)
        patch.setattr(ShardScorer, "score", pooled.score)
        score(ScoreConfig(**settings), tmp_path / "two", notes, Ray(workers=2))
    assert {path.name for path in (tmp_path / "marks").iterdir()} == {"losses", "gradient", "score"}
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert not [said for said in notes.warnings if "no room for a worker" not in said]  # slow machines say that
    assert not ray.is_initialized()


@pytest.mark.long
def test_a_rehearsal_on_machines_that_go_changes_no_byte(
    ray: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"direction": "rehearsal", "rehearse_lr": 1e-3, "rehearse_seeds": 2, "target_groups": 2, "layers": 1}
    settings["data"] = write_jsonl(tmp_path / "few.jsonl", token_records(20, longest=18))
    score(ScoreConfig(**settings), tmp_path / "one")
    notes = Notes()
    with monkeypatch.context() as patch:
        patch.setattr(RehearsalScorer, "rehearse", pooled.rehearse)
        score(ScoreConfig(**settings), tmp_path / "two", notes, Ray(workers=2))
    assert {path.name for path in (tmp_path / "marks").iterdir()} == {"rehearse 0", "rehearse 1"}
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert 0 < notes.done["rehearsal"] <= dict(notes.stages)["rehearsal"]  # what the dead did is not told


def test_a_shard_that_always_kills_is_named(
    ray: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardScorer, "score", pooled.scored_but_one)
    with pytest.raises(CurateError, match=r"shard 1: its worker was lost \(.*\), 3 times\. All else is kept"):
        score(ScoreConfig(**settings), tmp_path / "run", engine=Ray(workers=2))
    assert len(list((tmp_path / "run").glob("values/*/*.parquet"))) == 11


def test_machines_may_go_and_come(ray: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    score(ScoreConfig(**settings), tmp_path / "one")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    class Changing(Notes):
        """One machine goes, with what its worker is at; then another comes, which is the only one soon."""

        def advance(self, tokens: int) -> None:
            super().advance(tokens)
            if self.stages[-1][0] == "scoring" and nodes:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
                if nodes:
                    cluster.add_node(num_cpus=1)

    try:
        done = score(ScoreConfig(**settings), tmp_path / "two", Changing(), Ray(cluster.address, 2))
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert done.shards_scored == 12 and not nodes
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.long
def test_the_lines_for_ray_make_the_same_run(ray: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    more = {"rows_per_shard": 7, "threads": 1}
    lines = lines_of("ray", tmp_path, settings, **more).replace("--workers 32", "--workers 2")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        there = os.environ | {"RAY_ADDRESS": cluster.address}
        subprocess.run(["bash", "-euc", lines], cwd=tmp_path, env=there, check=True, capture_output=True)
    finally:
        cluster.shutdown()
    check_lines(tmp_path, **more)


def test_what_a_worker_refuses_is_refused_here(ray: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    save_file({"another": torch.zeros(2, 2)}, tmp_path / "fisher.safetensors")
    settings |= {"fisher": str(tmp_path / "fisher.safetensors")}
    with pytest.raises(UsageError, match="it has no tensor"):
        score(ScoreConfig(**settings), tmp_path / "run", engine=Ray(workers=1))


def test_what_a_worker_cannot_hand_over_is_an_error_that_names_it(
    ray: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardScorer, "score", pooled.scored_but_kept)
    with pytest.raises(CurateError, match=r"shard 0: a worker cannot hand over what came of it \(.*lock.*\)"):
        score(ScoreConfig(**settings), tmp_path / "run", engine=Ray(workers=1))


def test_a_cluster_that_the_process_is_connected_to_is_taken_and_stays(
    ray: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    notes = Notes()
    score(ScoreConfig(**settings), tmp_path / "run", notes, Ray("127.0.0.1:1", 1))
    assert ray.is_initialized() and ray.cluster_resources()["CPU"] == 2
    assert any(note.endswith(", cpu, float32") for note in notes.notes)


def test_a_cluster_that_is_not_there_is_told(ray: Any) -> None:
    engine = Ray("127.0.0.1:1", 1)
    with pytest.raises(UsageError, match=r"--engine ray: no cluster at 127\.0\.0\.1:1"):
        engine.device("auto")
    engine.close()


def test_devices_are_those_of_the_cluster() -> None:
    class Cluster:
        cards = 0.0

        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 8.0, "GPU": self.cards}

    engine: Any = Ray()
    engine._cluster = lambda: made
    made = Cluster()
    assert engine.device("auto") == engine.device("cpu") == "cpu"
    with pytest.raises(UsageError, match="--device cuda: the Ray cluster has no card"):
        engine.device("cuda")
    made.cards = 2.0
    assert engine.device("auto") == engine.device("cuda") == "cuda" and engine.device("cpu") == "cpu"
    for name in ("cuda:1", "mps"):
        with pytest.raises(UsageError, match=f"--device {name}: workers take cards by themselves"):
            engine.device(name)


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(signal, "SIGINT", signal.SIGINT)
    with pytest.raises(UsageError, match=r"pip install 'alphatoken-curate\[ray\]'"):
        Ray().device("auto")


def test_engines_of_the_command_line() -> None:
    import click

    def asked(**settings: Any) -> Any:
        return workers.engine_of({"workers": 1, "engine": "local", "ray_address": None} | settings, device)

    device = "auto"

    assert asked() is None and type(asked(workers="auto")).__name__ == "Local"
    assert type(asked(engine="ray")) is type(asked(engine="ray", ray_address="auto")) is Ray
    with pytest.raises(click.UsageError, match="--ray-address goes with --engine ray"):
        asked(ray_address="auto")
    device = "cuda:1"
    assert asked() is None
    for settings in ({"workers": 2}, {"engine": "ray"}):
        with pytest.raises(UsageError, match="--device cuda:1: workers take cards by themselves"):
            asked(**settings)

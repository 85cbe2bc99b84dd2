"""Whole runs with a part of the model elsewhere: every byte of values as without, and what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_adapters import save_adapter
from tiny_files import (
    command,
    contents,
    pair_records,
    plain_llama,
    quiet,
    save_gguf,
    token_records,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from alphatoken_curate import ScoreConfig, UsageError, refresh, scan, score, score_tokens
from alphatoken_curate.runs.shards import shard_name
from alphatoken_curate.scoring.estimate import estimate
from alphatoken_curate.scoring.named import told_of_models
from alphatoken_curate.scoring.processes import Local

TOLD = {"config.yaml", "manifest.json"}
"""Files of a run that say where it computed, or hold the digest of one that does."""

LONG = pytest.mark.long


@pytest.fixture(scope="module")
def files(folder: Path, models: dict[str, str]) -> dict[str, str]:
    rows = {"rows": token_records(9), "task": token_records(4, seed=9), "pairs": pair_records(6)}
    return {**models, **{name: write_jsonl(folder / f"{name}.jsonl", records) for name, records in rows.items()}}


def settings(files: dict[str, str], data: str = "rows", **more: Any) -> dict[str, Any]:
    base = {"model": files["tuned"], "reference": files["base"], "target": files["task"], "data": files[data]}
    return {**base, "layers": 2, "rows_per_shard": 3, "batch_tokens": 64, **more}


def same(one: Path, other: Path) -> None:
    """Every byte but of what says where it was computed, and there nothing else."""
    first, second = contents(one), contents(other)
    assert first.keys() == second.keys() and first.keys() > TOLD
    assert {name for name in first if first[name] != second[name]} <= TOLD
    told = [yaml.safe_load((run / "config.yaml").read_text()) for run in (one, other)]
    assert {name for name in told[0] if told[0][name] != told[1][name]} <= {"trunk_device", "device"}


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("data", "more"),
    [
        ("rows", {}),
        ("pairs", {"estimator": "exact+influence"}),
        *(
            pytest.param(*case, marks=LONG)
            for case in (
                ("rows", {"estimator": "influence", "precondition": "ekfac", "target_groups": 2}),
                ("rows", {"estimator": "influence", "precondition": "astra", "precondition_iterations": 2}),
                ("pairs", {"estimator": "exact", "precondition": "adam", "precondition_stability": True}),
                ("rows", {"fisher": "generate", "fisher_new_tokens": 4, "dtype": "bfloat16"}),
                ("rows", {"drift": "lookahead", "lookahead_lr": 1e-3, "estimator": "exact"}),
                ("pairs", {"retention": "=task", "drift": "weights", "precondition": "kfac"}),
            )
        ),
    ],
)
def test_with_the_trunk_on_disk_every_byte_is_the_same(
    data: str, more: dict[str, Any], files: dict[str, str], tmp_path: Path
) -> None:
    more = {k: files[v[1:]] if isinstance(v, str) and v.startswith("=") else v for k, v in more.items()}
    plain = score(ScoreConfig(**settings(files, data, **more)), tmp_path / "plain")
    moved = score(ScoreConfig(**settings(files, data, **more), trunk_device="disk"), tmp_path / "disk")
    assert plain.shards_scored == moved.shards_scored > 1
    same(plain.run, moved.run)


@pytest.mark.long
@pytest.mark.parametrize("rank", [None, 2])
def test_a_rehearsal_of_the_last_blocks_has_a_trunk(rank: int | None, files: dict[str, str], tmp_path: Path) -> None:
    how = {"direction": "rehearsal", "rehearse_lr": 1e-3, "parameters": "linear", "estimator": "exact+influence"}
    how |= {"rehearse_lora": rank}
    runs = [
        score(ScoreConfig(**settings(files, **how), trunk_device=trunk), tmp_path / str(trunk)).run
        for trunk in (None, "disk")
    ]
    same(*runs)


@pytest.mark.long
def test_a_run_goes_on_with_the_trunk_elsewhere_and_is_scored_again_so(files: dict[str, str], tmp_path: Path) -> None:
    whole = score(ScoreConfig(**settings(files)), tmp_path / "whole").run
    run = score(ScoreConfig(**settings(files), trunk_device="disk"), tmp_path / "run").run
    (run / "manifest.json").unlink()
    (run / "values" / "generation=0" / shard_name(1)).unlink()
    assert score(ScoreConfig(**settings(files), trunk_device="cpu"), run).shards_scored == 1
    same(whole, run)
    (once,) = refresh(whole, files["base"])
    ended = command("refresh", run, "--checkpoint", files["base"], "--trunk-device", "disk")
    assert ended.code == 0, ended.err
    assert scan(run, generation=1).collect().equals(scan(once.run, generation=1).collect())


@pytest.mark.long
def test_an_adapter_is_scored_where_the_run_is_told_of_no_trunk(files: dict[str, str], tmp_path: Path) -> None:
    run = score(ScoreConfig(**settings(files), trunk_device="cpu", device="cpu"), tmp_path / "run").run
    plain = score(ScoreConfig(**settings(files)), tmp_path / "plain").run
    with quiet():
        save_adapter(files["tuned"], tmp_path / "adapter")
    places = ["--base", files["tuned"], "--checkpoint", tmp_path / "adapter"]
    disk = command("refresh", run, *places, "--trunk-device", "disk")
    assert disk.code == 2 and "merged into a model that is on one device" in disk.err
    assert command("refresh", run, *places, "--trunk-device", "none").code == 0
    refresh(plain, tmp_path / "adapter", base=files["tuned"])
    assert scan(run, generation=1).collect().equals(scan(plain, generation=1).collect())


@pytest.mark.long
def test_each_worker_has_its_own(files: dict[str, str], tmp_path: Path) -> None:
    told = settings(files, threads=1)
    plain = score(ScoreConfig(**told), tmp_path / "plain").run
    same(plain, score(ScoreConfig(**told, trunk_device="disk"), tmp_path / "disk", engine=Local(2)).run)


def test_a_gguf_and_bfloat16_files_are_what_they_are(files: dict[str, str], tmp_path: Path) -> None:
    """Weights of bfloat16 that the model has in float32: those of S are read apart, those on disk each time."""
    weights = load_file(f"{files['tuned']}/model.safetensors")
    half = tmp_path / "half"
    with quiet():
        tiny_model("llama", dtype=torch.float32).save_pretrained(half)
    save_file({k: w.bfloat16() for k, w in weights.items()}, half / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("float32", "bfloat16"):
        told = settings(files, model=str(half), reference=None, dtype=dtype)
        runs = [
            score(ScoreConfig(**told, trunk_device=trunk), tmp_path / f"{dtype}-{trunk}").run
            for trunk in (None, "disk")
        ]
        same(*runs)


def test_a_model_that_transformers_dealt_out_is_scored_as_it_is(files: dict[str, str], tmp_path: Path) -> None:
    """What the Python interface is given: hooks of accelerate bring the blocks below S."""
    pytest.importorskip("accelerate")
    names = ("embed_tokens", "rotary_emb", "norm", *(f"layers.{n}" for n in range(4)))
    where = {"lm_head": "cpu"} | {
        f"model.{name}": "disk" if name in ("layers.0", "layers.1") else "cpu" for name in names
    }
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(files["tuned"])
        dealt = AutoModelForCausalLM.from_pretrained(files["tuned"], device_map=where, offload_folder=tmp_path / "off")
    told: dict[str, Any] = {"target": token_records(3, seed=9), "layers": 2, "estimator": "exact"}
    found = [score_tokens(model, token_records(5), **told) for model in (plain, dealt)]
    assert found[0].equals(found[1])
    with pytest.raises(UsageError, match=r"model\.layers\.1\.\S+ is on no device \(meta\)"):
        score_tokens(dealt, token_records(5), **told | {"layers": 3})


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--layers", "all"), "--trunk-device disk with --layers all: no block is left"),
        (("--layers", 4), "--trunk-device with --layers 4: all 4 blocks of LlamaForCausalLM score"),
        (
            ("--parameters", "all", "--estimator", "influence"),
            "--trunk-device disk with --parameters all: ",
        ),
        (("--direction", "rehearsal", "--rehearse-lr", 1e-3), "--trunk-device disk with --layers all"),
        (("--model", "=gguf"), "a GGUF file is unpacked into memory as a whole, so none of it can stay on disk."),
    ],
)
def test_what_has_no_trunk_is_refused_in_one_line(
    flags: tuple[Any, ...], says: str, files: dict[str, str], tmp_path: Path
) -> None:
    gguf = save_gguf(plain_llama(), tmp_path / "m.gguf")
    given = [gguf if flag == "=gguf" else flag for flag in flags]
    model = [] if "--model" in given else ["--model", files["base"]]
    ended = command("score", files["rows"], "-o", tmp_path / "run", "--trunk-device", "disk", *model, *given)
    lines = [line for line in ended.err.splitlines() if says in line]
    assert ended.code == 2 and len(lines) == 1 and "Give" in lines[0]
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_a_gguf_may_be_in_memory_elsewhere(files: dict[str, str], tmp_path: Path) -> None:
    gguf = save_gguf(plain_llama(), tmp_path / "m.gguf")
    told = settings(files, model=gguf, reference=None)
    same(*(score(ScoreConfig(**told, trunk_device=t), tmp_path / str(t)).run for t in (None, "cpu")))


def test_several_devices_are_no_places_of_workers_or_of_rehearsals(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--device cuda:0,cuda:1 with --direction rehearsal: .* Name one\."):
        ScoreConfig(data=("x",), device="cuda:0,cuda:1", direction="rehearsal", rehearse_lr=1e-3)
    ended = command(
        "score", files["rows"], "-o", tmp_path / "run", "--model", files["base"], "--device", "cuda:0,cuda:1"
    )
    if not torch.cuda.is_available():
        assert (
            ended.code == 2 and "--device cuda:0,cuda:1: torch sees no CUDA card here. Use --device cpu." in ended.err
        )


# -------------------------------------------------------------------------------------------------------------- telling


def test_what_is_where_is_told(files: dict[str, str], tmp_path: Path) -> None:
    config = ScoreConfig(**settings(files), trunk_device="disk", device="cpu")
    assert told_of_models(config, "cpu").endswith(", cpu, trunk on disk, float32")
    linear = AutoModelForCausalLM.from_pretrained(files["tuned"]).model.layers[2:]
    matrices = sum(p.numel() for p in linear.parameters() if p.ndim == 2)
    for trunk, where in (("disk", "blocks 1-2 on disk, 3-4 on cpu"), ("cpu", "blocks 1-4 on cpu")):
        found = estimate(replace(config, trunk_device=trunk))[1].placement
        each = f"2 directions of {4 * matrices / 2**20:,.1f} MiB each, beside the weights they move"
        assert found == (f"{where}; embeddings and head on cpu", each)
    ended = command(
        "check", files["rows"], "--model", files["base"], "--layers", 1, "--estimate", "--trunk-device=disk"
    )
    both = (
        "blocks 1-3 on disk, 4 on cpu; embeddings and head on cpu",
        "1 direction of 0.0 MiB each, beside the weights",
    )
    assert f"{'placement':<32}{both[0]}\n{'':32}{both[1]}" in ended.out

"""Rehearsals of preference pairs from files to files: what a run stores against autograd through the DPO training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from daily import daily
from killed import kill
from safetensors.torch import save_file
from tiny import make_row, tiny_model
from tiny_files import NAN_TOKEN, command, contents, pair_records, perturbed, quiet, rows_of, token_records, write_jsonl
from transformers import AutoModelForCausalLM
from unrolled import J, mean_over
from unrolled_pairs import Dpo, Simpo, flat, own_losses

from alphatoken_curate import InputError, ScoreConfig, UsageError, refresh, score, verify
from alphatoken_curate.directions.course import plan_steps
from alphatoken_curate.directions.groups import deal
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.runs import card, manifest
from alphatoken_curate.scoring.courses import optimiser_of
from alphatoken_curate.tokens.tokenise import PairRow

ROWS, TARGET, KEPT = pair_records(9, seed=2), token_records(10, seed=9), token_records(6, seed=5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, a tuned model of a family that computes all of it in the dtype it is given, and rows."""
    folder = tmp_path_factory.mktemp("files")
    base = tiny_model("gpt2", dtype=torch.float32)
    with quiet():
        base.save_pretrained(folder / "base")
        perturbed(tiny_model("gpt2", dtype=torch.float32), scale=0.1).save_pretrained(folder / "tuned")
    with torch.no_grad():
        trainee = Trainee(base, "all", "all")
        names, matrices = [m.parameter for m in trainee.maps], trainee.as_direction(trainee.weights)
        names += [n for n, p in zip(trainee.names, trainee.weights, strict=True) if p not in trainee._matrices]
        save_file({n: torch.zeros_like(w).contiguous() for n, w in zip(names, matrices, strict=True)}, folder / "zeros")
    rows = {"data": ROWS, "target": TARGET, "retention": KEPT}
    made = {name: write_jsonl(folder / f"{name}.jsonl", records) for name, records in rows.items()}
    return made | {name: str(folder / name) for name in ("base", "tuned", "zeros")}


def config(files: dict[str, str], **settings: Any) -> ScoreConfig:
    known = {"data": (files["data"],), "target": files["target"], "model": files["tuned"], "reference": files["base"]}
    known |= {"direction": "rehearsal", "rehearse_lr": 1e-2, "rehearse_rows_per_step": 4, "rehearse_root": 1e-6}
    known |= {"dtype": "float64", "beta": 0.3, "fisher": files["zeros"]}
    return ScoreConfig(**{**known, **settings})


def stored(run: Path, *names: str, generation: int = 0) -> dict[str, np.ndarray]:
    """(N,) of each column, all scored rows, chosen before rejected."""
    frame = pl.read_parquet(run / f"values/generation={generation}/*.parquet").filter(status="scored").sort("row_id")
    both = {name: (frame[f"chosen_{name}"], frame[f"rejected_{name}"]) for name in names}
    return {
        name: np.concatenate([x.drop_nulls().to_numpy() for pair in zip(*both[name], strict=True) for x in pair])
        for name in names
    }


def pairs_of(records: list[dict[str, Any]]) -> list[PairRow]:
    """By hand."""

    def branch(i: int, one: dict[str, Any], name: str) -> Any:
        respond = [t for t, label in enumerate(one[f"{name}_labels"]) if label != -100]
        return make_row(i, one[f"{name}_input_ids"], [(t, t + 1) for t in respond])

    each = enumerate(records)
    return [PairRow(chosen=branch(i, one, "chosen"), rejected=branch(i, one, "rejected")) for i, one in each]


def load(folder: str) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def by_hand(made: ScoreConfig, outcomes: list[J]) -> np.ndarray:
    """-dJ / dw of each outcome, mean over orders, (n, N) float64; losses of the reference are kept in float32."""
    rows, found = pairs_of(ROWS), []
    for order in range(made.rehearse_seeds):
        steps = plan_steps(
            rows, epochs=made.rehearse_epochs, rows_per_step=made.rehearse_rows_per_step, seed=made.seed + order
        )
        kind: Any = Dpo if made.rehearse_simpo is None else partial(Simpo, gamma=made.rehearse_simpo)
        kind = partial(kind, by_weights=True) if made.rehearse_denominator == "sum" else kind
        training = kind(
            model=lambda: load(made.model),
            names=Trainee(load(made.model), made.layers, made.parameters).names,  # type: ignore[arg-type]
            pairs=rows,
            steps=steps,
            optimiser=optimiser_of(made, len(steps)),
            reference=[x.float().double() for x in own_losses(load(made.reference or made.model), rows)],
            beta=made.beta,
        )
        found.append(training.values(outcomes).numpy())
    return np.mean(found, axis=0)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "its own reference": {"reference": None, "rehearse_epochs": 2, "retention": "=retention"},
    "simpo": {"rehearse_simpo": 0.5, "beta": 2.0},
    "simpo by weights": {"rehearse_simpo": 0.0, "beta": 2.0, "rehearse_denominator": "sum", "reference": None},
    "orders": {"rehearse_seeds": 2, "rehearse_optimizer": "sgd", "rehearse_lr": 0.3, "rehearse_clip": 0.2},
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", daily(SETTINGS, ["default", "simpo"]))
def test_a_run_holds_what_autograd_finds_through_the_unrolled_training(
    name: str, files: dict[str, str], tmp_path: Path
) -> None:
    given = {key: files[v[1:]] if str(v).startswith("=") else v for key, v in SETTINGS[name].items()}
    made, run = config(files, **given), tmp_path / "run"
    score(made, run)
    assert not verify(run)
    groups = deal(rows_of(TARGET), 5, seed=0)
    keeps = deal(rows_of(KEPT), 5, seed=0) if made.retention else []
    values = by_hand(made, [mean_over(group) for group in (*groups, *keeps)])
    wanted = {"adapt_influence": _mean(values[:5], groups)}
    if keeps:
        wanted["stab_influence"] = _mean(values[5:], keeps)
    shares = np.array([sum(int(row.response.sum()) for row in group) for group in groups], float)[:, None]
    apart = shares / shares.sum() * (values[:5] - wanted["adapt_influence"])
    wanted["adapt_error"] = np.sqrt((apart**2).sum(axis=0) * 5 / 4)
    for column, found in stored(run, *wanted).items():
        expected = wanted[column]
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-7 * np.abs(expected).max(), err_msg=column)


def _mean(values: np.ndarray, groups: list[list[Any]]) -> np.ndarray:
    """Weighed by tokens."""
    counts = [sum(int(row.response.sum()) for row in group) for group in groups]
    return np.average(values, axis=0, weights=counts)


def test_omega_and_margin_are_of_the_model_as_it_starts(files: dict[str, str], tmp_path: Path) -> None:
    done = score(config(files, layers=1, parameters="linear"), tmp_path / "run")
    pairs = pairs_of(ROWS)
    ours, theirs = (own_losses(load(files[name]), pairs) for name in ("tuned", "base"))
    ratios = np.array([float((b - a).sum()) for a, b in zip(ours, theirs, strict=True)])
    margin = 0.3 * (ratios[0::2] - ratios[1::2])
    frame = pl.read_parquet(tmp_path / "run/values/generation=0/*.parquet").sort("row_id")
    np.testing.assert_allclose(frame["margin"], margin, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(frame["omega"], 0.3 / (1 + np.exp(margin)), rtol=1e-5)
    np.testing.assert_allclose(stored(tmp_path / "run", "nll")["nll"], torch.cat(ours), rtol=1e-6)
    np.testing.assert_allclose(stored(tmp_path / "run", "reference_nll")["reference_nll"], torch.cat(theirs), rtol=1e-6)
    text = (tmp_path / "run" / card.NAME).read_text()
    assert "3 steps of AdamW at 0.01, 4 pairs each" in text and "both are of the model as the training begins" in text
    assert done.manifest.counts.scored == len(ROWS)


def test_paths_are_with_omega_held(files: dict[str, str], tmp_path: Path) -> None:
    """Influence is more than its parts: by what a weight does to omega. One step of SGD says how much."""
    how = {"rehearse_optimizer": "sgd", "rehearse_rows_per_step": 9, "parameters": "linear", "layers": 2}
    score(config(files, **how), tmp_path / "whole")
    score(config(files, **how, estimator="exact+influence"), tmp_path / "parted")
    whole = stored(tmp_path / "whole", "adapt_influence")["adapt_influence"]
    parted = stored(tmp_path / "parted", "adapt_direct", "adapt_upstream", "nll", "reference_nll")
    frame = pl.read_parquet(tmp_path / "parted/values/generation=0/*.parquet").sort("row_id")
    pairs = pairs_of(ROWS)
    lengths = [int(row.response.sum()) for row in flat(pairs)]
    held = parted["adapt_direct"] + parted["adapt_upstream"]
    omega, margin = (np.repeat(frame[name].to_numpy(), 2) for name in ("omega", "margin"))
    # held_t = -omega s_t q_t / P; by omega, s_t (ref_t - l_t) omega (beta - omega) times the sum of s q / P.
    sums = np.add.reduceat(held, np.cumsum([0, *lengths[:-1]])) / omega
    slope = -omega * (0.3 - omega) * np.repeat(sums[0::2] + sums[1::2], 2)
    signs = np.tile([1.0, -1.0], len(pairs))
    moved = np.repeat(signs * slope, lengths) * (parted["reference_nll"] - parted["nll"])
    assert np.abs(moved).max() > 0.01 * np.abs(whole).max() and np.isfinite(margin).all()
    np.testing.assert_allclose(whole - held, moved, atol=1e-5 * np.abs(whole).max())


def test_a_pair_without_a_finite_loss_is_left_out_whole(
    files: dict[str, str], models: dict[str, str], tmp_path: Path
) -> None:
    odd = {"chosen_input_ids": [5, 6, 7, 8], "chosen_labels": [-100, -100, 7, 8]}
    odd |= {"rejected_input_ids": [5, NAN_TOKEN, 7], "rejected_labels": [-100, NAN_TOKEN, 7]}
    data = write_jsonl(tmp_path / "data.jsonl", [*ROWS[:4], odd, *ROWS[4:]])
    given = {"model": models["broken"], "reference": None, "layers": 1, "parameters": "linear", "fisher": "sampled"}
    done = score(config(files, data=(data,), retention=files["retention"], dtype="float32", **given), tmp_path / "run")
    assert (done.manifest.counts.scored, done.manifest.counts.failed) == (len(ROWS), 1)
    frame = pl.read_parquet(tmp_path / "run/values/generation=0/*.parquet")
    assert frame["status"][4] == "failed" and np.isfinite(stored(tmp_path / "run", "value")["value"]).all()
    assert not verify(tmp_path / "run")


@pytest.mark.parametrize(
    "at",
    [
        "after-rename@reference_nll-00001.safetensors",
        pytest.param("after-rename@rehearsal-00000-losses.safetensors", marks=pytest.mark.long),
        pytest.param("after-rename@rehearsal-00000-0-adjoint-0-1.safetensors", marks=pytest.mark.long),
        pytest.param("mid-write@rehearsal-00000-columns.safetensors", marks=pytest.mark.long),
        pytest.param("mid-write@part-00001.parquet", marks=pytest.mark.long),
    ],
)
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    at: str, files: dict[str, str], tmp_path: Path
) -> None:
    made = config(files, layers=1, parameters="linear", rows_per_shard=5)
    score(made, tmp_path / "whole")
    kill(at, lambda: score(made, tmp_path / "run"))
    score(made, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize("reference", ["base", None])
def test_a_checkpoint_is_rehearsed_from_where_it_is(
    reference: str | None, files: dict[str, str], tmp_path: Path
) -> None:
    """Its reference stays that of the run, whether it was another model than the one that was scored or not."""
    settings: dict[str, Any] = {"layers": 1, "parameters": "linear", "rows_per_shard": 5}
    named = None if reference is None else files[reference]
    score(config(files, model=files["base"], reference=named, **settings), tmp_path / "run")
    refresh(tmp_path / "run", files["tuned"])
    score(config(files, **settings), tmp_path / "alone")
    names = ("nll", "reference_nll", "adapt_influence", "stab_influence", "value", "value_error")
    found, wanted = stored(tmp_path / "run", *names, generation=1), stored(tmp_path / "alone", *names)
    for name in names:
        np.testing.assert_array_equal(found[name], wanted[name])
    assert not verify(tmp_path / "run")


def test_a_sum_of_weights_divides_no_training_of_pairs(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--rehearse-denominator sum: .*data\.jsonl holds preference rows"):
        score(config(files, rehearse_denominator="sum"), tmp_path / "run")


def test_beta_is_part_of_what_a_run_is(files: dict[str, str], tmp_path: Path) -> None:
    score(config(files, layers=1, parameters="linear"), tmp_path / "run")
    told = manifest.read(tmp_path / "run").settings
    assert told["beta"] == 0.3 and told["kind"] == "preference" and told["direction"] == "rehearsal"
    ended = command("score", "--config", tmp_path / "run/config.yaml", "--beta", "0.5", "-o", tmp_path / "run")
    assert ended.code == 4 and "beta (0.3 in the run, 0.5 now)" in ended.err


def test_simpo_is_part_of_what_a_run_is_and_told(files: dict[str, str], tmp_path: Path) -> None:
    """A margin of 0 is one, and other than none."""
    how: dict[str, Any] = {"layers": 1, "parameters": "linear", "beta": 2.0}
    score(config(files, **how, rehearse_simpo=0.0), tmp_path / "run")
    assert manifest.read(tmp_path / "run").settings["rehearse_simpo"] == 0.0
    assert "by SimPO with beta 2 and gamma 0" in (tmp_path / "run" / card.NAME).read_text()
    score(config(files, **how), tmp_path / "dpo")
    simpo, dpo = (stored(tmp_path / name, "adapt_influence", "nll") for name in ("run", "dpo"))
    assert not np.allclose(simpo["adapt_influence"], dpo["adapt_influence"], rtol=0.1)
    np.testing.assert_array_equal(simpo["nll"], dpo["nll"])
    ended = command("score", "--config", tmp_path / "dpo/config.yaml", "--rehearse-simpo", "0", "-o", tmp_path / "dpo")
    assert ended.code == 4 and "rehearse_simpo (not set in the run, 0.0 now)" in ended.err


def test_paths_of_simpo_add_up_with_omega_held(files: dict[str, str], tmp_path: Path) -> None:
    """In one step of SGD: direct and upstream are the influence less what a weight does to omega."""
    how: dict[str, Any] = {
        "rehearse_optimizer": "sgd",
        "rehearse_rows_per_step": 9,
        "parameters": "linear",
        "layers": 2,
    }
    how |= {"rehearse_simpo": 0.5, "beta": 2.0, "target_groups": 1}
    score(config(files, **how), tmp_path / "whole")
    score(config(files, **how, estimator="exact+influence"), tmp_path / "parted")
    whole = stored(tmp_path / "whole", "adapt_influence", "nll")
    parted = stored(tmp_path / "parted", "adapt_direct", "adapt_upstream")
    held = parted["adapt_direct"] + parted["adapt_upstream"]
    lengths = np.array([int(row.response.sum()) for row in flat(pairs_of(ROWS))])
    starts = np.cumsum([0, *lengths[:-1]])
    means = -np.add.reduceat(whole["nll"].astype(float), starts) / lengths
    omega = 2.0 / (1 + np.exp(2.0 * (means[0::2] - means[1::2]) - 0.5))
    # held_t = -omega s_t q_t / (P n): by omega s_t (-l_t) omega (beta - omega) / n times the sum of s q / (P n).
    sums = np.add.reduceat(held, starts)
    slope = -(2.0 - omega) * (sums[0::2] + sums[1::2])
    each = np.repeat(slope, 2) * np.tile([1.0, -1.0], len(omega)) / lengths
    moved = np.repeat(each, lengths) * -whole["nll"]
    assert np.abs(moved).max() > 0.01 * np.abs(whole["adapt_influence"]).max()
    atol = 1e-5 * np.abs(whole["adapt_influence"]).max()
    np.testing.assert_allclose(whole["adapt_influence"] - held, moved, atol=atol)


def test_a_loss_of_pairs_is_too_large_by_where_it_began(files: dict[str, str], tmp_path: Path) -> None:
    """One of SimPO has no scale: by a large beta and gamma a pair costs tens of nats from the first step on."""
    how: dict[str, Any] = {"layers": 1, "parameters": "linear", "rehearse_rows_per_step": 1, "rehearse_simpo": 5.0}
    done = score(config(files, **how, beta=30.0, rehearse_lr=1e-9), tmp_path / "run")
    assert done.manifest.counts.scored == len(ROWS)
    with pytest.raises(InputError, match=r"The rehearsal diverges: in step \d of 9 the mean loss is"):
        score(config(files, **how, beta=30.0, rehearse_lr=3.0), tmp_path / "far")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_a_beta_of_dpo_is_warned_of_with_simpo(beta: float, files: dict[str, str], tmp_path: Path) -> None:
    given = {"layers": 1, "parameters": "linear", "limit": 2, "rehearse_simpo": 0.5, "dtype": "float32"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    flags += ["--direction=rehearsal", "--rehearse-lr=0.01", f"--target={files['target']}", f"--model={files['tuned']}"]
    ended = command("score", files["data"], *flags, f"--beta={beta}", "-o", tmp_path / "run")
    assert ended.code == 0 and ("--rehearse-simpo by --beta 0.1: SimPO's margins" in ended.err) == (beta < 1)
    ended = command("export", tmp_path / "run", "--for", "trl", "-o", tmp_path / "export")
    assert ended.code == 0 and "of a training by SimPO" in (tmp_path / "export/README.md").read_text()

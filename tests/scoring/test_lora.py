"""Rehearsed LoRAs from files to files: what a run stores against autograd through the training of peft's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from daily import daily
from killed import kill
from peft_lora import as_ours, names_of, with_lora
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_adapters import save_adapter
from tiny_files import Notes, command, contents, perturbed, quiet, rows_of, token_records, write_jsonl
from torch import Tensor
from transformers import AutoModelForCausalLM
from unrolled import J, mean_over, values_by_autograd

from alphatoken_curate import ModelError, ScoreConfig, refresh, score, verify
from alphatoken_curate.directions.course import plan_steps
from alphatoken_curate.directions.groups import deal
from alphatoken_curate.directions.lora import LoraTrainee
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.models.load import find_model
from alphatoken_curate.models.unmerged import Lora
from alphatoken_curate.scoring.check import check
from alphatoken_curate.scoring.courses import optimiser_of
from alphatoken_curate.scoring.estimate import estimate
from alphatoken_curate.scoring.named import lora_of
from alphatoken_curate.scoring.spec import ScorerSpec

pytest.importorskip("peft")

ROWS, TARGET, KEPT = token_records(9, seed=2), token_records(10, seed=9), token_records(6, seed=5)
MODULES = ["attn.c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, a tuned model and adapters of a family that computes all of it in the dtype it is given, and rows."""
    folder = tmp_path_factory.mktemp("files")
    with quiet():
        tiny_model("gpt2", dtype=torch.float32).save_pretrained(folder / "base")
        perturbed(tiny_model("gpt2", dtype=torch.float32)).save_pretrained(folder / "tuned")
    for name, settings in {
        "adapter": {"r": 2, "lora_alpha": 3},
        "stable": {"r": 2, "lora_alpha": 3, "use_rslora": True},
        "other": {"r": 4},
    }.items():
        save_adapter(folder / "base", folder / name, target_modules=MODULES, fan_in_fan_out=True, **settings)
    maps, draw = Trainee(tiny_model("gpt2", dtype=torch.float32), "all", "linear").maps, torch.Generator()
    save_file({m.parameter: torch.rand(m.weight.shape, generator=draw.manual_seed(1)) for m in maps}, folder / "fisher")
    rows = {"data": ROWS, "target": TARGET, "retention": KEPT}
    made = {name: write_jsonl(folder / f"{name}.jsonl", records) for name, records in rows.items()}
    return made | {name: str(folder / name) for name in ("base", "tuned", "fisher", "adapter", "stable", "other")}


def config(files: dict[str, str], **settings: Any) -> ScoreConfig:
    known = {"data": (files["data"],), "target": files["target"], "model": files["base"], "dtype": "float64"}
    known |= {"direction": "rehearsal", "rehearse_lr": 2e-2, "rehearse_rows_per_step": 4, "rehearse_root": 1e-6}
    return ScoreConfig(**{**known, "fisher": files["fisher"], "rehearse_lora": 2, **settings})


def stored(run: Path, *names: str, generation: int = 0) -> dict[str, np.ndarray]:
    """(N,) of each column, all scored rows."""
    frame = pl.read_parquet(run / f"values/generation={generation}/*.parquet").filter(status="scored").sort("row_id")
    return {name: frame[name].explode().drop_nulls().to_numpy() for name in names}


def load(folder: str) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def drift_by_hand(files: dict[str, str], trainee: LoraTrainee, offset: dict[str, Tensor], *, moved: bool) -> J:
    """1/2 sum F (W - W_ref)^2, the reference `offset` away from what the training began with."""
    fisher = {name: x.double() for name, x in load_file(files["fisher"]).items()}
    first = dict(zip(trainee.names, (w.clone() for w in trainee.weights), strict=True))
    scale = trainee.lora.scale

    def outcome(_: Any, held: dict[str, Tensor]) -> Tensor:
        now, parts = {as_ours(name): x for name, x in held.items()}, []
        for m in trainee.maps:
            product, begun = (scale * x[f"{m.owner}.lora_B"] @ x[f"{m.owner}.lora_A"] for x in (now, first))
            drift = product - (0 if moved else begun) + offset.get(m.owner, 0)
            parts.append((fisher[m.parameter] * drift**2).sum())
        return torch.stack(parts).sum() / 2

    return outcome


def by_hand(files: dict[str, str], made: ScoreConfig, base: str, groups: int, *, moved: bool = False) -> dict[str, Any]:
    """The columns of a run, from the unrolled training of peft's layers beside `base`; and the loss before it."""
    rows, found = rows_of(ROWS), []
    lora = lora_of(made, find_model(made.model))
    targets = deal(rows_of(TARGET), groups, seed=0)
    keeps = deal(rows_of(KEPT), groups, seed=0) if made.retention else []
    for order in range(made.rehearse_seeds):
        trainee = LoraTrainee(load(base), made.layers, lora, seed=made.seed + order)  # type: ignore[arg-type]
        model = with_lora(load(base), trainee)
        steps = plan_steps(rows, epochs=made.rehearse_epochs, rows_per_step=4, seed=made.seed + order)
        outcomes = [mean_over(group) for group in (*targets, *keeps)]
        if not keeps:
            offset = {}
            if made.reference and not moved:
                reference = Trainee(load(made.reference), made.layers, "linear").maps  # type: ignore[arg-type]
                pairs = zip(trainee.maps, reference, strict=True)
                offset = {m.owner: m.weight.detach() - r.weight.detach() for m, r in pairs}
            outcomes.append(drift_by_hand(files, trainee, offset, moved=moved))
        optimiser, summed = optimiser_of(made, len(steps)), made.rehearse_denominator == "sum"
        found.append(values_by_autograd(model, names_of(model), rows, steps, optimiser, outcomes, summed=summed))
        nll = torch.cat([-_log_p(model, row) for row in rows])
    values = np.mean([one.numpy() for one in found], axis=0)
    counts = [sum(int(row.response.sum()) for row in group) for group in (*targets, *keeps)]
    columns = {"adapt_influence": np.average(values[:groups], axis=0, weights=counts[:groups])}
    columns["stab_influence"] = (
        np.average(values[groups:], axis=0, weights=counts[groups:]) if keeps else values[groups]
    )
    return columns | {"nll": nll.detach().numpy()}


def _log_p(model: Any, row: Any) -> Tensor:
    ids, places = torch.from_numpy(row.input_ids).long(), np.flatnonzero(row.response)
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return torch.log_softmax(logits[places - 1], -1).gather(1, ids[places][:, None])[:, 0]


def assert_stored(run: Path, wanted: dict[str, Any], generation: int = 0) -> None:
    found = stored(run, *wanted, generation=generation)
    for column, values in wanted.items():
        np.testing.assert_allclose(found[column], values, rtol=2e-6, atol=2e-7 * np.abs(values).max(), err_msg=column)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "kept, orders": {"retention": "=retention", "rehearse_seeds": 2, "rehearse_denominator": "sum"},
    "alpha, sgd": {"rehearse_lora_alpha": 3.0, "rehearse_optimizer": "sgd", "rehearse_lr": 0.5, "rehearse_clip": 0.2},
    "tuned, last, warm": {"model": "=tuned", "reference": "=base", "layers": 1, "rehearse_warmup": 1},
    "adapter": {"model": "=adapter", "retention": "=retention"},
    "adapter, drift": {"model": "=adapter"},
    "adapter, its base": {"model": "=adapter", "reference": "=base"},
    "rank-stabilised": {"model": "=stable", "rehearse_seeds": 2},
}
_OFTEN = ("kept, orders", "adapter, its base")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", daily(SETTINGS, _OFTEN))
def test_a_run_holds_what_autograd_finds_through_the_training_of_pefts_layers(
    name: str, files: dict[str, str], tmp_path: Path
) -> None:
    given = {key: files[v[1:]] if str(v).startswith("=") else v for key, v in SETTINGS[name].items()}
    made = config(files, target_groups=2, **given)
    assert made.parameters == "linear"
    score(made, tmp_path / "run")
    assert not verify(tmp_path / "run")
    base = files["base"] if made.model in (files["adapter"], files["stable"]) else made.model
    moved = name == "adapter, its base"  # of which the base is the reference: what A and B make is the drift
    assert_stored(tmp_path / "run", by_hand(files, made, base, 2, moved=moved))


@pytest.mark.long
def test_paths_are_stored_along_each_step(files: dict[str, str], tmp_path: Path) -> None:
    score(config(files, layers=2), tmp_path / "whole")
    score(config(files, layers=2, estimator="exact+influence"), tmp_path / "parted")
    whole = stored(tmp_path / "whole", "adapt_influence", "stab_influence")
    paths = ("direct", "causal", "upstream")
    parted = stored(tmp_path / "parted", *(f"{o}_{p}" for o in ("adapt", "stab") for p in paths))
    for one in ("adapt", "stab"):
        wanted = whole[f"{one}_influence"]
        found = parted[f"{one}_direct"] + parted[f"{one}_upstream"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
        assert np.abs(parted[f"{one}_causal"]).max() > 1e-3 * np.abs(wanted).max()


@pytest.mark.parametrize(
    "at",
    [
        pytest.param("mid-write@rehearsal-00000-losses.safetensors", marks=pytest.mark.long),
        pytest.param("after-rename@rehearsal-00000-0-state-1.safetensors", marks=pytest.mark.long),
        "after-rename@rehearsal-00000-0-adjoint-0-1.safetensors",
        pytest.param("mid-write@rehearsal-00000-1-adjoint-0-1.safetensors", marks=pytest.mark.long),
        pytest.param("after-rename@rehearsal-00000-0-values-0.safetensors", marks=pytest.mark.long),
        pytest.param("mid-write@rehearsal-00000-columns.safetensors", marks=pytest.mark.long),
    ],
)
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    at: str, files: dict[str, str], tmp_path: Path
) -> None:
    made = config(files, rehearse_seeds=2, layers=1)
    score(made, tmp_path / "whole")
    kill(at, lambda: score(made, tmp_path / "run"))
    score(made, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    left = [path.name for path in (tmp_path / "run/artifacts").glob("*rehearsal*")]
    assert left == ["rehearsal-00000-columns.safetensors"], "states are gone"


@pytest.mark.long
def test_an_adapter_is_rehearsed_on_from_where_it_is(files: dict[str, str], tmp_path: Path) -> None:
    settings = {"reference": files["base"], "layers": "all", "target_groups": 1}
    score(config(files, **settings), tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(ModelError, match=r"its rank is 4, and that of --rehearse-lora is 2.*with --rehearse-lora 4\."):
        refresh(tmp_path / "run", files["other"])
    assert contents(tmp_path / "run") == before
    refresh(tmp_path / "run", files["adapter"])
    score(config(files, model=files["adapter"], **settings), tmp_path / "alone")
    names = ("nll", "adapt_influence", "stab_influence", "value")
    found, wanted = stored(tmp_path / "run", *names, generation=1), stored(tmp_path / "alone", *names)
    for name in names:
        np.testing.assert_array_equal(found[name], wanted[name])
    assert (found["nll"] != stored(tmp_path / "run", "nll")["nll"]).any()
    assert not verify(tmp_path / "run")


@pytest.mark.long
def test_a_whole_checkpoint_gets_a_new_lora(files: dict[str, str], tmp_path: Path) -> None:
    settings = {"reference": files["base"], "layers": 1}
    score(config(files, **settings), tmp_path / "run")
    refresh(tmp_path / "run", files["tuned"])
    score(config(files, model=files["tuned"], **settings), tmp_path / "alone")
    found, wanted = stored(tmp_path / "run", "value", generation=1), stored(tmp_path / "alone", "value")
    np.testing.assert_array_equal(found["value"], wanted["value"])


@pytest.mark.long
def test_of_a_narrow_model_nothing_is_widened(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With retention rows in place of a Fisher it is never captured; all else is as in float32 but for roundings."""
    given: dict[str, Any] = {"retention": files["retention"], "rehearse_optimizer": "sgd", "rehearse_lr": 0.02}
    score(config(files, dtype="float32", **given), tmp_path / "float32")
    kinds: list[torch.dtype] = []
    plain = ScorerSpec.load

    def load_it(self: ScorerSpec, *given: Any) -> Any:
        model = plain(self, *given)
        kinds.extend(p.dtype for p in model.parameters())
        return model

    monkeypatch.setattr(ScorerSpec, "load", load_it)
    monkeypatch.setattr(ScorerSpec, "capture", lambda *_: pytest.fail("it was captured"))
    score(config(files, dtype="bfloat16", **given), tmp_path / "bfloat16")
    assert set(kinds) == {torch.bfloat16}
    exact, rounded = (stored(tmp_path / d, "nll", "adapt_influence") for d in ("float32", "bfloat16"))
    for name, values in exact.items():
        off = np.linalg.norm(values - rounded[name]) / np.linalg.norm(values)
        assert 1e-5 < off < 0.1, (name, off)


@pytest.mark.long
def test_what_files_have_in_bfloat16_stays_so_and_gives_the_bits_of_float32(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet():
        tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "narrow")
        tiny_model("llama", dtype=torch.bfloat16).float().save_pretrained(tmp_path / "wide")
    given: dict[str, Any] = {"retention": files["retention"], "dtype": "float32", "estimator": "exact+influence"}
    loaded: list[Any] = []
    plain = ScorerSpec.load

    def load_it(self: ScorerSpec, *given: Any) -> Any:
        loaded.append(plain(self, *given))
        assert {p.dtype for p in loaded[-1].parameters()} == {torch.bfloat16 if given[1:] else torch.float32}
        return loaded[-1]

    monkeypatch.setattr(ScorerSpec, "load", load_it)
    for name in ("narrow", "wide"):
        score(config(files, model=str(tmp_path / name), **given), tmp_path / f"run-{name}")
    for model in loaded:  # as it was left
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert model.model.embed_tokens.weight.dtype == model.model.norm.weight.dtype == torch.float32
    one, other = (stored(tmp_path / f"run-{name}", "nll", "value", "adapt_upstream") for name in ("narrow", "wide"))
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


@pytest.mark.long
@pytest.mark.parametrize("estimator", ["influence", "exact"])
def test_a_narrow_model_drifts_by_a_fisher_too(estimator: str, files: dict[str, str], tmp_path: Path) -> None:
    given = {"rehearse_optimizer": "sgd", "rehearse_lr": 0.02, "estimator": estimator, "model": files["adapter"]}
    given |= {"reference": files["base"]}
    for dtype in ("float32", "bfloat16"):
        score(config(files, dtype=dtype, **given), tmp_path / dtype)
    column = "stab_influence" if estimator == "influence" else "stab_direct"
    exact, rounded = (stored(tmp_path / d, column)[column] for d in ("float32", "bfloat16"))
    assert 1e-5 < np.linalg.norm(exact - rounded) / np.linalg.norm(exact) < 0.1


def test_what_was_rehearsed_is_told(files: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--direction", "rehearsal", "--rehearse-lr", "0.02", "--layers", "1", "--rehearse-lora", "2")
    how = ("--target", files["target"], "--model", files["base"], "--fisher", files["fisher"], *flags)
    ended = command("score", files["data"], *how, "--rehearse-lora-alpha", "3", "-o", run)
    assert ended.code == 0, ended.err
    told = "2 steps of AdamW at 0.02, a LoRA of rank 2 and alpha 3, 8 rows each"
    assert told in (run / "README.md").read_text()
    assert told in " ".join(command("stats", run).out.split())
    ended = command("score", files["data"], *how, "-o", run)
    assert ended.code == 4 and "rehearse_lora_alpha (3.0 in the run, not set now)" in ended.err
    for told in (("check",), ("score", "-o", tmp_path / "other")):
        ended = command(*told, files["data"], *how, "--model", files["other"])
        assert ended.code == 2 and "its rank is 4, and that of --rehearse-lora is 2" in ended.err
    assert not (tmp_path / "other").exists() or not contents(tmp_path / "other")


def test_what_it_cannot_stand_beside_is_told_before_a_row_is_read(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet():
        tiny_model("mixtral", dtype=torch.float32).save_pretrained(tmp_path / "experts")
    monkeypatch.setattr("alphatoken_curate.scoring.prepare.Reader", None)
    for made, told in (
        (config(files, model=str(tmp_path / "experts")), r"mlp\.gate is no linear layer of its own"),
        (
            config(files, model=files["adapter"], layers=1),
            r"the adapter stands beside transformer\.h\.0\..* no linear map",
        ),
        (config(files, layers=9), r"--layers 9: the model has 4 decoder blocks\. Give 1 to 4, or all"),
        (ScoreConfig(data=(files["data"],), model=files["base"], layers=9), r"--layers 9: the model has 4 decoder"),
    ):
        with pytest.raises(ModelError, match=told):
            check(made)
        with pytest.raises(ModelError, match=told):
            score(made, tmp_path / "run")
    assert not (tmp_path / "run" / "artifacts").exists()


def test_by_default_alpha_is_twice_the_rank(files: dict[str, str]) -> None:
    assert lora_of(config(files), find_model(files["base"])) == Lora(rank=2, scale=2.0)
    assert lora_of(config(files), find_model(files["adapter"])).scale == 1.5


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["base", "adapter"])
def test_what_it_takes_is_estimated(name: str, files: dict[str, str]) -> None:
    notes = Notes()
    _, found = estimate(config(files, model=files[name], retention=files["retention"], rehearse_rows_per_step=2), notes)
    names = [stage.name for stage in found.stages]
    assert names == [
        "reading rows",
        "loading the model",
        "preparing the rehearsal",
        "losses before the rehearsal",
        "rehearsal: 5 steps there and back",
    ]
    assert all(notes.done[stage] == tokens for stage, tokens in notes.stages)
    assert all(stage.seconds > 0 for stage in found.stages) and "blocks 1-4 on cpu" in found.placement[0]

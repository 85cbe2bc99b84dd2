"""Masks that follow the checkpoints of a training: each epoch trains on the mask of the last one."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from daily import daily
from hand import sft_loss, stored
from small_run import published
from tiny_files import NAN_TOKEN, pair_records, quiet, token_records, write_jsonl
from trainer_runs import NO_CHECKPOINTING, settings, tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from alphatoken_curate import CurateError, FingerprintError, ScoreConfig, mask, refresh, score
from alphatoken_curate.errors import UsageError
from alphatoken_curate.runs import manifest
from alphatoken_curate.trainers import RefreshCallback, WeightedTrainer, as_dataset
from alphatoken_curate.trainers import refresh as module
from alphatoken_curate.trainers.current import CurrentMask

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),  # workers of loaders
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more of them than cores
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"),  # TRL's own call
]

ROWS, BATCH = 8, 4


def scored(folder: Path, models: dict[str, str], kind: str = "sft", records: list[Any] | None = None) -> Path:
    records = records or (token_records(ROWS) if kind == "sft" else pair_records(ROWS))
    data = write_jsonl(folder / f"{kind}.jsonl", records)
    target = write_jsonl(folder / "target.jsonl", token_records(3, seed=5))
    config = ScoreConfig(data=data, target=target, model=models["base"], layers=2, weights="rank")
    return score(config, folder / kind).run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("finished")
    return {kind: scored(folder, models, kind) for kind in ("sft", "preference")}


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished["sft"], tmp_path / "run"))


def model_of(models: dict[str, str]) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float32)


def arguments(out: Path, epochs: int, **more: Any) -> dict[str, Any]:
    return settings(out, 1, BATCH, max_steps=-1, num_train_epochs=epochs, learning_rate=0.3) | {
        "save_strategy": "epoch",
        **more,
    }


def trainer(run: Path, models: dict[str, str], out: Path, callbacks: list[Any], *, epochs: int = 2, **more: Any) -> Any:
    return WeightedTrainer(
        model=model_of(models),
        args=TrainingArguments(**arguments(out, epochs, **more)),
        train_dataset=as_dataset(run, 0),
        callbacks=callbacks,
    )


def of_trl(kind: str, run: Path, models: dict[str, str], out: Path, callbacks: list[Any]) -> Any:
    from trl import DPOConfig, SFTConfig

    from alphatoken_curate.trainers import WeightedDPOTrainer, WeightedSFTTrainer

    own = {**NO_CHECKPOINTING, "max_length": None}
    given = {"model": model_of(models), "train_dataset": as_dataset(run, 0), "processing_class": tokenizer()}
    given["callbacks"] = callbacks
    if kind == "dpo":
        own |= {"beta": 0.3}  # the run's is 0.1
        return WeightedDPOTrainer(args=DPOConfig(**arguments(out, 2, **own)), ref_model=model_of(models), **given)
    if kind == "packed":
        own |= {"packing": True, "max_length": 40}
    return WeightedSFTTrainer(args=SFTConfig(**arguments(out, 2, **own)), **given)


def watched(made: Any) -> list[list[tuple[tuple[int, ...], tuple[float, ...]]]]:
    """By epoch: tokens and weights of all that is trained on, a pair for each sequence."""
    epochs: list[list[tuple[tuple[int, ...], tuple[float, ...]]]] = []
    own = made.training_step

    def looked_at(model: Any, inputs: Any, *rest: Any) -> Any:
        while len(epochs) <= int(made.state.epoch or 0):
            epochs.append([])
        ids, weight = inputs["input_ids"], inputs["loss_weight"]
        if "attention_mask" in inputs:
            lengths = inputs["attention_mask"].sum(1).tolist()
            parts = [(ids[i, :n], weight[i, :n]) for i, n in enumerate(lengths)]
        else:
            starts = [*(inputs["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
            parts = [(ids[0, a:b], weight[0, a:b]) for a, b in itertools.pairwise(starts)]
        epochs[-1] += [(tuple(a.tolist()), tuple(b.tolist())) for a, b in parts]
        return own(model, inputs, *rest)

    made.training_step = looked_at
    return epochs


def expected(run: Path, number: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    rows = stored(run, number)
    branches = ("",) if "input_ids" in rows[0] else ("chosen_", "rejected_")
    return sorted((tuple(row[b + "input_ids"]), tuple(row[b + "loss_weight"])) for row in rows for b in branches)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", daily(["trainer", "workers", "sft", "packed", "dpo"], ["trainer", "dpo"]))
def test_each_epoch_trains_on_the_mask_of_the_last_checkpoint(
    kind: str,
    finished: dict[str, Path],
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(finished["preference" if kind == "dpo" else "sft"], tmp_path / "run"))
    before = Path(shutil.copytree(run, tmp_path / "before"))
    callback = RefreshCallback(run)
    if kind in ("trainer", "workers"):
        made = trainer(run, models, tmp_path / "out", [callback], dataloader_num_workers=int(kind == "workers"))
    else:
        made = of_trl(kind, run, models, tmp_path / "out", [callback])
    epochs = watched(made)
    made.train()
    assert callback.masks == [(0, 0), (1, 1)]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("RefreshCallback: ")]
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert [line.partition(": ")[2] for line in told] == [
        *([f"beta=0.3 trains, and values of {run} are of beta 0.1 (score --beta)"] if kind == "dpo" else []),
        f"mask 0 of {run} is in force from epoch 0 on",
        f"{run} is scored at checkpoint-{steps[0]}",
        f"mask 1 of {run} is in force from epoch 1 on",
        f"{run} is scored at checkpoint-{steps[1]}",
    ]
    assert [sorted(epoch) for epoch in epochs] == [expected(run, 0), expected(run, 1)]
    assert expected(run, 0) != expected(run, 1)
    # Every checkpoint was scored, and as the command would have done it.
    assert len(manifest.read(run).generations) == 3
    first = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    refresh(before, first)
    assert expected(before, 1) == expected(run, 1)


@pytest.mark.long
def test_of_several_checkpoints_in_an_epoch_the_last_gives_the_mask(
    run: Path, models: dict[str, str], tmp_path: Path
) -> None:
    callback = RefreshCallback(run)
    made = trainer(run, models, tmp_path / "out", [callback], save_strategy="steps", save_steps=1)
    epochs = watched(made)
    made.train()
    assert callback.masks == [(0, 0), (1, 2)] and len(manifest.read(run).generations) == 5
    assert sorted(epochs[1]) == expected(run, 2) != expected(run, 1)


@pytest.mark.long
def test_an_epoch_of_streamed_rows_trains_on_the_mask_of_the_last_checkpoint(
    run: Path, models: dict[str, str], tmp_path: Path
) -> None:
    """Where rows have no count, transformers does not say when an epoch ends but by beginning another."""
    callback = RefreshCallback(run)
    steps = {"max_steps": 3 * ROWS // BATCH, "save_strategy": "steps", "save_steps": 1}
    made = trainer(run, models, tmp_path / "out", [callback], **steps)
    made.train_dataset = as_dataset(run, 0).to_iterable_dataset()
    epochs = watched(made)
    made.train()
    assert callback.masks == [(0, 0), (1, 2), (2, 4)]
    trained = list(itertools.chain(*epochs))
    for epoch, number in callback.masks:
        assert sorted(trained[ROWS * epoch : ROWS * (epoch + 1)]) == expected(run, number)


@pytest.mark.long
def test_a_second_training_begins_with_the_newest_mask(run: Path, models: dict[str, str], tmp_path: Path) -> None:
    callback = RefreshCallback(run)
    made = trainer(run, models, tmp_path / "out", [callback], epochs=1)
    made.train()
    assert callback.masks == [(0, 0)]
    made.train()
    assert callback.masks == [(0, 1)]


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in made.model.state_dict().items()}


@pytest.mark.long
def test_a_resumed_training_goes_by_the_mask_of_then(
    run: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of an epoch, by a refresh that fails; the same training in the end."""
    other = Path(shutil.copytree(run, tmp_path / "whole"))
    often = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer(other, models, tmp_path / "through", [RefreshCallback(other)], **often)
    whole.train()
    calls, own = [], module.refreshed

    def failing(*given: Any) -> int:
        calls.append(given)
        if len(calls) == 3:
            raise FingerprintError("nothing is left of it", ("model",))
        return own(*given)

    monkeypatch.setattr(module, "refreshed", failing)
    with pytest.raises(FingerprintError, match="nothing is left"):
        trainer(run, models, tmp_path / "out", [RefreshCallback(run)], **often).train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"checkpoint-{n}" for n in (1, 2, 3)]
    mask(run, published(weights="rank", generation="0,1"))  # the newest by now, and not the one in force
    assert manifest.read(run).masks[-1].mask == 3 and expected(run, 3) != expected(run, 2)
    callback = RefreshCallback(run)
    made = trainer(run, models, tmp_path / "out", [callback], **often)
    epochs = watched(made)
    made.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert callback.masks == [(0, 0), (1, 2)] and len(manifest.read(run).generations) == 5
    in_force = dict(expected(run, 2))
    assert len(epochs[1]) == BATCH and all(in_force[ids] == weight for ids, weight in epochs[1])
    for name, wanted in weights(whole).items():
        assert torch.equal(weights(made)[name], wanted), name


@pytest.mark.long
def test_a_training_resumed_from_an_earlier_checkpoint_takes_that_ones_mask(
    run: Path, models: dict[str, str], tmp_path: Path
) -> None:
    whole = trainer(run, models, tmp_path / "out", [RefreshCallback(run)], epochs=3)
    whole.train()
    assert len(manifest.read(run).generations) == 4
    callback = RefreshCallback(run)
    made = trainer(run, models, tmp_path / "out", [callback], epochs=3)
    made.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert callback.masks == [(0, 0), (1, 1), (2, 2)]
    assert len(manifest.read(run).generations) == 4
    for name, wanted in weights(whole).items():
        assert torch.equal(weights(made)[name], wanted), name


@pytest.mark.long
def test_a_checkpoint_of_another_folder_is_not_taken_for_the_one_resumed_from(
    run: Path, models: dict[str, str], tmp_path: Path
) -> None:
    trainer(run, models, tmp_path / "out", [RefreshCallback(run)], epochs=1).train()
    fork = shutil.copytree(tmp_path / "out", tmp_path / "fork")
    other = Path(shutil.copytree(run, tmp_path / "other"))
    trainer(other, models, tmp_path / "another", [RefreshCallback(other)], epochs=1).train()
    scored = len(manifest.read(run).generations)
    for name in ("another", "none"):
        made = trainer(run, models, tmp_path / name, [RefreshCallback(run)])
        with pytest.raises(UsageError, match=rf"at step 2, but .*{name}/checkpoint-2 is not the checkpoint"):
            made.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert len(manifest.read(run).generations) == scored
    # A copy is as good as it, until it is trained on in another way.
    callback = RefreshCallback(run)
    trainer(run, models, fork, [callback]).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert callback.masks == [(0, 0), (1, 1)] and len(callback.starts) == 2
    trainer(other, models, tmp_path / "out", [RefreshCallback(other)]).train(resume_from_checkpoint=True)
    made = trainer(run, models, fork, [RefreshCallback(run)], epochs=3)
    with pytest.raises(UsageError, match=r"at step 4, but .*fork/checkpoint-4 is not the checkpoint"):
        made.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))


@pytest.mark.long
def test_callback_states_may_be_restored_by_the_trainer(run: Path, models: dict[str, str], tmp_path: Path) -> None:
    trainer(run, models, tmp_path / "out", [RefreshCallback(run)], epochs=2).train()
    made = trainer(
        run, models, tmp_path / "out", [RefreshCallback(run)], epochs=3, restore_callback_states_from_checkpoint=True
    )
    epochs = watched(made)
    made.train(resume_from_checkpoint=True)
    (callback,) = [one for one in made.callback_handler.callbacks if isinstance(one, RefreshCallback)]
    assert callback.masks == [(0, 0), (1, 1), (2, 2)] and sorted(epochs[-1]) == expected(run, 2)


@pytest.mark.long
def test_a_refresh_in_a_process_of_its_own(run: Path, models: dict[str, str], tmp_path: Path) -> None:
    before = Path(shutil.copytree(run, tmp_path / "before"))
    callback = RefreshCallback(run, new_process=True, device="cpu")
    # One checkpoint, in the middle of the first epoch: training goes on meanwhile, and waits at the second.
    made = trainer(run, models, tmp_path / "out", [callback], save_strategy="steps", save_steps=1, max_steps=1)
    made.train()
    assert len(manifest.read(run).generations) == 2
    refresh(before, tmp_path / "out" / "checkpoint-1")
    assert expected(run, 1) == expected(before, 1)


def test_rows_that_a_checkpoint_fails_on_are_told_of(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = token_records(ROWS)
    records[2]["input_ids"][0] = NAN_TOKEN
    run = scored(tmp_path, models, records=records)
    shutil.copytree(models["broken"], tmp_path / "out" / "checkpoint-5")
    where = SimpleNamespace(output_dir=tmp_path / "out")
    callback, told = RefreshCallback(run), f"RefreshCallback: 1 of {ROWS} rows failed in generation 1: "
    callback._begin_refresh(where, SimpleNamespace(global_step=5, is_world_process_zero=True))  # type: ignore[arg-type]
    assert capsys.readouterr().out.count(told) == 1
    # What a process of its own was told is told when it is waited for.
    shutil.rmtree(run)
    run = scored(tmp_path, models, records=records)
    here, there = multiprocessing.Pipe(duplex=False)
    module._tell_refreshed(there, str(run), str(tmp_path / "out" / "checkpoint-5"), callback.models)
    callback._job = (SimpleNamespace(join=lambda: None), here)
    callback._finish()
    assert capsys.readouterr().out.count(told) == 1 and callback._made == 1


@pytest.mark.slow
def test_a_reader_that_went_away_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(module.tqdm, "write", gone)
    module._tell(SimpleNamespace(is_world_process_zero=True), "a line")  # type: ignore[arg-type]


@pytest.mark.long
def test_what_fails_in_a_process_of_its_own_fails_the_training(
    run: Path, models: dict[str, str], tmp_path: Path
) -> None:
    wrong = RefreshCallback(run, new_process=True, reference=models["tuned"])
    made = trainer(run, models, tmp_path / "out", [wrong])
    with pytest.raises(CurateError, match=r"in a process of its own failed: FingerprintError: .*not the reference"):
        made.train()
    assert made.state.epoch == 1  # it had to wait where the mask was needed


@pytest.mark.long
def test_a_process_tells_what_went_wrong(run: Path, models: dict[str, str]) -> None:
    here, there = multiprocessing.Pipe(duplex=False)
    named = {"base": None, "reference": models["tuned"], "device": None}
    with pytest.raises(FingerprintError):
        module._tell_refreshed(there, str(run), models["base"], named)
    made, problem, warned = here.recv()
    assert made is None and problem.startswith("FingerprintError: ") and "not the reference" in problem
    assert warned == []


@pytest.mark.long
def test_random_draws_of_the_training_are_left_alone(
    run: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, states = module.refreshed, []

    def looked_at(*given: Any) -> int:
        states.append(torch.get_rng_state())
        made = own(*given)
        states.append(torch.get_rng_state())
        return made

    monkeypatch.setattr(module, "refreshed", looked_at)
    trainer(run, models, tmp_path / "out", [RefreshCallback(run)], epochs=1).train()
    assert len(states) == 2 and torch.equal(*states)


@pytest.mark.long
def test_rows_to_evaluate_on_keep_their_own_weights(
    run: Path, finished: dict[str, Path], models: dict[str, str], tmp_path: Path
) -> None:
    made = trainer(run, models, tmp_path / "out", [RefreshCallback(run)], per_device_eval_batch_size=ROWS)
    made.train()
    found = made.evaluate(as_dataset(finished["sft"], 0))["eval_loss"]
    assert abs(found - sft_loss(made.model, stored(finished["sft"], 0), "count").item()) < 1e-6


@pytest.mark.long
def test_what_would_go_on_with_an_old_mask_is_refused(run: Path, models: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = Trainer(
        model=model_of(models),
        args=TrainingArguments(**arguments(out, 1)),
        train_dataset=as_dataset(run).remove_columns("loss_weight"),
        callbacks=[RefreshCallback(run)],
    )
    with pytest.raises(UsageError, match="this trainer would go on with the old ones"):
        plain.train()
    for more, says in (
        ({"save_strategy": "no"}, "save_strategy='no'"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "dataloader_persistent_workers"),
    ):
        with pytest.raises(UsageError, match=says):
            trainer(run, models, out, [RefreshCallback(run)], **more).train()
    with pytest.raises(UsageError, match="save_total_limit=1"):
        trainer(run, models, out, [RefreshCallback(run, new_process=True)], save_total_limit=1).train()
    best = trainer(run, models, out, [RefreshCallback(run, new_process=True)], save_total_limit=2)
    best.args.load_best_model_at_end = True
    with pytest.raises(UsageError, match="save_total_limit=2 beside the best model: it deletes what is being scored"):
        best.train()
    trainer(run, models, out, [RefreshCallback(run)], save_total_limit=1).train()


@pytest.mark.long
def test_reference_log_probabilities_of_the_first_mask_are_refused(
    finished: dict[str, Path], models: dict[str, str], tmp_path: Path
) -> None:
    from trl import DPOConfig

    from alphatoken_curate.trainers import WeightedDPOTrainer

    run = finished["preference"]
    own = {**NO_CHECKPOINTING, "max_length": None, "precompute_ref_log_probs": True}
    made = WeightedDPOTrainer(
        model=model_of(models),
        args=DPOConfig(**arguments(tmp_path, 1, **own)),
        train_dataset=as_dataset(run),
        processing_class=tokenizer(),
        callbacks=[RefreshCallback(run)],
    )
    with pytest.raises(UsageError, match="precompute_ref_log_probs: they are of the first mask"):
        made.train()


@pytest.mark.long
def test_rows_of_another_run_are_refused(run: Path) -> None:
    current = CurrentMask(run)
    row = {"row_id": 0, "input_ids": stored(run, 0)[0]["input_ids"]}
    with pytest.raises(UsageError, match="has no row 0"):
        current([row])
    current.use(0)
    assert current([row])[0]["loss_weight"] == stored(run, 0)[0]["loss_weight"]
    cut = current([{**row, "input_ids": row["input_ids"][:3]}])[0]
    assert cut["loss_weight"] == stored(run, 0)[0]["loss_weight"][:3]
    for wrong, says in (
        ({"row_id": ROWS, "input_ids": [4]}, f"has no row {ROWS}"),
        ({**row, "row_id": 1}, "row 1: its input_ids are not those"),
        ({"input_ids": [4]}, "has no row_id"),
        ({"row_id": 0}, "row 0 has no input_ids"),
    ):
        with pytest.raises(UsageError, match=says):
            current([wrong])


@pytest.mark.long
def test_a_row_that_a_checkpoint_could_not_score_trains_nothing(tmp_path: Path) -> None:
    from dataclasses import replace

    from small_run import small_run, value_rows, write_generation

    rows = value_rows()
    run = small_run(tmp_path / "run", rows)
    failed = [
        replace(row, status="failed", branches=tuple(replace(b, signals={}) for b in row.branches)) for row in rows[:1]
    ]
    write_generation(run, [*failed, *rows[1:]], number=1)
    manifest.write(run, manifest.rebuild(run))
    mask(run, published())
    current = CurrentMask(run)
    current.use(1)
    ids = stored(run, 0)[0]["input_ids"]
    found = current([{"row_id": 0, "input_ids": ids}])[0]
    assert found["labels"] == [-100] * len(ids) and found["loss_weight"] == [0.0] * len(ids)

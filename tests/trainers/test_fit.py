"""A model for one tokenizer: rows are ids, and a model of other tokens would be trained on them without a word."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from tiny import tiny_model
from tiny_files import command, contents, token_records, write_jsonl
from torch.utils.data import ChainDataset, ConcatDataset, Subset, random_split
from trainer_runs import NO_CHECKPOINTING, WORDS, settings, step, tiny, tokenizer, train_run
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, SFTConfig
from two_tokenizers import TEXTS, byte_level, load, padded, save_model, text_run

from alphatoken_curate import ModelError, ScoreConfig, score
from alphatoken_curate.errors import UsageError
from alphatoken_curate.trainers import (
    RefreshCallback,
    TrainDataset,
    WeightedDPOTrainer,
    WeightedLossMixin,
    WeightedSFTTrainer,
    WeightedTrainer,
    as_dataset,
)
from alphatoken_curate.trainers.fit import check_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")

SWAPPED = [*WORDS[:7], "x", *WORDS[8:]]


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("homes")
    return {name: save_model(folder / name, byte_level(TEXTS[name])) for name in TEXTS}


@pytest.fixture(scope="module")
def run(homes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_run(tmp_path_factory.mktemp("run"), homes["english"])


def weighted(model: Any, rows: Any, out: Path, *, kind: Any = WeightedTrainer, **more: Any) -> Any:
    return kind(model=model, args=TrainingArguments(**settings(out, 1, 4)), train_dataset=rows, **more)


# --- the tokenizer


def test_the_model_that_was_scored_is_trained(run: Path, homes: dict[str, Path], tmp_path: Path) -> None:
    rows = as_dataset(run)
    step(weighted(load(homes["english"]), rows, tmp_path))
    step(weighted(load(homes["english"]), rows, tmp_path, processing_class=byte_level(TEXTS["english"])))
    model, grown = load(homes["english"]), padded(byte_level(TEXTS["english"]))
    model.resize_token_embeddings(400, mean_resizing=False)
    step(weighted(model, rows, tmp_path, processing_class=grown))
    step(weighted(model, TrainDataset(run), tmp_path, processing_class=grown))


def test_another_model_is_refused_by_the_folder_it_is_from(run: Path, homes: dict[str, Path], tmp_path: Path) -> None:
    wanted = rf"{homes['numbers']}: not the tokenizer of {run}, whose rows are tokens of english: token \d+ is"
    for rows in (as_dataset(run), TrainDataset(run)):
        with pytest.raises(ModelError, match=wanted):
            weighted(load(homes["numbers"]), rows, tmp_path)
    # The tokenizer that is handed over is right, the model is not.
    with pytest.raises(ModelError, match=wanted):
        weighted(load(homes["numbers"]), as_dataset(run), tmp_path, processing_class=byte_level(TEXTS["english"]))
    with pytest.raises(ModelError, match=wanted):
        weighted(load(homes["numbers"]), None, tmp_path, eval_dataset={"held out": as_dataset(run)})


def test_another_tokenizer_is_refused(run: Path, homes: dict[str, Path], tmp_path: Path) -> None:
    other = byte_level(TEXTS["numbers"])
    with pytest.raises(ModelError, match=r"the tokenizer that was given: not the tokenizer of .* score the rows again"):
        weighted(
            tiny_model("llama", dtype=torch.float32, vocab_size=320), as_dataset(run), tmp_path, processing_class=other
        )
    for make in (as_dataset, TrainDataset):
        assert make(run, tokenizer=padded(byte_level(TEXTS["english"]))) is not None
        with pytest.raises(ModelError, match="not the tokenizer of"):
            make(run, tokenizer=other)
    with pytest.raises(ModelError, match="not the tokenizer of"):
        weighted(
            load(homes["english"]),
            as_dataset(run),
            tmp_path,
            kind=type("Own", (WeightedLossMixin, Trainer), {}),
            processing_class=other,
        )


def test_trl_loads_a_tokenizer_by_itself(run: Path, homes: dict[str, Path], tmp_path: Path) -> None:
    args = SFTConfig(**settings(tmp_path, 1, 4, max_length=None, **NO_CHECKPOINTING))
    step(WeightedSFTTrainer(load(homes["english"]), args=args, train_dataset=as_dataset(run)))
    with pytest.raises(ModelError, match=rf"{homes['numbers']}: not the tokenizer of"):
        WeightedSFTTrainer(load(homes["numbers"]), args=args, train_dataset=as_dataset(run))
    packed = SFTConfig(**settings(tmp_path, 1, 4, max_length=64, packing=True, padding_free=False, **NO_CHECKPOINTING))
    with pytest.raises(ModelError, match="not the tokenizer of"):
        WeightedSFTTrainer(load(homes["numbers"]), args=packed, train_dataset=as_dataset(run))


def test_pairs_too(tmp_path: Path) -> None:
    rows = as_dataset(train_run(tmp_path / "run", kind="preference"))
    args = DPOConfig(**settings(tmp_path, 1, 4, max_length=None, **NO_CHECKPOINTING))
    made = {"ref_model": tiny(), "args": args, "train_dataset": rows}
    assert WeightedDPOTrainer(tiny(), processing_class=tokenizer(), **made) is not None
    with pytest.raises(ModelError, match="token 7 is '<7>' there and 'x' here"):
        WeightedDPOTrainer(tiny(), processing_class=tokenizer(SWAPPED), **made)


def test_rows_know_their_run_wherever_datasets_takes_them(tmp_path: Path) -> None:
    rows = as_dataset(train_run(tmp_path / "run"))
    parts = rows.train_test_split(0.5, seed=1)
    ways = {
        "mapped": rows.map(lambda row: {"length": len(row["input_ids"])}),
        "drawn": rows.shuffle(seed=3).select(range(4)),
        "split": parts["train"],
        "cut": as_dataset(tmp_path / "run", max_length=6),
        "put together": concatenate_datasets([rows, Dataset.from_list([rows[0]], features=rows.features)]),
        "kept": _kept(rows, tmp_path / "kept"),
    }
    for name, found in ways.items():
        with pytest.raises(ModelError, match="token 7 is '<7>' there"):
            weighted(tiny(), found, tmp_path, processing_class=tokenizer(SWAPPED))
            pytest.fail(name)
    rows = ways["kept"]
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")  # then its ids are all there is to go by
    assert weighted(tiny(), rows, tmp_path, processing_class=tokenizer(SWAPPED)) is not None


def test_rows_are_looked_for_in_what_wraps_them(tmp_path: Path) -> None:
    rows = as_dataset(train_run(tmp_path / "run"))
    bare = Dataset.from_list([rows[0]], features=rows.features)
    stream = rows.to_iterable_dataset(num_shards=2)
    ways: dict[str, Any] = {
        "a part": Subset(rows, [0, 1]),
        "a part of a part": Subset(Subset(rows, [0, 1]), [0]),
        "split": random_split(rows, [1, len(rows) - 1])[0],
        "put together": ConcatDataset([bare, Subset(rows, [0])]),
        "one behind the other": ChainDataset([stream]),
        "streamed": stream,
        "streamed and changed": stream.shuffle(seed=1).map(lambda row: row).filter(lambda row: True).take(3),
        "streamed in turn": interleave_datasets([bare.to_iterable_dataset(), stream]),
    }
    for name, found in ways.items():
        with pytest.raises(ModelError, match="token 7 is '<7>' there"):
            check_model(tiny(), tokenizer(SWAPPED), found)
            pytest.fail(name)
        check_model(tiny(), tokenizer(), found)
    with pytest.raises(ModelError, match="token 7 is '<7>' there"):
        weighted(tiny(), ways["a part"], tmp_path, processing_class=tokenizer(SWAPPED))
    for odd in (IterableDataset.from_generator(_one_row), type("Own", (), {"dataset": "tulu"})(), None):
        check_model(tiny(), tokenizer(SWAPPED), odd)


def _one_row() -> Iterator[dict[str, Any]]:
    yield {"input_ids": [1]}


def _kept(rows: Dataset, folder: Path) -> Dataset:
    rows.save_to_disk(folder)
    return Dataset.load_from_disk(folder)


# --- the embeddings


def test_where_no_tokenizer_is_known_embeddings_must_be_enough(models: dict[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", token_records(9))
    run = score(ScoreConfig(data=data, model=models["base"], layers=1), tmp_path / "run").run
    largest = max(max(row["input_ids"]) for row in as_dataset(run))
    few = {size: tiny_model("qwen2", dtype=torch.float32, vocab_size=size) for size in (largest, largest + 1)}
    step(weighted(few[largest + 1], as_dataset(run), tmp_path))
    wanted = rf"Qwen2ForCausalLM: its embeddings are of {largest} tokens, and the rows of .*run, .* use token {largest}"
    for rows in (as_dataset(run), TrainDataset(run)):
        with pytest.raises(UsageError, match=wanted):
            weighted(few[largest], rows, tmp_path)
    bare = Dataset.from_list([dict(row) for row in as_dataset(run)])  # an export, say
    with pytest.raises(UsageError, match=rf"of {largest} tokens, and the rows use token {largest}\. Train the model"):
        weighted(few[largest], bare, tmp_path)
    listed = [dict(row) for row in as_dataset(run)]
    for rows in (listed, Subset(listed, [0]), {"a": listed}, [{"input_ids": torch.tensor([1, largest])}]):
        with pytest.raises(UsageError, match=rf"and the rows use token {largest}\. Train the model"):
            weighted(few[largest], rows, tmp_path)
    for odd in ([], [3], [{"text": "a"}], [{"input_ids": "a"}], [*listed, None]):  # nothing to look at
        assert weighted(few[largest], odd, tmp_path) is not None


# --- rounds


def test_a_refresh_at_each_checkpoint_begins_with_the_same_look(
    run: Path, homes: dict[str, Path], tmp_path: Path
) -> None:
    rows = Dataset.from_list([dict(row) for row in as_dataset(run)])  # which does not know its run
    args = TrainingArguments(**settings(tmp_path, 1, 4, save_strategy="epoch"))
    made = WeightedTrainer(
        model=load(homes["numbers"]), args=args, train_dataset=rows, callbacks=[RefreshCallback(run)]
    )
    with pytest.raises(ModelError, match=rf"{homes['numbers']}: not the tokenizer of"):
        made.train()
    assert made.state.global_step == 0


def test_a_checkpoint_with_another_tokenizer_is_not_scored(run: Path, homes: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = contents(copy)
    ended = command("refresh", copy, "--checkpoint", homes["numbers"])
    assert ended.code == 2 and "numbers: not the tokenizer of" in ended.err and "score --model" in ended.err
    assert contents(copy) == before
    same = Path(shutil.copytree(homes["english"], tmp_path / "same"))
    padded(byte_level(TEXTS["english"])).save_pretrained(same)
    assert command("refresh", copy, "--checkpoint", same).code == 0
    (same / "tokenizer.json").write_text("{")  # rows are tokens: it is not needed
    assert command("refresh", copy, "--checkpoint", same).code == 0
    bare = Path(shutil.copytree(homes["numbers"], tmp_path / "bare"))
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert command("refresh", copy, "--checkpoint", bare).code == 0

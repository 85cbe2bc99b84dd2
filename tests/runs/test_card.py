from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import published, small_run, value_row, value_rows, write_generation

from alphatoken_curate import scan
from alphatoken_curate.masks.remask import make_mask
from alphatoken_curate.runs import card, manifest
from alphatoken_curate.runs.schema import BY_ESTIMATOR, LAYOUTS, SIGNALS, components
from alphatoken_curate.trainers import as_dataset


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "a")


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_load_dataset_reads_the_folder_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    run, layout = small_run(tmp_path / "a", kind=kind), LAYOUTS[kind]
    made = make_mask(run, published(keep=0.2))
    card.write(run, manifest.read(run))
    cache = str(tmp_path / "cache")
    train = datasets.load_dataset(str(run), split="train", cache_dir=cache)
    assert train.column_names == layout.train.names
    kept = sum(sum(map(sum, train[prefix + "loss_mask"])) for prefix in layout.branches)
    assert kept == made.kept_tokens  # the newest mask alone
    assert train.num_rows == made.rows
    values = datasets.load_dataset(str(run), "values", split="train", cache_dir=cache)
    assert values.column_names == layout.values.names and values["row_id"][:] == list(range(12))
    assert datasets.get_dataset_config_names(str(run)) == ["train", "values"]


@pytest.mark.parametrize("config", ["train", "values"])
def test_load_dataset_never_gives_the_rows_of_another_folder_of_that_name(tmp_path: Path, config: str) -> None:
    """`datasets` keeps a copy of what it read, and knows it by the folder's name and the card."""
    import datasets

    cache = str(tmp_path / "cache")
    for place, count, keep in (("a", 8, 0.6), ("b", 5, 0.6), ("a", 6, 0.6), ("a", 6, 0.3)):
        run = tmp_path / place / "run"
        shutil.rmtree(run, ignore_errors=True)
        card.write(
            small_run(run, [value_row(i, 9 + i) for i in range(count)], config=published(keep=keep)), manifest.read(run)
        )
        found = datasets.load_dataset(str(run), config, split="train", cache_dir=cache)
        stored = scan(run, config).collect()
        assert found["row_id"][:] == stored["row_id"].to_list()
        name = "loss_mask" if config == "train" else "nll"
        assert found[name][:] == stored[name].to_list()


def test_a_shard_without_rows_is_read_over(tmp_path: Path) -> None:
    """All of its rows failed, and `train/` has none of them."""
    import datasets

    rows = [value_row(i, 5, "failed" if i in (3, 4, 5, 8) else "scored") for i in range(9)]
    run = small_run(tmp_path / "a", rows, config=published(), per_shard=3)
    assert [shard.rows for shard in manifest.read(run).masks[0].shards] == [3, 0, 2]
    card.write(run, manifest.read(run))
    found = datasets.load_dataset(str(run), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["row_id"][:] == as_dataset(run)["row_id"][:] == [0, 1, 2, 6, 7]


@pytest.mark.parametrize("name", ["a", "g[1]"])
def test_what_the_card_says_of_datasets_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the name is a pattern of another run's too, and where other bytes of the same time were there before."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    small_run(tmp_path / "g1", [value_row(0, 9)])
    for keep in (0.6, 0.3):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        run = small_run(tmp_path / name, config=published(keep=keep))
        for path in run.rglob("*"):
            os.utime(path, (1.7e9, 1.7e9))
        monkeypatch.chdir(run)
        (lines,) = [part for part in card.render(manifest.read(run)).split("```") if "load_dataset" in part]
        known: dict[str, Any] = {}
        *before, train, values = lines.removeprefix("python").strip().splitlines()
        exec("\n".join(before), known)
        assert eval(train, known)["loss_mask"][:] == scan(run, "train").collect()["loss_mask"].to_list()
        assert eval(values, known).num_rows == 12


def test_the_front_matter_names_the_newest(run: Path) -> None:
    make_mask(run, published(keep=0.2))
    text = card.render(manifest.read(run))
    configs = yaml.safe_load(text.split("---")[1])["configs"]
    assert [(one["config_name"], one.get("default"), one["data_files"][0]["path"]) for one in configs] == [
        ("train", True, "train/mask=0001/part-*.parquet"),
        ("values", None, "values/generation=0/part-*.parquet"),
    ]


def test_generations_and_masks_are_listed(tmp_path: Path) -> None:
    run = small_run(tmp_path, generations=(0, 3), config=published(generation="all"))
    made = make_mask(run, published(generation="0"))
    text = card.render(manifest.read(run))
    assert (
        'generation 0: checkpoint "base"\ngeneration 3: checkpoint "checkpoint-3"\nmask 0: mean of generations 0, 3; '
        in text
    )
    assert f"\nmask 1: generation 0; {made.kept_tokens} of {made.response_tokens} response tokens train (" in text
    assert 'path: "values/generation=3/part-*.parquet"' in text


def test_a_new_generation_makes_it_old(run: Path) -> None:
    write_generation(run, value_rows(seed=1), number=3)
    manifest.write(run, manifest.rebuild(run))
    assert not card.is_current(run, manifest.read(run))


def test_before_the_first_mask_values_are_the_default(run: Path) -> None:
    stored = replace(manifest.read(run), masks=())
    configs = yaml.safe_load(card.render(stored).split("---")[1])["configs"]
    assert [(one["config_name"], one["default"]) for one in configs] == [("values", True)]


def test_a_card_is_current_until_a_newer_mask(run: Path) -> None:
    with (run / "README.md").open("a") as file:
        file.write("\nMy own words.\n")
    assert card.is_current(run, manifest.read(run))
    make_mask(run, published(keep=0.2))
    assert not card.is_current(run, manifest.read(run))
    (run / "README.md").write_bytes(b"\xff")
    assert not card.is_current(run, manifest.read(run))
    card.write(run, manifest.read(run))
    assert card.is_current(run, manifest.read(run))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("estimator", [name for name in BY_ESTIMATOR if name != "exact"])
@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_it_has_counts_columns_with_units_and_settings(tmp_path: Path, kind: str, estimator: str) -> None:
    text = (small_run(tmp_path, kind=kind, estimator=estimator) / "README.md").read_text()
    absent = [name for name in SIGNALS if name not in components(estimator).signals]
    for schema in (LAYOUTS[kind].train, LAYOUTS[kind].values):
        for column in schema:
            units = column.metadata[b"units"].decode()
            named = [line for line in text.splitlines() if line.startswith(f"| `{column.name}` |")]
            there = column.name.removeprefix("chosen_").removeprefix("rejected_") not in absent
            assert bool(named) == there and all(f"| {units} |" in line for line in named), column.name
    assert "| rows read | 12 |" in text and "| rows rejected | 1 |" in text
    assert f'"estimator": "{estimator}"' in text and "load_dataset" in text and "read_parquet" in text
    assert "\\|" in text  # the `scored | target | ...` of a meaning stays in its cell
    assert ("A row is a pair of answers" in text) == ("`omega` = beta sigmoid(-margin)" in text) == (kind != "sft")


def test_the_value_of_train_has_the_units_of_what_the_newest_mask_is_made_from(run: Path) -> None:
    for by, units in (("entropy", "nats"), ("nll - reference_nll", "those of the --by expression")):
        make_mask(run, published(by=by))
        train, values = card.render(manifest.read(run)).split("`values`: every row read")
        assert f"| `value` | list of float | {units} |" in train
        assert "| `value` | list of float | nats per unit step |" in values


def test_names_cannot_become_markdown(run: Path) -> None:
    stored = manifest.read(run)
    nasty = "x\n```\n---\n<script>"
    generations = tuple(replace(one, checkpoint=nasty) for one in stored.generations)
    settings = {**stored.settings, "by": nasty}
    text = card.render(replace(stored, settings=settings, versions={nasty: "1"}, generations=generations))
    assert text.count("\n```\n") == card.render(stored).count("\n```\n")
    assert text.count("\n```") == card.render(stored).count("\n```")
    assert len(text.split("\n---\n")) == 2

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small_run import small_run

from alphatoken_curate import card, manifest
from alphatoken_curate.config import MaskConfig
from alphatoken_curate.remask import make_mask
from alphatoken_curate.schema import TRAIN, VALUES


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "a")


def test_load_dataset_reads_the_folder_offline(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    made = make_mask(run, MaskConfig(keep=0.2))
    card.write(run, manifest.read(run))
    cache = str(tmp_path / "cache")
    train = datasets.load_dataset(str(run), split="train", cache_dir=cache)
    assert train.column_names == TRAIN.names
    assert sum(map(sum, train["loss_mask"])) == made.kept_tokens  # the newest mask alone
    assert train.num_rows == made.rows
    values = datasets.load_dataset(str(run), "values", split="train", cache_dir=cache)
    assert values.column_names == VALUES.names and values["row_id"][:] == list(range(12))
    assert datasets.get_dataset_config_names(str(run)) == ["train", "values"]


def test_the_front_matter_names_the_newest(run: Path) -> None:
    make_mask(run, MaskConfig(keep=0.2))
    text = card.render(manifest.read(run))
    configs = yaml.safe_load(text.split("---")[1])["configs"]
    assert [(one["config_name"], one.get("default"), one["data_files"][0]["path"]) for one in configs] == [
        ("train", True, "train/mask=0001/part-*.parquet"),
        ("values", None, "values/generation=0/part-*.parquet"),
    ]


def test_before_the_first_mask_values_are_the_default(run: Path) -> None:
    stored = replace(manifest.read(run), masks=())
    configs = yaml.safe_load(card.render(stored).split("---")[1])["configs"]
    assert [(one["config_name"], one["default"]) for one in configs] == [("values", True)]


def test_a_card_is_current_until_a_newer_mask(run: Path) -> None:
    with (run / "README.md").open("a") as file:
        file.write("\nMy own words.\n")
    assert card.is_current(run, manifest.read(run))
    make_mask(run, MaskConfig(keep=0.2))
    assert not card.is_current(run, manifest.read(run))
    (run / "README.md").write_bytes(b"\xff")
    assert not card.is_current(run, manifest.read(run))
    card.write(run, manifest.read(run))
    assert card.is_current(run, manifest.read(run))


def test_it_has_counts_columns_with_units_and_settings(run: Path) -> None:
    text = (run / "README.md").read_text()
    for schema in (TRAIN, VALUES):
        for column in schema:
            units = column.metadata[b"units"].decode()
            assert any(f"`{column.name}`" in line and f"| {units} |" in line for line in text.splitlines())
    assert "| rows read | 12 |" in text and "| rows rejected | 1 |" in text
    assert '"estimator": "published"' in text and "load_dataset" in text and "read_parquet" in text
    assert "\\|" in text  # the `scored | target | ...` of a meaning stays in its cell


def test_settings_cannot_become_markdown(run: Path) -> None:
    stored = manifest.read(run)
    nasty = "x\n```\n---\n<script>"
    stored = replace(stored, settings={"by": nasty}, versions={nasty: "1"})
    text = card.render(stored)
    assert text.count("\n```\n") == card.render(manifest.read(run)).count("\n```\n")
    assert len(text.split("\n---\n")) == 2

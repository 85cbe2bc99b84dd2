"""LLaMA-Factory: a folder that `datasets` opens, with exactly the columns that its collators take."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import yaml
from small_run import small_run

from alphatoken_curate import export

LISTS = ["input_ids", "attention_mask", "labels"]
MEDIA = ["images", "videos", "audios"]


@pytest.mark.parametrize(("kind", "prefixes"), [("sft", [""]), ("preference", ["chosen_", "rejected_"])])
def test_the_folder_is_one_of_save_to_disk(tmp_path: Path, kind: str, prefixes: list[str]) -> None:
    run = small_run(tmp_path / "run", kind=kind)
    done = export(run, trainer="llamafactory", output=tmp_path / "out")
    opened = datasets.load_from_disk(str(tmp_path / "out"))
    assert list(opened) == ["train"] and len(opened["train"]) == done.rows and done.data == tmp_path / "out"
    rows = opened["train"]
    assert rows.column_names == [prefix + name for prefix in prefixes for name in LISTS] + MEDIA
    assert all(rows[0][name] is None for name in MEDIA)
    # What is read can be mapped, filtered and saved again, as what `datasets` wrote itself.
    rows.filter(lambda row: True, keep_in_memory=True).save_to_disk(tmp_path / "again")
    assert datasets.load_from_disk(str(tmp_path / "again"))[:] == rows[:]


def test_features_are_named_as_all_releases_of_datasets_read_them(tmp_path: Path) -> None:
    """4.0 reads `Sequence` and writes `List`, which 3 does not know."""
    export(small_run(tmp_path / "run"), trainer="llamafactory", output=tmp_path / "out")
    about = json.loads((tmp_path / "out/train/dataset_info.json").read_bytes())
    assert {feature["_type"] for feature in about["features"].values()} == {"Sequence", "Value"}


def test_what_datasets_caches_is_not_mixed_up(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    for name, most in (("one", None), ("other", 4), ("again", 4)):
        export(run, trainer="llamafactory", output=tmp_path / name, max_length=most)
    found = {
        name: datasets.load_from_disk(str(tmp_path / name))["train"]._fingerprint for name in ("one", "other", "again")
    }
    assert found["one"] != found["other"] == found["again"]


@pytest.mark.parametrize(("kind", "stage"), [("sft", "sft"), ("preference", "dpo")])
def test_the_lines_of_the_readme_are_yaml(tmp_path: Path, kind: str, stage: str) -> None:
    place = tmp_path / 'a: "b" #c'
    export(small_run(tmp_path / "run", kind=kind), trainer="llamafactory", output=place)
    text = (place / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    found = yaml.safe_load(text)
    assert found["stage"] == stage and found["tokenized_path"] == str(place) and found["dataset"]
    assert found["cutoff_len"] == max(len(ids) for ids in longest(place))


def longest(place: Path) -> list[list[int]]:
    rows = datasets.load_from_disk(str(place))["train"]
    return [ids for name in rows.column_names if name.endswith("input_ids") for ids in rows[name]]

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_run import run_with_errors, small_run
from tiny_files import command

from alphatoken_curate.reading.sums import MEANS
from alphatoken_curate.runs import card, manifest
from alphatoken_curate.runs.direction import direction, rehearsed
from alphatoken_curate.runs.fingerprint import Json
from alphatoken_curate.runs.schema import SIGNALS


def told(run: Path, **more: Json) -> str | None:
    stored = manifest.read(run)
    return rehearsed(replace(stored, settings={**stored.settings, **more}))


def test_a_rehearsed_training_is_told_in_words(tmp_path: Path) -> None:
    run = run_with_errors(tmp_path)
    assert direction(manifest.read(run)) == "rehearsal"
    assert manifest.read(run).counts.scored == 27  # in steps of four rows, seven an epoch
    assert told(run) == "14 steps of AdamW at 3e-05, 4 rows each, 2 epochs"
    more: dict[str, Json] = {
        "rehearse_optimizer": "sgd",
        "rehearse_epochs": 1,
        "rehearse_rows_per_step": 100,
        "rehearse_lr": 0.5,
        "rehearse_schedule": "cosine",
        "rehearse_warmup": 3,
        "rehearse_clip": 1.0,
        "rehearse_weight_decay": 0.1,
        "rehearse_momentum": 0.9,
        "rehearse_seeds": 4,
    }
    assert told(run, **more) == (
        "1 step of SGD at 0.5, 100 rows each, cosine schedule, 3 steps of warm-up, gradients clipped at 1,"
        " weight decay 0.1, momentum 0.9, the mean over 4 orders of the rows"
    )
    assert told(run, rehearse_lora=8) == "14 steps of AdamW at 3e-05, a LoRA of rank 8, 4 rows each, 2 epochs"
    assert "a LoRA of rank 8 and alpha 12, 4 rows" in (told(run, rehearse_lora=8, rehearse_lora_alpha=12.0) or "")
    assert "4 pairs each" in (told(run, kind="preference") or "")
    simpo: dict[str, Json] = {"kind": "preference", "rehearse_simpo": 0.0, "beta": 2.5}
    assert "4 pairs each, by SimPO with beta 2.5 and gamma 0, 2 epochs" in (told(run, **simpo) or "")
    assert (told(run, **more, kind="preference") or "").endswith("the mean over 4 orders of the pairs")
    off = dict.fromkeys(("rehearse_clip", "rehearse_momentum", "rehearse_seeds", "rehearse_warmup", "rehearse_window"))
    assert told(run, **off) == told(run)


def test_windows_are_told_where_they_are_less_than_the_whole_training(tmp_path: Path) -> None:
    run = run_with_errors(tmp_path)
    whole = told(run)
    assert told(run, rehearse_window=13) == f"{whole}, each step by the outcome at the end of its window of 13 steps"
    assert told(run, rehearse_window=1) == f"{whole}, each step by the outcome at the end of its window of 1 step"
    assert told(run, rehearse_window=14) == told(run, rehearse_window=900) == whole


def test_each_answer_is_a_row_where_turns_are_sequences(tmp_path: Path) -> None:
    stored = manifest.read(run_with_errors(tmp_path))
    each = replace(stored, settings={**stored.settings, "turns": "each"}, counts=replace(stored.counts, sequences=41))
    assert (rehearsed(each) or "").startswith("22 steps")


@pytest.mark.parametrize("own", [{}, {"direction": "gradient"}])
def test_the_published_gradient_is_no_rehearsal(tmp_path: Path, own: dict[str, Json]) -> None:
    run = small_run(tmp_path, settings=own)
    assert direction(manifest.read(run)) == "gradient" and told(run) is None
    assert "rehearsed" not in (run / card.NAME).read_text()


def test_the_card_of_a_run_says_what_its_values_are_of(tmp_path: Path) -> None:
    text = (run_with_errors(tmp_path) / card.NAME).read_text()
    assert "at the end of a rehearsed training: 14 steps of AdamW at 3e-05, 4 rows each, 2 epochs." in text
    assert "how much a training step on it" not in text
    assert "| `value_error` | list of float | nats per unit weight | standard error of value" in text


def test_rehearsed_values_are_per_unit_weight_wherever_they_stand(tmp_path: Path) -> None:
    run = run_with_errors(tmp_path / "run")
    shards = sorted(run.rglob("part-*.parquet"))
    units = {path.parent.parent.name: set() for path in shards}
    for path in shards:
        for column in pq.read_schema(path):
            if column.name in (*SIGNALS, "value") and column.name not in MEANS:
                units[path.parent.parent.name].add(column.metadata[b"units"])
    assert units == {"values": {b"nats per unit weight"}, "train": {b"nats per unit weight"}}
    command("report", run)
    texts = [
        command("stats", run).out,
        command("stats", run, "--json").out,
        command("show", run, "--row", 0).out,
        command("show", run, "--row", 0, "--tokens").out,
        (run / card.NAME).read_text(),
        *(path.read_text() for path in run.rglob("*.html")),
    ]
    for text in texts:
        assert "per unit weight" in " ".join(text.split()) and "unit step" not in " ".join(text.split())
    assert len(texts) == 6

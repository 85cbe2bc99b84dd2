from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_run import VOCABULARY, published, small_run, value_rows, write_pieces
from tiny_files import command, contents

from alphatoken_curate import MaskConfig, mask, scan_tokens
from alphatoken_curate.errors import StoredDataError, UsageError
from alphatoken_curate.masks.always import always_kept, check
from alphatoken_curate.reading.compare import compare
from alphatoken_curate.reading.stats import stats
from alphatoken_curate.reading.trainset import open_train
from alphatoken_curate.reading.verify import verify
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.schema import BY_ESTIMATOR, LAYOUTS, PREFERENCE, SFT
from alphatoken_curate.tokens.pieces import Piece

ALL = MaskConfig(keep=0.1, by="nll")
both_kinds = pytest.mark.parametrize("kind", LAYOUTS)


def stored_of(run: Path, name: str, kind: str) -> list[list[Any]]:
    """A list column of the values of scored rows, all branches, as the file has it."""
    found = []
    for path in sorted((run / "values").glob("generation=0/*.parquet")):
        rows = [row for row in pq.read_table(path).to_pylist() if row["status"] == "scored"]
        found += [row[prefix + name] for row in rows for prefix in LAYOUTS[kind].branches]
    return found


def weights_of(run: Path) -> list[list[float]]:
    return [branch.loss_weight.tolist() for row in open_train(run).rows() for branch in row.branches]


@pytest.mark.one_in(6)
@both_kinds
@pytest.mark.parametrize("scope", ["global", "row", "batch:3"])
def test_every_token_that_ends_an_answer_trains_and_counts_in_the_share(tmp_path: Path, kind: str, scope: str) -> None:
    run = small_run(tmp_path / "run", value_rows(30, kind=kind), kind=kind)
    made = mask(run, MaskConfig(keep=0.7, by="-nll", scope=scope))
    ends, weights = stored_of(run, "end_of_turn", kind), weights_of(run)
    total = 0
    for end, weight in zip(ends, weights, strict=True):
        assert all(weight[i] > 0 for i, ends_here in enumerate(end) if ends_here)
        total += sum(end)
    assert (made.end_of_turn_tokens, made.end_of_turn_kept) == (total, total)
    plain = mask(run, published(keep=0.7, by="-nll", scope=scope))
    assert plain.end_of_turn_tokens == total and (plain.end_of_turn_kept or 0) < total
    assert made.kept_tokens - made.rows_given_back - made.over_share == plain.kept_tokens - plain.rows_given_back
    assert verify(run) == []


def test_nothing_is_always_kept_where_nothing_is_dropped(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", config=MaskConfig(always_keep="none"))
    before = contents(run)
    for stays in ("end-of-turn", "special", "nll > 0"):
        made = mask(run, MaskConfig(always_keep=stays))
        assert not made.created and made.end_of_turn_kept == made.end_of_turn_tokens
    assert contents(run) == before
    assert mask(run, MaskConfig(weights="relu", by="nll")).created, "relu drops what is 0 or below"
    assert mask(run, MaskConfig(weights="tilt:2", by="nll")).created, "so does a tilt far below"
    mask(run, MaskConfig(weights="tilt:100", by="-nll"))
    ends = stored_of(run, "end_of_turn", "sft")
    pairs = [pair for row in zip(ends, weights_of(run), strict=True) for pair in zip(*row, strict=True)]
    assert all(weight > 0 for closes, weight in pairs if closes)
    response = [responds for row in stored_of(run, "response", "sft") for responds in row]
    assert any(responds and not weight for responds, (_, weight) in zip(response, pairs, strict=True))


def test_special_tokens_are_those_of_the_vocabulary(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", value_rows(40))
    special = {3, 7, 11, 30}
    write_pieces(run, [Piece(content=f"<{i}>".encode(), special=i in special) for i in range(VOCABULARY)])
    mask(run, MaskConfig(keep=0.2, by="-nll", always_keep="special"))
    ids, response = stored_of(run, "input_ids", "sft"), stored_of(run, "response", "sft")
    met = 0
    for row in zip(ids, response, weights_of(run), strict=True):
        for token, responds, weight in zip(*row, strict=True):
            met += responds and token in special
            assert weight > 0 or not responds or token not in special
            assert responds or not weight
    assert met > 5


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("nll > 0.5", lambda nll, value: nll > 0.5),
        ("nll", lambda nll, value: nll > 0),
        ("nll > 0.5 OR value < -1", lambda nll, value: nll > 0.5 or value < -1),
        ("CASE WHEN value > 0 THEN 1 ELSE -1 END", lambda nll, value: value > 0),
    ],
)
def test_an_expression_keeps_where_it_is_true_or_above_0(tmp_path: Path, expression: str, holds: Any) -> None:
    run = small_run(tmp_path / "run", value_rows(30))
    made = mask(run, MaskConfig(keep=0.1, by="entropy", always_keep=expression))
    kept = 0
    columns = [stored_of(run, name, "sft") for name in ("nll", "value")]
    for nlls, values, weights in zip(*columns, weights_of(run), strict=True):
        for nll, value, weight in zip(nlls, values, weights, strict=True):
            if nll is not None and holds(nll, value):
                kept += 1
                assert weight > 0
    assert made.over_share == max(0, kept - -(-made.response_tokens // 10)) > 0


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("end-of-tunr", r"always-keep: Did you mean end-of-turn\? 'end-of-tunr': "),
        ("nll > avg(nll)", r"always-keep: 'nll > avg\(nll\)' is not told of each token alone"),
        ("random", r"always-keep: 'random'"),
        ("nll >", r"always-keep: 'nll >' at character 6: it ends too early"),
        ("adapt_influence > 0", "always-keep: adapt_influence was not computed"),
        ("omega > 0", "always-keep: 'omega > 0': .*'omega'"),
        ("3 > 2", "always-keep: '3 > 2': it names no column at all"),
    ],
)
def test_what_cannot_be_always_kept_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(name, BY_ESTIMATOR["published"], SFT)
    run = small_run(tmp_path / "run")
    before = contents(run)
    with pytest.raises(UsageError, match=message):
        mask(run, replace(ALL, always_keep=name))
    assert contents(run) == before
    ended = command("mask", run, "--keep", "0.5", "--always-keep", name)
    assert ended.code == 2 and "always-keep" in ended.err


def test_numbers_of_a_pair_may_be_named_in_pairs() -> None:
    check("margin > 0", BY_ESTIMATOR["published"], PREFERENCE)


def test_an_expression_without_a_number_somewhere_is_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    with pytest.raises(UsageError, match=r"always-keep: 'ln\(nll\)' gives no finite float32"):
        mask(run, replace(ALL, always_keep="ln(nll)"))


def test_special_needs_a_vocabulary_that_is_whole(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    vocabulary = run / "artifacts" / "vocab.parquet"
    content = bytearray(vocabulary.read_bytes())
    content[20] ^= 1
    vocabulary.write_bytes(content)
    with pytest.raises(StoredDataError, match=r"vocab\.parquet: damaged"):
        mask(run, replace(ALL, always_keep="special"))
    vocabulary.unlink()
    manifest.write(run, replace(manifest.read(run), files=manifest.rebuild(run).files))
    with pytest.raises(UsageError, match="does not say which tokens are special"):
        mask(run, replace(ALL, always_keep="special"))


def test_generations_that_are_averaged_end_answers_alike(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", value_rows(20), generations=(0, 1))
    made = mask(run, MaskConfig(keep=0.4, by="-nll", generation="all"))
    assert made.generations == (0, 1) and made.end_of_turn_kept == made.end_of_turn_tokens == sum(
        map(sum, stored_of(run, "end_of_turn", "sft"))
    )
    assert verify(run) == []


def test_it_is_told_how_many_end_of_turn_tokens_train(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", value_rows(20))
    told = command("mask", run, "--keep", "0.02", "--by", "-nll")
    total = sum(map(sum, stored_of(run, "end_of_turn", "sft")))
    assert f"          end of turn: {total} of {total} train\n" in told.out
    share = -(-2 * manifest.read(run).masks[-1].response_tokens // 100)
    beyond = f"what is always kept is more than the share by {total - share} tokens, and stays"
    assert f"          {beyond}\n" in told.out
    again = command("mask", run, "--keep", "0.02", "--by", "-nll")
    assert "Already there" in again.out and beyond in again.out
    shown = command("stats", run).out
    assert f"{total} of {total} train; {beyond}" in " ".join(shown.split())
    assert "--always-keep end-of-turn" in " ".join(shown.split())
    newest = stats(run).masks[-1]
    assert (newest.end_of_turn_tokens, newest.end_of_turn_kept, newest.over_share) == (total, total, total - share)
    assert f"; end of turn: {total} of {total} train" in (run / "README.md").read_text()
    command("report", run, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"End of turn: {total} of {total} train." in page and beyond.capitalize() in page
    assert "--always-keep end-of-turn</code>, of generation" in page
    command("mask", run, "--keep", "0.02", "--by", "-nll", "--always-keep", "none", "--allow-empty-rows")
    few = stats(run).masks[-1]
    assert few.end_of_turn_tokens == total and (few.end_of_turn_kept or 0) < total
    assert "always_keep" not in command("stats", run).out.rpartition("settings")[2].splitlines()[-1]


def test_two_runs_are_compared_by_what_their_masks_always_keep(tmp_path: Path) -> None:
    runs = [small_run(tmp_path / name, value_rows(20)) for name in ("a", "b")]
    for run, stays in zip(runs, ("end-of-turn", "none"), strict=True):
        mask(run, MaskConfig(keep=0.3, by="-nll", always_keep=stays))
    found = compare(*runs)
    assert [side.mask_settings["always_keep"] for side in (found.first, found.second)] == ["end-of-turn", "none"]
    assert found.masks.only_first > 0
    kept = [manifest.read(run).masks[-1].kept_tokens for run in runs]
    assert [found.masks.both + n for n in (found.masks.only_first, found.masks.only_second)] == kept
    told = command("compare", *runs).out
    assert "--always-keep end-of-turn; second by" in " ".join(told.split())


def test_what_is_always_kept_is_another_mask_and_named_in_its_footers(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", value_rows(20))
    made = [mask(run, replace(ALL, always_keep=stays)) for stays in ("none", "end-of-turn", "special", "nll > 1")]
    assert [one.mask for one in made] == [1, 2, 3, 4]
    settings = [one.settings.get("always_keep") for one in manifest.read(run).masks[1:]]
    assert settings == [None, "end-of-turn", "special", "nll > 1"]
    assert not any(mask(run, replace(ALL, always_keep=stays)).created for stays in ("none", "end-of-turn"))


def test_what_is_always_kept_by_the_value_is_another_mask_by_other_stability_settings(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", value_rows(20))
    one = replace(ALL, always_keep="value > 0.5")
    made = [mask(run, given).mask for given in (one, replace(one, stability_weight=-1.5))]
    value = {w: scan_value(run, w) for w in (1.5, -1.5)}
    assert made == [1, 2]
    for number, weight in zip(made, (1.5, -1.5), strict=True):
        kept = [branch.loss_weight for row in open_train(run, number).rows() for branch in row.branches]
        assert (np.concatenate(kept)[np.concatenate(stored_of(run, "response", "sft"))] > 0)[value[weight] > 0.5].all()
    assert mask(run, replace(one, stability_scale="rms")).mask == 3
    assert not mask(run, one).created
    by_nll = replace(ALL, always_keep="nll > 1")
    assert mask(run, by_nll).mask == mask(run, replace(by_nll, stability_weight=9.0)).mask


def scan_value(run: Path, weight: float) -> np.ndarray:
    """Of all response tokens, in order."""
    tokens = scan_tokens(run).collect()
    adaptation, stability = ("adapt_direct", "adapt_causal"), ("stab_direct", "stab_causal")
    parts = [sum(tokens[name].to_numpy().astype(np.float64) for name in names) for names in (adaptation, stability)]
    return np.asarray(parts[0] + weight * parts[1])


def test_an_answer_without_an_end_is_said_to_have_none(tmp_path: Path) -> None:
    rows = [
        replace(row, branches=tuple(replace(one, end_of_turn=one.response & False) for one in row.branches))
        for row in value_rows(10)
    ]
    run = small_run(tmp_path / "run", rows)
    told = command("mask", run, "--keep", "0.3")
    assert "end of turn: no response token ends an answer" in told.out
    assert always_kept(run, manifest.read(run), ALL) is not None

"""Every exporter: what its trainer reads is what the run says; whole or not at all; README and record."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
from exported import FOR_PAIRS, HALF, SOFT, TOKEN_FORMS, Row, read, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import published, small_run
from tiny_files import command, contents, token_records, write_jsonl

import alphatoken_curate
from alphatoken_curate import CurateError, InputError, StoredDataError, UsageError, export, mask
from alphatoken_curate.cli.export import TRAINERS
from alphatoken_curate.exports import export as module
from alphatoken_curate.exports.export import ALIASES, FORMS
from alphatoken_curate.exports.form import (
    IN_WORDS,
    Asked,
    Kept,
    batched,
    same_rows,
    to_positions,
    to_tokens,
    trains,
    unlike,
)
from alphatoken_curate.exports.guide import checked_against
from alphatoken_curate.reading.trainset import TrainBranch, TrainRow
from alphatoken_curate.rows.read import read_rows
from alphatoken_curate.rows.shapes import Tokens
from alphatoken_curate.runs.documents import sealed, unsealed
from alphatoken_curate.runs.schema import LAYOUTS

KINDS = [("sft", name) for name in TOKEN_FORMS] + [("preference", name) for name in FOR_PAIRS]
FLOATS = {("sft", name) for name in ("hf", "ms-swift", "levanter", "tinker", "verl")}
FLOATS |= {("preference", "hf"), ("preference", "tinker")}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[tuple[str, str], Path]:
    """Runs of either kind with binary and with soft weights."""
    made = {}
    for kind in LAYOUTS:
        for name, config in (("binary", HALF), ("soft", SOFT)):
            made[kind, name] = small_run(folder / f"{kind}-{name}", kind=kind, config=config)
    return made


def test_the_command_knows_every_exporter() -> None:
    assert sorted(TRAINERS) == sorted((*FORMS, *ALIASES))
    assert alphatoken_curate.export is export


# ------------------------------------------------------------------------------------------- what trainers read


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("kind", "trainer"), KINDS)
def test_binary_masks_arrive(runs: dict[tuple[str, str], Path], tmp_path: Path, kind: str, trainer: str) -> None:
    run = runs[kind, "binary"]
    done = export(run, trainer=trainer, output=tmp_path / "out")
    wanted = truth(run)
    assert read(trainer, tmp_path / "out") == wanted
    assert done.rows == len(wanted) and not done.soft and not done.dropped
    assert done.trained_tokens == done.weight_sum == sum(len(branch) for row in wanted for branch in row)


@pytest.mark.parametrize(("kind", "trainer"), KINDS)
def test_soft_weights_arrive_or_are_refused(
    runs: dict[tuple[str, str], Path], tmp_path: Path, kind: str, trainer: str
) -> None:
    run = runs[kind, "soft"]
    wanted = truth(run)
    assert any(weight != 1 for row in wanted for branch in row for weight in branch.values())
    if (kind, trainer) in FLOATS:
        done = export(run, trainer=trainer, output=tmp_path / "out")
        assert read(trainer, tmp_path / "out") == wanted
        assert done.soft and done.weight_sum == pytest.approx(done.trained_tokens)
    else:
        with pytest.raises(UsageError, match="--binarize"):
            export(run, trainer=trainer, output=tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    done = export(run, trainer=trainer, output=tmp_path / "binary", binarize=True)
    assert read(trainer, tmp_path / "binary") == truth(run, binarize=True) and not done.soft


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("kind", "trainer"), KINDS)
@pytest.mark.parametrize("most", [3, 4])
def test_rows_are_cut_with_their_weights(
    runs: dict[tuple[str, str], Path], tmp_path: Path, kind: str, trainer: str, most: int
) -> None:
    run, soft = runs[kind, "soft"], (kind, trainer) in FLOATS
    done = export(run, trainer=trainer, output=tmp_path / "out", max_length=most, binarize=not soft)
    whole, wanted = truth(run), truth(run, max_length=most, binarize=not soft)
    assert read(trainer, tmp_path / "out") == wanted and len(wanted) < len(whole)
    assert done.dropped == {"cut_away": len(whole) - len(wanted)} and done.cut_rows > 0
    lost = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in lost} == {"cut_away"} and len(lost) == done.dropped["cut_away"]
    ids = {row["row_id"] for path in (run / "train/mask=0000").iterdir() for row in pq.read_table(path).to_pylist()}
    assert {row["row_id"] for row in lost} < ids


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("kind", "trainer"), KINDS)
def test_rows_that_a_mask_leaves_nothing_of_are_dropped_by_name(tmp_path: Path, kind: str, trainer: str) -> None:
    config = published(keep=0.1, allow_empty_rows=True)
    run = small_run(tmp_path / "run", kind=kind, config=config)
    total = len([row for shard in (run / "train/mask=0000").iterdir() for row in pq.read_table(shard).to_pylist()])
    wanted = truth(run)
    assert 0 < len(wanted) < total
    done = export(run, trainer=trainer, output=tmp_path / "out")
    assert read(trainer, tmp_path / "out") == wanted
    assert done.dropped == {"nothing_trains": total - len(wanted)}


def test_a_mask_is_chosen_by_its_number(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    mask(run, published(keep=0.2))
    for number in (0, 1):
        export(run, trainer="hf", output=tmp_path / str(number), mask=number)
        assert read("hf", tmp_path / str(number)) == truth(run, mask=number)
    assert truth(run, mask=0) != truth(run, mask=1)
    assert export(run, trainer="hf", output=tmp_path / "newest").mask == 1
    with pytest.raises(UsageError, match="has no mask 7"):
        export(run, trainer="hf", output=tmp_path / "none", mask=7)


# --------------------------------------------------------------------------------------------- drawn by hypothesis


@st.composite
def drawn_rows(draw: st.DrawFn, branches: int, soft: bool) -> list[Kept]:
    """Rows with something to train in every branch."""
    weights = st.sampled_from([0.0, 1.0]) if not soft else st.floats(0, 8, width=32)
    rows = []
    for row_id in range(draw(st.integers(1, 4))):
        made = []
        for _ in range(branches):
            ids = np.array(draw(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=6)), np.int32)
            weight = np.array([0.0, *(draw(weights) for _ in ids[1:])], np.float32)
            weight[1 + draw(st.integers(0, len(ids) - 2))] = 1
            labels = np.where(weight > 0, ids, -100).astype(np.int64)
            made.append(TrainBranch(input_ids=ids, labels=labels, loss_weight=weight))
        rows.append(Kept(row=TrainRow(row_id=row_id, branches=tuple(made))))
    return rows


def predictions(rows: list[Kept]) -> list[Row]:
    return [
        tuple(
            {(i, int(branch.input_ids[i])): float(branch.loss_weight[i]) for i in np.flatnonzero(branch.loss_weight)}
            for branch in kept.row.branches
        )
        for kept in rows
    ]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("kind", "trainer"), KINDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_rows_arrive_aligned(kind: str, trainer: str, data: st.DataObject) -> None:
    rows = data.draw(drawn_rows(len(LAYOUTS[kind].branches), (kind, trainer) in FLOATS))
    asked = Asked(layout=LAYOUTS[kind], strict=False)
    with tempfile.TemporaryDirectory() as name:
        FORMS[trainer].write(Path(name), batched(rows), asked)
        FORMS[trainer].check(Path(name), iter(rows), asked)
        assert read(trainer, Path(name)) == predictions(rows)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9))
def test_alignments_turn_back(weights: list[float]) -> None:
    token = np.array([0.0, *weights], np.float32)
    assert np.array_equal(to_tokens(to_positions(token)), token)
    assert to_positions(token)[-1] == 0 and to_positions(token)[0] == token[1]


# --------------------------------------------------------------------------------- what was written is read back


def altered(rows: list[Kept], how: str) -> list[Kept]:
    """The rows with one of them spoilt."""
    row = rows[0].row
    first = row.branches[0]
    weight, ids = first.loss_weight.copy(), first.input_ids.copy()
    if how == "shifted":
        weight = np.roll(weight, 1)
    elif how == "lost":
        weight[np.flatnonzero(weight)[0]] = 0
    elif how == "other id":
        ids[0] ^= 1
    elif how == "longer":
        return [*rows, rows[0]]
    elif how == "shorter":
        return rows[:-1]
    branch = TrainBranch(input_ids=ids, labels=np.where(weight > 0, ids, -100).astype(np.int64), loss_weight=weight)
    return [replace(rows[0], row=replace(row, branches=(branch, *row.branches[1:]))), *rows[1:]]


@pytest.mark.parametrize("how", ["shifted", "lost", "other id", "longer", "shorter"])
@pytest.mark.parametrize(("kind", "trainer"), KINDS)
def test_a_file_that_is_not_the_mask_is_seen(tmp_path: Path, kind: str, trainer: str, how: str) -> None:
    branches = []
    for weight in ([0, 0, 1, 1, 0], [0, 1, 0, 1, 0]):
        ids = np.arange(5, dtype=np.int32)
        values = np.array(weight, np.float32)
        labels = np.where(values > 0, ids, -100).astype(np.int64)
        branches.append(TrainBranch(input_ids=ids, labels=labels, loss_weight=values))
    layout = LAYOUTS[kind]
    parts = tuple(branches[: len(layout.branches)])
    rows = [Kept(row=TrainRow(row_id=i, branches=parts)) for i in range(3)]
    asked = Asked(layout=layout, strict=False)
    FORMS[trainer].write(tmp_path, batched(altered(rows, how)), asked)
    with pytest.raises(CurateError, match="read back"):
        FORMS[trainer].check(tmp_path, iter(rows), asked)


def test_a_row_with_other_branches_is_not_the_same(tmp_path: Path) -> None:
    branch = TrainBranch(input_ids=np.arange(2), labels=np.array([-100, 1]), loss_weight=np.array([0, 1], np.float32))
    kept = Kept(row=TrainRow(row_id=0, branches=(branch, branch)))
    one = ((branch.input_ids, branch.loss_weight),)
    same_rows(tmp_path, iter([one * 2]), iter([kept]))
    with pytest.raises(CurateError, match="row_id 0"):
        same_rows(tmp_path, iter([one]), iter([kept]))
    assert "report" in str(unlike(tmp_path, "it is odd"))


def test_labels_that_are_neither_the_token_nor_masked_are_no_weights() -> None:
    found = trains(np.array([-100, 5, 6]), np.array([4, 5, 7]))
    assert found[:2].tolist() == [0, 1] and np.isnan(found[2])


# ------------------------------------------------------------------------------------- whole, or not there at all


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    for place in ("full", "file", "link"):
        (tmp_path / place).mkdir() if place == "full" else None
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    before = contents(tmp_path)
    for place, says in (("full", "not empty"), ("file", "no folder"), ("link", "no folder")):
        with pytest.raises(UsageError, match=says):
            export(run, trainer="hf", output=tmp_path / place)
    for place in (run, run / "exports" / "hf"):
        with pytest.raises(UsageError, match="lies in the run folder"):
            export(run, trainer="hf", output=place)
    assert contents(tmp_path) == before


def test_an_empty_folder_is_taken_and_folders_above_are_made(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    export(run, trainer="hf", output=tmp_path / "empty")
    export(run, trainer="hf", output=tmp_path / "a" / "b")
    assert contents(tmp_path / "empty").keys() == contents(tmp_path / "a" / "b").keys()


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path / "run")
    shard = sorted((run / "train/mask=0000").iterdir())[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(StoredDataError, match=shard.name):
        export(run, trainer="hf", output=tmp_path / "out")
    shard.write_bytes(whole)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "readme", fails)
    with pytest.raises(KeyboardInterrupt):
        export(run, trainer="hf", output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_reads_back_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that gives back other bytes than it was given."""
    run = small_run(tmp_path / "run", config=SOFT)
    good = FORMS["tinker"]

    def spoilt(folder: Path, *rest: Any) -> None:
        good.write(folder, *rest)
        path = folder / "train.jsonl"
        first, *others = path.read_text().splitlines()
        row = json.loads(first)
        row["weights"][-1] += 0.25
        path.write_text("\n".join([json.dumps(row), *others]) + "\n")

    monkeypatch.setitem(module.FORMS, "tinker", replace(good, write=spoilt))
    with pytest.raises(CurateError, match="read back"):
        export(run, trainer="tinker", output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("trainer", TOKEN_FORMS)
def test_the_same_run_gives_the_same_bytes(tmp_path: Path, trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path / "run")
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        export(run, trainer=trainer, output="out")
        found.append(contents(tmp_path / name))
    assert found[0] == found[1]


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("trainer", sorted(FORMS.keys() - set(FOR_PAIRS)))
def test_pairs_are_refused_where_there_is_no_form(
    runs: dict[tuple[str, str], Path], tmp_path: Path, trainer: str
) -> None:
    with pytest.raises(UsageError, match="hf, llamafactory, ms-swift, tinker"):
        export(runs["preference", "binary"], trainer=trainer, output=tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_what_is_asked_amiss_is_refused(runs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    run = runs["sft", "binary"]
    with pytest.raises(UsageError, match="Give one of hf, llamafactory"):
        export(run, trainer="trlx", output=tmp_path / "out")
    with pytest.raises(UsageError, match="--strict is for --for hf"):
        export(run, trainer="verl", output=tmp_path / "out", strict=True)
    with pytest.raises(UsageError, match="at least 2"):
        export(run, trainer="hf", output=tmp_path / "out", max_length=1)
    with pytest.raises(UsageError, match="no such run folder"):
        export(tmp_path / "nowhere", trainer="hf", output=tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_mask_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", config=published(keep="positive", by="position - 9", allow_empty_rows=True))
    with pytest.raises(UsageError, match=r"all are dropped \(cut_away \d, nothing_trains \d\)"):
        export(run, trainer="hf", output=tmp_path / "out", max_length=9)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ------------------------------------------------------------------------------------------------ README and record


@pytest.mark.parametrize(("kind", "trainer"), [*KINDS])
def test_the_readme_says_what_to_do_and_what_was_done(
    runs: dict[tuple[str, str], Path], tmp_path: Path, kind: str, trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, form = runs[kind, "binary"], FORMS[trainer]
    done = export(run, trainer=trainer, output="out", max_length=6)
    text = (tmp_path / "out" / "README.md").read_text()
    place = {"llamafactory": '"out"', "hf": '"./out"'}.get(trainer, f"out/{form.data}")
    for line in (
        place,
        IN_WORDS[form.alignment],
        "divides by nothing" if kind == "preference" else form.divides,
        *form.beware,
        *checked_against(form, kind),
    ):
        assert line in text, line
    assert f"- {done.rows} rows written" in text
    assert f"- {done.cut_rows} row" in text and "cut at the end to 6 tokens" in text
    for reason, count in done.dropped.items():
        assert f"- {count} row" in text and f"`{reason}`" in text
    assert text.count("```") % 2 == 0 and str(tmp_path) not in text


@pytest.mark.parametrize(("kind", "trainer"), KINDS)
def test_the_record_says_where_it_is_from(
    runs: dict[tuple[str, str], Path], tmp_path: Path, kind: str, trainer: str
) -> None:
    run = runs[kind, "binary"]
    done = export(run, trainer=trainer, output=tmp_path / "out", max_length=6)
    about = json.loads((tmp_path / "out" / "export.json").read_bytes())
    manifest = json.loads((run / "manifest.json").read_bytes())
    assert about["run"]["fingerprint"] == manifest["generations"][0]["fingerprint"]
    assert about["run"]["digests"] == manifest["digests"] and about["run"]["model"] == "base"
    readme = (tmp_path / "out" / "README.md").read_text()
    tokens = "tokens of the tokenizer of `base`: train that model, or one with the same tokenizer (`"
    assert tokens + str(manifest["digests"].get("tokenizer")) in readme
    assert about["mask"]["fingerprint"] == manifest["masks"][0]["fingerprint"]
    assert about["mask"]["settings"]["keep"] == 0.5 and about["trainer"] == trainer and about["kind"] == kind
    assert about["settings"] == {"max_length": 6, "strict": False, "binarize": False}
    rows = about["rows"]
    assert rows["read"] == rows["written"] + sum(rows["dropped"].values()) and rows["written"] == done.rows
    assert about["tokens"]["trained"] == done.trained_tokens and about["weights"]["sum"] == done.weight_sum
    listed = {one["path"]: one for one in about["files"]}
    found = contents(tmp_path / "out")
    assert listed.keys() == found.keys() - {"export.json"}
    for name, one in listed.items():
        assert one["sha256"] == hashlib.sha256(found[name]).hexdigest() and one["bytes"] == len(found[name])


SIMPO = {"rehearse_simpo": 0.5, "beta": 2.0}


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_the_readme_has_what_the_loss_of_the_values_takes(tmp_path: Path, kind: str) -> None:
    """Values of pairs are of DPO by the run's beta, which no trainer's default knows."""
    run = small_run(tmp_path / "run", kind=kind, config=published(weights="sigmoid"))
    rewrite(run, "settings", beta=0.5, rehearse_denominator="sum")
    wanted = {
        "hf": {
            "sft": 'train_dataset=rows, denominator="sum")',
            "preference": "args = DPOConfig(max_length=None, beta=0.5)",
        },
        "llamafactory": {"preference": "pref_beta: 0.5"},
        "ms-swift": {"preference": "swift rlhf --rlhf_type dpo --beta 0.5 --model"},
        "tinker": {"preference": "of DPO with a beta of 0.5"},
    }
    for trainer, lines in wanted.items():
        binarize = trainer not in ("hf", "tinker")
        export(run, trainer=trainer, output=tmp_path / trainer, binarize=binarize)
        text = (tmp_path / trainer / "README.md").read_text()
        assert lines.get(kind, "") in text and (kind == "preference") == ("0.5" in text)


@pytest.mark.parametrize(
    ("divided", "says"), [("count", "divide by how many respond"), ("sum", "trl.experimental.cpo")]
)
def test_the_readme_of_values_of_simpo_says_which_mean_they_are_of(tmp_path: Path, divided: str, says: str) -> None:
    """By count a token of weight 0 stays in the denominator, which labels of -100 take it out of."""
    run = small_run(tmp_path / "run", kind="preference")
    rewrite(run, "settings", rehearse_denominator=divided, **SIMPO)
    export(run, trainer="trl", output=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert says in text and "`beta=2.0, simpo_gamma=0.5`" in text and "DPOConfig(max_length=None)" in text
    assert ("would divide by" in text) == (divided == "count")


def rewrite(run: Path, key: str, **told: Any) -> None:
    """The run as if its manifest said this, too."""
    path = run / "manifest.json"
    stored = unsealed(path.read_bytes())
    path.write_bytes(sealed({**stored, key: {**stored[key], **told}}))


def test_the_readme_of_pairs_names_who_reads_pairs(runs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    export(runs["preference", "binary"], trainer="hf", output=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# Tokens to train, for TRL, by `WeightedDPOTrainer`\n" in text
    assert not [name for name in ("Unsloth", "Axolotl", "axolotl", "Together", "together") if name in text]


def test_the_readme_of_tokens_as_given_names_no_tokenizer(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    rewrite(run, "digests", tokenizer=f"sha256:{hashlib.sha256().hexdigest()}")
    export(run, trainer="hf", output=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "- token ids as they were given, scored by `base`: train a model of the same tokens" in text


@pytest.mark.parametrize("trainer", ["axolotl", "together", "unsloth", "verl"])
def test_pairs_are_refused_by_the_name_that_was_given(
    runs: dict[tuple[str, str], Path], tmp_path: Path, trainer: str
) -> None:
    with pytest.raises(UsageError, match=rf"holds preference pairs, and {trainer} has no form for pairs.* --for hf, "):
        export(runs["preference", "binary"], trainer=trainer, output=tmp_path / "out")


def test_weights_that_labels_cannot_hold_are_told_with_who_weighs(
    runs: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"Axolotl weighs by AlphaTokenPlugin.*all tokens that weigh something train"):
        export(runs["sft", "soft"], trainer="axolotl", output=tmp_path / "out")
    found = command("export", runs["sft", "soft"], "--for", "trl", "-o", tmp_path / "trl")
    assert "  weights  not all 0 or 1: README.md says which of its trainers weigh by them" in found.out.splitlines()


@pytest.mark.parametrize("trainer", TOKEN_FORMS)
def test_the_readme_names_the_folder_as_it_is_called(
    runs: dict[tuple[str, str], Path], tmp_path: Path, trainer: str
) -> None:
    done = export(runs["sft", "binary"], trainer=trainer, output=tmp_path / "größer 😀")
    assert f"{done.path}" in (done.path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("trainer", ["hf", "levanter", "verl", "skyrl", "megatron", "ms-swift", "tinker"])
def test_the_folder_opens_as_a_dataset(runs: dict[tuple[str, str], Path], tmp_path: Path, trainer: str) -> None:
    import datasets

    done = export(runs["sft", "binary"], trainer=trainer, output=tmp_path / "out", max_length=4)
    assert (tmp_path / "out" / "dropped.jsonl").exists()
    opened = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(opened) == done.rows


def test_a_folder_that_was_exported_anew_is_read_anew(runs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    import datasets

    found = []
    for weights in ("binary", "soft"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        export(runs["sft", weights], trainer="hf", output=tmp_path / "out")
        found.append(datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")))
        written = pq.read_table(tmp_path / "out" / "train.parquet")
        assert found[-1]["loss_weight"][:] == written["loss_weight"].to_pylist()
    assert found[0]["loss_weight"][:] != found[1]["loss_weight"][:]


# ------------------------------------------------------------------------------------------------------ a real run


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_a_scored_run_is_exported(models: dict[str, str], tmp_path: Path, kind: str) -> None:
    records: list[dict[str, Any]] = token_records(12)
    if kind == "preference":
        pairs = zip(records[::2], records[1::2], strict=True)
        records = [
            {f"{name}_{key}": row[key] for name, row in zip(("chosen", "rejected"), pair, strict=True) for key in keys}
            for pair in pairs
            for keys in [("input_ids", "labels")]
        ]
    data, run = write_jsonl(tmp_path / "rows.jsonl", records), tmp_path / "run"
    done = command("score", data, "--model", models["base"], "-o", run, "--weights", "sigmoid", "--rows-per-shard", 4)
    assert done.code == 0, done.err
    for trainer in TOKEN_FORMS if kind == "sft" else FOR_PAIRS:
        soft = (kind, trainer) in FLOATS
        export(run, trainer=trainer, output=tmp_path / trainer, binarize=not soft)
        assert read(trainer, tmp_path / trainer) == truth(run, binarize=not soft), trainer


def test_many_rows_are_written_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alphatoken_curate.exports import form

    run = small_run(tmp_path / "run")
    monkeypatch.setattr(form, "BATCH_ROWS", 2)
    for trainer in TOKEN_FORMS:
        export(run, trainer=trainer, output=tmp_path / trainer)
        assert read(trainer, tmp_path / trainer) == truth(run)
    assert pq.ParquetFile(tmp_path / "megatron" / "train.idx.parquet").num_row_groups == 5


@pytest.mark.parametrize(
    ("name", "form", "strict"),
    [("trl", "hf", False), ("unsloth", "hf", False), ("axolotl", "hf", True), ("together", "hf", True)],
)
def test_trainers_by_their_own_names(tmp_path: Path, name: str, form: str, strict: bool) -> None:
    run = small_run(tmp_path / "run")
    by_name = export(run, trainer=name, output=tmp_path / "a", binarize=True)
    by_form = export(run, trainer=form, strict=strict, output=tmp_path / "b", binarize=True)
    assert by_name.trainer == form
    written = [(folder / "train.parquet").read_bytes() for folder in (by_name.path, by_form.path)]
    assert written[0] == written[1]
    about = [json.loads((folder / "export.json").read_bytes()) for folder in (by_name.path, by_form.path)]
    assert [one["settings"]["strict"] for one in about] == [strict, strict]


def test_a_name_that_is_near_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"found 'axolotls'\. Did you mean axolotl\? Give one of hf, "):
        export(small_run(tmp_path / "run"), trainer="axolotls", output=tmp_path / "a")


def test_an_export_named_as_data_says_what_of_it_is_read(runs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    export(runs["sft", "binary"], trainer="trl", output=tmp_path / "out")
    with pytest.raises(InputError, match=r"was made of, or of this folder train.parquet by itself\."):
        read_rows([str(tmp_path / "out")])
    (tmp_path / "out" / "train.parquet").unlink()
    with pytest.raises(InputError, match=r"Name the rows the run was made of\."):
        read_rows([str(tmp_path / "out")])


@pytest.mark.parametrize("trainer", sorted(TOKEN_FORMS))
def test_a_file_of_an_export_is_read_by_its_labels_or_not_at_all(
    runs: dict[tuple[str, str], Path], tmp_path: Path, trainer: str
) -> None:
    # What lies there without labels may be of positions: mapped to a mask of tokens, it would be off by one in silence.
    folder = tmp_path / "out"
    export(runs["sft", "binary"], trainer=trainer, output=folder)
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".arrow", ".jsonl"))
    assert files
    for path in files:
        if trainer in ("hf", "llamafactory"):
            labels = [cast(Tokens, row.record).labels for row in read_rows([str(path)]).rows]
            trained = [{(i, label) for i, label in enumerate(row) if label != -100} for row in labels]
            assert trained == [set(branch) for (branch,) in truth(runs["sft", "binary"])]
        else:
            with pytest.raises(InputError, match=r"whose weights are not read from here\. Name the rows"):
                read_rows([str(path)])

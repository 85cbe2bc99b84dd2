"""What is said of a path that is no run folder, by every reader of runs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import published, small_run
from tiny_files import command, contents

import alphatoken_curate
from alphatoken_curate import UsageError
from alphatoken_curate.errors import StoredDataError
from alphatoken_curate.exports.export import export
from alphatoken_curate.reading.row import read_row
from alphatoken_curate.reading.stats import stats
from alphatoken_curate.rows.files import SUFFIXES
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.folder import check_is_run, destination
from alphatoken_curate.scoring.budget import NAME as BUDGET
from alphatoken_curate.trainers import as_dataset

READERS: dict[str, Callable[[Path], Any]] = {
    "scan": alphatoken_curate.scan,
    "scan_tokens": alphatoken_curate.scan_tokens,
    "stats": stats,
    "compare": lambda run: alphatoken_curate.compare(run, generations=(0, 0)),
    "report": alphatoken_curate.report,
    "verify": alphatoken_curate.verify,
    "mask": lambda run: alphatoken_curate.mask(run, published()),
    "read_row": lambda run: read_row(run, row=0),
    "export": lambda run: alphatoken_curate.export(run, trainer="hf", output=run.with_name("out")),
    "refresh": lambda run: alphatoken_curate.refresh(run, run),
    "watch": lambda run: next(alphatoken_curate.watch(run, run)),
    "as_dataset": as_dataset,
    "publish": lambda run: alphatoken_curate.publish(run, "s3://bucket/run"),
}
COMMANDS = {
    "stats": (),
    "show": ("--row", 0),
    "compare": (),
    "report": (),
    "mask": (),
    "export": ("--for", "hf", "-o", "out"),
    "verify": (),
    "refresh": ("--checkpoint", "c"),
    "publish": ("s3://bucket/run",),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run `a`, its export `a.hf` and other things, in the working folder."""
    monkeypatch.chdir(tmp_path)
    small_run(Path("a"))
    export("a", trainer="hf", output="a.hf")
    for name in ("sft.jsonl", "my rows.json.gz", "notes.txt"):
        Path(name).write_text("{}\n")
    Path("d").mkdir()
    Path("d/notes.txt").write_text("mine")
    Path("empty").mkdir()
    return tmp_path


def said(path: str) -> str:
    with pytest.raises(UsageError) as caught:
        check_is_run(Path(path))
    return str(caught.value)


def test_what_is_written_to_is_known_by_its_own_name(place: Path) -> None:
    Path("link").symlink_to("d")
    Path("lost").symlink_to("nowhere")
    Path("round").symlink_to("round")
    assert [destination(Path(path)) for path in ("a", "link", "new/run")] == [Path("a"), Path("link"), Path("new/run")]
    root = place.resolve()
    assert destination(Path("x/../d/../a")) == root / "a" and destination(Path("link/../a")) == root / "a"
    for path in ("lost", "lost/run", "x/../lost", "round", "x/../round/run"):
        with pytest.raises(UsageError, match=r"is a symbolic link to (nowhere|round), where nothing is"):
            destination(Path(path))
    before = contents(place)
    for output, why in (("x/../d", "is there and not empty"), ("x/../a/values", "lies in the run folder")):
        with pytest.raises(UsageError, match=why):
            export("a", trainer="hf", output=output)
    with pytest.raises(UsageError, match="lost is a symbolic link to nowhere"):
        export("a", trainer="hf", output="lost/export")
    assert contents(place) == before
    assert export("a", trainer="hf", output="x/../new").path == root / "new" and not Path("x").exists()


def sources() -> str:
    names = [one.source for one in manifest.read(Path("a")).inputs]
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("x", "x: no such run folder. Make one with: alphatoken-curate score DATA -o x"),
        ("x y", "x y: no such run folder. Make one with: alphatoken-curate score DATA -o 'x y'"),
        ("sft.jsonl/x", "no such run folder"),
        ("x" * 300, "no such run folder"),
        ("sft.jsonl", "sft.jsonl: a file of rows, not a run folder. Score it first: alphatoken-curate score sft.jsonl"),
        (
            "my rows.json.gz",
            "a file of rows, not a run folder. Score it first: alphatoken-curate score 'my rows.json.gz'",
        ),
        ("notes.txt", "notes.txt: a file, not a run folder. Name the folder that `score` made."),
        ("d", "d: not a run folder: it has no manifest.json. Name the folder that `score` made, or make one with: "),
        (".", ".: not a run folder: it has no manifest.json."),
        ("a/manifest.json", "a/manifest.json: a file of the run a, not a run folder. Name the run itself: a"),
        ("a/values", "a/values: a folder of the run a, not a run folder. Name the run itself: a"),
        ("a/train/mask=0000", "a/train/mask=0000: a folder of the run a, not a run folder."),
        ("a/values/generation=0/part-00000.parquet", "a file of the run a, not a run folder. Name the run itself: a"),
        ("a.hf/train.parquet", "a.hf/train.parquet: a file of a.hf, an export of a run of "),
    ],
)
def test_it_says_what_it_is_and_what_to_do(place: Path, path: str, says: str) -> None:
    assert says in said(path)


def test_an_export_says_of_what_and_which_command_checks_it(place: Path) -> None:
    assert said("a.hf") == (
        f"a.hf: an export of a run of {sources()} (mask 0, for hf), not a run folder. Name the run it was made from."
        " To check its files: alphatoken-curate verify a.hf"
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"null", b"[]", b'{"mask": 3}', b"\xff"], ids=range(7))
def test_a_damaged_record_is_told_of_and_never_followed(place: Path, content: bytes) -> None:
    Path("a.hf/export.json").write_bytes(content)
    assert "an export by its export.json, which is damaged or was not written by `export`" in said("a.hf")
    Path("export.json").write_bytes(content)
    assert said("sft.jsonl").startswith("sft.jsonl: a file of rows")


def test_parts_of_a_run_know_it_from_inside_and_by_links(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("link").symlink_to(place / "a" / "values")
    assert f"a folder of the run {place / 'a'}," in said("link")
    (place / "a" / "train" / "mask=0009").mkdir()
    assert "a folder of the run a," in said("a/train/mask=0009")
    monkeypatch.chdir(place / "a" / "train")
    assert f"a folder of the run {place / 'a'}," in said("mask=0000")
    monkeypatch.chdir(place / "a")
    check_is_run(Path())


def test_a_web_page_s_manifest_makes_no_run_of_its_folder(place: Path) -> None:
    Path("manifest.json").write_text("{}")
    Path("README.md").write_text("mine")
    assert said("README.md").startswith("README.md: a file, not a run folder")


@pytest.mark.parametrize("kept", ["values", "train", f"artifacts/{BUDGET}"])
def test_a_run_that_lost_its_manifest_or_was_begun_is_damaged_and_no_other_thing(place: Path, kept: str) -> None:
    run = Path("a")
    (run / "artifacts" / BUDGET).write_text("{}")
    for path in sorted(run.rglob("*"), reverse=True):
        if not path.as_posix().startswith(f"a/{kept}") and not (path.is_dir() and any(path.iterdir())):
            path.rmdir() if path.is_dir() else path.unlink()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(StoredDataError, match="no finished run"):
        manifest.read(run)
    assert "a folder of the run a," in said(f"a/{kept.partition('/')[0]}")


def test_an_empty_folder_is_a_run_that_was_not_begun(place: Path) -> None:
    with pytest.raises(StoredDataError, match="no finished run"):
        manifest.read(Path("empty"))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", list(READERS))
def test_every_function_that_reads_a_run_says_it(place: Path, name: str) -> None:
    before = contents(place)
    for path in ("sft.jsonl", "a.hf", "d", "x", "a/values"):
        with pytest.raises(UsageError) as caught:
            READERS[name](place / path)
        assert str(caught.value) == said(str(place / path))
    assert contents(place) == before and not (place / "x").exists()


def test_the_functions_are_all_that_read_a_run() -> None:
    takes = {
        name
        for name in alphatoken_curate.__all__
        if inspect.isfunction(found := getattr(alphatoken_curate, name))
        and "run" in inspect.signature(found).parameters
    }
    assert takes - READERS.keys() == {"score", "score_part"}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_that_reads_a_run_says_it(place: Path, name: str) -> None:
    before = contents(place)
    for path in ("sft.jsonl", "d", "x", "a/values", *(["a.hf"] if name != "verify" else [])):
        ended = command(name, path, *COMMANDS[name])
        assert ended.code == 2 and ended.out == "" and said(path) in ended.err
    assert contents(place) == before
    if name == "compare":
        assert said("sft.jsonl") in command("compare", "a", "sft.jsonl").err


def test_refresh_says_it_before_torch_is_imported(place: Path) -> None:
    code = (
        "import sys; sys.argv = ['', 'refresh', 'sft.jsonl', '--checkpoint', 'c']\n"
        "from alphatoken_curate.cli.main import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules, 'pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False", "False"] and "a file of rows" in done.stderr


@pytest.mark.one_in(2)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_names_of_files_of_rows_are_known(place: Path, suffix: str) -> None:
    Path(f"rows{suffix}").write_text("{}")
    assert "a file of rows" in said(f"rows{suffix}")

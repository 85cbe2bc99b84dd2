"""What the system refuses is a line: a name, a file, an output; an error of our own keeps its traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import small_run
from tiny_files import command, token_records, write_jsonl

from alphatoken_curate.reading import verify as module

LONG = "a" * 300


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, and rows `d.jsonl` beside it, in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("d.jsonl"), token_records(4))
    return small_run(Path("run"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "arguments",
    [
        *(("score", "d.jsonl", flag, LONG) for flag in ("-o", "--model", "--fisher", "--chat-template", "--reuse")),
        ("score", f"{LONG}.jsonl"),
        ("score", LONG, "-o", "x"),
        ("export", "run", "--for", "trl", "-o", LONG),
        ("report", "run", "-o", LONG),
        ("stats", "run", "--svg", LONG),
        ("stats", "run", "--svg", LONG[:250]),  # the file that it is written to first has a longer name
    ],
    ids=lambda arguments: " ".join(arguments[:4]).replace(LONG, "LONG"),
)
def test_a_name_that_is_too_long(arguments: tuple[str, ...], run: Path, models: dict[str, str]) -> None:
    model = ("--model", models["base"]) if arguments[0] == "score" and "--model" not in arguments else ()
    ended = command(*arguments, *model)
    assert ended.code in (2, 3) and "Traceback" not in ended.err and ended.out == ""
    assert "File name too long; give a shorter name" in ended.err or "no such file" in ended.err


def test_a_file_where_a_folder_is_needed_is_told_of_before_rows_are_read(run: Path, models: dict[str, str]) -> None:
    Path("notdir").write_text("x")
    for arguments in (("score", "d.jsonl", "--model", models["base"]), ("export", "run", "--for", "trl")):
        for place in ("notdir/x", "notdir/x/y"):
            ended = command(*arguments, "-o", place)
            told = f"Error: {place}: notdir is a file, and a folder is needed there. Name another place.\n"
            assert (ended.code, ended.out, ended.err) == (2, "", told)
    ended = command("report", "run", "-o", "notdir/x")
    assert ended.code == 2 and "a file lies where a folder is needed, so name another place" in ended.err


@pytest.mark.skipif(sys.platform == "darwin", reason="takes no such names")
def test_a_folder_whose_name_is_no_text_is_refused_at_once(run: Path, models: dict[str, str]) -> None:
    name = os.fsdecode(b"o\xff")
    score = ("score", "d.jsonl", "--model", models["base"], "-o", name)
    for arguments in (score, ("export", "run", "--for", "trl", "-o", name)):
        ended = command(*arguments)
        assert ended.code == 2 and ended.err.startswith("Error: ") and ended.err.count("\n") == 1
        assert "o\\udcff: its name is not UTF-8" in ended.err and not Path(name).exists()
    run.rename(name)  # its files are as they were: none is called damaged
    for arguments in (score, ("stats", name), ("verify", name), ("refresh", name, "--checkpoint", models["base"])):
        ended = command(*arguments)
        assert ended.code == 2 and "o\\udcff: its name is not UTF-8" in ended.err and "damaged" not in ended.err


@pytest.mark.one_in(6)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("verb", ["stats", "mask", "--help"])
def test_an_output_that_takes_no_more(verb: str, buffered: bool, run: Path) -> None:
    code = "from alphatoken_curate.cli.main import main; main()"
    words = [
        sys.executable,
        "-P",
        *([] if buffered else ["-u"]),
        "-c",
        code,
        verb,
        *([] if verb == "--help" else ["run"]),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr == "Error: standard output: No space left on device; make room\n"


def test_what_the_system_refuses_of_a_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {errno.EACCES: (1, "check its permissions"), errno.ENOSPC: (1, "make room"), errno.EIO: (1, "see what")}
    for number, (code, does) in {**cases, errno.ELOOP: (2, "name what it should lead to")}.items():
        error = OSError(number, os.strerror(number), "some/file")
        monkeypatch.setattr(module, "verify", lambda _, error=error: (_ for _ in ()).throw(error))
        ended = command("verify", "run")
        assert ended.code == code and ended.err.startswith(f"Error: some/file: {os.strerror(number)}; ")
        assert does in ended.err and ended.err.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC, None])
def test_an_error_that_names_no_file_keeps_its_traceback(
    number: int | None, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError("of a library") if number is None else OSError(number, os.strerror(number))
    monkeypatch.setattr(module, "verify", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match=str(error).replace("[", r"\[")):
        command("verify", "run")

"""What the pages show is what happens: commands parse and run, Python runs as printed, links lead somewhere.

`pytest --rewrite tests/test_readme.py` writes the table of columns into README.md, and into sample_data/README.md what
the code below `<!-- test: question N -->` prints.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pytest
import torch
from real_run import real_run
from small_run import small_run
from tiny import tiny_model
from tiny_files import command, perturbed, quiet

from alphatoken_curate.cli.main import COMMANDS, cli
from alphatoken_curate.cli.options import read_config
from alphatoken_curate.config import MaskConfig, ScoreConfig
from alphatoken_curate.errors import UsageError
from alphatoken_curate.models import load
from alphatoken_curate.runs.schema import BY_ESTIMATOR, ERRORS, NOT_COMPUTED, PREFERENCE, SFT

ROOT = Path(__file__).parent.parent
MAIN, SAMPLE = ROOT / "README.md", ROOT / "sample_data" / "README.md"
RESULTS = ROOT / "tests" / "benchmarks" / "pays" / "results" / "README.md"
FOLDERS = (".github", "alphatoken_curate", "cli", "sample_data", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def block(mark: str, page: str = "README.md") -> str:
    found = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", TEXTS[page], re.DOTALL)
    assert found, f"{page} has no block marked {mark}"
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCED.findall(text) if kind == language]


def section(title: str) -> str:
    """The text below a heading of README.md, up to the next one."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, f"README.md has no heading {title}"
    return found[1]


# --------------------------------------------------------------------------------------------------------- as a whole


def test_the_readme_is_short_and_says_early_which_command_to_run() -> None:
    lines = README.splitlines()
    assert len(lines) <= 240
    assert lines.index("## Which command do I run?") < 60


def test_the_two_commands_are_there() -> None:
    assert "python -m venv" in block("ci: score")
    assert "alphatoken-curate score sample_data/sft.jsonl" in block("ci: score")
    assert block("ci: test").strip().endswith("&& pytest -n auto --dist loadfile")


def test_no_line_is_said_twice() -> None:
    """Of sentences, tables and commands; heads of tables may be alike, and so may lines of Python.

    An arm that another stage is told beside is in the tables of both.
    """
    said: Counter[str] = Counter()
    spared = re.compile(
        r"^```(python|text)\n.*?^```$|^<!-- referee -->$.*?^<!-- end of referee -->$", re.DOTALL | re.MULTILINE
    )
    for text in TEXTS.values():
        lines = [line.strip() for line in spared.sub("", text).splitlines()]
        heads = {lines[n - 1] for n, line in enumerate(lines) if re.fullmatch(r"\|[\s:|-]+\|", line)}
        said.update(
            line for line in lines if len(line) >= 40 and line not in heads and not re.match(r"\|[\s:-]+\|", line)
        )
    said -= Counter(dict.fromkeys(said, 1))
    assert not said


def test_every_gain_is_one_of_the_result_tables() -> None:
    """The only figures of README.md with three decimals are those of outcomes, and have their signs."""
    told = "".join(map(section, ("Which command do I run?", "Does training on a mask pay?")))
    cells = re.findall(r"\| \+?(-?\d\.\d{3})(?= )", TEXTS[RESULTS.relative_to(ROOT).as_posix()])
    found = re.findall(r"-?\d\.\d{3}", told)
    assert len(found) >= 8
    assert not {*found} - {*cells}


# --------------------------------------------------------------------------------------------------------------- links

_LINK = re.compile(r"\[[^\]]*\]\(\s*([^)\s]+)\s*\)")


def prose(text: str) -> str:
    """Without code."""
    return re.sub(r"`[^`\n]*`", "code", FENCED.sub("", text))


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them: lower case, without punctuation, hyphens for spaces, numbered if alike."""
    found: list[str] = []
    for title in re.findall(r"^#{1,6} +(.*?) *#*$", FENCED.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{sum(one == slug for one in found)}")
    return set(found)


def dead(page: str, text: str) -> Iterator[str]:
    """Links of a page that lead to no file, or to no heading of it."""
    for link in _LINK.findall(prose(text)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        there = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        whole = there.exists() and there.is_relative_to(ROOT)
        if not whole or (anchor and anchor not in anchors(there.read_text(encoding="utf-8"))):
            yield link


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    assert len(TEXTS) >= 8
    assert {page: list(dead(page, text)) for page, text in TEXTS.items()} == {page: [] for page in TEXTS}
    assert len(_LINK.findall(prose(README))) > 20


@pytest.mark.parametrize("link", ["nothing.md", "README.md#no-such-heading", "#nor-this", "../README.md"])
def test_a_dead_link_is_seen(link: str) -> None:
    assert list(dead("README.md", f"{README}\n[a\nlink]({link})")) == [link]


def test_headings_become_anchors_as_on_github() -> None:
    text = "# What, `A-b_c` is?\n## Speed: `x.py`\n```sh\n# no heading\n```\n## [A link](x) · too\n## Twice\n## Twice\n"
    assert anchors(text) == {"what-a-b_c-is", "speed-xpy", "a-link--too", "twice", "twice-1"}


# ------------------------------------------------------------------------------------------------------------ commands


def command_lines(text: str) -> list[list[str]]:
    """The arguments of each `alphatoken-curate` of its shell blocks, also of what a job wraps, variables filled in."""
    found = []
    for body in blocks(text, "sh"):
        known: dict[str, str] = {}
        for line in body.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r"([A-Z]+)=(\S+|\".*\")", line):
                known[assigned[1]] = assigned[2].strip('"')
            wrapped = re.search(r'--wrap "(.*?)"', line)
            whole = wrapped[1].replace("\\$SLURM_ARRAY_TASK_ID", "0") if wrapped else line
            words = shlex.split(re.sub(r"\$([A-Z]+)", lambda name, known=known: known[name[1]], whole), comments=True)
            if words and words[0] == "alphatoken-curate":
                found.append(words[1:])
    return found


def parsed(arguments: list[str]) -> None:
    """As the command line parses them; raises where a command, an option or a value is none of its own."""
    name, *rest = arguments
    assert name in COMMANDS, f"no command {name}"
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    context = found.make_context(name, rest)
    if name in ("check", "score"):
        read_config(context, ScoreConfig, context.params["data"])
    elif name == "mask":
        read_config(context, MaskConfig)


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if command_lines(text)])
def test_every_command_line_parses(page: str) -> None:
    for arguments in command_lines(TEXTS[page]):
        parsed(arguments)


@pytest.mark.parametrize(
    "line", ["sing a.jsonl", "score a.jsonl --loud", "score a.jsonl --keep 2", "export a --for me"]
)
def test_a_command_line_that_does_not_parse_is_seen(line: str) -> None:
    with pytest.raises((AssertionError, click.ClickException, UsageError)):
        parsed(line.split())


@pytest.mark.parametrize("page", ["README.md", "sample_data/README.md", "tests/models/README.md"])
def test_every_option_in_a_sentence_is_one_of_a_command(page: str) -> None:
    commands = [cli.get_command(click.Context(cli), name) for name in COMMANDS]
    known = {option for one in commands if one for parameter in one.params for option in parameter.opts}
    found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", FENCED.sub("", TEXTS[page])))
    assert len(found) > 10
    assert found - {"--rewrite", "--no-deps"} <= known


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_tokenizer: Any) -> Iterator[Path]:
    """A folder with what the lines of README.md name: rows, and tiny models that have SmolLM2's tokenizer."""
    shape = {"vocab_size": len(smollm2_tokenizer), "max_position_embeddings": 2048, "hidden_size": 16}
    for place, scale in (("my/model", 0.0), ("my/clean", 0.02), ("out/checkpoint-500", 0.01)):
        with quiet():
            perturbed(tiny_model("llama", dtype=torch.float32, **shape), scale).save_pretrained(tmp_path / place)
        smollm2_tokenizer.save_pretrained(tmp_path / place)
    shutil.copytree(SAMPLE.parent, tmp_path / "sample_data")
    lines = (SAMPLE.parent / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, few in (("data", lines[:12]), ("my", lines[12:24]), ("task", lines[24:28])):
        (tmp_path / f"{name}.jsonl").write_text("".join(few), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    demo = load.ModelSource(name="smollm2-135m", folder=tmp_path / "my" / "model")
    monkeypatch.setattr(load, "_find_demo", lambda local: demo)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models are fastest so, beside other programs above all
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Which command do I run?", "My own data and my own model"])
def test_the_lines_of_every_situation_run(title: str, workplace: Path) -> None:
    lines = command_lines(section(title))
    assert len(lines) >= 6
    for arguments in lines:
        done = command(*["my/model" if word.startswith("Qwen/") else word for word in arguments])
        assert done.code == 0, (arguments, done.err)


# -------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if blocks(text, "python")])
def test_python_compiles(page: str) -> None:
    for code in blocks(TEXTS[page], "python"):
        compile(code, page, "exec")


def test_the_histogram_runs_as_printed_and_takes_six_lines_of_polars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = block("test: histogram", "sample_data/README.md")
    assert sum(bool(line) for line in code.splitlines()) == 6
    small_run(tmp_path / "sft.alphatoken")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "histogram" in printed
    assert "nll" in printed


QUESTION = re.compile(r"(<!-- test: question (\d) -->\n```python\n)(.*?)(```\n\n```text\n)(.*?)(```\n)", re.DOTALL)


def answered(text: str) -> str:
    """The page with the answers that its questions print, asked one after the other of the run of `real_run`."""
    import polars as pl

    known: dict[str, Any] = {}

    def run(found: re.Match[str]) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(found[3], "README.md", "exec"), known)
        return "".join((found[1], found[3], found[4], out.getvalue(), found[6]))

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), pl.Config(tbl_width_chars=100):
        real_run(Path("few.alphatoken"))
        return QUESTION.sub(run, text)


def test_six_questions_have_the_answers_that_are_printed(same_text: Callable[[Path, str], None]) -> None:
    text = SAMPLE.read_text(encoding="utf-8")
    assert [found[2] for found in QUESTION.finditer(text)] == list("123456")
    same_text(SAMPLE, answered(text))


def test_an_answer_that_is_not_what_is_printed_is_seen() -> None:
    text = TEXTS["sample_data/README.md"]
    (first, *_) = QUESTION.finditer(text)
    wrong = text.replace(first[5], first[5].replace("│", "|", 1))
    assert wrong != text
    assert answered(wrong) == text


# ------------------------------------------------------------------------------------------------------------- columns

_BEGIN, _END = "<!-- test: columns -->\n", "<!-- end of columns -->"
_NULL = re.compile(r"[;,] null (?:where )?")


def columns() -> list[tuple[str, pa.Field]]:
    """Every column of runs, without the prefix of a branch, and which files have it; once where both mean the same."""
    values = {field.name: field for field in SFT.values}
    values |= {field.name: field for field in PREFERENCE.values if not field.name.startswith(PREFERENCE.branches)}
    train = {field.name: field for field in SFT.train}
    both = {"row_id"} | {name for name in values.keys() & train.keys() if same(values[name], train[name])}
    found = [("both" if name in both else "values", field) for name, field in values.items()]
    return found + [("train", field) for name, field in train.items() if name not in both]


def same(one: pa.Field, other: pa.Field) -> bool:
    return bool(one.equals(other, check_metadata=True))


def told(field: pa.Field, key: bytes) -> str:
    return str(field.metadata[key].decode()).replace("|", "\\|")


def null_where(field: pa.Field) -> str:
    """When all of a column is null, or a row's number."""
    stated = _NULL.split(told(field, b"doc"))[1:]
    if stated or field.name not in NOT_COMPUTED:
        return stated[0] if stated else {"id": "the row has none", "omega": "unless `scored`"}.get(field.name, "")
    if field.name.startswith("drift_"):
        return "unless `--retention` and `--drift` are given"
    if field.name in ERRORS:
        return "without `--target-groups` (`stab_error`: or `--retention`)"
    lacking = [name for name, one in BY_ESTIMATOR.items() if field.name not in one.signals]
    if len(lacking) == 1:
        return f"`--estimator {lacking[0]}`"
    (having,) = BY_ESTIMATOR.keys() - lacking
    return f"unless `--estimator {having}`"


def table() -> str:
    """The columns with units and meaning, as the schema has them; those that differ by their path in one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for where, field in columns():
        meaning = _NULL.split(told(field, b"doc"))[0]
        if field.name.startswith("drift_"):
            meaning = meaning.replace(field.name.removeprefix("drift_"), "...")
        if field.name in ERRORS:
            meaning = "standard error of adaptation, stability and value, by groups of target and retention rows"
        rows.setdefault((where, told(field, b"units"), meaning, null_where(field)), []).append(f"`{field.name}`")
    lines = ["| column | in | unit | meaning | null where |", "|---|---|---|---|---|"]
    lines += [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in rows.items()]
    return "\n".join(lines) + "\n"


def with_columns(text: str) -> str:
    start, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    return text[:start] + table() + text[end:]


def test_the_table_of_columns_is_the_schema(same_text: Callable[[Path, str], None]) -> None:
    same_text(MAIN, with_columns(MAIN.read_text(encoding="utf-8")))


def test_every_column_of_every_run_is_in_the_table() -> None:
    shown = section("Columns")
    for layout in (SFT, PREFERENCE):
        for field in (*layout.values, *layout.train):
            name = field.name
            for prefix in PREFERENCE.branches:
                name = name.removeprefix(prefix)
            (*_, row) = (
                line for line in shown.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]
            )
            assert told(field, b"units") in row

"""How the package is laid out: imports go one way, only the command line prints, and nothing runs foreign code."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import alphatoken_curate

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "alphatoken_curate"
CLI = ROOT / "cli"

ORDER = """
    errors config fingerprint documents draws schema atomic progress
    | files containers tables shapes pairs rows chat pieces speller tokens plan
    | tangents tangent_rules precision probabilities attention tangent_attention experts foreign blocks caches capture
    value_rows folders adapters models likeness checkpoints
    | losses selection target fisher generate precondition drift paths parameters influence composite preference signals
    | criteria masks | sealed shards records manifest card responses ranked remask
    | artifacts budget meter prepare idle scorer trial job beside changes score refresh memory estimate check
    | words scan rules verify histogram sums counting stats heat row_view row_search row_text stats_text stats_picture
    compare compare_text
    | report_markup report_numbers report_chart report_tokens report_overview
    report_relations report_rows report
    | trainset
    | exports.form exports.settle exports.hf exports.llamafactory exports.swift exports.shifted exports.unshifted
    exports.verl_dataset exports.originals exports.messages exports.guide exports.export
    | trainers.loss trainers.collator trainers.dataset trainers.current trainers.heads trainers.hf trainers.sft
    trainers.dpo trainers.refresh trainers.axolotl
"""
"""Each module imports only from those before it; those of a folder are named with it, `folder.module`."""

FOLDERS: tuple[str, ...] = ("exports", "trainers")
"""Groups of modules that outgrew a file or two."""

RANK = {name: n for n, name in enumerate(ORDER.replace("|", " ").split())}

FORBIDDEN = re.compile(
    r"\b(pickle|dill|joblib|subprocess|marshal|shelve)\b|torch\.load\b|\b(eval|exec|compile|__import__)$|shell=True"
    r"|yaml\.(load|unsafe_load|full_load|load_all)$|os\.(system|popen|exec\w*|spawn\w*)$"
)


def modules(folder: Path) -> list[Path]:
    """Those of the folder and, in the library, of its folders."""
    return sorted([*folder.glob("*.py"), *(path for path in folder.glob("[a-z]*/*.py") if folder == LIBRARY)])


def name_of(path: Path) -> str:
    """As in `ORDER`."""
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Names of our own modules that a module imports, anywhere in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("alphatoken_curate."))
        elif isinstance(node, ast.ImportFrom):
            package, _, module = (node.module or "").partition(".")
            if package == "alphatoken_curate" and module in ("", *FOLDERS):
                yield from (f"{module}.{alias.name}".strip(".") for alias in node.names)
            elif package == "alphatoken_curate":
                yield module


def test_every_module_has_its_place_in_the_order() -> None:
    assert {name_of(path) for path in modules(LIBRARY)} - {""} - set(FOLDERS) == set(RANK)
    folders = {path.name for path in LIBRARY.iterdir() if path.is_dir() and path.name.isidentifier()}
    assert folders - {"__pycache__", "cli"} == set(FOLDERS)


@pytest.mark.parametrize("path", modules(LIBRARY), ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    if path.stem == "__init__":
        return
    wrong = {name for name in imported(path) if RANK.get(name, 999) >= RANK[name_of(path)]}
    assert not wrong, f"{name_of(path)} imports {wrong}"
    assert not [n for n in ast.walk(tree(path)) if isinstance(n, ast.ImportFrom) and n.level], "relative import"


def test_the_library_does_not_know_the_command_line() -> None:
    for path in modules(LIBRARY):
        assert "cli" not in set(imported(path)), path
        assert not re.search(r"^\s*(import|from) click", path.read_text(), re.MULTILINE), path


def _calls(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, name as written, arguments as written) of every call."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            arguments = ", ".join(ast.unparse(item) for item in (*node.args, *node.keywords))
            yield node.lineno, ast.unparse(node.func), arguments


@pytest.mark.parametrize("path", modules(LIBRARY), ids=name_of)
def test_only_the_command_line_prints(path: Path) -> None:
    for line, name, _ in _calls(path):
        assert name not in ("print", "click.echo", "sys.stdout.write", "sys.stderr.write"), f"{path}:{line}"
    text = path.read_text()
    assert not re.search(r"sys\.(stdout|stderr)|^import logging|warnings\.warn", text, re.MULTILINE)


@pytest.mark.parametrize("path", [*modules(LIBRARY), *modules(CLI)], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_nothing_runs_foreign_code(path: Path) -> None:
    for line, name, arguments in _calls(path):
        if name == "yaml.load" and re.search(r"Loader=(yaml\.SafeLoader|Strict)\b", arguments):
            continue  # Strict derives from SafeLoader: see the test below
        if name.endswith(".eval") or name == "re.compile":
            continue  # a model's evaluation mode; a pattern
        assert not FORBIDDEN.search(name) and "shell=True" not in arguments, f"{path}:{line}: {name}"
    for node in ast.walk(tree(path)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(FORBIDDEN.search(name) for name in names), f"{path}:{node.lineno}"


def test_the_strict_yaml_loader_is_a_safe_one() -> None:
    bases = [
        ast.unparse(base)
        for node in ast.walk(tree(LIBRARY / "config.py"))
        if isinstance(node, ast.ClassDef) and node.name == "Strict"
        for base in node.bases
    ]
    assert bases == ["yaml.SafeLoader"]


def test_the_patterns_find_what_they_look_for() -> None:
    for name in ("pickle.loads", "torch.load", "eval", "builtins.exec", "yaml.load", "yaml.unsafe_load", "os.system"):
        assert FORBIDDEN.search(name), name
    for name in ("model.evaluate", "importlib.import_module", "yaml.safe_load", "safetensors.torch.load_file"):
        assert not FORBIDDEN.search(name), name


@pytest.mark.parametrize("path", [*modules(LIBRARY), *modules(CLI)], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_modules_and_functions_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= (100 if path.parent == CLI else 400)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 50, f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", [*modules(LIBRARY), *modules(CLI)], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_errors_are_neither_swallowed_nor_asserted(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type is not None else ""
            assert caught and caught != "Exception", f"{path}:{node.lineno}"
            if caught == "BaseException":
                assert isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None, f"{path}:{node.lineno}"


def test_every_command_is_a_file_of_its_own() -> None:
    from alphatoken_curate.cli.main import COMMANDS

    helpers = {"__init__", "interrupts", "main", "options", "terminal"}
    assert {path.stem for path in modules(CLI)} - helpers == set(COMMANDS)


def test_the_public_names() -> None:
    names = alphatoken_curate.__all__
    assert names == sorted(names) and len(set(names)) == len(names)
    for name in names:
        assert callable(getattr(alphatoken_curate, name)), name
        assert getattr(alphatoken_curate, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = alphatoken_curate.nope
    # A function that shares its name with its module stays the function, whoever imports the module.
    for name in ("score", "verify", "scan", "compare"):
        importlib.import_module(f"alphatoken_curate.{name}")
        assert callable(getattr(alphatoken_curate, name)), name


def test_importing_the_package_costs_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import alphatoken_curate; from alphatoken_curate import ScoreConfig;"
        "print({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'alphatoken_curate'}"


def test_every_source_module_has_its_tests() -> None:
    """One test file per module, but for those that others test whole."""
    elsewhere = {
        "errors": "test_cli",
        "progress": "test_score",
        "schema": "test_shards",
        "scorer": "test_score",
        "check": "test_cli",
        "files": "test_rows",
        "folders": "test_models",
        "containers": "test_rows",
        "tables": "test_rows",
        "chat": "test_tokens",
        "fingerprint": "test_manifest",
        "documents": "test_manifest",
        "records": "test_shards",
        "atomic": "test_shards",
        "beside": "test_refresh",
        "job": "test_score",
        "likeness": "test_refresh",
        "pairs": "test_rows",
        "shapes": "test_rows",
        "speller": "test_tokens",
        "tangent_rules": "test_tangents",
        "probabilities": "test_attention",
        "selection": "test_paths",
        "sums": "test_stats",
        "trainers.current": "test_trainers_refresh",
        "trainers.heads": "test_trainers_sft",
        "counting": "test_stats",
        "exports.form": "test_exports_export",
        "exports.guide": "test_exports_export",
        "exports.originals": "test_exports_messages",
        "exports.verl_dataset": "test_exports_unshifted",
    }
    for name in RANK:
        assert (ROOT / "tests" / f"{elsewhere.get(name, 'test_' + name.replace('.', '_'))}.py").is_file(), name

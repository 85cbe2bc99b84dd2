"""How the package is laid out: imports go one way, only the command line prints, and nothing runs foreign code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from sources import CLI, LIBRARY, ROOT, imports, modules
from yaml.constructor import SafeConstructor

import alphatoken_curate
from alphatoken_curate import settings

ORDER = """
    : errors wording urls settings together config progress
    runs: stores fingerprint documents schema atomic sealed shards train_shards records folder manifest vocabulary
        direction card watched tensor_file uploads
        artifacts
    models: releases formats tensors positions gguf_files whole vocabularies folders adapters unmerged devices disk load
        likeness checkpoints
    engine: tangents tangent_rules precision probabilities attention tangent_attention twice padding_rows lowrank
        experts foreign below blocks caches placement capture moving value_rows
    rows: files containers arrays batches saved hub tables marks fields padding shapes pairs beside columns read
    tokens: meter sandbox bounded dates refusals marks specials closings kept turns blocks each forms advice chat pieces
        likeness speller tokenise plan packed dealt draws
    directions: losses selection target fisher generate precondition gauss_newton astra drift parameters
        optimisers step_losses trainee shelves waypoints windows course rehearsal lora groups sums
    signals: paths influence composite preference stored rehearsed student
    masks: language expression criteria formulas choose always responses ranked remask mask
    scoring: budget meter folder named identity sources spawned tokenising shelf reader reach prepare idle outcome spec
        reference scorer solving trial job lora courses material portions rehearse steps worker engines pool processes
        cluster stages rehearsing beside changes loop part refresh watch memory probes estimate check finished score
    reading: words published scan rules verify publish row search histogram sums counting errors stats compare trainset
    views: heat row_text stats_text stats_picture compare_text
    page: markup numbers chart tokens overview relations rows report
    exports: form settle hf llamafactory swift shifted unshifted verl_dataset originals messages guide verify export
    trainers: loss collator fit dataset current heads hf sft dpo refresh axolotl
"""
"""Folders and the modules inside them, in the order of imports: a module imports only from those before it.

The first line is the package's own folder. Data flows from the first folder to the last.
"""


def _dealt() -> dict[str, list[str]]:
    """Modules by folder, in order."""
    parts = re.split(r"^ {4}(\w*):", ORDER, flags=re.MULTILINE)[1:]
    return {folder: names.split() for folder, names in zip(parts[::2], parts[1::2], strict=True)}


HOUSE = _dealt()

RANK = {f"{folder}.{name}".strip("."): n for n, (folder, name) in enumerate((f, m) for f in HOUSE for m in HOUSE[f])}

PUBLIC_FOLDERS = ("trainers",)
"""Folders whose `__init__` hands on public names; the others hold their first lines alone."""

FORBIDDEN = re.compile(
    r"\b(pickle|dill|joblib|subprocess|marshal|shelve)\b|torch\.load\b|\b(eval|exec|compile|__import__)$|shell=True"
    r"|yaml\.(load|unsafe_load|full_load|load_all)$|os\.(system|popen|exec\w*|spawn\w*)$"
)


def name_of(path: Path) -> str:
    """As in `ORDER`."""
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Names of our own modules that a module imports, anywhere in it, as in `RANK`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("alphatoken_curate."))
        elif isinstance(node, ast.ImportFrom):
            package, _, module = (node.module or "").partition(".")
            if package == "alphatoken_curate" and module in HOUSE:
                yield from (f"{module}.{alias.name}".strip(".") for alias in node.names)
            elif package == "alphatoken_curate":
                yield module


def test_every_module_has_its_place_in_the_order() -> None:
    assert {name_of(path) for path in modules(LIBRARY)} - set(HOUSE) == set(RANK)
    folders = {path.name for path in LIBRARY.iterdir() if path.is_dir() and path.name.isidentifier()}
    assert folders - {"__pycache__", "cli"} == set(HOUSE) - {""}


@pytest.mark.parametrize("path", modules(LIBRARY), ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    if path.stem == "__init__":
        return
    wrong = {name for name in imported(path) if RANK.get(name, 999) >= RANK[name_of(path)]}
    assert not wrong, f"{name_of(path)} imports {wrong}"
    assert not [n for n in ast.walk(tree(path)) if isinstance(n, ast.ImportFrom) and n.level], "relative import"


@pytest.mark.parametrize("folder", [name for name in HOUSE if name])
def test_every_folder_says_what_comes_in_what_goes_out_and_where_to_begin(folder: str) -> None:
    module = tree(LIBRARY / folder / "__init__.py")
    lines = (ast.get_docstring(module) or "").splitlines()
    assert lines[0].endswith(".") and lines[1] == "" and len(lines) >= 5, "what the folder is for, then an empty line"
    for line, start in zip(lines[2:5], ("In: ", "Out: ", "Open first: "), strict=True):
        assert line.startswith(start) and len(line) > len(start) + 3, line
    named = re.findall(r"\w+\.py", lines[4])
    assert named and all((LIBRARY / folder / name).is_file() for name in named), lines[4]
    hands_on = [node for node in module.body if not isinstance(node, ast.Expr)]
    assert not hands_on or folder in PUBLIC_FOLDERS, "import from the module that defines"


def test_every_folder_is_installed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(f"alphatoken_curate.{name}".strip(".") for name in (*HOUSE, "cli"))


def test_contributing_has_a_line_for_every_folder_in_the_same_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE)
    assert listed == [*(name for name in HOUSE if name), "cli"]
    named = re.findall(rf"`((?:{'|'.join((*HOUSE, 'cli')).strip('|')})/\w+\.py)`", text)
    assert named, "the way of a row"
    for name in named:
        assert (LIBRARY / name).is_file() or (ROOT / name).is_file(), name


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
        if name == "yaml.load" and re.search(r"Loader=(yaml\.SafeLoader|strict)\b", arguments):
            continue  # strict is a SafeLoader: see the test below
        if name.endswith(".eval") or name == "re.compile":
            continue  # a model's evaluation mode; a pattern
        assert not FORBIDDEN.search(name) and "shell=True" not in arguments, f"{path}:{line}: {name}"
    for node in ast.walk(tree(path)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(FORBIDDEN.search(name) for name in names), f"{path}:{node.lineno}"


def test_the_strict_yaml_loader_is_a_safe_one() -> None:
    source = (LIBRARY / "settings.py").read_text(encoding="utf-8")
    assert re.findall(r"strict = (.*)", source) == ["_strict(content)"]
    for content in (b"", b"\\uDCFF"):
        known = settings._strict(content).yaml_constructors
        assert known.keys() == yaml.SafeLoader.yaml_constructors.keys()
        assert all(known[tag] is made for tag, made in SafeConstructor.yaml_constructors.items())


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
            handed_on = isinstance(node.body[-1], ast.Return) and "error" in ast.unparse(node.body[-1])
            assert caught and (caught != "Exception" or handed_on), f"{path}:{node.lineno}"
            if caught == "BaseException":
                assert isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None, f"{path}:{node.lineno}"


def test_every_command_is_a_file_of_its_own() -> None:
    from alphatoken_curate.cli.main import COMMANDS

    helpers = {"__init__", "__main__", "grouped", "interrupts", "lines", "main", "options", "paths", "terminal", "told"}
    helpers |= {"generations", "system", "workers"}
    assert {path.stem for path in modules(CLI)} - helpers == set(COMMANDS)


def test_the_public_names() -> None:
    names = alphatoken_curate.__all__
    assert names == sorted(names) and len(set(names)) == len(names)
    for name in names:
        assert callable(getattr(alphatoken_curate, name)), name
        assert getattr(alphatoken_curate, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = alphatoken_curate.nope


def test_importing_the_package_costs_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import alphatoken_curate; from alphatoken_curate import ScoreConfig;"
        "print({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'alphatoken_curate'}"


def test_every_source_module_has_its_tests() -> None:
    """One test file per module, in the folder of the same name, but for those that others test whole."""
    elsewhere = {
        "errors": "cli/test_main",
        "progress": "scoring/test_score",
        "runs.documents": "runs/test_manifest",
        "together": "test_config",
        "runs.records": "runs/test_shards",
        "runs.uploads": "reading/test_publish",
        "runs.vocabulary": "reading/test_words",
        "models.folders": "models/test_load",
        "models.likeness": "scoring/test_refresh",
        "directions.waypoints": "directions/test_shelves",
        "engine.tangent_rules": "engine/test_tangents",
        "engine.moving": "signals/test_influence",
        "engine.padding_rows": "directions/test_trainee",
        "engine.probabilities": "engine/test_attention",
        "rows.files": "rows/test_read",
        "rows.containers": "rows/test_read",
        "rows.tables": "rows/test_read",
        "rows.shapes": "rows/test_read",
        "rows.pairs": "rows/test_read",
        "tokens.chat": "tokens/test_tokenise",
        "scoring.spec": "scoring/test_score",
        "scoring.reference": "scoring/test_score",
        "scoring.scorer": "scoring/test_score",
        "scoring.job": "scoring/test_score",
        "scoring.steps": "scoring/test_estimate",
        "scoring.folder": "scoring/test_score",
        "scoring.identity": "scoring/test_prepare",
        "scoring.loop": "scoring/test_score",
        "scoring.engines": "scoring/test_pool",
        "scoring.processes": "scoring/test_pool",
        "scoring.spawned": "scoring/test_pool",
        "scoring.reader": "scoring/test_prepare",
        "scoring.cluster": "scoring/test_cluster",
        "scoring.stages": "scoring/test_score",
        "scoring.probes": "scoring/test_estimate",
        "scoring.courses": "scoring/test_rehearse",
        "scoring.material": "scoring/test_rehearsing",
        "scoring.portions": "scoring/test_rehearsing",
        "scoring.watch": "scoring/test_refresh",
        "masks.formulas": "masks/test_choose",
        "masks.mask": "masks/test_remask",
        "scoring.beside": "scoring/test_refresh",
        "scoring.check": "cli/test_main",
        "reading.counting": "reading/test_stats",
        "reading.sums": "reading/test_stats",
        "trainers.current": "trainers/test_refresh",
        "trainers.heads": "trainers/test_sft",
        "exports.form": "exports/test_export",
        "exports.guide": "exports/test_export",
        "exports.originals": "exports/test_messages",
        "exports.verl_dataset": "exports/test_unshifted",
    }
    for name in RANK:
        folder, _, module = name.rpartition(".")
        assert (ROOT / "tests" / f"{elsewhere.get(name, f'{folder}/test_{module}'.strip('/'))}.py").is_file(), name
    assert elsewhere.keys() <= RANK.keys()


def test_tests_and_what_helps_them_stand_apart() -> None:
    tests = ROOT / "tests"
    helpers = [path.stem for path in (tests / "support").glob("*.py")]
    assert helpers and not [name for name in helpers if name.startswith("test_")]
    for path in tests.rglob("test_*.py"):
        assert not [name for name in imports(path) if name.startswith("test_")], (
            f"{path}: move what it needs to support/"
        )

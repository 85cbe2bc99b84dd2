from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from tiny_files import Ended, command, contents, token_records, write_jsonl

from alphatoken_curate import CurateError, FingerprintError, InputError, ModelError, StoredDataError, UsageError
from alphatoken_curate.cli import main as main_module
from alphatoken_curate.cli.main import COMMANDS
from alphatoken_curate.runs import manifest


@pytest.fixture
def data(folder: Path) -> str:
    return write_jsonl(folder / "rows.jsonl", token_records(8))


@pytest.fixture
def run(folder: Path, data: str, models: dict[str, str], tmp_path: Path) -> Path:
    """A finished run of `data` with the model `base`, copied from one that was made once."""
    if not (folder / "run").exists():
        assert command("score", data, "--model", models["base"], "-o", folder / "run").code == 0
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


def refused(ended: Ended, code: int, *says: str) -> None:
    """It ended with this code and a message that says all of this, and no traceback."""
    assert ended.code == code, ended
    for text in says:
        assert text in ended.err, ended.err
    assert "Traceback" not in ended.err and ended.out == ""


# --- help


def test_help_answers_without_heavy_imports() -> None:
    """No torch, transformers, polars, datasets or pyarrow, and at once."""
    code = f"""
import sys, time
began = time.perf_counter()
from alphatoken_curate.cli.main import cli
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in {list(COMMANDS)})):
    try:
        cli.main(arguments, standalone_mode=False, prog_name="alphatoken-curate")
    except SystemExit:
        pass
heavy = {{"torch", "transformers", "polars", "datasets", "pyarrow", "numpy", "safetensors"}}
print("HEAVY", sorted(heavy & sys.modules.keys()))
print("SECONDS", time.perf_counter() - began)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    *text, heavy, seconds = done.stdout.splitlines()
    assert heavy == "HEAVY []"
    assert float(seconds.split()[1]) < 2  # for ten of them; 0.2 where nothing else runs
    shown = "\n".join(text)
    assert "Exit codes: 0 done" in shown
    assert "\n  alphatoken-curate check data.jsonl\n  alphatoken-curate score data.jsonl --target task.jsonl\n" in shown
    for name in COMMANDS:
        assert f"alphatoken-curate {name} [OPTIONS]" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_file_and_says_what_it_does(name: str) -> None:
    found = main_module.cli.get_command(click.Context(main_module.cli), name)
    assert found is not None and found.help
    for option in (p for p in found.params if isinstance(p, click.Option)):
        assert option.help and option.help.endswith("."), option.name


def test_the_installed_command_is_this_one() -> None:
    path = Path(sys.executable).with_name("alphatoken-curate")
    if not path.is_file():
        pytest.skip("the package is not installed")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("alphatoken-curate ")


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alphatoken_curate", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("alphatoken-curate ")


def test_an_unknown_command_or_flag(data: str) -> None:
    refused(command("scores", data), 2, "No such command")
    refused(command("score", data, "--layer", 3), 2, "--layers")
    refused(command("score", data, "--keep"), 2, "requires an argument")


# --- what is said on success


def test_score_says_what_it_wrote_and_what_comes_next(data: str, models: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = command("score", data, "--model", models["base"], "-o", run)
    assert ended.code == 0
    assert f"Wrote {run}" in ended.out and "7 scored of 8 (1 held out as target)" in ended.out
    assert f"alphatoken-curate stats {run}" in ended.out and f"{run}/train/mask=0000/" in ended.out
    assert "scoring: 100%" in ended.err
    assert ended.out.count("stability is 0") == 1 and "stability" not in ended.err.lower() and "!" not in ended.err
    again = command("score", data, "--model", models["base"], "-o", run)
    assert again.code == 0 and "is finished" in again.out and "Nothing was written" in again.out
    shown = next(line for line in ended.out.splitlines() if "show" in line).split("--row ")[1]
    assert command("show", run, "--row", shown).code == 0


def test_score_prints_commands_to_paste_and_says_what_it_wrote_again(
    data: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("my run", "-r"):
        words = ("score", data, "--model", models["base"], "-o", f"./{run}")
        lines = [line.strip().removeprefix("Next: ") for line in command(*words).out.splitlines()]
        told = [one for line in lines for one in line.split("   or   ") if one.startswith("alphatoken-curate ")]
        assert [one.split()[1] for one in told] == ["stats", "show", "mask"]
        assert [command(*shlex.split(one)[1:]).code for one in told] == [0, 0, 0]
    (tmp_path / run / "config.yaml").unlink()
    assert "there already. Nothing was written but config.yaml, manifest.json.\n" in command(*words).out
    assert "there already. Nothing was written.\n" in command(*words).out


def test_a_trial_on_the_first_rows_has_a_folder_of_its_own(
    data: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command("score", data, "--model", models["base"], "--limit", 4)
    run = Path(f"{Path(data).stem}.limit-4.alphatoken")
    assert ended.code == 0 and f"Wrote {run}" in ended.out and "3 scored of 4" in ended.out
    assert manifest.read(run).settings["limit"] == 4 and "limit: 4" in (run / "config.yaml").read_text()
    assert command("verify", run).code == 0
    again = command("score", data, "--model", models["base"], "--limit", 4)
    assert "is finished" in again.out
    other = command("score", data, "--model", models["base"], "--limit", 5, "-o", run)
    refused(other, 4, "limit")
    assert command("check", data, "--model", models["base"], "--limit", 4).out.split()[1] == "4"
    replayed = command("score", "--config", run / "config.yaml", "-o", "replayed")
    assert replayed.code == 0 and contents(Path("replayed") / "values") == contents(run / "values")


def test_check_and_score_say_first_what_will_compute(
    data: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments in (("check", data), ("score", data, "-o", tmp_path / "run")):
        ended = command(*arguments, "--model", models["tuned"], "--reference", models["base"])
        first = next(line for line in ended.err.splitlines() if line != "starting")
        assert first == f"model {models['tuned']}, reference {models['base']}, cpu, float32"


def test_the_default_run_folder_is_named_after_the_data(
    data: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("score", data, "--model", models["base"]).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["rows.alphatoken"]


def test_mask_says_what_it_kept(run: Path) -> None:
    ended = command("mask", run, "--keep", 0.2)
    assert ended.code == 0 and "Wrote mask 1" in ended.out and "response tokens kept" in ended.out
    again = command("mask", run, "--keep", "0.20")
    assert again.code == 0 and "Already there: mask 1" in again.out
    older = command("mask", run)
    assert older.code == 0 and "Already there: mask 0" in older.out and "name this one by its number" in older.out
    assert command("verify", run).code == 0


def test_check_tells_what_score_would_do(data: str, models: dict[str, str], tmp_path: Path) -> None:
    before = contents(tmp_path)
    ended = command("check", data, "--model", models["base"], "--max-length", 17, "--rows-per-shard", 3)
    assert ended.code == 0, ended.err
    lengths = [min(17, len(record["input_ids"])) for record in token_records(8)]
    lines = {" ".join(line.split()[:-1]): line for line in ended.out.splitlines()}
    assert "rows 8 7 to score, 1 target" in " ".join(ended.out.split())
    assert "held out of DATA" in ended.out and lines
    assert f"longest row {max(lengths)}" in ended.out and "by --max-length" in ended.out
    assert "shards 3 about" in " ".join(ended.out.split())
    assert contents(tmp_path) == before


def test_check_lists_bad_rows(models: dict[str, str], tmp_path: Path) -> None:
    odd = write_jsonl(
        tmp_path / "odd.jsonl",
        [*token_records(4), "{", *({"input_ids": [1, 2], "labels": [1, n]} for n in range(3, 28))],
    )
    refused(command("check", odd, "--model", models["base"]), 3, "odd.jsonl:5: invalid_json", "and 6 more")
    ended = command("check", odd, "--model", models["base"], "--bad-rows", "quarantine")
    assert ended.code == 0 and "odd.jsonl:6: label_mismatch" in ended.out and "and 6 more" in ended.out


def test_a_config_file_with_flags_on_top(data: str, models: dict[str, str], tmp_path: Path) -> None:
    settings = {"data": [data], "model": models["base"], "keep": 0.1, "layers": 1, "reference": None}
    (tmp_path / "c.yaml").write_text(json.dumps(settings))  # JSON is YAML
    ended = command("score", "-c", tmp_path / "c.yaml", "--keep", 0.3, "-o", tmp_path / "run")
    assert ended.code == 0, ended.err
    stored = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert stored["settings"]["layers"] == 1 and stored["masks"][0]["settings"]["keep"] == 0.3
    # A flag given as its default beats the file as well.
    ended = command("score", "-c", tmp_path / "c.yaml", "--keep", 0.5, "-o", tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert stored["masks"][1]["settings"]["keep"] == 0.5


# --- exit 2: usage


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--keep", "1.5"),
        ("--scope", "batch:0"),
        ("--stability-weight", "nan"),
        ("--layers", "0"),
        ("--window", "-1"),
        ("--seed", "1.5"),
        ("--batch-tokens", "lots"),
        ("--estimator", "shapley"),
        ("--parameters", "all"),
        ("--dtype", "int8"),
        ("--weights", "soft"),
        ("--device", "potato"),
        ("--fisher", "nowhere.safetensors"),
        ("--model", "./nowhere"),
        ("--reference", "./nowhere"),
    ],
)
def test_a_value_that_cannot_be_used(flag: str, value: str, data: str, models: dict[str, str], tmp_path: Path) -> None:
    model = () if flag == "--model" else ("--model", models["base"])
    ended = command("score", data, *model, flag, value, "-o", tmp_path / "run")
    refused(ended, 2, value, flag if value != "./nowhere" else "no model here")
    assert not (tmp_path / "run").exists()


def test_no_data() -> None:
    refused(command("score"), 2, "DATA")
    refused(command("check"), 2, "DATA")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layer: 3\n", "Did you mean layers?"),
        ("keep: 0.1\nkeep: 0.2\n", "stands there twice"),
        ("keep: !!python/object/apply:os.system ['touch owned']\n", "not a config"),
        ("a: &a [1]\nb: *a\n", "aliases"),
        ("- keep\n", "not a mapping"),
        ("keep: 7\n", "--keep 7: it takes a share"),
    ],
)
def test_a_config_that_cannot_be_used(
    text: str, says: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    refused(command("score", data, "-c", "c.yaml"), 2, says)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_more_layers_than_the_model_has(data: str, models: dict[str, str], tmp_path: Path) -> None:
    ended = command("score", data, "--model", models["base"], "--layers", 99, "-o", tmp_path / "run")
    assert ended.code == 2 and "the model has 4 decoder blocks" in ended.err and "Traceback" not in ended.err
    # The refused settings leave no run behind that the right ones would then differ from.
    assert command("score", data, "--model", models["base"], "--layers", 2, "-o", tmp_path / "run").code == 0


def test_a_pickled_model(data: str, models: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(models["base"], tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    refused(command("score", data, "--model", tmp_path / "old"), 2, "pickle", "save_pretrained")


def test_a_reference_of_another_shape(data: str, models: dict[str, str], tmp_path: Path) -> None:
    import torch
    from tiny import tiny_model
    from tiny_files import quiet

    with quiet():
        tiny_model("llama", dtype=torch.float32, intermediate_size=20).save_pretrained(tmp_path / "small")
    flags = ("--model", models["base"], "--reference", tmp_path / "small", "-o", tmp_path / "run")
    ended = command("score", data, *flags)
    assert ended.code == 2 and "reference" in ended.err and "Traceback" not in ended.err


def test_a_fisher_file_that_does_not_fit(data: str, models: dict[str, str], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    flags = ("--model", models["tuned"], "--reference", models["base"], "--fisher", tmp_path / "f.safetensors")
    cases: dict[str, Any] = {"it has no tensor": {"x": torch.zeros(2)}}
    name = "model.layers.3.self_attn.q_proj.weight"
    whole = {m: torch.ones(1) for m in _names(models["base"])}
    cases["is 1, the model's is"] = whole | {name: torch.ones(1)}
    for n, (says, tensors) in enumerate(cases.items()):
        save_file(tensors, tmp_path / "f.safetensors")
        ended = command("score", data, *flags, "-o", tmp_path / f"run{n}")
        assert ended.code == 2 and says in ended.err and "f.safetensors" in ended.err, ended.err
    (tmp_path / "f.safetensors").write_bytes(b"x" * 20)
    ended = command("score", data, *flags, "-o", tmp_path / "run")
    assert ended.code == 2 and "not a readable safetensors file" in ended.err


def _names(model: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(f"{model}/model.safetensors", framework="np") as file:
        return list(file.keys())


def test_a_folder_that_is_no_run(data: str, models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "notes.txt").write_text("mine")
    ended = command("score", data, "--model", models["base"], "-o", tmp_path / "project")
    refused(ended, 2, "not a run folder", "-o")
    refused(command("mask", tmp_path / "nowhere"), 2, "no such run folder", "score DATA -o")
    assert not (tmp_path / "nowhere").exists()
    for name in ("mask", "verify", "stats"):
        refused(command(name, tmp_path / "project"), 2, "not a run folder", "no manifest.json", "score DATA -o")
    assert contents(tmp_path / "project") == {"notes.txt": b"mine"}


def test_selection_by_what_is_not_there(run: Path) -> None:
    before = contents(run)
    refused(command("mask", run, "--by", "nope"), 2, "nope")
    refused(command("mask", run, "--by", "nll - reference_nll"), 2, "--reference")
    assert contents(run) == before


# --- exit 3: input


def test_bad_rows_are_all_listed_before_a_model_is_loaded(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alphatoken_curate.scoring import spec

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(spec, "load_placed", load)
    records: list[Any] = token_records(6)
    records[1] = "[1, 2]"
    records[3] = {"text": "words"}
    records[5] = {"input_ids": [1, 99], "labels": [-100, 99]}
    odd = write_jsonl(tmp_path / "odd.jsonl", records)
    task = write_jsonl(tmp_path / "task.jsonl", ["{"])
    ended = command("score", odd, "--target", task, "--model", models["base"], "-o", tmp_path / "run")
    refused(
        ended, 3, "4 rows", "odd.jsonl:2:", "odd.jsonl:4:", "odd.jsonl:6:", "task.jsonl:1:", "--bad-rows quarantine"
    )
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there(models: dict[str, str], tmp_path: Path) -> None:
    refused(command("score", tmp_path / "none.jsonl", "--model", models["base"]), 3, "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    refused(command("score", tmp_path / "empty.jsonl", "--model", models["base"]), 3, "No row")


def test_nothing_but_bad_rows(models: dict[str, str], tmp_path: Path) -> None:
    odd = write_jsonl(tmp_path / "odd.jsonl", ["{", "["])
    flags = ("--model", models["base"], "--bad-rows", "quarantine", "-o", tmp_path / "run")
    refused(command("score", odd, *flags), 3, "none of its 2 rows")
    refused(command("check", odd, *flags[:-2]), 3, "none of its 2 rows")


def test_text_without_a_tokenizer(models: dict[str, str], tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"prompt": "a", "completion": "b"}])
    refused(command("score", text, "--model", models["base"]), 3, "has no tokenizer, and text.jsonl:1 is a row of text")


# --- exit 4: stored data


def test_other_settings_are_named(run: Path, data: str, models: dict[str, str]) -> None:
    before = contents(run)
    ended = command("score", data, "--model", models["base"], "--layers", 1, "--window", 3, "-o", run)
    refused(ended, 4, str(run), "layers (3 in the run, 1 now), window (32 in the run, 3 now)", "-o")
    assert contents(run) == before


def test_damage_is_named(run: Path, data: str, models: dict[str, str]) -> None:
    (run / "manifest.json").write_text("[" * 100000)
    refused(command("stats", run), 4, "manifest.json", "damaged")
    ended = command("verify", run)
    assert ended.code == 4 and "manifest.json" in ended.err
    ended = command("mask", run)
    assert ended.code == 0 and "made anew from the shards" in " ".join(ended.err.split())
    (run / "artifacts" / "run.json").write_text("{}")
    refused(command("score", data, "--model", models["base"], "-o", run), 4, "run.json", "damaged")


def test_a_mask_that_is_there_prints_the_command_that_uses_it(run: Path, tmp_path: Path) -> None:
    run = run.rename(tmp_path / "my run")
    for keep in (0.5, 0.6):
        assert command("mask", run, "--keep", keep).code == 0
    again = command("mask", run, "--keep", 0.5)
    assert again.code == 0 and "Already there: mask 1" in again.out
    (line,) = [line.strip() for line in again.out.splitlines() if " export " in line]
    assert "Next:" not in again.out, "the newest mask is another"
    assert line == f"alphatoken-curate export '{run}' --mask 1 --for trl -o DIR"
    words = [str(tmp_path / "out") if word == "DIR" else word for word in shlex.split(line)[1:]]
    exported = command(*words)
    assert exported.code == 0 and "of mask 1" in exported.out
    assert f"  in Python: scan('{run}', 'train', mask=1), as_dataset('{run}', 1)\n" in again.out
    newest = command("mask", run, "--keep", 0.7, "--by", "nll - row_mean(nll)", "--always-keep", "none").out
    assert "--mask" not in newest
    assert "  by      nll - row_mean(nll); --keep 0.7, --scope global, --weights binary, --always-keep none\n" in newest
    (line,) = [line.removeprefix("Next: ") for line in newest.splitlines() if line.startswith("Next: ")]
    for words in line.split("   or   "):
        assert command(*shlex.split(words)[1:], *(["-o", tmp_path / "next"] if " export " in words else [])).code == 0


def test_a_reason_is_told_once_with_the_lines_it_holds_for(tmp_path: Path, models: dict[str, str]) -> None:
    rows = [*token_records(2), {"x": 1}, {"x": 2}, *token_records(1), {"x": 3}, "{"]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    for name in ("score", "check"):
        ended = command(name, data, "--model", models["base"])
        assert ended.code == 3 and "4 rows cannot be used" in ended.err
        assert ended.err.count("unknown_shape") == 1 and "(lines 3-4, 6)" in ended.err and "invalid_json" in ended.err
    told = command("check", data, "--model", models["base"], "--bad-rows", "quarantine").out
    assert told.count("unknown_shape") == 1 and "(lines 3-4, 6)" in told


@pytest.mark.long
def test_a_closed_stderr_ends_nothing(data: str, models: dict[str, str], tmp_path: Path) -> None:
    code = "import sys; sys.stderr = None; from alphatoken_curate.cli.main import main; main()"
    made = ("score", 0, ("-o", tmp_path / "run"))
    for name, wanted, more in (("check", 0, ()), made, ("score", 3, ("--target", "no.jsonl"))):
        words = [sys.executable, "-P", "-c", code, name, data, "--model", models["base"], *map(str, more)]
        assert subprocess.run(words, capture_output=True, check=False).returncode == wanted
    assert (tmp_path / "run" / "manifest.json").is_file()


def test_a_plan_for_a_card_is_made_where_there_is_none(
    data: str, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ended = command("check", data, "--model", models["base"], "--device", "cuda", "--batch-tokens", 64)
    assert ended.code == 0 and f"model {models['base']}, cuda, bfloat16" in ended.err


def test_bad_rows_of_two_files_of_one_name_are_told_apart(models: dict[str, str], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "rows.jsonl", [*token_records(3), "{"])
    places = [tmp_path / folder / "rows.jsonl" for folder in ("a", "b")]
    ended = command("check", places[0], "--target", places[1], "--model", models["base"])
    lines = [line.strip() for line in ended.err.splitlines()]
    assert ended.code == 3 and lines.count("and of files beside DATA:") == 1
    assert len([line for line in lines if line.startswith("rows.jsonl:4: invalid_json")]) == 2


def test_score_says_which_mask_readers_take(data: str, models: dict[str, str], tmp_path: Path) -> None:
    words = ("score", data, "--model", models["base"], "-o", tmp_path / "run")
    assert "Only where tokens may be wrong, and you have looked at what goes" in command(*words).out
    half = command(*words, "--keep", 0.5)
    assert half.code == 0 and "was scored before; wrote mask 1, which readers take from now on" in half.out
    again = command(*words).out
    assert "is finished" in again and "name this one by its number" in again and "Every token trains" not in again


# --- all of the errors, and interrupts


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CurateError("x"), 1),
        (UsageError("x"), 2),
        (ModelError("x"), 2),
        (InputError("x"), 3),
        (StoredDataError("x"), 4),
        (FingerprintError("x", ("a",)), 4),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (click.UsageError("x"), 2),
    ],
    ids=lambda x: type(x).__name__,
)
def test_every_error_has_its_exit_code(
    error: BaseException, code: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    importlib.import_module("alphatoken_curate.reading.verify")
    monkeypatch.setattr(sys.modules["alphatoken_curate.reading.verify"], "verify", fail)
    ended = command("verify", run)
    assert ended.code == code
    assert ("go on" if code == 130 else "x") in ended.err


def test_an_error_of_our_own_keeps_its_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("alphatoken_curate.reading.verify")
    monkeypatch.setattr(sys.modules["alphatoken_curate.reading.verify"], "verify", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("verify", run)


def test_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    """`alphatoken-curate ... | head -1`: no traceback."""
    code = "from alphatoken_curate.cli.main import main; main()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "mask", str(run)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.long
def test_a_signal_before_anything_is_begun_is_an_interrupt(data: str, models: dict[str, str], tmp_path: Path) -> None:
    """A whole process, imports and all."""
    code = "from alphatoken_curate.cli.main import main; print('here', flush=True); main()"
    arguments = ("score", data, "--model", models["base"], "-o", str(tmp_path / "run"))
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "run the same command again to go on" in err


def test_an_interrupt_that_falls_into_a_finaliser_is_not_lost(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Finalised:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def long(_: Path) -> list[Any]:
        Finalised()
        for _ in range(1000):
            time.sleep(0.01)
        return []

    importlib.import_module("alphatoken_curate.reading.verify")
    monkeypatch.setattr(sys.modules["alphatoken_curate.reading.verify"], "verify", long)
    began = time.monotonic()
    refused(command("verify", run), 130, "go on")
    assert time.monotonic() - began < 10

"""What a run is known by: each field of its fingerprint changed alone is refused by name, and nothing else is."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from daily import daily
from safetensors.torch import load_file, save_file
from tiny_files import command, contents, plain_llama, save_gguf, token_records, write_jsonl
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from alphatoken_curate import ScoreConfig, score, verify
from alphatoken_curate.progress import Silent
from alphatoken_curate.runs import manifest, shards
from alphatoken_curate.runs.fingerprint import Json, differing
from alphatoken_curate.runs.schema import SCHEMA_VERSION
from alphatoken_curate.runs.shards import Footer
from alphatoken_curate.scoring.budget import Budget
from alphatoken_curate.scoring.job import job_of, record
from alphatoken_curate.scoring.scorer import ShardScorer
from alphatoken_curate.scoring.spec import spec_of

DATED = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}.{% endfor %}"
DATED += "{% if add_generation_prompt %}a:{% endif %}"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 :."

Settings = dict[str, Any]
"""As of `ScoreConfig`."""


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(count)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "chosen_input_ids": [5, 6, 7 + i],
            "chosen_labels": [-100, 6, 7 + i],
            "rejected_input_ids": [5, 6, 40],
            "rejected_labels": [-100, 6, 40],
        }
        for i in range(count)
    ]


def save_tokenizer(folder: Path) -> None:
    """One token for each character, and a chat template that writes the day of the month."""
    inner = Tokenizer(WordLevel({"</s>": 2, **{one: 3 + i for i, one in enumerate(CHARACTERS)}}, unk_token="</s>"))
    inner.pre_tokenizer, inner.decoder = Split("", "isolated"), Fuse()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", chat_template=DATED).save_pretrained(folder)


@pytest.fixture
def files(models: dict[str, str], tmp_path: Path) -> Settings:
    """Files to name in settings, each of them the test's own."""
    found: Settings = {name: str(shutil.copytree(path, tmp_path / name)) for name, path in models.items()}
    save_tokenizer(tmp_path / "tuned")
    for name, rows in {
        "rows": token_records(11),
        "task": token_records(4, seed=9),
        "chats": chats(6),
        "mine": [{"q": f"say {i}", "a": f"it is {i}"} for i in range(6)],
        "pairs": pairs(6),
    }.items():
        found[name] = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    weights = load_file(f"{found['tuned']}/model.safetensors")
    save_file({name: torch.ones_like(w) for name, w in weights.items() if w.ndim == 2}, tmp_path / "fisher.safetensors")
    (tmp_path / "elsewhere" / "artifacts").mkdir(parents=True)
    (tmp_path / "template.jinja").write_text(DATED)
    found["template"] = str(tmp_path / "template.jinja")
    return found | {"fisher": str(tmp_path / "fisher.safetensors"), "elsewhere": str(tmp_path / "elsewhere")}


def plain(files: Settings, **more: Any) -> Settings:
    """Rows of tokens, a tuned model with a tokenizer, its reference, and a target of its own."""
    return {"data": files["rows"], "model": files["tuned"], "reference": files["base"], "target": files["task"]} | more


def told(settings: Settings) -> dict[str, Json]:
    """The fingerprint fields of a run of these settings."""
    prepared = prepare_all(settings)
    return dict(spec_of(prepared, Path("artifacts"), "cpu").store.fields)


def prepare_all(settings: Settings) -> Any:
    from alphatoken_curate.scoring.prepare import prepare

    return prepare(ScoreConfig(**settings))


def begin(run: Path, settings: Settings) -> None:
    """A run of these settings that has computed something."""
    Budget(run, told(settings), 64, Silent())
    (run / "artifacts" / "target-00000.safetensors").write_bytes(b"")


# --- one field after the other


@dataclass(frozen=True, kw_only=True)
class Change:
    """Settings of a run, and others, or other files, with which it is refused."""

    base: Callable[[Settings], Settings] = plain
    to: Callable[[Settings], Settings] = lambda _: {}
    files: Callable[[Settings, pytest.MonkeyPatch], object] = lambda *_: None
    also: tuple[str, ...] = ()
    """Named beside the field: it cannot be changed without them."""


def given(**settings: Any) -> Callable[[Settings], Settings]:
    """`plain` and these; a value that begins with `=` stands for a file of that name."""
    return lambda files: plain(files, **{name: _named(value, files) for name, value in settings.items()})


def becomes(**settings: Any) -> Callable[[Settings], Settings]:
    """These alone."""
    return lambda files: {name: _named(value, files) for name, value in settings.items()}


def _named(value: Any, files: Settings) -> Any:
    return files[value[1:]] if isinstance(value, str) and value.startswith("=") else value


def appended(name: str, text: str = " ") -> Callable[[Settings, pytest.MonkeyPatch], object]:
    """A file, or one in a folder (`tuned/tokenizer.json`), is a bit longer."""

    def change(files: Settings, _: pytest.MonkeyPatch) -> None:
        first, _, rest = name.partition("/")
        path = Path(files[first]) / rest if rest else Path(files[first])
        path.write_bytes((path.read_bytes() if path.exists() else b"") + text.encode())

    return change


def another_row(name: str) -> Callable[[Settings, pytest.MonkeyPatch], object]:
    return appended(name, json.dumps(token_records(1, seed=99)[0]) + "\n")


def other_releases(_: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that make another text of the same template."""
    monkeypatch.setattr("alphatoken_curate.tokens.dates.TemplateDay._parts", [["%d", "77"]])


def other_schema(_: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphatoken_curate.scoring.identity.SCHEMA_VERSION", 99)


LOOKAHEAD = {"drift": "lookahead", "lookahead_lr": 1e-3}
GENERATE = {"fisher": "generate"}
REHEARSAL = {"direction": "rehearsal", "rehearse_lr": 1e-3}
SGD = {**REHEARSAL, "rehearse_optimizer": "sgd"}
FIELDS: dict[str, Change] = {
    "schema_version": Change(files=other_schema),
    "data": Change(files=another_row("rows")),
    "model": Change(to=becomes(model="=broken"), also=("tokenizer", "template")),
    "tokenizer": Change(files=appended("tuned/tokenizer.json")),
    "template": Change(files=appended("tuned/chat_template.jinja", "{# #}"), also=("tokenizer",)),
    "tokens": Change(base=given(data="=chats"), files=other_releases),
    "reference": Change(to=becomes(reference="=broken")),
    "target": Change(files=another_row("task")),
    "target_rows": Change(base=given(target=None), to=becomes(target_rows=2)),
    "target_tokens": Change(base=given(target="=chats"), files=other_releases),
    "estimator": Change(base=given(estimator="exact"), to=becomes(estimator="influence")),
    "layers": Change(to=becomes(layers=2)),
    "parameters": Change(base=given(estimator="influence"), to=becomes(parameters="all")),
    "window": Change(to=becomes(window=31)),
    "stability_weight": Change(to=becomes(stability_weight=1.25)),
    "beta": Change(base=given(data="=pairs"), to=becomes(beta=0.2)),
    "turns": Change(to=becomes(turns="last")),
    "limit": Change(to=becomes(limit=5)),
    "template_date": Change(base=given(data="=chats"), to=becomes(template_date="2024-02-29")),
    "map": Change(base=given(data="=mine", map="q=prompt,a=response"), to=becomes(map="q=prompt,a=completion")),
    "subset": Change(to=becomes(subset="main")),
    "split": Change(to=becomes(split="test")),
    "chat_template": Change(base=given(data="=chats", chat_template="=template"), files=appended("template", "{# #}")),
    "chat_template_kwargs": Change(to=becomes(chat_template_kwargs='{"loud": true}')),
    "assistant_specials": Change(to=becomes(assistant_specials="text")),
    "max_length": Change(to=becomes(max_length=2049)),
    "rows_per_shard": Change(to=becomes(rows_per_shard=1025)),
    "dtype": Change(to=becomes(dtype="bfloat16")),
    "seed": Change(to=becomes(seed=1)),
    "fisher": Change(to=becomes(fisher="empirical")),
    "fisher_rows": Change(to=becomes(fisher_rows=255)),
    "fisher_prompts": Change(
        base=given(**GENERATE, fisher_prompts="=task"), files=another_row("task"), also=("target",)
    ),
    "fisher_new_tokens": Change(base=given(**GENERATE), to=becomes(fisher_new_tokens=127)),
    "fisher_stops": Change(
        base=given(**GENERATE),
        files=lambda files, _: (Path(files["base"]) / "generation_config.json").write_text('{"eos_token_id": 7}'),
    ),
    "prompt_tokens": Change(base=given(**GENERATE, fisher_prompts="=chats"), files=other_releases),
    "drift": Change(base=given(retention="=task"), to=becomes(drift="weights")),
    "lookahead_lr": Change(base=given(**LOOKAHEAD), to=becomes(lookahead_lr=2e-3)),
    "lookahead_rows": Change(base=given(**LOOKAHEAD), to=becomes(lookahead_rows=255)),
    "retention": Change(base=given(retention="=chats"), files=appended("chats", "\n")),
    "retention_tokens": Change(base=given(retention="=chats"), files=other_releases),
    "precondition": Change(base=given(precondition="kfac"), to=becomes(precondition="ekfac")),
    "precondition_rows": Change(base=given(precondition="kfac"), to=becomes(precondition_rows=255)),
    "precondition_eps": Change(base=given(precondition="adam"), to=becomes(precondition_eps=1e-7)),
    "precondition_damping": Change(base=given(precondition="kfac"), to=becomes(precondition_damping=0.2)),
    "precondition_iterations": Change(base=given(precondition="astra"), to=becomes(precondition_iterations=9)),
    "precondition_stability": Change(base=given(precondition="kfac"), to=becomes(precondition_stability=True)),
    "target_groups": Change(base=given(target_groups=1), to=becomes(target_groups=2)),
    "direction": Change(base=given(estimator="influence", parameters="all", layers="all"), to=becomes(**REHEARSAL)),
    "rehearse_lr": Change(base=given(**REHEARSAL), to=becomes(rehearse_lr=2e-3)),
    "rehearse_epochs": Change(base=given(**REHEARSAL), to=becomes(rehearse_epochs=2)),
    "rehearse_rows_per_step": Change(base=given(**REHEARSAL), to=becomes(rehearse_rows_per_step=7)),
    "rehearse_optimizer": Change(base=given(**REHEARSAL), to=becomes(rehearse_optimizer="sgd")),
    "rehearse_betas": Change(base=given(**REHEARSAL), to=becomes(rehearse_betas="0.9,0.99")),
    "rehearse_eps": Change(base=given(**REHEARSAL), to=becomes(rehearse_eps=1e-7)),
    "rehearse_root": Change(base=given(**REHEARSAL), to=becomes(rehearse_root=1e-13)),
    "rehearse_weight_decay": Change(base=given(**REHEARSAL), to=becomes(rehearse_weight_decay=0.1)),
    "rehearse_momentum": Change(base=given(**SGD), to=becomes(rehearse_momentum=0.5)),
    "rehearse_schedule": Change(base=given(**REHEARSAL), to=becomes(rehearse_schedule="linear")),
    "rehearse_warmup": Change(base=given(**REHEARSAL), to=becomes(rehearse_warmup=1)),
    "rehearse_clip": Change(base=given(**REHEARSAL), to=becomes(rehearse_clip=1.0)),
    "rehearse_denominator": Change(base=given(**REHEARSAL), to=becomes(rehearse_denominator="sum")),
    "rehearse_seeds": Change(base=given(**REHEARSAL), to=becomes(rehearse_seeds=2)),
    "rehearse_lora": Change(base=given(**REHEARSAL, parameters="linear"), to=becomes(rehearse_lora=4)),
    "rehearse_lora_alpha": Change(base=given(**REHEARSAL, rehearse_lora=4), to=becomes(rehearse_lora_alpha=4.0)),
    "rehearse_simpo": Change(base=given(data="=pairs", **REHEARSAL), to=becomes(rehearse_simpo=0.0)),
    "rehearse_window": Change(base=given(**REHEARSAL), to=becomes(rehearse_window=2)),
}
"""By the field that is named. `kind` is not here: rows of the other kind are other data."""


def flags(settings: Settings) -> list[str]:
    """As a command line has them; DATA first."""
    others = {name: value for name, value in settings.items() if name != "data" and value is not None}
    named = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in others.items()]
    return [settings["data"], *named]


def test_every_field_of_a_fingerprint_is_tried(files: Settings) -> None:
    newer = {
        "limit",
        "map",
        "subset",
        "split",
        "template_date",
        "chat_template",
        "chat_template_kwargs",
        "assistant_specials",
        "target_groups",
        "precondition_iterations",
        "direction",
        *(name for name in FIELDS if name.startswith("rehearse_")),
    }  # not there at its default, as every setting that came later
    assert set(FIELDS) | {"kind"} == set(told(plain(files))) | newer


@pytest.mark.one_in(9)
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_changed_alone_is_refused_by_its_name(
    field: str, files: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, run = FIELDS[field], tmp_path / "run"
    settings = change.base(files)
    begin(run, settings)
    before, was = contents(run), told(settings)
    change.files(files, monkeypatch)
    settings |= change.to(files)
    ended = command("score", *flags(settings), "-o", run)
    assert ended.code == 4, ended.err
    names = {field, *change.also}
    if field == "schema_version":  # it says what can still be done with such a run
        assert f"schema version {SCHEMA_VERSION}, and this release writes" in ended.err and contents(run) == before
        return
    line = next(line for line in ended.err.splitlines() if "made with other settings or inputs" in line)
    named = dict(re.findall(r"(\w+) \((.*? in the run, .*?) now\)", line.split("inputs: ")[1].split(". Give")[0]))
    assert set(named) == names
    assert all(len(set(both.split(" in the run, "))) == 2 for both in named.values()), "the values of both sides"
    assert names <= set(differing(was, told(settings))) and contents(run) == before


def test_the_code_of_a_model_is_part_of_it(files: Settings) -> None:
    config = Path(files["tuned"]) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModelForCausalLM": "own.Model"}}))
    (config.parent / "own.py").write_text("a = 1\n")
    was = told(plain(files))
    (config.parent / "own.py").write_text("a = 2\n")
    assert differing(was, told(plain(files))) == ("model",)


# --- what does not matter


INDIFFERENT: dict[str, Any] = {
    "batch_tokens": 77,
    "threads": 3,
    "device": "cpu",
    "trunk_device": "disk",
    "bad_rows": "quarantine",
    "reuse": "=elsewhere",
    "trust_remote_code": True,
    "keep": 0.3,
    "scope": "row",
    "weights": "rank",
    "by": "nll",
    "stability_scale": "rms",
    "allow_empty_rows": True,
    "always_keep": "special",
    "generation": "all",
    "aggregate": "last",
}
"""Settings that change no value; those of a mask are in the fingerprint of the mask."""


def test_every_setting_is_tried() -> None:
    decide = {"data", "model", "reference", "target", "retention", "fisher_prompts", *FIELDS}
    assert {item.name for item in fields(ScoreConfig)} <= decide | INDIFFERENT.keys()
    assert not decide & INDIFFERENT.keys()


@pytest.mark.parametrize("name", INDIFFERENT)
def test_what_changes_no_value_is_in_no_fingerprint(name: str, files: Settings) -> None:
    assert told(plain(files, **{name: _named(INDIFFERENT[name], files)})) == told(plain(files))


def test_neither_folders_nor_names_of_models_matter(files: Settings, tmp_path: Path) -> None:
    """Only the names of files of rows do, by which shards tell where a row is from."""
    settings = plain(files, fisher=files["fisher"], retention=files["task"], drift="weights")
    was = told(settings)
    (tmp_path / "there").mkdir()
    to = {
        "data": "there/rows.jsonl",
        "target": "there/task.jsonl",
        "model": "one",
        "reference": "other",
        "fisher": "f.st",
    }
    moved = {name: str(Path(settings[name]).rename(tmp_path / place)) for name, place in to.items()}
    moved["retention"] = moved["target"]
    assert told(settings | moved) == was
    moved["data"] = str(Path(moved["data"]).rename(tmp_path / "others.jsonl"))
    assert differing(was, told(settings | moved)) == ("data",)


def test_the_name_of_a_gguf_file_does_not_matter(files: Settings, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = save_gguf(plain_llama(), tmp_path / "one.gguf")
    was = told(plain(files, model=model, reference=None))
    other = str(Path(model).rename(tmp_path / "other.gguf"))
    assert told(plain(files, model=other, reference=None)) == was


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("workers", "kind"), [(1, "rows"), (2, "pairs"), (3, "pairs"), (7, "rows")])
def test_any_number_of_workers_in_any_order_makes_the_same_shards(
    workers: int, kind: str, files: Settings, tmp_path: Path
) -> None:
    """Scorers that were pickled, each with a model of its own, score the shards of a run as they come."""
    settings = plain(files, data=files[kind], rows_per_shard=2, batch_tokens=64, layers=2)
    run = score(ScoreConfig(**settings), tmp_path / "run").run
    prepared = prepare_all(settings)
    spec = spec_of(prepared, run / "artifacts", "cpu")
    job = job_of(prepared, spec)
    scorers = [pickle.loads(pickle.dumps(ShardScorer(spec))) for _ in range(workers)]
    order = list(enumerate(job.shards))
    random.Random(workers).shuffle(order)
    stored = manifest.read(run).generations[0]
    for turn, (index, rows) in enumerate(order):
        found = scorers[turn % workers](index, rows, Silent(), 64)
        records = [record(row, "scored", one) for row, one in zip(rows, found, strict=True)]
        facts = replace(job.facts, plan=stored.plan[index])
        path = tmp_path / "again" / "values" / "generation=0" / shards.shard_name(index)
        made = shards.write_values(path, records, Footer(fields=spec.store.fields, facts=facts.as_json()), job.layout)
        assert made == stored.shards[index]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("batch_tokens", [1, 40, 320])
def test_batches_give_the_same_rows_and_values(batch_tokens: int, files: Settings, tmp_path: Path) -> None:
    settings = plain(files, layers=2)
    runs = [score(ScoreConfig(**settings, batch_tokens=n), tmp_path / str(n)).run for n in (64, batch_tokens)]
    names = ["input_ids", "response", "value"]
    one, other = (
        shards.read(run / "values/generation=0/part-00000.parquet", manifest.layout(manifest.read(run)).values)
        for run in runs
    )
    assert all(one[name].equals(other[name]) for name in (*names[:2], "row_id", "source", "line", "status"))
    a, b = (shards.entries(table["value"])[0] for table in (one, other))
    assert np.nanmax(np.abs(a - b)) <= 1e-5 * np.nanmax(np.abs(a))
    same = [dict(shards.read_footer(run / "values/generation=0/part-00000.parquet").fields) for run in runs]
    assert same[0] == same[1]


# --- replay


REPLAYED: dict[str, Callable[[Settings], Settings]] = {
    "held out, a bad row": given(target=None, bad_rows="quarantine", data="=odd", rows_per_shard=4),
    "pairs, rms": given(data="=pairs", stability_scale="rms", keep="positive", weights="relu"),
    "retention beside the drift": given(retention="=task", drift="weights", by="nll - reference_nll"),
    "a Fisher of one's own": given(fisher="=fisher", precondition="kfac", scope="batch:3", weights="sigmoid"),
    "lookahead, all parameters": given(**LOOKAHEAD, estimator="influence", parameters="all", dtype="auto"),
    "answers": given(**GENERATE, fisher_prompts="=chats", fisher_new_tokens=3, by="random", seed=5),
    "chats": given(data="=chats", target=None, reference=None, turns="last", max_length=19),
    "columns of one's own": given(data="=mine", map="q=prompt,a=response", target="=mine", reference=None),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", daily(REPLAYED, ["held out, a bad row", "pairs, rms", "chats"]))
def test_the_config_replays_the_run_from_anywhere(
    name: str, files: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files["odd"] = write_jsonl(tmp_path / "odd.jsonl", [*token_records(11), "{"])
    # Settings as a user types them, and folders with the names of what is none.
    monkeypatch.chdir(tmp_path)
    for folder in ("sampled", "generate", "empirical", "smollm2-135m"):
        (tmp_path / folder).mkdir()
    settings = {
        key: str(Path(value).relative_to(tmp_path)) if str(value).startswith(str(tmp_path)) else value
        for key, value in REPLAYED[name](files).items()
    }
    settings = {key: value for key, value in settings.items() if value is not None} | {"layers": 2}
    assert command("score", *flags(settings), "-o", "a").code == 0
    (tmp_path / "far" / "away").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "far" / "away")
    ended = command("score", "--config", tmp_path / "a" / "config.yaml", "-o", "b")
    assert ended.code == 0, ended.err
    assert contents(tmp_path / "far/away/b") == contents(tmp_path / "a") and verify("b") == []
    stored = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    assert stored["dtype"] == "float32" and isinstance(stored["batch_tokens"], int)
    # The same run, whoever names it: it is done, and says so.
    assert command("score", "--config", "b/config.yaml", "-o", tmp_path / "a").code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "far/away/b")

"""What must not run, leave or enter: code of a model, words of a row, a connection that nobody asked for."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chats import CHATML, answer, chat, responses, run, run_prompts, user
from hostile_run import PAYLOADS, hostile_run
from pinned import asked
from safetensors.torch import load_file
from sources import CLI, LIBRARY, ROOT, imports, modules
from tiny_files import command, contents, token_records, write_jsonl

from alphatoken_curate.directions import drift
from alphatoken_curate.errors import ModelError, StoredDataError, UsageError
from alphatoken_curate.models.checkpoints import is_complete
from alphatoken_curate.models.load import find_model, load_model, load_tokenizer
from alphatoken_curate.rows.files import legible
from alphatoken_curate.rows.shapes import Prompt
from alphatoken_curate.runs.artifacts import TARGET, Store

EOT = "<|im_end|>"


@pytest.fixture
def model(models: dict[str, str], tmp_path: Path) -> Path:
    """A copy of base that a test may spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(models["base"]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def loaded(folder: Path) -> Any:
    source = find_model(str(folder))
    load_tokenizer(source)
    return load_model(source, dtype=torch.float32, device=torch.device("cpu"))


# --- models: weights


class _Runs:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (open, (str(self._path), "w"))


@pytest.mark.parametrize(
    "name", ["weights.bin", "pytorch_model.pt", "../model-2/model.safetensors", "/etc/x", 3, "a\\b"]
)
def test_an_index_that_names_other_than_our_safetensors_is_refused(name: Any, model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "decoy.safetensors")
    torch.save({"x": _Runs(tmp_path / "ran")}, model / "weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is no safetensors file of this folder"):
        loaded(model)
    assert not (tmp_path / "ran").exists()
    index["weight_map"] = dict.fromkeys(weights, "decoy.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert type(loaded(model)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', "{"])
def test_an_index_that_is_none_is_refused(content: str, model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json"):
        find_model(str(model))


def test_weights_that_the_config_names_are_of_this_folder(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    for name in ("weights.bin", "../x.safetensors"):
        (model / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        with pytest.raises(ModelError, match=r"config\.json takes weights from"):
            find_model(str(model))


# --- models: code


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", "kernels-community/flash-attn2", "flash_attention_2", {"": "a/b"}])
def test_attention_that_the_hub_would_give_as_code_is_refused(key: str, value: Any, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    for spoiled in ({key: value}, {"text_config": {key: value}}):
        (model / "config.json").write_text(json.dumps(config | spoiled))
        with pytest.raises(ModelError, match=r"asks for the attention .* --trust-remote-code"):
            loaded(model)
    (model / "config.json").write_text(json.dumps(config | {key: "eager"}))
    assert type(loaded(model)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("place", ["code.Tokenizer", "someone/repository--code.Tokenizer"])
def test_code_of_a_tokenizer_is_not_run(place: str, model: Path, tmp_path: Path) -> None:
    about = {"tokenizer_class": "Homemade", "auto_map": {"AutoTokenizer": [place, None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(about))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="cannot load its tokenizer"):
        loaded(model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"vocab_size": "x"},
        {"hidden_size": -4},
        {"hidden_act": "os.system"},
        {"rope_parameters": {"rope_type": "evil"}},
        {"model_type": "../../x"},
        {"pad_token_id": 10**9},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_config_that_makes_no_sense_is_a_model_error(settings: dict[str, Any], model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ModelError, match="cannot load it"):
        loaded(model)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 100, b"junk" * 100])
def test_a_gguf_file_that_is_none_is_a_model_error(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.gguf"):
        loaded(tmp_path / "x.gguf")


# --- hostile headers of safetensors


def _file(header: Any, body: bytes = b"\0" * 8) -> bytes:
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(told)) + told + body


def _one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


HEADERS = {
    "empty": b"",
    "short": b"\x08\0\0",
    "endless header": struct.pack("<Q", 2**63) + b"{}",
    "header past the end": struct.pack("<Q", 10**6) + b"{}",
    "no JSON": _file(b"x" * 50),
    "array": _file([]),
    "null": _file(None),
    "deep": _file(b'{"a":' * 50_000),
    "not UTF-8": _file(b"\xff" * 20),
    "past the end": _file(_one(data_offsets=[8, 16])),
    "negative": _file(_one(data_offsets=[-8, 0])),
    "text for numbers": _file(_one(data_offsets=["0", "8"])),
    "overflow": _file(_one(shape=[2**62, 4])),
    "other shape": _file(_one(shape=[3])),
    "unknown dtype": _file(_one(dtype="OBJECT")),
    "hole": _file(_one(), b"\0" * 12),
    "overlap": _file(_one() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"\0" * 12),
    "cut": _file(_one(), b"\0" * 7),
    "no offsets": _file({"a": {"dtype": "F32", "shape": [2]}}),
    "metadata of numbers": _file(_one() | {"__metadata__": {"x": 3}}),
    "pickle": b"\x80\x04\x95cposix\nsystem\n(S'true'\ntR.",
}


SCORING: Any = SimpleNamespace(names=["a"], weights=[torch.zeros(2)], rest=None, layers=1, device=torch.device("cpu"))


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_header_is_refused_wherever_safetensors_are_read(case: str, model: Path, tmp_path: Path) -> None:
    content = HEADERS[case]
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot load it"):
        loaded(model)
    is_complete(model)  # reads headers itself; a hostile one may look whole to it, and is refused above
    path = tmp_path / "fisher.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"fisher\.safetensors: not a readable safetensors file"):
        drift.read_direction(path, SCORING, flag="--fisher")
    store = Store(folder=tmp_path, fields={})
    store.path(TARGET).write_bytes(content)
    with pytest.raises(StoredDataError, match="damaged"):
        store.load(TARGET)


# --- rows: words that command


def _specials(tokenizer: Any, *records: Any) -> list[int]:
    good, bad = run(tokenizer, *records)
    assert not bad, bad
    return [int(np.isin(row.input_ids, tokenizer.all_special_ids).sum()) for row in good]


@pytest.fixture
def tokenizer(smollm2_tokenizer: Any) -> Iterator[Any]:
    template = smollm2_tokenizer.chat_template
    body = "(m.content or '') + (m.tool_calls | tojson if m.tool_calls else '') + (m | tojson if m.extra else '')"
    smollm2_tokenizer.chat_template = "{{ tools | tojson if tools else '' }}" + CHATML.replace("m.content", f"({body})")
    yield smollm2_tokenizer
    smollm2_tokenizer.chat_template = template


def _called(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}


@pytest.mark.long
def test_special_tokens_in_keys_and_roles_of_calls_and_tools_stay_text(tokenizer: Any) -> None:
    for arguments in ({EOT: 1}, {"role": EOT}, {"x": [{"role": {EOT: EOT}}]}, {f"a{EOT}": "<|im_start|>assistant\n"}):
        plain, odd = (chat(user("a"), _called(one), answer("b")) for one in ({"x": 1}, arguments))
        before, after = _specials(tokenizer, plain, odd)
        assert before == after == 6
        tools = [{"name": "t", "parameters": arguments}]
        assert _specials(tokenizer, chat(user("a"), answer("b"), tools=tools)) == [4]
        (row,), _ = run(tokenizer, odd)
        assert responses(tokenizer, row)[-1] == "b" + EOT
        assert json.dumps(arguments) in tokenizer.decode(row.input_ids)
        (prompt,), _ = run_prompts(tokenizer, Prompt(messages=[user("a")], tools=tools))
        assert np.isin(prompt.input_ids, tokenizer.all_special_ids).sum() == 3


def test_special_tokens_in_other_keys_of_a_message_stay_text(tokenizer: Any) -> None:
    odd = {"role": "user", "content": "a", "extra": 1, EOT: EOT, "name": EOT}
    assert _specials(tokenizer, chat(odd, answer("b"))) == [4]
    (row,), _ = run(tokenizer, chat(odd, answer("b")))
    assert '{"role": "user", "content": "a"' in tokenizer.decode(row.input_ids)  # the order is kept


def test_a_template_that_escapes_what_hides_a_special_token_is_refused_for_such_rows(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("m.content", "(m.content | tojson(ensure_ascii=True))")
    good, bad = run(tokenizer, chat(user("a\\ufdd2"), answer("b")), chat(user(EOT), answer("b")))
    assert [row.row_id for row in good] == [0]
    assert [(row.row_id, row.reason) for row in bad] == [(1, "template_not_splittable")]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ 10.0 ** 1000 }}",
        "{{ messages[99].content.x }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_that_breaks_out_or_down_is_a_bad_row(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template + CHATML
    good, (bad,) = run(tokenizer, chat(user("a"), answer("b")))
    assert not good and bad.reason == "template_error"


def test_rows_command_no_terminal(tmp_path: Path) -> None:
    made = hostile_run(tmp_path / "run")
    shows = [("show", made, "--row", row) for row in range(0, len(PAYLOADS) + 1, 5)]
    tables = [("show", made, "--row", len(PAYLOADS) - 1, "--tokens"), ("show", made, "--search", "a")]
    as_json = [("stats", made, "--json"), ("compare", made, made, "--json")]
    others = [("stats", made), ("compare", made, made), ("verify", made), ("mask", made)]
    for arguments in (*shows, *tables, *as_json, *others):
        ended = command(*arguments)
        for out in (ended.out, ended.err):
            assert out == legible(out), arguments


def test_names_and_reasons_command_no_terminal(models: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    name = "\x1b]0;owned\x07\x1b[2J\u202e.jsonl"
    write_jsonl(folder / name, [*token_records(3), '{"\x1b[2J": 1}', {"messages": [{"role": "\x1b[2J"}]}])
    for flags in (("check", "--bad-rows", "quarantine"), ("check",), ("score", "-o", tmp_path / "run")):
        ended = command(flags[0], folder, "--model", models["base"], *flags[1:])
        told = ended.out + ended.err
        assert told == legible(told) and "owned" in told


def test_what_is_legible() -> None:
    assert legible("a\nb\x1b[2J\x07\u202e\r\x9b é 日本\n") == "a\nb\\u001b[2J\\u0007\\u202e\\u000d\\u009b é 日本\n"


# --- a whole run, watched


_WATCHED = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import alphatoken_curate, transformers, torch, polars, datasets
transformers.AutoModelForCausalLM, transformers.AutoTokenizer
import urllib3  # accelerate takes in boto3 where there is one, as moto needs; this asks at import whether IPv6 is there
seen, WRITES = [], os.O_WRONLY | os.O_RDWR | os.O_CREAT
def watch(event, args):
    runs = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
    if event.startswith("socket.") or event in runs:
        seen.append([event, str(args)[:200]])
    elif event == "open" and not isinstance(args[0], int) and isinstance(args[2], int) and args[2] & WRITES:
        seen.append(["write", os.path.realpath(args[0]) if isinstance(args[0], str) else str(args[0])])
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link"):
        seen.append(["write", os.path.realpath(str(args[0]))])
        if event == "os.rename":
            seen.append(["write", os.path.realpath(str(args[1]))])
sys.addaudithook(watch)
from tiny_files import command
codes = [command(*arguments).code for arguments in json.loads(sys.argv[1])]
print(json.dumps([codes, seen]))
"""


def test_a_run_opens_no_socket_starts_no_program_and_writes_nowhere_else(
    models: dict[str, str], tmp_path: Path
) -> None:
    records = token_records(len(PAYLOADS[:4]) + 6)
    names = (
        "../../x",
        "/etc/passwd",
        "CON",
        "$(touch owned)",
        "; touch owned #",
        "`touch owned`",
        "a/b",
        "..",
        "\0",
        "%s",
    )
    for record, name in zip(records, names, strict=True):
        record["id"] = name
    data, made = write_jsonl(tmp_path / "rows.jsonl", records), tmp_path / "run"
    common = ["--model", models["tuned"], "--reference", models["base"], "--layers", "1"]
    commands = [
        ["check", data, *common],
        ["score", data, *common, "-o", str(made)],
        ["refresh", str(made), "--checkpoint", models["base"]],
        ["mask", str(made), "--keep", "0.3"],
        ["show", str(made), "--row", "1"],
        ["stats", str(made)],
        ["compare", str(made)],
        ["report", str(made)],
        ["verify", str(made)],
    ]
    before = contents(tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HOME": str(here), "HF_HOME": str(here / "hub"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(here)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(here / "torch")  # torch makes it below /tmp, whatever TMPDIR says
    code = _WATCHED.format(tests=str(Path(__file__).parents[1] / "support"))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True, text=True, cwd=here, env=environment, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    codes, seen = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * len(commands)
    allowed = (str(made.resolve()), str(here.resolve()), "/dev/")
    assert [one for one in seen if one[0] != "write" or not one[1].startswith(allowed)] == []
    assert any(one[1].endswith(".parquet") for one in seen if str(made) in one[1])
    after = {name for name in contents(tmp_path) if not name.startswith(("run/", "here/"))}
    assert after == set(before)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("owned", "passwd", "x", "CON")]


# --- what the package may not contain


_NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "httpx2", "aiohttp", "ftplib", "smtplib"}
_NETWORK |= {
    "fsspec",
    "s3fs",
    "gcsfs",
    "huggingface_hub",
    "datasets",
    "wandb",
    "posthog",
    "sentry_sdk",
    "opentelemetry",
    "ctypes",
    "cffi",
    "pty",
}
_MAY = {
    "models/folders": {"huggingface_hub"},  # a model that the user names by its Hub id
    "models/releases": {"huggingface_hub"},
    "models/whole": {"huggingface_hub"},  # the name of an error
    "rows/hub": {"datasets", "huggingface_hub"},  # a data set that the user names by its Hub name
    "scoring/cluster": {"socket"},  # the Ray cluster whose address the user names; the name of a machine
    "runs/stores": {"fsspec"},  # rows and published runs whose URL the user names
    "trainers/dataset": {"datasets"},  # rows of a mask as `datasets` holds them, from memory
    "trainers/current": {"datasets"},
    "trainers/fit": {"datasets"},
    "trainers/hf": {"datasets"},
    "exports/hf": {"datasets"},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("path", [*modules(LIBRARY), *modules(CLI)], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_network_is_asked_in_two_places_only(path: Path) -> None:
    assert set(imports(path)) & _NETWORK <= _MAY.get(f"{path.parent.name}/{path.stem}", set())
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|trust_remote_code\s*=\s*True", text)
    assert not re.search(r"verify\s*=\s*False|mktemp\(|os\.chmod", text)


def test_where_the_network_may_be_asked_it_is() -> None:
    for name in ("models/folders", "models/whole", "rows/hub"):
        wanted = _MAY[name]
        assert set(imports(LIBRARY / f"{name}.py")) & _NETWORK == wanted


def test_what_checks_use_is_pinned_by_hash() -> None:
    text = (ROOT / ".ci/requirements.txt").read_text()
    pinned = re.findall(r"^([\w.-]+)==\S+((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    assert len(pinned) == len(re.findall(r"^\w", text, re.MULTILINE)) > 50
    wanted = {re.split(r"[^\w.-]", one)[0].lower() for one in asked()}
    assert wanted <= {name for name, _ in pinned}

"""Templates that write today's date write the day they are told, in every form that Python writes."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from chats import CHATML, answer, chat, responses, run, run_prompts, user
from tiny_files import command, contents, write_jsonl
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from alphatoken_curate import verify
from alphatoken_curate.rows.shapes import Prompt
from alphatoken_curate.tokens.chat import ChatSettings
from alphatoken_curate.tokens.dates import TemplateDay

DAY = datetime.date(2024, 2, 9)
FORMS = [
    "%Y-%m-%d",
    "%d %b %Y",
    "%B %-d, %Y",
    "%A %H:%M:%S.%f %p",
    "100%% %d%%d",
    "%%Y",
    "%j %U %W %y %c %x",
    "no date",
]


def written(tokenizer: Any, template: str, **options: Any) -> str:
    tokenizer.chat_template = template
    good, bad = run(tokenizer, chat(user("a"), answer("b")), chats=ChatSettings(**options))
    assert not bad, bad
    assert responses(tokenizer, good[0]) == ["b<|im_end|>"]
    return str(tokenizer.decode(good[0].input_ids)).split("<|im_start|>")[0]


@pytest.fixture
def tokenizer(smollm2_tokenizer: Any) -> Any:
    template = smollm2_tokenizer.chat_template
    yield smollm2_tokenizer
    smollm2_tokenizer.chat_template = template


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_pythons_own(tokenizer: Any, form: str) -> None:
    day = TemplateDay(day=DAY)
    template = "{{ strftime_now('" + form + "') }}" + CHATML
    assert written(tokenizer, template, day=day) == datetime.datetime(2024, 2, 9).strftime(form)
    assert day.written


DATED = {
    "if it is known": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}none{% endif %}",
    "in a macro": "{% macro head() %}{{ strftime_now('%Y') }}{% endmacro %}{{ head() }}",
    "set, as a default": "{%- set date = strftime_now('%Y') if date is not defined else date %}{{ date }}",
    "in an expression": "{{ (strftime_now('%Y') | int) + 0 }}",
    "a form that is made": "{% set form = '%' + 'Y' %}{{ strftime_now(form) }}",
    "by its name": "{{ strftime_now(format='%Y') }}",
    "behind a space": "{%- if true %}\n  {{- strftime_now('%Y') }}\n{%- endif %}",
}


@pytest.mark.parametrize("name", DATED)
def test_however_a_template_asks(tokenizer: Any, name: str) -> None:
    assert written(tokenizer, DATED[name] + CHATML, day=TemplateDay(day=DAY)).strip() == "2024"


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n  {% if true %}x{% endif %}\n", "{# #}\n"])
def test_nothing_else_of_a_template_changes(tokenizer: Any, start: str) -> None:
    """White space before its first tag stays as it is, or goes, as without a date."""
    without = written(tokenizer, start + "[{{ '2024' }}]" + CHATML)
    assert written(tokenizer, start + "[{{ strftime_now('%Y') }}]" + CHATML, day=TemplateDay(day=DAY)) == without


def test_a_template_that_marks_its_answers_and_writes_a_date(tokenizer: Any) -> None:
    marked = (
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert written(tokenizer, marked, day=TemplateDay(day=DAY)) == "2024"


def test_a_template_without_a_date_asks_for_none(tokenizer: Any) -> None:
    day = TemplateDay(day=DAY)
    assert written(tokenizer, CHATML, day=day) == "" and not day.written
    assert day.told(CHATML) == (CHATML, {})


def test_without_a_day_it_is_that_of_the_clock(tokenizer: Any) -> None:
    before = datetime.datetime.now().strftime("%Y")
    assert written(tokenizer, "{{ strftime_now('%Y') }}" + CHATML) in (before, str(int(before) + 1))


def test_a_prompt_has_the_date_too(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + CHATML
    settings = ChatSettings(day=TemplateDay(day=DAY))
    good, bad = run_prompts(tokenizer, Prompt(messages=[user("a")]), chats=settings)
    assert not bad and str(tokenizer.decode(good[0].input_ids)).startswith("2024<|im_start|>user")


# --- of a run

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 :."
PLAIN = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}.{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def save(folder: Path, template: str) -> None:
    inner = Tokenizer(WordLevel({"</s>": 2, **{one: 3 + i for i, one in enumerate(CHARACTERS)}}, unk_token="</s>"))
    inner.pre_tokenizer, inner.decoder = Split("", "isolated"), Fuse()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", chat_template=template).save_pretrained(folder)


class Calendar(datetime.date):
    today_is = "2026-11-28"

    @classmethod
    def today(cls) -> Any:
        return datetime.date.fromisoformat(cls.today_is)


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> type[Calendar]:
    """The day of `prepare`, which a test may set."""
    monkeypatch.setattr("alphatoken_curate.scoring.reader.date", Calendar)
    monkeypatch.setattr(Calendar, "today_is", "2026-11-28")
    return Calendar


@pytest.fixture
def named(models: dict[str, str], tmp_path: Path) -> list[Any]:
    """Rows and a model whose template writes the day, as a command line names them."""
    model = shutil.copytree(models["base"], tmp_path / "model")
    save(model, "{{ strftime_now('%d') }}" + PLAIN)
    rows = [{"messages": [user(f"say {i}"), answer(f"it is {i}")]} for i in range(6)]
    return [write_jsonl(tmp_path / "rows.jsonl", rows), "--model", model, "--layers", 1]


def test_a_run_goes_on_and_is_replayed_on_another_day(
    named: list[Any], tmp_path: Path, calendar: type[Calendar], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command("score", *named, "-o", whole).code == 0
    # Begun on the same day and broken off before its second shard; gone on with on the next.
    once = [*named, "--rows-per-shard", 2]
    assert command("score", *once, "-o", broken).code == 0
    again = tmp_path / "again"
    assert command("score", *once, "-o", again).code == 0
    for name in ("values/generation=0/part-00001.parquet", "config.yaml", "manifest.json"):
        (broken / name).unlink()
    calendar.today_is = "2026-11-29"
    ended = command("score", *once, "-o", broken)
    assert ended.code == 0, ended.err
    assert contents(broken) == contents(again) and verify(broken) == []
    assert yaml.safe_load((whole / "config.yaml").read_text())["template_date"] == "2026-11-28"
    assert command("score", "--config", whole / "config.yaml", "-o", tmp_path / "other").code == 0
    assert contents(tmp_path / "other") == contents(whole)
    # A finished run is finished; another day is another run, by name.
    assert "is finished" in command("score", *named, "-o", whole).out
    ended = command("score", *named, "--template-date", "2026-11-29", "-o", whole)
    assert ended.code == 4 and "template_date (2026-11-28 in the run, 2026-11-29 now)" in ended.err
    assert '"template_date": "2026-11-28"' in (whole / "README.md").read_text()
    assert '"template_date": "2026-11-28"' in (whole / "manifest.json").read_text().replace('":"', '": "')


def test_the_day_is_told_before_a_run(named: list[Any], calendar: type[Calendar]) -> None:
    found = command("check", *named)
    assert f"template's date  {'2026-11-28':>12}   --template-date sets another" in found.out
    assert f"template's date  {'2024-02-29':>12}" in command("check", *named, "--template-date", "2024-02-29").out
    wrong = command("check", *named, "--template-date", "2023-02-29")
    assert wrong.code == 2 and "--template-date '2023-02-29': it takes a day as YYYY-MM-DD" in wrong.err


def test_where_no_date_is_written_there_is_none(named: list[Any], tmp_path: Path, calendar: type[Calendar]) -> None:
    save(tmp_path / "model", PLAIN)
    assert "template's date" not in command("check", *named).out
    ended = command("score", *named, "--template-date", "2024-02-29", "-o", tmp_path / "run")
    assert ended.code == 0 and "Without effect here: --template-date (no chat template writes a date)." in ended.err
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["template_date"] is None
    assert "template_date" not in (tmp_path / "run/manifest.json").read_text()
    before = contents(tmp_path / "run")
    calendar.today_is = "2026-12-24"
    assert "is finished" in command("score", *named, "-o", tmp_path / "run").out
    assert contents(tmp_path / "run") == before

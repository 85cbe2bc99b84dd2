"""Every template that TRL carries, and those of Axolotl where its wheel is at hand, by every kind of row.

A cell is right, or refused for what the template itself does. `pytest --rewrite` of this file writes the table of the
README beside it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from by_hand import BY_HAND
from chats import answer, run_any
from daily import daily
from each import each_answer
from kinds import CALLS, GROUPS, KINDS, record_of
from matrix import (
    STOPS,
    TURNS,
    Chat,
    cell,
    chat_of,
    chat_template,
    check_by_changes,
    rendered,
    responding,
    said,
    why_refused,
    written,
)
from packaging.version import Version
from templates import AXOLOTL, axolotl_templates, family_tokenizer, templates, tokenizer_of

from alphatoken_curate.rows.containers import RowFault
from alphatoken_curate.rows.shapes import Messages, Pair
from alphatoken_curate.tokens.chat import MARK, ChatSettings, RenderedText
from alphatoken_curate.tokens.speller import Speller
from alphatoken_curate.tokens.tokenise import PairRow

PAGE = Path(__file__).parent / "README.md"
START, END = "<!-- matrix: written by tests/tokens/test_matrix.py -->", "<!-- end of matrix -->"
NO_STOP = "the chat template writes no token to stop at behind an answer"

TRL = sorted(templates())
RELEASE = version("trl")
OFTEN = (
    *("deepseekv3", "gemma3", "glm4moe", "gptoss", "llama3_1"),
    *("phi3", "qwen2_5", "qwen3", "qwen3_training"),
)
"""Those that are tried each time; all of them by `-m long`."""

OLDER = Version(version("transformers")) < Version("5.23")
"""Whose mask lacks a token within an answer of many scripts (seen with 5.6)."""

SOME = daily(TRL, OFTEN)
TRAINING = [name for name in TRL if name.endswith("_training")]
AXOLOTLS = list(axolotl_templates()) or [pytest.param("", marks=pytest.mark.skip(f"{AXOLOTL} names no wheel"))]


# --- each cell


def check_cell(name: str, kind: str, turns: str) -> None:
    tokenizer, record, found = family_tokenizer(name), record_of(kind), cell(name, kind, turns)
    if isinstance(found, RowFault):
        assert why_refused(name, kind, turns) != "ours", found.message
        return
    check_by_changes(tokenizer, record, turns, found)
    check_tokens(tokenizer, found)
    if "generation" not in tokenizer.chat_template:
        assert len(found.spans) == len(responding(record, turns))
        ends = {token.content for token in tokenizer.added_tokens_decoder.values()}
        open_turn = NO_STOP in found.notes or "in a row" in kind
        assert open_turn or all(one.rstrip().endswith(tuple(ends)) for one in said(found)), said(found)


def check_tokens(tokenizer: Any, found: RenderedText) -> None:
    """The whole row decodes to the whole text, and what responds to the answers."""
    speller = Speller(tokenizer, turns="all", chats=ChatSettings(stops=STOPS))
    (spelled,) = speller.encode([found])
    assert not isinstance(spelled, RowFault), spelled.message
    tokens, mask, *_ = spelled
    masked = [token for token, inside in zip(tokens, mask, strict=True) if inside]
    kept = set(range(len(found.text))) - swallowed(tokenizer, found.text)
    inside = {i for start, end in found.spans for i in range(start, end)}
    for ids, places in ((tokens, kept), (masked, kept & inside)):
        text = "".join(found.text[i] for i in sorted(places)).replace(MARK, "")
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def swallowed(tokenizer: Any, text: str) -> set[int]:
    """Where white space stands that a control token takes in."""
    greedy = [token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip]
    found = [one for name in greedy for one in re.finditer(re.escape(name) + r"(\s+)", text)]
    return {i for one in found for i in range(*one.span(1))}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("turns", [TURNS[0], *(pytest.param(one, marks=pytest.mark.long) for one in TURNS[1:])])
@pytest.mark.parametrize("name", SOME)
def test_a_cell_is_right_or_refused_for_what_its_template_does(name: str, turns: str) -> None:
    for kind in KINDS:
        check_cell(name, kind, turns)


MARKED_HEADERS = (
    *("<｜Assistant｜>", "<｜Assistant｜><think>", "<|start|>assistant", "<｜tool▁outputs▁end｜>"),
    *("<think>", "<think>\n\n</think>"),
)
"""What some training forms mark of the generation prompt."""

OTHERS = re.compile(r"^<\|turn>model\n|<\|tool_response>$|(?<=<\|end\|>)\n<\|end\|>$")
"""What Gemma 4 writes before an answer behind a result, where its generation prompt is empty, and behind a call; what
Phi-3's training forms mark behind the last answer."""


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SOME)
def test_each_answer_is_what_the_model_is_asked_and_what_it_wrote(name: str) -> None:
    """Beside the template alone: the messages before an answer with the generation prompt, the answer, its stop."""
    tokenizer, compared = family_tokenizer(name), 0
    for kind in KINDS:
        record, wanted = record_of(kind), each_answer(tokenizer, record_of(kind))
        try:
            found = chat_template(tokenizer, "each").render(record)
        except RowFault:
            continue
        if wanted is None or kind == "blank" or any(item.marked for item in found):
            continue
        for item, (given_, responds) in zip(found, wanted, strict=True):
            start, end = item.spans[0][0], item.spans[-1][1]
            header = item.text[start : len(given_)]
            assert item.text.startswith(given_) and header.strip() in ("", *MARKED_HEADERS), (kind, header)
            # A stop that history has, as the next role of GLM, is not written behind the last answer.
            mine = OTHERS.sub("", item.text[max(start, len(given_)) :].rstrip())
            assert mine == OTHERS.sub("", responds.rstrip()) or not item.closings[-1], kind
            assert item.text[end:] == ""
            compared += 1
    # Those that open a thought in the prompt, where no answer has one, never write what they ask for.
    assert compared >= 20 or name.startswith(("deepseek", "nemotron")), compared


@pytest.mark.long
@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", AXOLOTLS)
def test_a_cell_of_axolotls_templates(name: str, turns: str) -> None:
    for kind in KINDS:
        check_cell(name, kind, turns)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", BY_HAND)
def test_families_by_hand(name: str) -> None:
    compared = 0
    for kind in KINDS:
        for turns in TURNS:
            found = cell(name, kind, turns)
            if not isinstance(found, RowFault):
                wanted = BY_HAND[name](record_of(kind).messages)
                assert said(found) == (wanted[-1:] if turns == "last" else wanted), (kind, turns)
                compared += 1
    assert compared >= 60


# --- training forms


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", TRAINING)
def test_where_transformers_has_a_mask_it_is_ours(name: str) -> None:
    tokenizer = family_tokenizer(name)
    speller = Speller(tokenizer, turns="all", chats=ChatSettings(stops=STOPS))
    compared = 0
    for kind in KINDS:
        found, record = cell(name, kind), record_of(kind)
        if isinstance(found, RowFault) or found.marked or (kind == "scripts" and OLDER):
            continue
        if swallowed(tokenizer, found.text) & {start for start, _ in found.spans}:
            continue  # theirs has the header's last token, too, which takes in the answer's first white space
        chat = chat_of(tokenizer, record, found)
        theirs = tokenizer.apply_chat_template(
            chat, tools=record.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ((tokens, mask, *_),) = speller.encode([found])
        assert theirs["input_ids"] == tokens, kind
        assert [bool(one) for one in theirs["assistant_masks"]] == mask.tolist(), kind
        compared += 1
    assert compared >= 25


HEADERS = ("", "<｜Assistant｜>", "<｜Assistant｜><think>", "<|start|>assistant", "<｜tool▁outputs▁end｜>")
HEADERS += ("<think>", "<think></think>")
"""What some mark, or write in history as the generation prompt does, before what a model itself writes."""

STOPS_AT = "<|tool_response>"
"""What a Gemma stops at behind a call, by its generation_config.json, is not marked."""

OTHER_RENDERING = {"phi3_training", "phi3_5_training"}
"""They mark an end of text behind the whole chat, too, which no answer needs."""


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", TRAINING)
def test_without_its_marks_a_training_template_gives_the_answers_it_marks(name: str) -> None:
    compared = 0
    for kind in KINDS:
        wanted, found = cell(name, kind), cell(name, kind, marks=False)
        if isinstance(wanted, RowFault):
            continue
        if isinstance(found, RowFault):
            assert why_refused(name, kind, "all", marks=False) != "ours", (kind, found.message)
            continue
        assert wanted.text == found.text
        marked, mine = ({i for start, end in one.spans for i in range(start, end)} for one in (wanted, found))
        assert "".join(found.text[i] for i in sorted(mine - marked)).replace(STOPS_AT, "") == "", kind
        more = "".join(found.text[i] if i in marked - mine else "\0" for i in range(len(found.text)))
        if name in OTHER_RENDERING:
            more = more.removesuffix("<|end|>")
        assert all("".join(piece.split()) in HEADERS for piece in more.split("\0")), (kind, more.split("\0"))
        compared += 1
    assert compared >= 25


# --- pairs


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", SOME)
def test_each_branch_of_a_pair_is_what_it_is_alone(name: str) -> None:
    tokenizer = family_tokenizer(name)
    for kind in ("single", "several", "system", "inline thoughts", "echoes", "call"):
        record = record_of(kind)
        other = Messages(messages=[*record.messages[:-1], answer("Never.")], tools=record.tools)
        options = {"turns": "all", "chats": ChatSettings(stops=STOPS)}
        alone = [run_any(tokenizer, one, **options) for one in (record, other)]
        good, bad = run_any(tokenizer, Pair(chosen=record, rejected=other), **options)
        if not all(rows for rows, _ in alone):
            assert not good and bad[0].reason in {one.reason for _, refused in alone for one in refused}
            continue
        (pair,) = good
        assert isinstance(pair, PairRow)
        for branch, ((row,), _) in zip((pair.chosen, pair.rejected), alone, strict=True):
            assert branch.input_ids.tolist() == row.input_ids.tolist()  # type: ignore[union-attr]
            assert branch.response.tolist() == row.response.tolist()  # type: ignore[union-attr]


# --- what each answer is at inference


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gemma3", "gptoss", "cohere2", "phi3", "glm4moe"])
def test_the_oracle_of_each_answer_by_hand(name: str) -> None:
    tokenizer = family_tokenizer(name)
    compared = 0
    for kind in ("single", "several", "echoes", "inline thoughts", "letters", "code", "call", "rounds of calls"):
        record = record_of(kind)
        found = each_answer(tokenizer, record)
        if found is None or isinstance(cell(name, kind), RowFault):
            continue
        places = responding(record, "all")
        assert [text for _, text in found] == [BY_HAND[name](record.messages[: i + 1])[-1] for i in places], kind
        assert all(record.messages[i - 1]["content"] in given for i, (given, _) in zip(places, found, strict=True))
        compared += 1
    assert compared >= 5


# --- what is told of a refusal


def _without_second_calls(chat: Chat) -> Chat:
    made: Chat = []
    for message in chat:
        calls = message.get("tool_calls", ())
        made += [{**message, "tool_calls": [call]} for call in calls] if len(calls) > 1 else [message]
    results = [message for message in made if message["role"] == "tool"]
    if not results:
        return made
    first, second = (message for message in made if message.get("tool_calls"))
    return [made[0], first, results[0], second, results[1], made[-1]]


def _as_one(chat: Chat) -> Chat:
    made: Chat = []
    for message in chat:
        if made and made[-1]["role"] == message["role"]:
            made[-1] = {**made[-1], "content": made[-1]["content"] + "\n\n" + message["content"]}
        else:
            made.append(message)
    return made


def _first(chat: Chat, role: str) -> int:
    return [message["role"] for message in chat].index(role)


FOLLOWED: dict[str, Callable[[Chat], Chat]] = {
    "with `system` for `developer`": lambda chat: [{**chat[0], "role": "system"}, *chat[1:]],
    "without its system message": lambda chat: [one for one in chat if one["role"] not in ("system", "developer")],
    "from its first question on": lambda chat: chat[_first(chat, "user") :],
    "up to its last answer": lambda chat: chat[: len(chat) - _first(chat[::-1], "assistant")],
    "with messages in a row of one role as one": _as_one,
    "without content beside tool_calls": lambda chat: [
        {**one, "content": ""} if "tool_calls" in one else one for one in chat
    ],
    "with one call to a message": _without_second_calls,
}


def follow(name: str, record: Messages, told: str) -> RenderedText | RowFault:
    tokenizer = family_tokenizer(name)
    if told.startswith("--turns "):
        return rendered(tokenizer, record, told.split()[1])
    if told.startswith("--chat-template-kwargs"):
        settings = json.loads(told.split("'")[1])
        return rendered(tokenizer, Messages(messages=record.messages, template_kwargs=settings), "all")
    if told.startswith("name a template that can with --chat-template FILE"):
        return rendered(tokenizer_of(templates()["qwen2_5"]), record, "all")
    edited = FOLLOWED[told.removeprefix("it takes this row ")](record.messages)
    return rendered(tokenizer, Messages(messages=edited, tools=record.tools), "all")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", SOME)
def test_a_refusal_shows_what_differs_and_its_advice_takes_the_row(name: str) -> None:
    for kind in KINDS:
        found = cell(name, kind)
        if isinstance(found, RowFault):
            why, _, told = found.message.rpartition("; ")
            assert re.search(r"'.+'", why) or why.startswith("the chat template fails: "), why
            assert not isinstance(follow(name, record_of(kind), told), RowFault), (kind, found.message)


def test_advice_is_sought_once_for_each_kind_of_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    template = chat_template(family_tokenizer("gemma3"), "all")
    tried = Counter[str]()
    render = type(template)._shown
    monkeypatch.setattr(type(template), "_shown", lambda self, record: tried.update(["once"]) or render(self, record))
    for i in range(50):
        with pytest.raises(RowFault, match="as one"):
            template.render(Messages(messages=[*record_of("in a row").messages, answer(f"Number {i}.")]))
    assert 50 < tried["once"] < 80


# --- the table


def tally(name: str) -> list[str]:
    """Of each group of kinds: how many are right, and how many are refused for what."""
    found = []
    for kinds in GROUPS.values():
        came = Counter(
            why_refused(name, kind, "all") if isinstance(one, RowFault) else ""
            for kind in kinds
            for one in [cell(name, kind)]
        )
        right = came.pop("", 0)
        found.append(", ".join([str(right), *(f"{number} {why}" for why, number in sorted(came.items()))]))
    return found


def table() -> str:
    rows = [(name, tally(name)) for name in TRL]
    totals = Counter[str]()
    for _, cells in rows:
        for one in cells:
            right, *refused = one.split(", ")
            totals.update({"right": int(right)})
            totals.update({why: int(number) for number, _, why in (part.partition(" ") for part in refused)})
    counted = ", ".join(f"{number:,} {why}" for why, number in sorted(totals.items(), key=lambda one: -one[1]))
    size = f"{len(rows)} templates x {len(KINDS)} kinds of rows, `--turns all`"
    lines = [f"TRL {RELEASE}: {size}: {counted}.", ""]
    lines += ["| template | " + " | ".join(f"{group} ({len(kinds)})" for group, kinds in GROUPS.items()) + " |"]
    lines += ["|---" * (len(GROUPS) + 1) + "|"]
    lines += [f"| `{name}` | " + " | ".join(cells) + " |" for name, cells in rows]
    return "\n".join(lines)


@pytest.mark.long
def test_the_table_says_what_came_of_each_template(
    request: pytest.FixtureRequest, same_text: Callable[[Path, str], None]
) -> None:
    page = PAGE.read_text(encoding="utf-8")
    if f"TRL {RELEASE}:" not in page and not request.config.getoption("--rewrite"):
        pytest.skip("the table is of another TRL")
    before, _, rest = page.partition(START)
    same_text(PAGE, f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}")


def test_there_are_forty_kinds_and_each_is_in_one_group() -> None:
    assert len(KINDS) >= 40 and sorted(kind for kinds in GROUPS.values() for kind in kinds) == sorted(KINDS)
    assert set(KINDS) > CALLS
    assert written(family_tokenizer("qwen3"), record_of("single").messages, record_of("single")) is not None

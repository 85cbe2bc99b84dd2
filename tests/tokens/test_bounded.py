"""Templates within bounds write what transformers has them write; those that run away end soon, and small."""

from __future__ import annotations

import resource
import sys
import threading
import time
from typing import Any

import pytest
from runaways import BREAKING, RUNAWAYS
from templates import templates, tokenizer_of
from transformers.utils import chat_template_utils

from alphatoken_curate.tokens.bounded import LONGEST, Bounded
from alphatoken_curate.tokens.meter import RunawayError

CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"city": "Ås", "n": [1, 2]}}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
    [
        {"role": "system", "content": "sys é"},
        {"role": "user", "content": "hi "},
        {"role": "assistant", "content": "<think>\nabc\n</think>\n\nyo"},
        {"role": "user", "content": "more\n"},
        {"role": "assistant", "content": "z", "reasoning_content": "thought"},
    ],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": "12"},
        {"role": "assistant", "content": "done"},
    ],
]


def outcome(tokenizer: Any, chat: Any, **options: Any) -> str:
    """What is written, or why nothing is."""
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.long
def test_every_template_writes_the_same_within_bounds() -> None:
    compared = 0
    for name, template in templates().items():
        tokenizer = tokenizer_of(template, name)
        for chat in CHATS:
            for options in ({}, {"tools": TOOLS}, {"add_generation_prompt": True}):
                plain = outcome(tokenizer, chat, **options)
                with Bounded([chat, options]):
                    assert outcome(tokenizer, chat, **options) == plain, name
                compared += 1
    assert compared > 300


SLOWER = ("calls in loops", "wide loop", "blocks of calls")
"""Those that take a second or two."""

ODD = (
    "{{ 1 + 2 }}{{ 2 ** 3 * 4 % 5 }}{{ [1] + [2] }}{{ 'a' ~ 1 ~ none }}{{ 'ab' * 2 }}{{ 1.5 + 1 }}{{ nothing }}",
    "{{ '%s-%5.2f' % ('é', 1.234) }}{{ '{:>6}|{a!r}'.format(1, a='b') }}{{ '%d%%' % 3 }}{{ '{}'.format('²') }}",
    "{% autoescape true %}{% set a = '<' %}{{ a ~ '&' }}{{ a | safe ~ '>' }}{{ a + '<b>' }}{% endautoescape %}",
    "{% set ns = namespace(a=1, b=[]) %}{% set ns.b = ns.b + [ns.a] %}{{ ns }}{{ ns.b }}{{ ns.keys }}{{ ns._x }}",
    "{% set m = messages[0] %}{{ m.items() | list }}{{ m.get('x', 3) }}{{ m.none }}{{ m.update }}{{ m['role'] }}",
    "{{ 'a,b'.split(',') }}{{ ' x '.strip() }}{{ 'x'.__class__ }}{{ 'x'.nothing }}",
    "{% for a, b in {'x': 1}.items() %}{{ loop.index }}{{ loop.first }}{{ loop.length }}{{ a }}{{ b }}{% endfor %}",
    "{% for x in [3, 1, 2] | sort if x > 1 %}{{ loop.last }}{{ x }}{% else %}none{% endfor %}",
    "{% macro f(x, y=2) %}{{ x + y }}{{ varargs }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{{ f(1, 2, 3) }}",
    "{% macro f() %}[{{ caller() }}]{% endmacro %}{% call f() %}x{% endcall %}{% filter upper %}a{% endfilter %}",
    "{{ range(5) | map('string') | join('-') }}{{ [1, 2] | sum }}{{ ['b', 'a'] | sort | first }}{{ 'x' | tojson }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages | map(attribute='role') | list }}",
    "{{ raise_exception('no') }}",
    "{{ messages.append(1) }}",
    "{{ 'x' + 1 }}",
    "{{ 1 // 0 }}",
    "{{ 'x' is string }}{{ 1 in [1, 2] }}{{ [1, [2]] == [1, [2]] }}{{ 'b' in 'abc' }}{{ 'abc'[::-1] }}",
    "{{ 'a\nb' | indent(2) }}{{ 'long text here' | truncate(8) }}{{ 'x' | center(5) }}",
    "{{ [1, 2, 3] | batch(2) | list }}{{ joiner(', ')() }}",
    "{% for x in [[1, [2]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}{{ cycler(1, 2).next() }}",
    "{% set a %}{{ 1 }}{{ 'b' }}{% endset %}{{ a | length }}{{ dict(a=1) }}{{ (1, 'a') }}{{ {1: 2} }}",
)


@pytest.mark.parametrize("template", ODD)
def test_whatever_a_template_may_use_is_the_same_within_bounds(template: str) -> None:
    tokenizer = tokenizer_of(template)
    plain = outcome(tokenizer, CHATS[0])
    with Bounded(CHATS[0]):
        assert outcome(tokenizer, CHATS[0]) == plain


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in SLOWER else ()) for name in RUNAWAYS]
)
def test_a_template_that_runs_away_ends_soon_and_small(name: str) -> None:
    tokenizer = tokenizer_of("x")
    tokenizer.chat_template = RUNAWAYS[name]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with Bounded(CHATS[0]), pytest.raises(RunawayError, match=r"more than [\d,]+|a value of|digits|characters long"):
        tokenizer.apply_chat_template(CHATS[0], tokenize=False)
    assert time.thread_time() - began < 10
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "KiB"


@pytest.mark.parametrize("name", BREAKING)
def test_what_python_ends_by_itself_is_left_to_it(name: str) -> None:
    tokenizer = tokenizer_of("x")
    tokenizer.chat_template = BREAKING[name]
    with Bounded(CHATS[0]), pytest.raises((ArithmeticError, RecursionError, SyntaxError, ValueError)):
        tokenizer.apply_chat_template(CHATS[0], tokenize=False)


def test_long_chats_may_take_longer() -> None:
    tokenizer = tokenizer_of(
        "{% set ns = namespace(all='') %}{% for m in messages %}{% for c in m.content %}{% set ns.all = ns.all + c %}"
        "{% endfor %}{% endfor %}{{ ns.all }}"
    )
    chat = [{"role": "user", "content": "x" * 50} for _ in range(100)]
    with Bounded(chat):
        assert outcome(tokenizer, chat) == "x" * 5000
    with Bounded([]), pytest.raises(RunawayError):  # as if next to nothing was given
        tokenizer.apply_chat_template(chat, tokenize=False)


def test_transformers_is_as_before_behind_it_and_for_other_threads() -> None:
    theirs, found = chat_template_utils._compile_jinja_template, []
    tokenizer = tokenizer_of("{{ 'x' * 5000000 }}")

    def render() -> None:
        found.append(len(tokenizer.apply_chat_template(CHATS[0], tokenize=False)))

    with Bounded(CHATS[0]):
        other = threading.Thread(target=render)
        other.start()
        other.join()
        with pytest.raises(RunawayError):
            render()
    assert found == [5_000_000]
    assert chat_template_utils._compile_jinja_template is theirs


def test_a_template_is_not_too_long() -> None:
    tokenizer = tokenizer_of("{# " + "x" * LONGEST + " #}")
    with Bounded([]), pytest.raises(RunawayError, match="characters long"):
        tokenizer.apply_chat_template(CHATS[0], tokenize=False)

"""The sandbox that counts: what each template is worth, and that the sandbox holds as before."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from alphatoken_curate.tokens.meter import Meter, RunawayError
from alphatoken_curate.tokens.sandbox import counting


def made(template: str, **given: Any) -> tuple[str, Meter]:
    plain = chat_template_utils._compile_jinja_template("").environment
    counts: Any = counting(template, plain)
    counts.environment.meter.begin([])
    return counts.render(**given), counts.environment.meter


def steps(template: str, **given: Any) -> int:
    _, meter = made(template, **given)
    return int(meter._taken + 500 - meter._left)


def test_each_turn_of_a_loop_counts_as_its_body_has_parts() -> None:
    one, more = ("{% for i in x %}" + body + "{% endfor %}" for body in ("{{ i }}", "{{ i }}{{ i }}{{ i }}"))
    assert 0 < steps(one, x=[1]) < steps(more, x=[1])
    assert steps(one, x=range(1000)) == 1000 * steps(one, x=[1])
    assert steps("{% for i in x if i > 999 %}{% endfor %}", x=range(1000)) == 1000
    assert steps("{% macro f() %}x{% endmacro %}{{ f() }}") < steps("{% macro f() %}x{% endmacro %}{{ f() }}{{ f() }}")


def test_what_is_made_counts() -> None:
    for template in ("{{ x * 10 }}", "{{ x }}" * 10, "{% set a = x + x + x + x + x %}{{ a }}"):
        assert made(template, x="y" * 1000)[1]._made >= 10_000, template
    assert made("{{ x.strip() }}", x="y" * 1000)[1]._made == 1000


def test_nothing_is_worked_out_while_a_template_is_compiled() -> None:
    plain = chat_template_utils._compile_jinja_template("").environment
    for expression in ("'x' * 10**12", "'x' | center(10**12)", "10 ** 1000000000000", "('x' * 10**12) | length"):
        for template in (f"{{{{ {expression} }}}}", f"{{% if {expression} %}}{{% endif %}}"):
            counts = counting(template, plain)
            with pytest.raises(RunawayError):
                counts.render()


@pytest.mark.parametrize(
    "template",
    [
        "{{ x.__class__ }}",
        "{{ x['__class__'].mro() }}",
        "{{ x.__init__.__globals__ }}",
        "{{ x | attr('__class__') | attr('mro') }}",
        "{{ m.pop('a') }}",
        "{{ m.update(a=2) }}",
        "{{ l.append(1) }}",
        "{{ '{0.__class__.__mro__}'.format(x) }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': x}) }}",
        "{{ ns._private() }}",
        "{{ loop.__class__() }}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    given: dict[str, Any] = {"x": "text", "m": {"a": 1}, "l": [1]}
    template = "{% set ns = namespace(a=1) %}{% for i in [1] %}" + template + "{% endfor %}"
    plain: ImmutableSandboxedEnvironment = chat_template_utils._compile_jinja_template("").environment

    def outcome(render: Any) -> str:
        try:
            return str(render())
        except (SecurityError, Exception) as error:
            return type(error).__name__

    found = outcome(lambda: made(template, **given)[0])
    assert found == outcome(lambda: plain.from_string(template).render(**given))
    assert "class" not in found and given == {"x": "text", "m": {"a": 1}, "l": [1]}

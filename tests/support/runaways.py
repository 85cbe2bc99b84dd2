"""Chat templates that loop for ever or write gigabytes, one for each way that the sandbox of jinja2 leaves open."""

from __future__ import annotations

_MANY, _DONE = "{% for i in range(100000) %}", "{% endfor %}"
_LONG = "{% set b = 'x' * 3000000 %}"


def _doubled(expression: str, first: str = "'x'") -> str:
    """Sixty times twice as long."""
    begin = f"{{% set ns = namespace(x={first}) %}}{{% for i in range(60) %}}"
    return f"{begin}{{% set ns.x = {expression} %}}{_DONE}"


def _macro(body: str, last: str = "", more: str = "") -> str:
    """A macro that calls itself sixty deep."""
    return f"{{% macro f(n) %}}{{% if n %}}{body}{{% else %}}{last}{{% endif %}}{{% endmacro %}}{{{{ f(60{more}) }}}}"


_TREE = _doubled("[ns.x, ns.x]", "['x']")
_SPACES = "".join(f"{{% set n{i + 1} = namespace(a=n{i}, b=n{i}) %}}" for i in range(40)).replace("n0", "'x'")

RUNAWAYS = {
    "nested loops": _MANY * 2 + "x" + _DONE * 2,
    "nested loops that write nothing": _MANY * 3 + "{% set a = 1 %}" + _DONE * 3,
    "loops that leave all out": _MANY + "{% for j in range(100000) if false %}x{% endfor %}" + _DONE,
    "calls in loops": "{% set c = cycler(1, 2) %}" + _MANY * 2 + "{{ c.next() }}" + _DONE * 2,
    "macro that calls itself twice": _macro("{{ f(n - 1) }}{{ f(n - 1) }}"),
    "macro that writes twice as much": _macro("{{ f(n - 1) }}{{ f(n - 1) }}", "x" * 100),
    "macro of its own arguments": _macro("{{ f(n - 1, varargs, varargs) }}", "{{ varargs }}", ", 1"),
    "macro that compares its arguments": _macro(
        "{{ f(n - 1, varargs, varargs) }}", "{{ varargs == varargs[0] }}", ", 1"
    ),
    "macro of its own names": _macro("{{ f(n - 1, a=kwargs, b=kwargs) }}", "{{ kwargs }}", ", a=1"),
    "blocks of calls": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 40
    + "x"
    + "{% endcall %}" * 40,
    "text times a number": "{{ 'x' * 10**10 }}",
    "a number times text": "{% set a = 10000000000 * 'x' %}",
    "a list times a number": "{% set a = [0] * 10000000000 %}",
    "power": "{% set a = 10 ** 10000000000 %}",
    "square of a square": _doubled("ns.x * ns.x", "3"),
    "sum": _doubled("ns.x + ns.x"),
    "sum of many": _doubled(" + ".join(["ns.x"] * 100)),
    "tilde": _doubled("ns.x ~ ns.x"),
    "tilde of many": _doubled(" ~ ".join(["ns.x"] * 1000)),
    "sums written down": "{% set a = 'x' %}" + "{% set a = a + a %}" * 60,
    "sums of a `with`": "{% set a = 'x' %}" + "{% with a = a + a %}" * 60 + "{% endwith %}" * 60,
    "per cent": _doubled("'%s%s' % (ns.x, ns.x)"),
    "format": _doubled("'{0}{0}'.format(ns.x)"),
    "format as a filter": _doubled("'%s%s' | format(ns.x, ns.x)"),
    "join": _doubled("''.join([ns.x, ns.x])"),
    "join as a filter": _doubled("[ns.x, ns.x] | join"),
    "join by a long text": _LONG + "{{ range(100000) | map('string') | join(b) }}",
    "replace": _doubled("ns.x.replace('x', 'xx')"),
    "replace as a filter": _doubled("ns.x | replace('x', 'xx')"),
    "block of set": _doubled("y").replace("{% set ns.x", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x"),
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "zfill": "{{ 'x'.zfill(10000000000) }}",
    "center": "{{ 'x' | center(width=10000000000) }}",
    "center in a condition": "{% if 'x' | center(10000000000) %}a{% endif %}",
    "center of each": "{{ range(100000) | map('string') | map('center', 1000000) | list }}",
    "bytes of a number": "{{ (1).to_bytes(length=10000000000, byteorder='big') }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(100000000) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'x' * 1000000}) }}",
    "width of a number": "{{ '%9999999999d' % 1 }}",
    "width that is told": "{{ '%*d' % (9999999999, 1) }}",
    "width in braces": "{{ '{:>9999999999}'.format('a') }}",
    "width in braces that is told": "{{ '{:{w}}'.format('a', w='999999999') }}",
    "digits": "{{ '%.999999999f' % 1.0 }}",
    "map of a format": "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
    "batch": "{{ [1] | batch(9999999999, 'x') | list }}",
    "slice": "{{ [1] | slice(9999999999) | list }}",
    "indent of JSON": "{{ [1] | tojson(indent=9999999999) }}",
    "indent": "{{ 'a\n' | indent(9999999999, true) }}",
    "wordwrap": "{{ ('a' * 3000000) | wordwrap(1, true, 'x' * 3000000) }}",
    "lipsum": "{{ lipsum(n=1000000000) }}",
    "tree written": _TREE + "{{ ns.x }}",
    "tree as JSON": _TREE + "{{ ns.x | tojson }}",
    "tree of `dict`": _doubled("dict(a=ns.x, b=ns.x)", "{}") + "{{ ns.x | string | length }}",
    "tree of namespaces": _SPACES + "{{ n40 }}",
    "list of copies": _LONG + "{% set ns = namespace(l=[]) %}" + _MANY + "{% set ns.l = ns.l + [b[1:]] %}" + _DONE,
    "copies in a block": _LONG + "{% set a %}" + _MANY + "{{ b | upper }}" + _DONE + "{% endset %}",
    "copies written": _LONG + _MANY + "{{ b | upper }}" + _DONE,
    "wide loop": _MANY + "{% set a %}" + "{{ i }}" * 10000 + "{% endset %}" + _DONE,
    "search from the right": "{{ ('a' * 3000000).rfind('ab' + 'a' * 900000) }}",
    "striptags": "{{ ('<!---->' * 500000) | striptags }}",
    "sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) }}",
    "list of letters": "{{ ('x' * 3000000) | list | length }}",
    "switch": "{% autoescape ('x' * 10000000000) %}a{% endautoescape %}",
    "long source": "{# " + "x" * 600000 + " #}",
}

BREAKING = {
    "loop": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loop within itself": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "loops too deep": "{% for a in 'xx' %}" * 25 + "{% endfor %}" * 25,
    "conditions too deep": "{% if true %}" * 150 + "{% endif %}" * 150,
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long sum": "{{ " + "+".join(["messages[0].content"] * 5000) + " }}",
    "digits": "{{ " + "9" * 10000 + " }}",
}
"""Others that Python or jinja2 end by themselves."""

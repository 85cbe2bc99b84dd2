"""The sandbox of jinja2 in which transformers renders templates, with a meter.

It writes templates as Python that counts. Each turn of a loop and each call of a macro is worth as many steps as its
body has parts. What can make more than it was given (`*`, `+`, `~`, formats, padding, joins) is counted before it is
made; what is made is counted too. Nothing is worked out while a template is compiled.

Imports jinja2, and so is imported where a template is first rendered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sized
from types import BuiltinMethodType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import Template
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alphatoken_curate.tokens.meter import GROWING, Meter, RunawayError

_Builtin: Any = BuiltinMethodType
_DEEPEST = 4096  # bits of a whole number
_WIDEST = 32
"""Names in an expression that may be added up before anything is counted."""

_HELD = "made within bounds"
"""The filter that counts what is held: the value of a `set`, what is looped over. No template can spell it."""

_FREE = (
    *("abs", "attr", "capitalize", "count", "d", "default", "first", "float", "int", "items", "last", "length"),
    *("lower", "random", "reverse", "round", "safe", "trim", "upper"),
)
"""Filters that make no more than they are given."""

_OF_DICT = frozenset(dir(dict))
_READS = ("get", "items", "keys", "values")
_PLAIN = (str, int, bool, list, dict)
_LAZY = ("map", "reject", "rejectattr", "select", "selectattr")


def counting(template: str, plain: ImmutableSandboxedEnvironment) -> Template:
    """A template that counts, with all that `plain` has; its meter is `environment.meter`."""
    environment: Any = _Counting.__new__(_Counting)
    environment.__dict__.update(plain.__dict__)
    meter = Meter()
    environment.__dict__.update(
        meter=meter,
        optimized=False,
        cache=None,
        extensions={name: one.bind(environment) for name, one in plain.extensions.items()},
        filters={
            **{name: one if name in _FREE else _metered(name, one, meter) for name, one in plain.filters.items()},
            _HELD: meter.made,
        },
        globals={**plain.globals, **_globals(plain.globals, meter)},
    )
    made: Template = environment.from_string(template)
    return made


class _Counting(ImmutableSandboxedEnvironment):
    """What compiled templates call; `meter` is that of the rendering."""

    meter: Meter
    intercepted_binops = frozenset({"*", "**", "%"})

    def _generate(self, source: nodes.Template, *about: Any, **more: Any) -> str:
        _mark_wide(source)
        for node in list(source.find_all((nodes.Assign, nodes.With, nodes.For, nodes.Macro, nodes.CallBlock))):
            _count_held(node)
            if not isinstance(node, (nodes.Assign, nodes.With)):
                _count_turns(node)
        return super()._generate(source, *about, **more)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox, sooner where its checks cannot but pass: it asks each of them at each access."""
        kind = type(obj)
        if kind is dict:
            if attribute not in _OF_DICT:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
            if attribute in _READS:
                return getattr(obj, attribute)
        elif attribute[:1] != "_" and attribute not in ("format", "format_map"):
            if kind is str:
                if (found := getattr(obj, attribute, None)) is not None:
                    return found
            elif kind is LoopContext or kind is self.globals["namespace"]:
                found = getattr(obj, attribute, None)
                if type(found) in _PLAIN:
                    return found
        return super().getattr(obj, attribute)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __self.meter
        meter.step(4)
        if type(__obj) is _Builtin and type(__obj.__self__) is str:  # as `split`: nothing of jinja2's is needed
            if kwargs:
                kwargs.pop("_loop_vars", None)
                kwargs.pop("_block_vars", None)
            if (name := __obj.__name__) in GROWING:
                args = tuple(list(one) if _runs_once(one) else one for one in args)
                meter.grow(name, (__obj.__self__, *args), kwargs)
            found = __obj(*args, **kwargs)
            return meter.made(found) if type(found) is list else found
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps `format`
        if isinstance(owner := getattr(method, "__self__", None), (str, bytes, int)):
            args = tuple(list(one) if _runs_once(one) else one for one in args)
            meter.grow(method.__name__, (owner, *args), kwargs)
        for one in args:
            meter.made(one)
        for name, one in kwargs.items():
            if name not in ("_loop_vars", "_block_vars"):
                meter.made(one)
        return meter.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, (str, bytes)):
                self.meter.grow("%", (left, right), {})
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _DEEPEST:
                raise RunawayError("it makes a number of more digits than any that is meant")
        elif operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(one, (str, bytes, list, tuple)):
                    self.meter.make(self.meter.size(one) * max(0, times))
        return super().call_binop(context, operator, left, right)

    def added(self, *terms: Any) -> Any:
        """The sum of a chain, from the left."""
        length = 0
        for one in terms:
            if type(one) is not str:
                return functools.reduce(self._sum, terms)
            length += len(one)
        self.meter.make(length)
        return "".join(terms)

    def _sum(self, left: Any, right: Any) -> Any:
        if isinstance(left, str) and isinstance(right, str):
            self.meter.make(len(left) + len(right))
            return left + right
        return self.meter.made(left + right)

    def joined(self, join: Callable[[tuple[Any, ...]], Any], terms: tuple[Any, ...]) -> Any:
        """What `~` makes of a chain; `join` is jinja2's own."""
        self.meter.make(sum(map(self.meter.size, terms)))
        return join(terms)

    def kept(self, value: Any) -> str:
        """What is written of a value, where it is held until more is written."""
        text = value if type(value) is str else str(self.meter.weighed(value))
        self.meter.make(len(text))
        return text

    def concat(self, parts: Iterable[str]) -> str:
        if not isinstance(parts, list):
            parts = list(self._counted(parts))
        else:
            self.meter.make(sum(map(len, parts)))
        return "".join(parts)

    def _counted(self, parts: Iterable[str]) -> Iterable[str]:
        make = self.meter.make
        for part in parts:
            make(len(part))
            yield part


class _Writer(CodeGenerator):
    """Writes a template as Python."""

    def _output_child_to_const(self, node: nodes.Expr, *about: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, *about)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.buffer is None or frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        else:
            self.write("environment.kept(")

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        if not hasattr(node, "wide"):
            super().visit_Add(node, frame)
            return
        terms: list[nodes.Expr] = []
        chain: nodes.Expr = node
        while isinstance(chain, nodes.Add):
            terms.append(chain.right)
            chain = chain.left
        self._list("environment.added(", [chain, *reversed(terms)], frame, ")")

    def _list(self, before: str, items: Iterable[nodes.Expr], frame: Frame, after: str) -> None:
        self.write(before)
        for item in items:
            self.visit(item, frame)
            self.write(", ")
        self.write(after)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        if not hasattr(node, "wide"):
            super().visit_Concat(node, frame)
            return
        name = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        if frame.eval_ctx.volatile:
            name = "(markup_join if context.eval_ctx.volatile else str_join)"
        self._list(f"environment.joined({name}, (", node.nodes, frame, "))")


_Counting.code_generator_class = _Writer


def _mark_wide(node: Any) -> None:
    """Mark the sums of each expression that is long."""
    for child in node.iter_child_nodes():
        if isinstance(child, nodes.Expr):
            if sum(1 for _ in child.find_all(nodes.Name)) > _WIDEST:
                for one in (child, *child.find_all(nodes.Expr)):
                    one.wide = True  # type: ignore[attr-defined]
        else:
            _mark_wide(child)


def _count_held(node: Any) -> None:
    """Have values that are given a name count."""
    if isinstance(node, nodes.Assign):
        node.node = _held(node.node)
    elif isinstance(node, nodes.With):
        node.values = [_held(one) for one in node.values]
    elif isinstance(node, nodes.For):
        node.iter = _held(node.iter)


def _held(value: Any) -> nodes.Expr:
    if isinstance(value, (nodes.Const, nodes.Name, nodes.Getattr, nodes.Compare, nodes.Not, nodes.Test)):
        return value
    return nodes.Filter(value, _HELD, [], [], None, None, lineno=value.lineno)


def _count_turns(node: Any) -> None:
    """Have each turn of a loop, or call of a macro, count as its body has parts; a turn that `if` leaves out as one."""
    weight = 1 + sum(1 for part in node.body for _ in part.find_all(nodes.Node))
    place = {"lineno": node.lineno}
    node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute(f"meter.step({weight})", **place), **place))
    if getattr(node, "test", None) is not None:
        node.test = nodes.And(nodes.EnvironmentAttribute("meter.step()", **place), node.test, **place)


def _metered(name: str, plain: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    """A filter that counts."""
    before = 1 if hasattr(plain, "jinja_pass_arg") else 0
    lazy = name in _LAZY

    @functools.wraps(plain)
    def metered(*values: Any, **named: Any) -> Any:
        own = values[before:]
        if lazy:
            meter.step(2 + (len(own[0]) if isinstance(own[0], Sized) else 0))
            return plain(*values, **named)
        own = tuple(list(one) if _runs_once(one) else one for one in own)
        meter.step(2)
        for one in own:
            meter.weighed(one)
        meter.grow(name, own, named)
        return meter.made(plain(*values[:before], *own, **named))

    return metered


def _runs_once(value: Any) -> bool:
    """Whether a value is made as it is read, as by the filters `map` and `select`."""
    return hasattr(value, "__next__")


def _globals(plain: Any, meter: Meter) -> dict[str, Any]:
    theirs = plain["namespace"]

    def __repr__(self: Any) -> str:
        meter.step(10)
        return str(meter.made(theirs.__repr__(self)))

    counted = type(theirs.__name__, (theirs,), {"__repr__": __repr__})
    return {"namespace": counted, "lipsum": _metered("lipsum", plain["lipsum"], meter)}

"""Jinja2's sandbox with an end: a template stops at a limit of steps and characters, before it takes time or memory.

Every call, filter, test, operator that can make a value larger, turn of a loop and printed value counts. What a value
weighs is counted before anything is made of it. Nothing is evaluated when a template is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import StrictUndefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: Calls, turns of loops and elements of values; and characters that go in or come out of these.
MAX_STEPS: Final = 200_000
MAX_CHARACTERS: Final = 20_000_000
_LARGEST_WIDTH: Final = 1_000
_MOST_BITS: Final = 4_096
#: Methods that make much of little, by a width or a format; a filter does the same within limits.
_WIDENING: Final = frozenset(
    {"center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "to_bytes", "zfill"}
)
_FILTERS_WITH_WIDTH: Final = ("batch", "center", "indent", "slice", "tojson", "wordwrap", "xmlattr")
_REFUSED_FILTERS: Final = ("pprint", "urlize")
#: Steps that a call counts for, in proportion to its time.
_CALL: Final = 50
#: What makes a format wide: a number of four digits, or one that is an argument.
_WIDE: Final = re.compile(r"%[^%a-zA-Z]*(?:[0-9]{4}|[*])")


@dataclass(slots=True)
class _Budget:
    steps: int = MAX_STEPS
    characters: int = MAX_CHARACTERS

    def spend(self, steps: int, characters: int = 0) -> None:
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0 or self.characters < 0:
            raise SecurityError(f"it makes more than {MAX_STEPS} steps or {MAX_CHARACTERS} characters")


_BUDGET: ContextVar[_Budget | None] = ContextVar("_BUDGET", default=None)


@contextmanager
def limit_rendering() -> Iterator[None]:
    """Allow what is rendered in the body so many steps and characters in all; SecurityError beyond them."""
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def _spend(steps: int, characters: int = 0) -> None:
    budget = _BUDGET.get()
    if budget is None:
        raise SecurityError("it is rendered without limits")
    budget.spend(steps, characters)


def _weigh(*values: Any) -> tuple[int, int]:
    """Spend what values hold, as often as they would be written out; return their elements and characters."""
    waiting, steps, characters = list(values), 0, 0
    while waiting:
        value = waiting.pop()
        length = len(value) if isinstance(value, str | bytes) else 0
        _spend(1, length)
        steps, characters = steps + 1, characters + length
        if isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            _spend(len(value))
            waiting += value
    return steps, characters


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend(1)
        yield value


def _joined(*values: Any) -> str:
    _weigh(*values)
    return "".join(map(str, values))


@pass_context
def _printed(_context: Context, value: Any) -> Any:
    _weigh(value)
    return value


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if any(hasattr(function, attribute) for attribute in ("jinja_pass_arg",)) else 0

    def limited(*arguments: Any, **named: Any) -> Any:
        given = (*arguments[first:], *named.values())
        if name in _FILTERS_WITH_WIDTH:
            _check_widths(given[1:])
        steps, characters = _weigh(*given)
        match name:
            case "replace" | "join" | "indent" | "batch" | "slice":  # the second for each of the first
                longest = max((len(one) for one in given[1:] if isinstance(one, str)), default=0)
                _spend(0, (steps + characters) * (longest or (_width(given[1:]) if name != "join" else 0)))
            case "format" if _WIDE.search(str(given[0])):
                raise SecurityError(f"a width is more than {_LARGEST_WIDTH}")
            case "center" | "wordwrap" | "tojson":
                _spend(0, steps * _LARGEST_WIDTH)
            case "sum":
                if any(isinstance(one, list | tuple | str) for one in given[1:]):
                    raise SecurityError("the filter sum adds numbers alone")
            case _:
                pass
        result = function(*arguments, **named)
        return _counted(result) if isinstance(result, Iterator) else result

    for attribute in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(function, attribute):
            setattr(limited, attribute, getattr(function, attribute))
    return limited


def _check_widths(given: Iterable[Any]) -> None:
    if any(isinstance(one, int) and abs(one) > _LARGEST_WIDTH for one in given):
        raise SecurityError(f"a width is more than {_LARGEST_WIDTH}")


def _width(given: Iterable[Any]) -> int:
    return max((abs(one) for one in given if isinstance(one, int)), default=1)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates that stop at a limit; they are to be rendered within `bounded`."""

    intercepted_binops = frozenset({"*", "**", "+", "%", "//", "-", "/"})

    def __init__(self) -> None:
        """Take nothing from outside; what a template makes is text for a program, not a page."""
        super().__init__(
            undefined=StrictUndefined,
            autoescape=False,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            optimized=False,
            finalize=_printed,
        )
        del self.globals["lipsum"]
        for name in _REFUSED_FILTERS:
            del self.filters[name]
        self.filters = {name: _filter(name, function) for name, function in self.filters.items()}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return what an operator makes of two values, if that is small enough."""
        sizes = [len(one) if isinstance(one, str | bytes | list | tuple) else None for one in (left, right)]
        _spend(1)
        if operator == "%" and sizes[0] is not None:
            raise SecurityError("a text can't be formatted, join its parts by ~")
        if operator in {"*", "**"} and sizes == [None, None]:
            _check_power(operator, left, right)
        elif operator == "*":
            size, times = (sizes[0], right) if sizes[0] is not None else (sizes[1], left)
            if isinstance(times, int) and size is not None:
                _spend(0 if isinstance(left if sizes[0] is not None else right, str) else size * max(times, 0),
                       size * max(times, 0))  # fmt: skip
        elif operator == "+":
            total = sum(size or 0 for size in sizes)
            _spend(0 if isinstance(left, str) else total, total)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template names, and count it."""
        _spend(_CALL)
        _weigh(*args, *kwargs.values(), *([obj.__self__] if isinstance(getattr(obj, "__self__", None), str) else []))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> None:
        """Leave a text's own `format` to `is_safe_attribute`, which refuses it."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may look at an attribute: at none that makes much of little."""
        if isinstance(obj, str | bytes | int) and attr in _WIDENING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        for loop in source.find_all(nodes.For):
            loop.iter = _calling("_counted", loop.iter)
        _replace_joins(source)
        return super()._generate(source, name, filename, defer_init)


def _check_power(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MOST_BITS:
            raise SecurityError(f"a number has more than {_MOST_BITS} bits")


def _calling(function: str, *arguments: Any) -> nodes.Expr:
    return nodes.Call(nodes.ImportedName(f"{__name__}.{function}"), list(arguments), [], None, None)


def _replace_joins(node: nodes.Node) -> None:
    """Have `~` count what it joins."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _replace_joins(value)
            if isinstance(value, nodes.Concat):
                setattr(node, name, _calling("_joined", *value.nodes))
        elif isinstance(value, list):
            for index, one in enumerate(value):
                if isinstance(one, nodes.Node):
                    _replace_joins(one)
                if isinstance(one, nodes.Concat):
                    value[index] = _calling("_joined", *one.nodes)

"""A Jinja2 sandbox that stops rendering before it takes too much time or memory.

Every call, filter, test, loop iteration, printed value, and operator that can enlarge a value counts. The size of a
value is counted before it is used. Nothing is evaluated when a template is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from jinja2 import StrictUndefined, TemplateError, meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: The limits of calls, loop iterations and elements of values, and of their input and output characters.
MAX_STEPS: Final = 200_000
MAX_CHARACTERS: Final = 20_000_000
_LARGEST_WIDTH: Final = 1_000
_MOST_BITS: Final = 4_096
#: Methods that can produce a large value from a small one; filters do the same within limits.
_WIDENING: Final = frozenset(
    {"center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "to_bytes", "zfill"}
)
_FILTERS_WITH_WIDTH: Final = ("batch", "center", "indent", "slice", "tojson", "wordwrap", "xmlattr")
_REMOVED_FILTERS: Final = ("pprint", "urlize")
#: The steps of a call, proportional to its time.
_CALL: Final = 50
#: A format with a width of four or more digits, or a width from an argument.
_WIDE: Final = re.compile(r"%[^%a-zA-Z]*(?:[0-9]{4}|[*])")


@dataclass(slots=True)
class _Budget:
    steps: int = MAX_STEPS
    characters: int = MAX_CHARACTERS

    def spend(self, steps: int, characters: int = 0) -> None:
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0 or self.characters < 0:
            raise SecurityError(f"rendering exceeds {MAX_STEPS} steps or {MAX_CHARACTERS} characters")


_BUDGET: ContextVar[_Budget | None] = ContextVar("_BUDGET", default=None)


@contextmanager
def limit_rendering() -> Iterator[None]:
    """Limit all rendering within the body; raise SecurityError beyond the limit."""
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def _spend(steps: int, characters: int = 0) -> None:
    budget = _BUDGET.get()
    if budget is None:
        raise SecurityError("rendering without limits")
    budget.spend(steps, characters)


def _weigh(*values: Any) -> tuple[int, int]:
    """Count the elements and characters of values, including repetitions."""
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
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    def limited(*arguments: Any, **named: Any) -> Any:
        given = (*arguments[first:], *named.values())
        if name in _FILTERS_WITH_WIDTH:
            _check_widths(given[1:])
        steps, characters = _weigh(*given)
        match name:
            case "replace" | "join" | "indent" | "batch" | "slice":  # the other arguments are repeated
                longest = max((len(each) for each in given[1:] if isinstance(each, str)), default=0)
                _spend(0, (steps + characters) * (longest or (_width(given[1:]) if name != "join" else 0)))
            case "format" if _WIDE.search(str(given[0])):
                raise SecurityError(f"a width is more than {_LARGEST_WIDTH}")
            case "center" | "wordwrap" | "tojson":
                _spend(0, steps * _LARGEST_WIDTH)
            case "sum":
                if any(isinstance(each, list | tuple | str) for each in given[1:]):
                    raise SecurityError("the filter sum adds only numbers")
            case _:
                pass
        result = function(*arguments, **named)
        return _counted(result) if isinstance(result, Iterator) else result

    for attribute in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(function, attribute):
            setattr(limited, attribute, getattr(function, attribute))
    return limited


def _check_widths(given: Iterable[Any]) -> None:
    if any(isinstance(each, int) and abs(each) > _LARGEST_WIDTH for each in given):
        raise SecurityError(f"a width is more than {_LARGEST_WIDTH}")


def _width(given: Iterable[Any]) -> int:
    return max((abs(each) for each in given if isinstance(each, int)), default=1)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates that must be rendered within `limit_rendering`."""

    error: ClassVar = TemplateError
    """The error type of invalid templates and of rendering."""
    limit_rendering = staticmethod(limit_rendering)
    intercepted_binops = frozenset({"*", "**", "+", "%", "//", "-", "/"})

    def find_references(self, text: str) -> tuple[set[str], list[str | None]]:
        """Return a template's undeclared variables, and the templates that it names."""
        tree = self.parse(text)
        return meta.find_undeclared_variables(tree), list(meta.find_referenced_templates(tree))

    def __init__(self) -> None:
        """Create an environment for plain text, without access to files."""
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
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.filters = {name: _filter(name, function) for name, function in self.filters.items()}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an operator, unless it is too large."""
        sizes = [len(each) if isinstance(each, str | bytes | list | tuple) else None for each in (left, right)]
        _spend(1)
        if operator == "%" and sizes[0] is not None:
            raise SecurityError("formatting with % is not allowed, join the parts with ~")
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
        """Call a function in a template, and count the call."""
        _spend(_CALL)
        _weigh(*args, *kwargs.values(), *([obj.__self__] if isinstance(getattr(obj, "__self__", None), str) else []))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> None:
        """Return None: `is_safe_attribute` rejects `str.format`."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may access an attribute, which can't enlarge a value."""
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
    """Replace `~` with a function that counts its operands."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _replace_joins(value)
            if isinstance(value, nodes.Concat):
                setattr(node, name, _calling("_joined", *value.nodes))
        elif isinstance(value, list):
            for index, each in enumerate(value):
                if isinstance(each, nodes.Node):
                    _replace_joins(each)
                if isinstance(each, nodes.Concat):
                    value[index] = _calling("_joined", *each.nodes)

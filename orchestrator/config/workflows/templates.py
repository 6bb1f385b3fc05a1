"""The templates of prompts and the conditions of phases: compiled when a file is read, so that mistakes have a place.

Both are Jinja2 in a sandbox: they can't call what changes a value, nor reach into Python, and end at a limit
(`config.workflows.template_sandbox`). Nothing that an agent said is ever compiled.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from orchestrator.config.source.problems import KnownWords, quote_text

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.environment import TemplateExpression

    from orchestrator.config.workflows.template_sandbox import BoundedEnvironment

#: What a template can name: see docs/configuration.md, and `engine.phases.prompts`, which gives each its value.
TEMPLATE_NAMES: Final = (
    "task",
    "phase",
    "given",
    "results",
    "feedback",
    "hand_over",
    "owns",
    "base",
    "diff",
    "round",
    "data",
)
#: The names of the templates that are there already: for phases of a kind, for those of no such kind, and their end.
BUILTIN_TEMPLATES: Final = ("scout", "plan", "build", "test", "deploy", "review", "phase")
DEFAULT_TEMPLATE: Final = "phase"
SUFFIX: Final = ".md.j2"
_FOLDER: Final = "templates"


@functools.cache
def read_builtin_template(name: str) -> str:
    """Return the text of one of the templates that are there already."""
    return read_builtin_file(f"{name}{SUFFIX}")


def read_builtin_file(name: str) -> str:
    """Return the text of a file of the folder with the templates that are there already."""
    return resources.files("orchestrator.config").joinpath(_FOLDER, name).read_text(encoding="utf-8")


def template_for(phase: str, kind: str | None) -> str:
    """Return the name of the template of a phase that brings none: that of its kind, or of its name, or of any."""
    return next((name for name in (kind, phase) if name in BUILTIN_TEMPLATES), DEFAULT_TEMPLATE)


@functools.cache
def environment() -> BoundedEnvironment:
    """Return what compiles templates and conditions: a name that is not there is an error, not an empty text."""
    from orchestrator.config.workflows.template_sandbox import BoundedEnvironment  # noqa: PLC0415  only workflows need Jinja2

    return BoundedEnvironment()


@functools.lru_cache(maxsize=256)
def compile_template(text: str) -> Template:
    """Return a template; ValueError, with the remedy, for what is none."""
    from jinja2 import TemplateError, meta  # noqa: PLC0415  the same

    try:
        tree = environment().parse(text)
        unknown = sorted(meta.find_undeclared_variables(tree) - set(TEMPLATE_NAMES) - set(environment().globals))
        referred = list(meta.find_referenced_templates(tree))
        template = environment().from_string(text)
    except (TemplateError, RecursionError, MemoryError) as error:
        raise ValueError(f"the template can't be read, {_where(error)}{_said(error)}: {_REMEDY}") from error
    if unknown:
        instead = KnownWords(TEMPLATE_NAMES, "the names in a template").suggest(unknown[0])
        raise ValueError(f"the template names {quote_text(unknown[0])}, which there is not: {instead}")
    if referred:
        raise ValueError("the template includes another one: write here what that says")
    return template


@functools.lru_cache(maxsize=256)
def compile_condition(text: str) -> TemplateExpression:
    """Return a condition; ValueError, with the remedy, for what is none."""
    from jinja2 import TemplateError  # noqa: PLC0415  the same

    try:
        # A name that is not there is to be an error when it is asked for the truth, too.
        return environment().compile_expression(text, undefined_to_none=False)
    except (TemplateError, RecursionError, MemoryError) as error:
        remedy = "write an expression over values, as in `plan.tasks | length > 1`"
        raise ValueError(f"the condition can't be read, {_said(error)}: {remedy}") from error


_REMEDY: Final = "write it as Jinja2 has it, as in {{ data(given.plan) }} or {% if feedback %} … {% endif %}"


def _where(error: Exception) -> str:
    line: Any = getattr(error, "lineno", None)
    return "" if line is None else f"line {line} of it: "


def _said(error: Exception) -> str:
    # What stands before the first colon is told as what is wrong, and what stands behind as the remedy.
    return " ".join((str(error) or type(error).__name__).replace(":", ",").split()).rstrip(".")

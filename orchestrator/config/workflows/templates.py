"""Compile phases' templates and conditions when a file is read.

Errors thus have a position. Both are Jinja2 in a sandbox: they can't change values or access Python internals, and
rendering is limited (`config.workflows.template_sandbox`). Output of agents is never compiled.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from orchestrator.domain.wording import quote_text, suggest
from orchestrator.errors import InvalidValue

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.environment import TemplateExpression

    from orchestrator.config.workflows.template_sandbox import BoundedEnvironment

#: The variables of a template, see docs/workflows.md; `engine.phases.prompts` sets their values.
TEMPLATE_NAMES: Final = (
    "task",
    "phase",
    "inputs",
    "results",
    "feedback",
    "submit_handoff",
    "owns",
    "base",
    "diff",
    "round",
    "data",
)
#: The built-in templates: one per kind of phase, and one for all other phases.
BUILTIN_TEMPLATES: Final = ("scout", "plan", "build", "test", "deploy", "review", "phase")
DEFAULT_TEMPLATE: Final = "phase"
SUFFIX: Final = ".md.j2"
_FOLDER: Final = "templates"


@functools.cache
def read_builtin_template(name: str) -> str:
    """Return the text of a built-in template."""
    return read_builtin_file(f"{name}{SUFFIX}")


def read_builtin_file(name: str) -> str:
    """Return the text of a file in the folder of built-in templates."""
    return resources.files("orchestrator.config").joinpath(_FOLDER, name).read_text(encoding="utf-8")


def template_for(phase: str, kind: str | None) -> str:
    """Return a phase's default template: for its kind, its name, or any phase."""
    return next((name for name in (kind, phase) if name in BUILTIN_TEMPLATES), DEFAULT_TEMPLATE)


@functools.cache
def environment() -> BoundedEnvironment:
    """Return the Jinja2 environment, in which an undefined variable is an error."""
    from orchestrator.config.workflows.template_sandbox import BoundedEnvironment  # noqa: PLC0415  only workflows need Jinja2

    return BoundedEnvironment()


@functools.lru_cache(maxsize=256)
def compile_template(text: str) -> Template:
    """Return a compiled template; raise InvalidValue for an invalid one."""
    try:
        names, referred = environment().find_references(text)
        unknown = sorted(names - set(TEMPLATE_NAMES) - set(environment().globals))
        template = environment().from_string(text)
    except (environment().error, RecursionError, MemoryError) as error:
        raise InvalidValue(f"invalid template: {_describe(error)}", _REMEDY) from error
    if unknown:
        remedy = suggest(unknown[0], TEMPLATE_NAMES, "the names in a template")
        raise InvalidValue(f"unknown name {quote_text(unknown[0])} in the template", remedy)
    if referred:
        raise InvalidValue("the template includes another one", "copy its content here")
    return template


@functools.lru_cache(maxsize=256)
def compile_condition(text: str) -> TemplateExpression:
    """Return a compiled condition; raise InvalidValue for an invalid one."""
    try:
        # An undefined variable must be an error even as a truth value.
        return environment().compile_expression(text, undefined_to_none=False)
    except (environment().error, RecursionError, MemoryError) as error:
        remedy = "use an expression over values, such as `plan.tasks | length > 1`"
        raise InvalidValue(f"invalid condition: {_describe(error)}", remedy) from error


_REMEDY: Final = "use Jinja2 syntax, such as {{ data(inputs.plan) }} or {% if feedback %} … {% endif %}"


def _describe(error: Exception) -> str:
    line: Any = getattr(error, "lineno", None)
    message = " ".join((str(error) or type(error).__name__).split()).rstrip(".")
    return message if line is None else f"line {line}: {message}"

"""Models and rules of the built-in kinds of handoffs.

Handoffs are written by models, so the models here are lenient: they accept a single item for a list, and common aliases
of fields. Required fields remain required.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from orchestrator.domain.scheduling.dependencies import find_cycles
from orchestrator.domain.workflow.violations import HandoffContext, Violation

#: Limits of a handoff: characters per text, and items per list or mapping.
MAX_TEXT_CHARS: Final = 20_000
MAX_ITEMS: Final = 500
MAX_PLANNED_TASKS, MAX_ARTIFACTS, MAX_FINDINGS = 200, 5_000, 200


def _text(value: Any) -> Any:
    """Accept a number or a list of lines as text."""
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "\n".join(value)
    return value


def _items(value: Any) -> list[Any]:
    """Accept a single item as a list, and None or an empty string as an empty list."""
    if value is None or value == "":
        return []
    items = value if isinstance(value, list | tuple) else [value]
    return [str(one) if isinstance(one, bool | int | float) else one for one in items if one is not None]


def _capped(items: list[Any]) -> tuple[Any, ...]:
    if len(items) > MAX_ITEMS:
        raise ValueError(f"{len(items)} items: use at most {MAX_ITEMS}")
    for number, item in enumerate(items):
        if isinstance(item, str) and len(item) > MAX_TEXT_CHARS:
            raise ValueError(f"item {number} has {len(item)} characters: use at most {MAX_TEXT_CHARS}")
    return tuple(items)


def _mapping_or_items(value: Any) -> Any:
    if isinstance(value, dict):
        _capped(list(value.values()))
        return value
    return _capped(_items(value))


def _mapping_or_text(value: Any) -> Any:
    value = value if isinstance(value, dict) else _text(value)
    if not isinstance(value, str | dict):
        raise ValueError("a list with values other than text: use text or an object")  # noqa: TRY004  pydantic handles only ValueError
    _capped(list(value.values()) if isinstance(value, dict) else [value])
    return value


#: Texts that mean an empty list.
_NONE: Final = frozenset({"", "-", "none", "n/a", "null"})
_NAMING: Final = ("id", "path", "name")


def parse_names(value: Any) -> list[Any]:
    """Accept `a, b` as two names, and an object as its name."""
    items = re.split(r"[,\n]", value) if isinstance(value, str) else _items(value)
    named = [next((one[key] for key in _NAMING if key in one), one) if isinstance(one, dict) else one for one in items]
    names = [one.strip() if isinstance(one, str) else one for one in named]
    return [one for one in names if not (isinstance(one, str) and one.lower() in _NONE)]


_ITEM: Final[dict[str, Any]] = {"type": ["string", "object"]}
_LIST: Final[dict[str, Any]] = {"type": "array", "items": _ITEM, "maxItems": MAX_ITEMS}

Text = Annotated[str, BeforeValidator(_text), Field(max_length=MAX_TEXT_CHARS)]
Name = Annotated[str, BeforeValidator(_text), Field(min_length=1, max_length=200)]
Names = Annotated[tuple[Name, ...], BeforeValidator(parse_names), Field(max_length=MAX_ITEMS)]
#: Texts or objects.
Items = Annotated[tuple[Any, ...], BeforeValidator(lambda value: _capped(_items(value))), WithJsonSchema(_LIST)]
ItemsOrMapping = Annotated[
    Any, BeforeValidator(_mapping_or_items), WithJsonSchema({**_LIST, "type": ["array", "object"]})
]
TextOrMapping = Annotated[Any, BeforeValidator(_mapping_or_text), WithJsonSchema(_ITEM)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True, populate_by_name=True)


def _also(name: str, *others: str) -> AliasChoices:
    return AliasChoices(name, *others)


class Scout(_Model):
    """The result of a scout phase: requirements, constraints, and findings."""

    scout_findings: Items = Field(
        validation_alias=_also("scout_findings", "findings", "observations", "results"),
        description="Relevant context: files, functions, conventions of the code.",
    )
    requirements: Items = Field(default=(), description="Conditions that the finished task must meet.")
    constraints: Items = Field(default=(), description="Limits of the solution, and things that must not change.")
    priorities: Items = Field(
        default=(), validation_alias=_also("priorities", "priority_order"), description="The work to do first."
    )
    risks: Items = Field(default=(), description="Possible problems.")
    opportunities: Items = Field(default=(), description="Ways to simplify the task.")
    approach: Text = Field(
        default="",
        validation_alias=_also("approach", "recommended_approach"),
        description="The recommended approach, if it is clear.",
    )
    summary: Text = Field(default="", description="A few sentences.")


class PlannedTask(_Model):
    """One step of a plan, which can become a task of the run."""

    id: Name = Field(validation_alias=_also("id", "task_id", "name"), description="Short and unique.")
    prompt: Annotated[Text, Field(min_length=1)] = Field(
        validation_alias=_also("prompt", "description", "details", "title", "task", "what"),
        description="Complete instructions for a reader who sees nothing else.",
    )
    dependencies: Names = Field(
        default=(),
        validation_alias=_also("dependencies", "depends_on", "needs", "requires"),
        description="The ids of the tasks that must be done first.",
    )
    owns: Names = Field(
        default=(),
        validation_alias=_also("owns", "paths", "files", "owned_paths"),
        description="The paths that it changes; patterns such as `src/*.py` are allowed.",
    )


def _tasks(value: Any) -> Any:
    """Accept `{id: prompt}` and `{id: {…}}` as a list of tasks, and text as a task."""
    if isinstance(value, dict):
        return [{"id": key, **(one if isinstance(one, dict) else {"prompt": one})} for key, one in value.items()]
    if isinstance(value, list):
        return [{"id": f"t{n}", "prompt": one} if isinstance(one, str) else one for n, one in enumerate(value, 1)]
    return value


class Plan(_Model):
    """The result of a plan phase: tasks, their order, timeline and resources."""

    tasks: Annotated[tuple[PlannedTask, ...], BeforeValidator(_tasks)] = Field(
        validation_alias=_also("tasks", "steps"), min_length=1, max_length=MAX_PLANNED_TASKS
    )
    dependencies: ItemsOrMapping = Field(
        description="Dependencies of the plan; as a mapping, the ids of the tasks that must be done before each task."
    )
    timeline: ItemsOrMapping = Field(
        validation_alias=_also("timeline", "schedule", "phases"), description="The order and timing of the work."
    )
    resources: ItemsOrMapping = Field(description="Required tools, packages, files and people.")
    specifications: ItemsOrMapping = Field(
        default=(), validation_alias=_also("specifications", "specification", "specs", "spec")
    )
    summary: Text = Field(default="", description="A few sentences.")


def _path(value: Any) -> Any:
    return value.strip().removeprefix("./") if isinstance(value, str) else value


def normalize_checksum(value: Any) -> Any:
    """Accept hexadecimal digits in either case, with or without the prefix `sha256:`."""
    return value.strip().lower().removeprefix("sha256:") if isinstance(value, str) else value


class Artifact(_Model):
    """A file that was built."""

    path: Annotated[str, BeforeValidator(_path), Field(min_length=1, max_length=4096)] = Field(
        validation_alias=_also("path", "file", "name"), description="Relative to the root of the repository, with `/`."
    )
    checksum: Annotated[
        str,
        BeforeValidator(normalize_checksum),
        Field(
            pattern=r"^[0-9a-f]{64}$",
            validation_alias=_also("checksum", "sha256", "digest", "hash"),
            description="The SHA-256 of the file in hexadecimal digits, as `sha256sum` prints it.",
        ),
    ]


def _artifacts(value: Any) -> Any:
    """Accept `{path: checksum}`, or a single artifact, as a list of artifacts."""
    if isinstance(value, dict):
        if {"path", "file"} & value.keys():
            return [value]
        return [{"path": path, "checksum": checksum} for path, checksum in value.items()]
    return _items(value)


class Build(_Model):
    """The result of a build phase: files and their metadata."""

    artifacts: Annotated[tuple[Artifact, ...], BeforeValidator(_artifacts)] = Field(
        validation_alias=_also("artifacts", "files"),
        max_length=MAX_ARTIFACTS,
        description="The created or changed files that later phases rely on; may be empty.",
    )
    implementation: ItemsOrMapping = Field(
        default=(),
        validation_alias=_also("implementation", "changes", "implemented"),
        description="The changes made, with file locations.",
    )
    test_cases: Items = Field(default=(), validation_alias=_also("test_cases", "tests"))
    coverage_requirements: ItemsOrMapping = Field(
        default=(), validation_alias=_also("coverage_requirements", "coverage")
    )
    configuration: ItemsOrMapping = Field(default=(), validation_alias=_also("configuration", "config"))
    environment: ItemsOrMapping = Field(default=(), validation_alias=_also("environment", "env"))
    summary: Text = Field(default="", description="A few sentences.")


_GOOD: Final = frozenset({"pass", "passed", "ok", "success", "succeeded", "successful", "done", "green", "deployed"})
_BAD: Final = frozenset({"fail", "failed", "failure", "error", "red", "unsuccessful", "rolled_back"})


def _outcome(value: Any) -> Any:
    if isinstance(value, str):
        word = value.strip().lower()
        return True if word in _GOOD else False if word in _BAD else value
    return value


Success = Annotated[bool, BeforeValidator(_outcome)]


class Test(_Model):
    """The result of a test phase."""

    passed: Success = Field(validation_alias=_also("passed", "success", "status", "verdict", "result"))
    failures: Items = Field(default=(), validation_alias=_also("failures", "failed", "errors"))
    test_cases: Items = Field(
        default=(), validation_alias=_also("test_cases", "tests"), description="The tested cases."
    )
    coverage: TextOrMapping = Field(default="", validation_alias=_also("coverage", "coverage_report"))
    summary: Text = Field(default="", description="A few sentences.")


class Deploy(_Model):
    """The result of a deploy phase."""

    deployed: Success = Field(validation_alias=_also("deployed", "success", "status", "result"))
    environment: TextOrMapping = Field(default="", validation_alias=_also("environment", "env", "target"))
    configuration: TextOrMapping = Field(default="", validation_alias=_also("configuration", "config"))
    artifacts: Items = Field(default=(), description="The deployed artifacts: paths, or objects with a path.")
    summary: Text = Field(default="", description="A few sentences.")


_VERDICTS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("approved", "accept", "accepted", "lgtm", "pass", "passed", "ok", "yes"), "approve"),
    **dict.fromkeys(
        ("rejected", "request_changes", "changes_requested", "needs_changes", "needs_work", "fail", "failed", "no"),
        "reject",
    ),
}
_SEVERITIES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("blocker", "blocking", "fatal", "severe"), "critical"),
    **dict.fromkeys(("high", "error", "important", "bug"), "major"),
    **dict.fromkeys(("medium", "moderate", "warning", "low", "warn"), "minor"),
    **dict.fromkeys(("nit", "nitpick", "note", "style", "suggestion", "trivial", "informational"), "info"),
}
_LINE: Final = re.compile(r"\s*[Ll]?([0-9]{1,9})(?![0-9])")


def _word(value: Any) -> Any:
    return re.sub(r"[\s-]+", "_", value.strip().lower()) if isinstance(value, str) else value


def _verdict(value: Any) -> Any:
    word = _word({True: "approve", False: "reject"}.get(value, value) if isinstance(value, bool) else value)
    return _VERDICTS.get(word, word) if isinstance(word, str) else word


def _severity(value: Any) -> Any:
    word = _word(value)
    known = isinstance(word, str) and word in {"critical", "major", "minor", "info"}
    return word if known else _SEVERITIES.get(word, "major") if isinstance(word, str) else "major"


def _line(value: Any) -> Any:
    """Accept the first line of a range such as `12-15`; return None if invalid."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, str):
        found = _LINE.match(value)
        value = int(found[1]) if found else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9 else None


class Finding(_Model):
    """One finding of a review."""

    path: Annotated[str | None, Field(max_length=4096)] = Field(
        default=None,
        validation_alias=_also("path", "file", "filename"),
        description="Relative to the root of the repository.",
    )
    line: Annotated[int | None, BeforeValidator(_line)] = Field(default=None, description="Counted from 1.")
    severity: Annotated[Literal["critical", "major", "minor", "info"], BeforeValidator(_severity)] = "major"
    message: Annotated[Text, Field(min_length=1)] = Field(
        validation_alias=_also("message", "description", "comment", "text", "issue", "title"),
        description="The problem, and how to fix it.",
    )


def _findings(value: Any) -> list[Any]:
    """Accept text as a finding without a path."""
    return [{"message": one} if isinstance(one, str) else one for one in _items(value)]


class Review(_Model):
    """The result of a review phase: a verdict and findings."""

    verdict: Annotated[Literal["approve", "reject"], BeforeValidator(_verdict)] = Field(
        validation_alias=_also("verdict", "decision", "approved")
    )
    findings: Annotated[tuple[Finding, ...], BeforeValidator(_findings)] = Field(
        default=(), validation_alias=_also("findings", "issues", "comments"), max_length=MAX_FINDINGS
    )
    summary: Text = Field(default="", description="A few sentences.")


def check_plan(plan: Plan, _context: HandoffContext) -> Iterable[Violation]:
    """Yield violations of the ids and dependencies of a plan's tasks."""
    ids = [task.id for task in plan.tasks]
    known = set(ids)
    for index, task in enumerate(plan.tasks):
        at = f"tasks[{index}]"
        if task.id in ids[:index]:
            message = f"another task has the id {task.id!r}"
            yield Violation("plan.ids", f"{at}.id", message, "give each task a unique id")
        for number, name in enumerate(task.dependencies):
            if name not in known:
                yield _unknown(f"{at}.dependencies[{number}]", name, "use ids of tasks in the plan")
    if isinstance(plan.dependencies, dict) and known & plan.dependencies.keys():
        for key, value in plan.dependencies.items():
            for name in [key, *map(str, parse_names(value))]:
                if name not in known:
                    remedy = "list only tasks of the plan here, and everything else under `resources`"
                    yield _unknown(f"dependencies.{key[:200]}", name, remedy)
    for cycle in find_cycles(collect_needs(plan))[:1]:
        message = f"dependency cycle: {' → '.join([*cycle, cycle[0]])}"
        yield Violation("plan.circle", "tasks", message, "remove one of these dependencies")


def _unknown(location: str, name: str, remedy: str) -> Violation:
    return Violation("plan.dependencies", location, f"no task has the id {name[:200]!r}", remedy)


def collect_needs(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return each task's dependencies, from its entry and the plan's `dependencies`."""
    needs = {task.id: dict.fromkeys(task.dependencies) for task in plan.tasks}
    if isinstance(plan.dependencies, dict):
        for key, value in plan.dependencies.items():
            if key in needs:
                needs[key] |= dict.fromkeys(name for name in map(str, parse_names(value)) if name in needs)
    return {name: tuple(one) for name, one in needs.items()}


def check_build(build: Build, context: HandoffContext) -> Iterable[Violation]:
    """Yield artifacts that do not match the files in the built tree."""
    for index, artifact in enumerate(build.artifacts):
        if not _is_inside(artifact.path):
            message = f"{artifact.path[:200]!r} is not a path in the repository"
            yield Violation(
                "build.path",
                f"artifacts[{index}].path",
                message,
                "use a path relative to the root of the repository, with `/`",
            )
        elif artifact.path in context.checksums:
            actual = context.checksums[artifact.path]
            if actual is None:
                message = f"{artifact.path!r} is not a file in the built tree"
                remedy = "list existing files that git does not ignore"
                yield Violation("build.artifacts", f"artifacts[{index}].path", message, remedy)
            elif normalize_checksum(actual) != artifact.checksum:
                message = f"wrong checksum of {artifact.path!r} (SHA-256: {normalize_checksum(actual)})"
                remedy = "use the checksum of the final file"
                yield Violation("build.checksum", f"artifacts[{index}].checksum", message, remedy)


def _is_inside(path: str) -> bool:
    parts = path.split("/")
    return not (path.startswith("/") or "\\" in path or "\0" in path or {"", ".", ".."} & set(parts))


def find_artifact_paths(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the artifact paths of a build handoff; empty if it is invalid."""
    try:
        build = Build.model_validate(dict(data))
    except (ValidationError, RecursionError):
        return ()  # the check reports it
    return tuple(dict.fromkeys(one.path for one in build.artifacts if _is_inside(one.path)))


def check_review(review: Review, _context: HandoffContext) -> Iterable[Violation]:
    """Yield a violation for a rejection without findings."""
    if review.verdict == "reject" and not review.findings:
        message = "the work is rejected without findings"
        yield Violation("review.findings", "findings", message, "list the problems, with path, line and message")

"""What the kinds of handoffs that come with it hold, and the rules for it. Pure.

What is asked for is written by programs that mean well: one thing is taken where a list is wanted, and other usual
names of a field are known. What is required is required.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from orchestrator.domain.workflow.violations import HandoffFacts, Violation

#: Characters of one text, items of one list, and entries of one mapping in what is handed over.
MAX_TEXT_CHARS: Final = 20_000
MAX_ITEMS: Final = 500
MAX_PLANNED_TASKS, MAX_ARTIFACTS, MAX_FINDINGS = 200, 5_000, 200


def _text(value: Any) -> Any:
    """Take a number or a list of lines where a text is meant."""
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "\n".join(value)
    return value


def _items(value: Any) -> list[Any]:
    """Take one thing where a list of them is meant, and nothing for an empty one."""
    if value is None or value == "":
        return []
    items = value if isinstance(value, list | tuple) else [value]
    return [str(one) if isinstance(one, bool | int | float) else one for one in items if one is not None]


def _capped(items: list[Any]) -> tuple[Any, ...]:
    if len(items) > MAX_ITEMS:
        raise ValueError(f"it has {len(items)} items: keep it to {MAX_ITEMS} at most")
    for place, one in enumerate(items):
        if isinstance(one, str) and len(one) > MAX_TEXT_CHARS:
            raise ValueError(f"item {place} has {len(one)} characters: keep it to {MAX_TEXT_CHARS} at most")
    return tuple(items)


def _mapping_or_items(value: Any) -> Any:
    if isinstance(value, dict):
        _capped(list(value.values()))
        return value
    return _capped(_items(value))


def _mapping_or_text(value: Any) -> Any:
    value = value if isinstance(value, dict) else _text(value)
    if not isinstance(value, str | dict):
        raise ValueError("it is a list of more than lines: write a text or an object")
    _capped(list(value.values()) if isinstance(value, dict) else [value])
    return value


#: What says that there are none.
_NONE: Final = frozenset({"", "-", "none", "n/a", "null"})
_NAMING: Final = ("id", "path", "name")


def parse_names(value: Any) -> list[Any]:
    """Take `a, b` for two names, and an object for what it is called."""
    items = re.split(r"[,\n]", value) if isinstance(value, str) else _items(value)
    called = [next((one[key] for key in _NAMING if key in one), one) if isinstance(one, dict) else one for one in items]
    names = [one.strip() if isinstance(one, str) else one for one in called]
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
    """What looking around found: what is wanted, what limits it, and what there is."""

    scout_findings: Items = Field(
        validation_alias=_also("scout_findings", "findings", "observations", "results"),
        description="What there is that matters to the task: files, functions, habits of the code.",
    )
    requirements: Items = Field(default=(), description="What has to be true in the end.")
    constraints: Items = Field(default=(), description="What must not change, or limits how it can be done.")
    priorities: Items = Field(
        default=(), validation_alias=_also("priorities", "priority_order"), description="What comes first."
    )
    risks: Items = Field(default=(), description="What may go wrong.")
    opportunities: Items = Field(default=(), description="What makes it easier than it looks.")
    approach: Text = Field(
        default="",
        validation_alias=_also("approach", "recommended_approach"),
        description="How it should be done, if that is clear.",
    )
    summary: Text = Field(default="", description="In a few sentences.")


class PlannedTask(_Model):
    """One piece of a plan, which can become a task of its own."""

    id: Name = Field(validation_alias=_also("id", "task_id", "name"), description="Short, and no other's.")
    prompt: Annotated[Text, Field(min_length=1)] = Field(
        validation_alias=_also("prompt", "description", "details", "title", "task", "what"),
        description="What to do, complete enough for somebody who sees nothing but this.",
    )
    dependencies: Names = Field(
        default=(),
        validation_alias=_also("dependencies", "depends_on", "needs", "requires"),
        description="The ids of the tasks that must be done before.",
    )
    owns: Names = Field(
        default=(),
        validation_alias=_also("owns", "paths", "files", "owned_paths"),
        description="The paths that it changes; patterns as `src/*.py` are possible.",
    )


def _tasks(value: Any) -> Any:
    """Take `{id: what}` and `{id: {…}}` for a list of tasks, and a bare text for a task that says what."""
    if isinstance(value, dict):
        return [{"id": key, **(one if isinstance(one, dict) else {"prompt": one})} for key, one in value.items()]
    if isinstance(value, list):
        return [{"id": f"t{n}", "prompt": one} if isinstance(one, str) else one for n, one in enumerate(value, 1)]
    return value


class Plan(_Model):
    """What is to be done, in which pieces and order, by when and with what."""

    tasks: Annotated[tuple[PlannedTask, ...], BeforeValidator(_tasks)] = Field(
        validation_alias=_also("tasks", "steps"), min_length=1, max_length=MAX_PLANNED_TASKS
    )
    dependencies: ItemsOrMapping = Field(
        description="What it depends on; as a mapping by task, the ids of the tasks that must be done before."
    )
    timeline: ItemsOrMapping = Field(
        validation_alias=_also("timeline", "schedule", "phases"), description="What comes when."
    )
    resources: ItemsOrMapping = Field(description="What it takes: tools, packages, files, people.")
    specifications: ItemsOrMapping = Field(
        default=(), validation_alias=_also("specifications", "specification", "specs", "spec")
    )
    summary: Text = Field(default="", description="In a few sentences.")


def _path(value: Any) -> Any:
    return value.strip().removeprefix("./") if isinstance(value, str) else value


def normalize_checksum(value: Any) -> Any:
    """Take the digits in either case, with or without their name before them."""
    return value.strip().lower().removeprefix("sha256:") if isinstance(value, str) else value


class Artifact(_Model):
    """A file that was built."""

    path: Annotated[str, BeforeValidator(_path), Field(min_length=1, max_length=4096)] = Field(
        validation_alias=_also("path", "file", "name"), description="From the top of the repository, with `/`."
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
    """Take `{path: checksum}` for a list of artifacts, and one for a list of one."""
    if isinstance(value, dict):
        if {"path", "file"} & value.keys():
            return [value]
        return [{"path": path, "checksum": checksum} for path, checksum in value.items()]
    return _items(value)


class Build(_Model):
    """What was built: the files, and what there is to know about them."""

    artifacts: Annotated[tuple[Artifact, ...], BeforeValidator(_artifacts)] = Field(
        validation_alias=_also("artifacts", "files"),
        max_length=MAX_ARTIFACTS,
        description="The files that were made or changed and are to be relied on; none where nothing is.",
    )
    implementation: ItemsOrMapping = Field(
        default=(),
        validation_alias=_also("implementation", "changes", "implemented"),
        description="What was done, and where.",
    )
    test_cases: Items = Field(default=(), validation_alias=_also("test_cases", "tests"))
    coverage_requirements: ItemsOrMapping = Field(
        default=(), validation_alias=_also("coverage_requirements", "coverage")
    )
    configuration: ItemsOrMapping = Field(default=(), validation_alias=_also("configuration", "config"))
    environment: ItemsOrMapping = Field(default=(), validation_alias=_also("environment", "env"))
    summary: Text = Field(default="", description="In a few sentences.")


_GOOD: Final = frozenset({"pass", "passed", "ok", "success", "succeeded", "successful", "done", "green", "deployed"})
_BAD: Final = frozenset({"fail", "failed", "failure", "error", "red", "unsuccessful", "rolled_back"})


def _outcome(value: Any) -> Any:
    if isinstance(value, str):
        word = value.strip().lower()
        return True if word in _GOOD else False if word in _BAD else value
    return value


Success = Annotated[bool, BeforeValidator(_outcome)]


class Test(_Model):
    """What tests came to."""

    passed: Success = Field(validation_alias=_also("passed", "success", "status", "verdict", "result"))
    failures: Items = Field(default=(), validation_alias=_also("failures", "failed", "errors"))
    test_cases: Items = Field(default=(), validation_alias=_also("test_cases", "tests"), description="What was tested.")
    coverage: TextOrMapping = Field(default="", validation_alias=_also("coverage", "coverage_report"))
    summary: Text = Field(default="", description="In a few sentences.")


class Deploy(_Model):
    """What was deployed, and where."""

    deployed: Success = Field(validation_alias=_also("deployed", "success", "status", "result"))
    environment: TextOrMapping = Field(default="", validation_alias=_also("environment", "env", "target"))
    configuration: TextOrMapping = Field(default="", validation_alias=_also("configuration", "config"))
    artifacts: Items = Field(default=(), description="What was deployed: paths, or objects that have one.")
    summary: Text = Field(default="", description="In a few sentences.")


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
    """Take the first line of `12-15`, and nothing for what is no line."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, str):
        found = _LINE.match(value)
        value = int(found[1]) if found else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9 else None


class Finding(_Model):
    """What a review found at one place."""

    path: Annotated[str | None, Field(max_length=4096)] = Field(
        default=None, validation_alias=_also("path", "file", "filename"), description="From the top of the repository."
    )
    line: Annotated[int | None, BeforeValidator(_line)] = Field(default=None, description="Counted from 1.")
    severity: Annotated[Literal["critical", "major", "minor", "info"], BeforeValidator(_severity)] = "major"
    message: Annotated[Text, Field(min_length=1)] = Field(
        validation_alias=_also("message", "description", "comment", "text", "issue", "title"),
        description="What is wrong, and what would be right.",
    )


def _findings(value: Any) -> list[Any]:
    """Take a bare text for a finding without a place."""
    return [{"message": one} if isinstance(one, str) else one for one in _items(value)]


class Review(_Model):
    """Whether what was built may go on, and what was found."""

    verdict: Annotated[Literal["approve", "reject"], BeforeValidator(_verdict)] = Field(
        validation_alias=_also("verdict", "decision", "approved")
    )
    findings: Annotated[tuple[Finding, ...], BeforeValidator(_findings)] = Field(
        default=(), validation_alias=_also("findings", "issues", "comments"), max_length=MAX_FINDINGS
    )
    summary: Text = Field(default="", description="In a few sentences.")


def check_plan(plan: Plan, _facts: HandoffFacts) -> Iterable[Violation]:
    """Yield what is wrong with the ids of a plan's tasks, and with what they wait for."""
    ids = [task.id for task in plan.tasks]
    known = set(ids)
    for place, task in enumerate(plan.tasks):
        at = f"tasks[{place}]"
        if task.id in ids[:place]:
            what = f"{task.id!r} is the id of another, too"
            yield Violation("plan.ids", f"{at}.id", what, "give each task an id of its own")
        for number, name in enumerate(task.dependencies):
            if name not in known:
                yield _unknown(f"{at}.dependencies[{number}]", name, "name tasks of the plan")
    if isinstance(plan.dependencies, dict) and known & plan.dependencies.keys():
        for key, value in plan.dependencies.items():
            for name in [key, *map(str, parse_names(value))]:
                if name not in known:
                    remedy = "name tasks of the plan here, and all else under `resources`"
                    yield _unknown(f"dependencies.{key[:200]}", name, remedy)
    circle = _find_cycle(collect_needs(plan))
    if circle:
        what = f"they wait for each other: {' → '.join(circle)}"
        yield Violation("plan.circle", "tasks", what, "leave out one of these dependencies")


def _unknown(place: str, name: str, remedy: str) -> Violation:
    return Violation("plan.dependencies", place, f"no task has the id {name[:200]!r}", remedy)


def collect_needs(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return by task of a plan the ids of those that it waits for: as it says, and as the plan's `dependencies` do."""
    needs = {task.id: dict.fromkeys(task.dependencies) for task in plan.tasks}
    if isinstance(plan.dependencies, dict):
        for key, value in plan.dependencies.items():
            if key in needs:
                needs[key] |= dict.fromkeys(name for name in map(str, parse_names(value)) if name in needs)
    return {name: tuple(one) for name, one in needs.items()}


def _find_cycle(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return tasks that wait for each other, the first of them at either end; nothing where none do."""
    left = {name: {need for need in of if need in needs} for name, of in needs.items()}
    while free := [name for name, of in left.items() if not of]:
        for name in free:
            del left[name]
        for of in left.values():
            of.difference_update(free)
    if not left:
        return []
    way = [min(left)]
    while way.count(way[-1]) == 1:
        way.append(min(left[way[-1]]))
    return way[way.index(way[-1]) :]


def check_build(build: Build, facts: HandoffFacts) -> Iterable[Violation]:
    """Yield which artifacts are not what is there."""
    for place, artifact in enumerate(build.artifacts):
        if not _is_inside(artifact.path):
            what = f"{artifact.path[:200]!r} is no path in the repository"
            yield Violation("build.path", f"artifacts[{place}].path", what, "name it from the top, with `/`")
        elif artifact.path in facts.checksums:
            found = facts.checksums[artifact.path]
            if found is None:
                what = f"{artifact.path!r} is no file in what was built"
                remedy = "name files that are there, and that git does not ignore"
                yield Violation("build.artifacts", f"artifacts[{place}].path", what, remedy)
            elif normalize_checksum(found) != artifact.checksum:
                what = f"it is not that of {artifact.path!r}, whose SHA-256 is {normalize_checksum(found)}"
                remedy = "name the checksum of the file as it is in the end"
                yield Violation("build.checksum", f"artifacts[{place}].checksum", what, remedy)


def _is_inside(path: str) -> bool:
    parts = path.split("/")
    return not (path.startswith("/") or "\\" in path or "\0" in path or {"", ".", ".."} & set(parts))


def find_artifact_paths(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the paths of the artifacts that what was handed over names; none where it can't be read."""
    try:
        build = Build.model_validate(dict(data))
    except (ValidationError, RecursionError):
        return ()  # the check says so
    return tuple(dict.fromkeys(one.path for one in build.artifacts if _is_inside(one.path)))


def check_review(review: Review, _facts: HandoffFacts) -> Iterable[Violation]:
    """Yield that a rejection gives nothing to mend."""
    if review.verdict == "reject" and not review.findings:
        what = "it rejects, and names nothing that is wrong"
        yield Violation("review.findings", "findings", what, "say what is to be mended, with path, line and message")

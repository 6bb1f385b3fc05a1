"""What a phase can hand over: kinds, each with a schema, what it is checked for, and the values that come of it. Pure.

What is asked for is written by programs that mean well: unknown keys are left out, one thing is taken where a list is
wanted, and other usual names of a field are known. What is required is required.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.domain.json_values import LARGEST, canonical, flaw_of, mended
from orchestrator.domain.violations import Violation
from orchestrator.errors import RefusedError

#: Characters of one text, items of one list, and entries of one mapping in what is handed over.
LONGEST_TEXT: Final = 20_000
MOST_ITEMS: Final = 500
MOST_TASKS, MOST_ARTIFACTS, MOST_FINDINGS = 200, 5_000, 200
#: Violations that are told of one handoff.
MOST_VIOLATIONS: Final = 20


@dataclass(frozen=True, slots=True)
class Facts:
    """What a check needs to know of the world."""

    checksums: Mapping[str, str | None] = field(default_factory=dict)
    """By path: the SHA-256 of the file in the tree that was built, in hexadecimal digits; None where there is none.

    A path that is not here was not looked at, and is not judged.
    """


@dataclass(frozen=True, slots=True)
class Checked:
    """What was handed over as its kind has it, or what is wrong with it."""

    data: dict[str, Any] | None
    """None if anything is wrong."""
    violations: Sequence[Violation] = ()
    ignored: Sequence[str] = ()
    """The keys that its kind does not know."""


Check = Callable[[dict[str, Any], Facts], Checked]
Exports = Callable[[Mapping[str, Any]], dict[str, Any]]


def _no_paths(_data: Mapping[str, Any]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of handoff. Made by `model_kind` or `schema_kind`."""

    name: str
    make_schema: Callable[[], dict[str, Any]]
    check: Check
    """Judges what was handed over; never raises."""
    exports: Exports
    """Returns the values that later phases inherit, from data that passed."""
    needs: tuple[str, ...] | None = None
    """The values that a phase of this kind is given where it declares nothing; None: all."""
    paths: Callable[[Mapping[str, Any]], tuple[str, ...]] = _no_paths
    """Returns the paths whose checksums its check wants in `Facts`."""
    required: tuple[str, ...] = ()
    """The keys that must be there."""

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema (Draft 2020-12) of it."""
        return self.make_schema()


# --- what may stand in a field


def _text(value: Any) -> Any:
    """Take a number or a list of lines where a text is meant."""
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "\n".join(value)
    return value


def _items(value: Any) -> Any:
    """Take one thing where a list of them is meant, and nothing for an empty one."""
    if value is None or value == "":
        return []
    if isinstance(value, str | dict | int | float):
        value = [value]
    if isinstance(value, list | tuple):
        return [str(one) if isinstance(one, bool | int | float) else one for one in value if one is not None]
    return value


def _names(value: Any) -> Any:
    """Take `a, b` for two names."""
    if isinstance(value, str):
        return [name for name in re.split(r"[,\s]+", value) if name]
    return _items(value)


_Loose = Any
Text = Annotated[str, BeforeValidator(_text), Field(max_length=LONGEST_TEXT)]
Name = Annotated[str, BeforeValidator(_text), Field(min_length=1, max_length=200)]
Item = Annotated[str, Field(max_length=LONGEST_TEXT)] | dict[str, _Loose]
Items = Annotated[tuple[Item, ...], BeforeValidator(_items), Field(max_length=MOST_ITEMS)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_names), Field(max_length=MOST_ITEMS)]
#: A list of texts or objects, or a mapping.
ItemsOrMapping = Annotated[dict[str, _Loose], Field(max_length=MOST_ITEMS)] | Items
TextOrMapping = Annotated[dict[str, _Loose], Field(max_length=MOST_ITEMS)] | Text


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
    prompt: Text = Field(
        default="",
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
        validation_alias=_also("tasks", "steps"), min_length=1, max_length=MOST_TASKS
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


def _checksum(value: Any) -> Any:
    """Take the digits in either case, with or without their name before them."""
    return value.strip().lower().removeprefix("sha256:") if isinstance(value, str) else value


class Artifact(_Model):
    """A file that was built."""

    path: Name = Field(
        validation_alias=_also("path", "file", "name"), description="From the top of the repository, with `/`."
    )
    checksum: Annotated[
        str,
        BeforeValidator(_checksum),
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
        max_length=MOST_ARTIFACTS,
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


Outcome = Annotated[bool, BeforeValidator(_outcome)]


class Test(_Model):
    """What tests came to."""

    passed: Outcome = Field(validation_alias=_also("passed", "success", "status", "verdict", "result"))
    failures: Items = Field(default=(), validation_alias=_also("failures", "failed", "errors"))
    test_cases: Items = Field(default=(), validation_alias=_also("test_cases", "tests"), description="What was tested.")
    coverage: TextOrMapping = Field(default="", validation_alias=_also("coverage", "coverage_report"))
    summary: Text = Field(default="", description="In a few sentences.")


class Deploy(_Model):
    """What was deployed, and where."""

    deployed: Outcome = Field(validation_alias=_also("deployed", "success", "status", "result"))
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


def _findings(value: Any) -> Any:
    """Take a bare text for a finding without a place."""
    return (
        [{"message": one} if isinstance(one, str) else one for one in found]
        if isinstance(found := _items(value), list)
        else found
    )


class Review(_Model):
    """Whether what was built may go on, and what was found."""

    verdict: Annotated[Literal["approve", "reject"], BeforeValidator(_verdict)] = Field(
        validation_alias=_also("verdict", "decision", "approved")
    )
    findings: Annotated[tuple[Finding, ...], BeforeValidator(_findings)] = Field(
        default=(), validation_alias=_also("findings", "issues", "comments"), max_length=MOST_FINDINGS
    )
    summary: Text = Field(default="", description="In a few sentences.")


# --- kinds

_M = TypeVar("_M", bound=BaseModel)
Rule = Callable[[Any, Facts], Iterable[Violation]]


def _no_rule(_model: Any, _facts: Facts) -> Iterable[Violation]:
    return ()


def model_kind(
    name: str,
    model: type[_M],
    *,
    rule: Rule = _no_rule,
    exports: Exports | None = None,
    needs: tuple[str, ...] | None = None,
    paths: Callable[[Mapping[str, Any]], tuple[str, ...]] = _no_paths,
) -> Kind:
    """Return the kind of what a pydantic model takes; `rule` says what else is wrong with an instance of it.

    Without `exports` it is one value of the kind's name.
    """

    def check(data: dict[str, Any], facts: Facts) -> Checked:
        return _guarded(name, data, lambda plain: _check_model(name, model, rule, plain, facts))

    return Kind(name, cache(model.model_json_schema), check, exports or _whole(name), needs, paths, _required(model))


def schema_kind(name: str, schema: Mapping[str, Any]) -> Kind:
    """Return the kind of what a JSON Schema (Draft 2020-12) allows; RefusedError if it is no such schema.

    Nothing is fetched: it can refer to nothing but itself.
    """
    check_schema(schema)
    fixed = dict(schema)

    def check(data: dict[str, Any], _facts: Facts) -> Checked:
        return _guarded(name, data, lambda plain: _check_schema_data(name, fixed, plain))

    required = fixed.get("required")
    keys = tuple(one for one in required if isinstance(one, str)) if isinstance(required, list) else ()
    return Kind(name, lambda: fixed, check, _whole(name), required=keys)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse what is no JSON Schema (Draft 2020-12), or refers to what lies elsewhere."""
    from jsonschema import Draft202012Validator, SchemaError  # noqa: PLC0415  only for schemas of the user's own

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        place = _place(error.absolute_path) or "the schema"
        remedy = "see https://json-schema.org/draft/2020-12 for what can be said"
        raise RefusedError(f"{place} is wrong: {error.message[:300]}", remedy) from None
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise RefusedError(f"it refers to {reference[:200]!r}, and nothing is fetched", "put it under `$defs`")


def _references(schema: Any) -> Iterable[str]:
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in {"$ref", "$dynamicRef"} and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for one in schema:
            yield from _references(one)


def _required(model: type[BaseModel]) -> tuple[str, ...]:
    return tuple(name for name, one in model.model_fields.items() if one.is_required())


def _whole(name: str) -> Exports:
    return lambda data: {name: dict(data)}


def _guarded(kind: str, data: Any, check: Callable[[dict[str, Any]], Checked]) -> Checked:
    """Check what is a plain JSON object within the size limit; a fault of the check itself is a violation."""
    if not isinstance(data, dict):
        what = f"it is {type(data).__name__}, no JSON object"
        return Checked(None, (Violation(f"{kind}.object", "the handoff", what, "hand over a JSON object"),))
    try:
        plain = mended(data)
        flaw = flaw_of(plain)
        if flaw is None and len(canonical(plain)) > LARGEST:
            flaw = f"it is larger than {LARGEST} bytes"
    except RecursionError:
        flaw, plain = "it is nested too deep", {}
    if flaw is not None:
        return Checked(None, (Violation(f"{kind}.json", "the handoff", flaw, "hand over a small, plain JSON object"),))
    try:
        return check(plain)
    except Exception as error:  # noqa: BLE001  what a plugin's model or a schema of the user's does wrong is told
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        remedy = "mend the plugin or the schema that defines this kind"
        return Checked(None, (Violation(f"{kind}.check", f"kind {kind!r}", f"its check failed: {fault}", remedy),))


def _check_model(name: str, model: type[_M], rule: Rule, data: dict[str, Any], facts: Facts) -> Checked:
    try:
        made = model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True, include_input=False)
        return Checked(None, _bounded(name, [_violation(name, one) for one in details]))
    found = list(rule(made, facts))
    if found:
        return Checked(None, _bounded(name, found))
    known = _known_keys(model)
    return Checked(made.model_dump(mode="json"), (), tuple(key for key in data if key not in known))


def _known_keys(model: type[BaseModel]) -> frozenset[str]:
    known: set[str] = set()
    for name, one in model.model_fields.items():
        known.add(name)
        alias = one.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        known.update(choice for choice in choices if isinstance(choice, str))
    return frozenset(known)


def _violation(kind: str, error: ErrorDetails) -> Violation:
    # Where several forms are possible, pydantic names the form, too; keys that come from a file have no such marks.
    place = _place([part for part in error["loc"] if isinstance(part, int) or "[" not in part])
    limits = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return Violation(f"{kind}.required", place, "it is missing", "add it, empty if there is nothing to say")
        case "too_long" | "string_too_long":
            most = limits.get("max_length")
            return Violation(f"{kind}.size", place, f"it is longer than {most}", f"keep it to {most} at most")
        case "too_short" | "string_too_short":
            return Violation(f"{kind}.empty", place, "it is empty", "say something")
        case "literal_error":
            expected = str(limits.get("expected"))
            return Violation(f"{kind}.choice", place, "it is none of what is possible", f"write {expected}")
        case _:
            return Violation(f"{kind}.form", place, error["msg"][:300], "write it as the schema says")


def _bounded(kind: str, found: Sequence[Violation]) -> Sequence[Violation]:
    left = len(found) - MOST_VIOLATIONS
    if left <= 0:
        return tuple(found)
    more = Violation(f"{kind}.more", "the handoff", f"{left} more mistakes are not told", "mend these first")
    return (*found[:MOST_VIOLATIONS], more)


def _check_schema_data(name: str, schema: dict[str, Any], data: dict[str, Any]) -> Checked:
    from jsonschema import Draft202012Validator  # noqa: PLC0415  only for schemas of the user's own
    from referencing import Registry  # noqa: PLC0415  the same

    # An empty registry: what a schema refers to is in it, or nowhere.
    validator = Draft202012Validator(schema, registry=Registry())
    remedy = "write it as the schema says"
    found = [
        Violation(f"{name}.schema", _place(error.absolute_path) or "the handoff", error.message[:300], remedy)
        for error, _ in zip(validator.iter_errors(data), range(MOST_VIOLATIONS), strict=False)
    ]
    return Checked(None, found) if found else Checked(data)


def _place(path: Iterable[Any]) -> str:
    place = ""
    for part in path:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    return place


# --- what else the kinds that come with it are checked for


def _check_plan(plan: Plan, _facts: Facts) -> Iterable[Violation]:
    ids = [task.id for task in plan.tasks]
    known = set(ids)
    for place, name in enumerate(ids):
        if name in ids[:place]:
            yield Violation(
                "plan.ids", f"tasks[{place}].id", f"{name!r} is another's, too", "give each task its own id"
            )
    for place, task in enumerate(plan.tasks):
        for at, name in enumerate(task.dependencies):
            if name not in known:
                where = f"tasks[{place}].dependencies[{at}]"
                yield Violation("plan.dependencies", where, f"no task has the id {name!r}", "name a task of the plan")
        if not task.prompt.strip():
            where = f"tasks[{place}].prompt"
            yield Violation("plan.prompt", where, "it is empty", "say what is to be done")
    yield from _check_mapping(plan, known)
    circle = _circle(planned_needs(plan))
    if circle:
        what = f"they wait for each other: {' → '.join(circle)}"
        yield Violation("plan.circle", "tasks", what, "leave out one of these dependencies")


def _check_mapping(plan: Plan, known: set[str]) -> Iterable[Violation]:
    if isinstance(plan.dependencies, dict) and known & plan.dependencies.keys():
        for key, value in plan.dependencies.items():
            names = _names(value)
            for name in [key, *(names if isinstance(names, list) else [])]:
                if not isinstance(name, str) or name not in known:
                    what = f"no task has the id {str(name)[:200]!r}"
                    remedy = "name tasks of the plan here, and all else under `resources`"
                    yield Violation("plan.dependencies", f"dependencies.{key[:200]}", what, remedy)


def planned_needs(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return by task of a plan the ids of those that it waits for: as it says, and as the plan's `dependencies` do."""
    needs = {task.id: dict.fromkeys(task.dependencies) for task in plan.tasks}
    if isinstance(plan.dependencies, dict):
        for key, value in plan.dependencies.items():
            names = _names(value)
            if key in needs and isinstance(names, list):
                needs[key] |= dict.fromkeys(name for name in names if isinstance(name, str) and name in needs)
    return {name: tuple(one) for name, one in needs.items()}


def _circle(needs: Mapping[str, Sequence[str]]) -> list[str]:
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


def _check_build(build: Build, facts: Facts) -> Iterable[Violation]:
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
            elif _checksum(found) != artifact.checksum:
                what = f"it is not that of {artifact.path!r}, whose SHA-256 is {_checksum(found)}"
                remedy = "name the checksum of the file as it is in the end"
                yield Violation("build.checksum", f"artifacts[{place}].checksum", what, remedy)


def _is_inside(path: str) -> bool:
    parts = path.split("/")
    return not (path.startswith("/") or "\\" in path or "\0" in path or {"", ".", ".."} & set(parts))


def _artifact_paths(data: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        build = Build.model_validate(mended(dict(data)))
    except (ValidationError, RecursionError):
        return ()  # the check says so
    return tuple(dict.fromkeys(one.path for one in build.artifacts if _is_inside(one.path)))


def _check_review(review: Review, _facts: Facts) -> Iterable[Violation]:
    if review.verdict == "reject" and not review.findings:
        what = "it rejects, and names nothing that is wrong"
        yield Violation("review.findings", "findings", what, "say what is to be mended, with path, line and message")


def _those_of(*keys: str) -> Exports:
    """Export these keys, where they say anything."""
    return lambda data: {key: data[key] for key in keys if data.get(key) not in (None, "", [], {})}


def _plan_exports(data: Mapping[str, Any]) -> dict[str, Any]:
    plan = {key: data[key] for key in ("tasks", "timeline", "resources", "summary") if key in data}
    return {"plan": plan, **_those_of("specifications", "dependencies")(data)}


def _named(name: str) -> Exports:
    return lambda data: {name: dict(data)}


#: What phases of a name need where nothing else is said.
NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    "plan": ("requirements", "constraints", "scout_findings"),
    "build": ("plan", "specifications", "dependencies"),
    "test": ("implementation", "test_cases", "coverage_requirements"),
    "deploy": ("artifacts", "configuration", "environment"),
}

_SCOUTED: Final = (
    "scout_findings", "requirements", "constraints", "priorities", "risks", "opportunities", "approach",
)  # fmt: skip
_BUILT: Final = (
    "artifacts", "implementation", "test_cases", "coverage_requirements", "configuration", "environment",
)  # fmt: skip

#: What is there without a plugin. No two export a value of the same name.
KINDS: Final[Mapping[str, Kind]] = {
    kind.name: kind
    for kind in (
        model_kind("scout", Scout, exports=_those_of(*_SCOUTED)),
        model_kind("plan", Plan, rule=_check_plan, exports=_plan_exports, needs=NEEDS["plan"]),
        model_kind(
            "build",
            Build,
            rule=_check_build,
            exports=_those_of(*_BUILT),
            needs=NEEDS["build"],
            paths=_artifact_paths,
        ),
        model_kind("test", Test, exports=_named("test_results"), needs=NEEDS["test"]),
        model_kind("deploy", Deploy, exports=_named("deployment"), needs=NEEDS["deploy"]),
        model_kind("review", Review, rule=_check_review),
    )
}

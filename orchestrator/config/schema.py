"""Pydantic models of the config file as written, before references are checked.

Settings that runs record are in `orchestrator.domain.settings`; this module has the parts that occur only in files.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from orchestrator.config.store import STORE_PATTERN, check_store_url
from orchestrator.domain.settings import run_settings
from orchestrator.domain.settings.fields import (
    Context,
    Name,
    NotEmpty,
    PathPattern,
    Prompt,
    Settings,
    WorkflowName,
    short_form,
)
from orchestrator.domain.settings.phase_settings import PhaseSettings
from orchestrator.domain.settings.run_settings import Retention, RunSettings, SandboxSettings, TaskSettings
from orchestrator.domain.wording import describe_value, quote_text
from orchestrator.errors import InvalidValue

MAX_TASKS = 100_000
MAX_PHASES = 50


def _check_version(version: int) -> int:
    if version != 1:
        raise InvalidValue(f"unsupported version {version}", "use 1")
    return version


def _phase(value: Any) -> Any:
    match value:
        case str():
            return {value: {}}
        case dict() if len(value) == 1:
            name, settings = next(iter(value.items()))
            if settings is not None:
                return value
            raise InvalidValue(f"the phase {quote_text(str(name))} is empty", f"use `- {name}`, or add its keys")
        case dict() if value and next(iter(value.values())) is None:
            message = f"the keys of the phase {quote_text(str(next(iter(value))))} are at the level of its name"
            raise InvalidValue(message, "indent them further")
    message = f"a phase can't be {describe_value(value)}"
    raise InvalidValue(message, "use `- NAME: {…}`, one name with the keys of the phase")


_PHASE = BeforeValidator(
    _phase,
    json_schema_input_type=Name | Annotated[dict[Name, PhaseSettings], Field(min_length=1, max_length=1)],
)


class Need(Settings):
    """A task that another one needs."""

    task: NotEmpty
    """Its id."""
    at: Literal["built", "landed"] = "landed"
    """When the other task starts: as soon as this one has built its work, and on that work, or after it has landed."""


#: In Python, an id is a need too.
_Need = Annotated[
    Annotated[Need, Tag("need")] | Annotated[str, Tag("id")],
    Discriminator(lambda _: "need"),
    short_form("task", "a need", "the id of a task, or `{task: ID, at: built}`", NotEmpty | Need),
]


class Task(TaskSettings):
    """One unit of work."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["prompt_file"]}]},
    )

    id: Name
    """The task's name within the run."""
    prompt: Prompt | None = None
    """The prompt for the CLI; alternatively use `prompt_file`."""
    prompt_file: NotEmpty | None = None
    """A file with the prompt, relative to this one."""
    needs: Annotated[tuple[_Need, ...], Field(strict=False, json_schema_extra={"uniqueItems": True})] = ()
    """The tasks that must land before this one starts; with `at: built` it starts on their work, and lands after it."""
    owns: Annotated[tuple[PathPattern, ...], Field(strict=False)] = ()
    """Patterns of the paths that it may change; tasks with overlapping patterns never run concurrently."""
    context: Context = Field(default_factory=dict)
    """Values for the phases of its workflow, in addition to the file's `context`."""


class AdapterSettings(run_settings.AdapterSettings):
    """An adapter; other keys are options of its type."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]

    @classmethod
    def of(cls, use: str, options: BaseModel, **settings: Any) -> Self:
        """Return an adapter's settings for the type `use` and its `Options`."""
        return cls.model_validate({"use": use, **options.model_dump(exclude_unset=True), **settings})


class SinkSettings(run_settings.SinkSettings):
    """A sink that receives events; other keys are options of its type."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]


class TrackerSettings(run_settings.TrackerSettings):
    """An external task list; other keys are options of its type."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]


class PullRequestSettings(run_settings.PullRequestSettings):
    """How tasks land by pull requests; other keys are options of the forge."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]


StoreUrl = Annotated[str, AfterValidator(check_store_url), WithJsonSchema({"type": "string", "pattern": STORE_PATTERN})]


class StateSettings(Retention):
    """The state store, and how much history it retains."""

    url: StoreUrl | None = None
    """The store: file:///a/folder, memory: (lost at exit), or one from an installed plugin."""


_STORE = short_form("url", "a store", "its URL, or a mapping", StoreUrl | StateSettings)


class _Versioned(Settings):
    version: Annotated[int, AfterValidator(_check_version), WithJsonSchema({"const": 1})]
    """The version of this format: 1."""


class Config(SandboxSettings, RunSettings, _Versioned):
    """The config file."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["tasks"], "properties": {"tasks": {"minItems": 1}}},
                {"required": ["trackers"], "properties": {"trackers": {"minProperties": 1}}},
            ]
        },
    )

    adapters: Annotated[
        dict[Name, AdapterSettings], Field(min_length=1, json_schema_extra={"additionalProperties": False})
    ] = Field(default_factory=dict)
    """Adapters by name; types that need no options can be used without an entry."""
    state: Annotated[StateSettings, _STORE] = Field(default_factory=StateSettings)
    """The state store. Default: .council/state of the repository."""
    state_dir: NotEmpty | None = None
    """The folder of the store, relative to this file; an alternative to its URL."""
    defaults: TaskSettings = Field(default_factory=TaskSettings)
    """Defaults for tasks; each task can override them."""
    workflows: dict[
        WorkflowName,
        Annotated[
            tuple[Annotated[dict[Name, PhaseSettings], _PHASE], ...],
            Field(strict=False, min_length=1, max_length=MAX_PHASES),
        ],
    ] = Field(default_factory=dict)
    """Workflows by name, each a list of phases; `adw` is built in."""
    context: Context = Field(default_factory=dict)
    """Values for the phases of all tasks."""
    sinks: dict[Name, SinkSettings] = Field(default_factory=dict)
    """Sinks that receive events, by name."""
    trackers: dict[Name, TrackerSettings] = Field(default_factory=dict)
    """External task lists, by name."""
    pull_requests: PullRequestSettings | None = None
    """How tasks land by pull requests. Default: they land on the target directly."""
    tasks: Annotated[tuple[Task, ...], Field(strict=False, max_length=MAX_TASKS)] = ()
    """The tasks; required unless there are trackers."""

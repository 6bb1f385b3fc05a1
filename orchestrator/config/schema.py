"""What users write: the shape of the file, before references between its parts are checked."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from orchestrator.config.durations import parse_duration
from orchestrator.config.names import check_branch, check_name, check_repo

MOST_TASKS = 100_000


def _check_version(version: int) -> int:
    if version != 1:
        raise ValueError(f"version {version} is not known here: write 1")
    return version


def _check_prompt(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what is to be done")
    return prompt


Name = Annotated[str, AfterValidator(check_name)]
Branch = Annotated[str, AfterValidator(check_branch)]
Duration = Annotated[float, BeforeValidator(parse_duration, json_schema_input_type=str)]
Attempts = Annotated[int, Field(ge=1, le=100)]
Prompt = Annotated[str, AfterValidator(_check_prompt)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class BackoffEntry(_Entry):
    """How long to wait before a failed task is tried again; what is left out comes from the defaults."""

    initial: Duration | None = None
    """The wait before the second attempt: 2s unless given."""
    factor: Annotated[float, Field(ge=1)] | None = None
    """How many times longer each wait is than the one before: 2 unless given."""
    max: Duration | None = None
    """The longest wait: 5m unless given."""
    jitter: bool | None = None
    """Whether a wait is drawn at random between nothing and its full length: true unless given."""


class DefaultsEntry(_Entry):
    """What holds for each task that doesn't say otherwise."""

    adapter: str | None = None
    """The adapter that runs the tasks; not needed where there is only one."""
    timeout: Duration | None = None
    """The wall-clock time that one session may take: 30m unless given."""
    attempts: Attempts | None = None
    """How often a task is tried at most: 3 unless given."""
    backoff: BackoffEntry | None = None
    """How long to wait between attempts."""


class TaskEntry(DefaultsEntry):
    """One unit of work."""

    id: Name
    """The task's name within the run."""
    prompt: Prompt | None = None
    """What the CLI is asked to do; or else give `prompt_file`."""
    prompt_file: Annotated[str, Field(min_length=1)] | None = None
    """A file that holds the prompt, relative to this one."""
    needs: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """The tasks that must have landed before this one starts."""


class AdapterEntry(_Entry):
    """An adapter; the other keys beside `use` are its own options."""

    model_config = ConfigDict(extra="allow")

    use: str
    """The kind of adapter: `command`, or what an installed plugin brings."""
    __pydantic_extra__: dict[str, Any]


class FileConfig(_Entry):
    """The whole file."""

    version: Annotated[int, AfterValidator(_check_version)]
    """The version of this format: 1."""
    repo: Annotated[str, AfterValidator(check_repo)] = "."
    """The repository: a path, relative to this file, or a URL."""
    base: Branch = "main"
    """The branch that work starts from."""
    target: Branch | None = None
    """The branch that work lands on: council/ and the run's id unless given."""
    capacity: Annotated[int, Field(ge=1, le=1000)] = 4
    """How many sessions may run at once."""
    adapters: Annotated[dict[Name, AdapterEntry], Field(min_length=1)]
    """The ways to run a CLI, by a name of your own."""
    defaults: DefaultsEntry = DefaultsEntry()
    """What holds for each task that doesn't say otherwise."""
    tasks: Annotated[tuple[TaskEntry, ...], Field(strict=False, min_length=1, max_length=MOST_TASKS)]
    """What is to be done."""

"""A run as it was configured, everything resolved: no default is left for anyone downstream to fill in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from orchestrator.domain import retry
from orchestrator.domain.failures import FailureClass
from orchestrator.errors import RefusedError
from orchestrator.protocols import AdapterType, JsonObject


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Backoff(_Model):
    """How long to wait before a failed task is tried again."""

    initial: float = 2.0
    """Seconds before the second attempt."""
    factor: float = 2.0
    """How many times longer each wait is than the one before."""
    max: float = 300.0
    """The longest wait in seconds."""
    jitter: bool = True
    """Whether a wait is drawn at random between nothing and its full length."""

    def policy(self) -> retry.Backoff:
        """Return the same as the value that `retry_delay` takes."""
        return retry.Backoff(self.initial, self.factor, self.max, self.jitter)


class TaskSpec(_Model):
    """One task, complete; `model_dump(mode="json")` and `model_validate` bring it through JSON."""

    id: str
    """The task's name within the run."""
    prompt: str
    """What the CLI is asked to do; the text itself, also where the file named another."""
    needs: Annotated[tuple[str, ...], Field(strict=False)]
    """The tasks that must have landed before this one starts."""
    adapter: str
    """The name of the adapter that runs it."""
    timeout: float
    """Wall-clock seconds that one session may take."""
    attempts: int
    """How often it is tried at most."""
    backoff: Backoff
    """How long to wait between attempts."""
    silence: float | None
    """Seconds that a session may go without output and without a change in its worktree; None: no limit."""
    retry_on: Annotated[frozenset[Annotated[FailureClass, Field(strict=False)]], Field(strict=False)]
    """The classes of failure that are worth another attempt."""
    checks: Annotated[tuple[str, ...], Field(strict=False)]
    """Shell commands that must succeed on the merged tree."""
    checks_timeout: float
    """Wall-clock seconds that one check may take."""
    checks_env: Annotated[tuple[str, ...], Field(strict=False)]
    """Names of variables that checks see beside the base set."""
    retry_checks: bool
    """Whether another attempt follows where the checks failed."""
    max_file: int
    """Bytes of the largest file that may be committed."""
    priority: int
    """The higher, the earlier among those that are ready."""
    owns: Annotated[tuple[str, ...], Field(strict=False)]
    """Patterns of the paths that it works on."""


_Paths = Annotated[tuple[Annotated[Path, Field(strict=False)], ...], Field(strict=False)]


class Reach(_Model):
    """What sessions may reach of this machine beyond their worktree; paths are absolute."""

    writable: _Paths = ()
    """Files and folders to write."""
    readable: _Paths = ()
    """Files and folders to read inside of what is hidden."""

    def __or__(self, other: Reach) -> Reach:
        """Return both together."""
        return Reach(writable=self.writable + other.writable, readable=self.readable + other.readable)


class FenceConfig(_Model):
    """What fences all sessions and checks of a run in."""

    sandbox: str
    """`auto`, `bubblewrap`, `landlock` or `off`."""
    network: bool
    """Whether they reach the network."""
    reach: Reach
    """What all of them may reach."""


class AdapterConfig(_Model):
    """One adapter under its name, with validated options."""

    name: str
    """The name that tasks call it by."""
    use: str
    """The name that a plugin registered its type under."""
    capacity: int | None
    """How many of its sessions may run at once; None: as many as the run's capacity."""
    reach: Reach
    """What its sessions may reach beyond what all may."""
    options: SerializeAsAny[BaseModel]
    """An instance of that type's `Options`."""

    def stored(self) -> JsonObject:
        """Return what `restore_adapter` takes, as plain JSON."""
        return self.model_dump(mode="json", exclude={"name"})


def restore_adapter(name: str, stored: JsonObject, adapter_types: Mapping[str, AdapterType]) -> AdapterConfig:
    """Return the adapter that `AdapterConfig.stored` gave, without the file that it came from.

    Raises RefusedError if its plugin is no longer installed or no longer takes these options.
    """
    use = str(stored["use"])
    if use not in adapter_types:
        raise RefusedError(
            f"adapter {name!r} uses {use!r}, which is not installed", "install the plugin that brings it"
        )
    try:
        options = adapter_types[use].Options.model_validate(stored["options"])
        reach = Reach.model_validate(stored["reach"])
        return AdapterConfig(name=name, use=use, capacity=stored["capacity"], reach=reach, options=options)
    except (ValidationError, KeyError) as error:
        differ = (
            f"{error.error_count()} options differ" if isinstance(error, ValidationError) else f"{error} is missing"
        )
        raise RefusedError(
            f"adapter {name!r} was configured for another version of {use!r} ({differ})",
            "install that version again, or start a new run",
        ) from error


class RunConfig(_Model):
    """What one file asks for."""

    path: Annotated[Path, Field(strict=False)]
    """The file, absolute."""
    repo: str
    """The repository: an absolute path, or a URL as it was written."""
    is_url: bool
    """Whether `repo` is a URL."""
    base: str
    """The branch that work starts from."""
    target: str | None
    """The branch that work lands on; None leaves the choice to the run."""
    capacity: int
    """How many sessions may run at once."""
    session_memory: int
    """Bytes of memory that one session is expected to take."""
    fence: FenceConfig
    """What sessions and checks are fenced in by."""
    adapters: Mapping[str, AdapterConfig]
    """The adapters by name."""
    tasks: Annotated[tuple[TaskSpec, ...], Field(strict=False)]
    """The tasks in the file's order."""

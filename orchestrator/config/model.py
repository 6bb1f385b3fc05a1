"""The resolved config of a run, and adapters, sinks and trackers restored from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from orchestrator.config.accounts import AccountAdapter
from orchestrator.config.schema import StateSettings
from orchestrator.domain.settings.names import account_adapter_name
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.domain.settings.run_settings import (
    AdapterConfig,
    PullRequestConfig,
    ResolvedSettings,
    Retention,
    SinkConfig,
    TaskSpec,
    TrackerConfig,
)
from orchestrator.errors import RefusedError
from orchestrator.protocols import Adapter, AdapterType, PluginType


class RunConfig(ResolvedSettings):
    """The resolved config of one run."""

    path: Annotated[Path, Field(strict=False)]
    """The absolute path of the config file; without a file, the run's name in the base folder of relative paths."""
    texts: Annotated[tuple[Annotated[Path, Field(strict=False)], ...], Field(strict=False)] = ()
    """The prompt and schema files; absolute, with symlinks resolved."""
    digest: str | None = None
    """The SHA-256 of the config file; None without a file, or if it refers to prompt or schema files."""
    state: StateSettings = Field(default_factory=StateSettings)
    """The state store."""
    tasks: Annotated[tuple[TaskSpec, ...], Field(strict=False)]
    """The tasks in the file's order."""
    context: dict[str, Any] = Field(default_factory=dict)
    """Values for the phases of all tasks; the `context` of each task already includes them."""
    template: TaskSpec | None = None
    """The defaults of a task from a tracker; None if there are no trackers."""

    def to_stored(self) -> dict[str, Any]:
        """Return the settings for a run document, by field."""
        plugins = {
            kind: {name: entry.to_stored() for name, entry in getattr(self, kind).items()}
            for kind in ("adapters", "sinks", "trackers")
        }
        forge = None if self.pull_requests is None else self.pull_requests.to_stored()
        stored = {name: getattr(self, name) for name in ResolvedSettings.model_fields} | plugins
        return stored | {"pull_requests": forge, "state": self.retention}

    @property
    def retention(self) -> Retention:
        """How much history the state store retains."""
        return Retention.model_construct(**{name: getattr(self.state, name) for name in Retention.model_fields})

    def adapters_of(self, task: TaskSpec) -> tuple[str, ...]:
        """Return all adapters for phases of a task, and of tasks from its plan."""
        workflows = [task.workflow]
        for name in workflows:  # the list grows by the workflows of tasks that plans create
            expansions = [phase.expand for phase in self.phases_of(name) if phase.expand is not None]
            workflows += dict.fromkeys(each.workflow for each in expansions if each.workflow not in workflows)
        phases = [phase for name in workflows for phase in self.phases_of(name)]
        own = task.adapters if None in workflows or any(phase.adapter is None for phase in phases) else ()
        named = [name for phase in phases if phase.adapter is not None for name in (phase.adapter, *phase.fallback)]
        return tuple(dict.fromkeys((*own, *named)))

    def phases_of(self, workflow: str | None) -> tuple[Phase, ...]:
        """Return the phases of a workflow; empty for None."""
        return () if workflow is None else self.workflows[workflow]


T = TypeVar("T")
WithAdapter = TypeVar("WithAdapter", TaskSpec, Phase)


def restore_options(
    subject: str,
    stored: AdapterConfig | SinkConfig | TrackerConfig | PullRequestConfig,
    types: Mapping[str, PluginType[T]],
    reason: str | None = None,
) -> tuple[PluginType[T], BaseModel]:
    """Return the type and options of a stored adapter, sink, tracker or forge.

    `subject` is the name of the entry in messages. Raises RefusedError if its plugin is no longer installed, with the
    `reason` if known, or if the type no longer accepts these options.
    """
    use = stored.use
    if use not in types:
        raise RefusedError(
            f"{subject} uses {use!r}, which is not installed{'' if reason is None else f': {reason}'}",
            "install the plugin that provides it",
        )
    try:
        return types[use], types[use].Options.model_validate(stored.options)
    except ValidationError as error:
        message = f"{subject} was configured for another version of {use!r} ({error.error_count()} invalid options)"
        raise RefusedError(message, "install that version again, or start a new run") from error


def restore_adapters(
    stored: Mapping[str, AdapterConfig],
    adapter_types: Mapping[str, AdapterType],
    explain: Callable[[str], str | None] = lambda _: None,
) -> dict[str, AdapterConfig]:
    """Return a run document's adapters; see `restore_options` for errors."""
    restored = {}
    for name, entry in stored.items():
        _, options = restore_options(f"adapter {name!r}", entry, adapter_types, explain(entry.use))
        restored[name] = entry.model_copy(update={"options": options})
    return restored


def expand_accounts(config: RunConfig) -> RunConfig:
    """Return a run with an adapter for each account, such as `claude@work`.

    The accounts of an adapter replace its name everywhere, in their order.
    """
    accounts = {
        name: {account_adapter_name(name, account): {account: given} for account, given in adapter.accounts.items()}
        for name, adapter in config.adapters.items()
        if adapter.accounts
    }
    if not accounts:
        return config

    def expand(settings: WithAdapter) -> WithAdapter:
        if settings.adapter is None:
            return settings
        named = (settings.adapter, *settings.fallback)
        adapter, *fallback = (each for one in named for each in accounts.get(one, (one,)))
        return settings.model_copy(update={"adapter": adapter, "fallback": tuple(fallback)})

    adapters = {
        each: adapter if one is None else adapter.model_copy(update={"accounts": one})
        for name, adapter in config.adapters.items()
        for each, one in accounts.get(name, {name: None}).items()
    }
    workflows = {name: tuple(map(expand, phases)) for name, phases in config.workflows.items()}
    template = None if config.template is None else expand(config.template)
    tasks = tuple(map(expand, config.tasks))
    return config.model_copy(
        update={"adapters": adapters, "workflows": workflows, "template": template, "tasks": tasks}
    )


def make_adapters(configs: Mapping[str, AdapterConfig], adapter_types: Mapping[str, AdapterType]) -> dict[str, Adapter]:
    """Return an adapter instance for each config, by name."""
    made = {name: adapter_types[config.use](config.options) for name, config in configs.items()}
    accounts = {name: next(iter(config.accounts.items())) for name, config in configs.items() if config.accounts}
    return made | {name: AccountAdapter(made[name], *account) for name, account in accounts.items()}


def used_adapters(config: RunConfig, adapter_types: Mapping[str, AdapterType]) -> dict[str, Adapter]:
    """Return the adapters that a config's tasks use, as a resume would create them."""
    used = {name for task in config.tasks for name in config.adapters_of(task)}
    stored = {name: entry.to_stored() for name, entry in config.adapters.items() if name in used}
    return make_adapters(restore_adapters(stored, adapter_types), adapter_types)

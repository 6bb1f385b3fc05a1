"""Settings of phases, in the config file and, resolved, in the run document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from orchestrator.domain.settings.fields import (
    Commands,
    Context,
    Duration,
    Name,
    NotEmpty,
    Prompt,
    Settings,
    SharedKey,
    Strings,
    ValueNames,
    WorkflowName,
    short_form,
)
from orchestrator.domain.wording import describe_value
from orchestrator.errors import InvalidValue


class HandoffSettings(Settings):
    """The handoff that a phase produces."""

    kind: Name
    """The kind: scout, plan, build, test, deploy, review, one from a plugin, or, with `schema`, a custom one."""
    schema_: NotEmpty | dict[str, Any] | None = Field(None, alias="schema")
    """The JSON Schema (draft 2020-12) of the handoff: a file, relative to this one, or the schema itself."""


class ContinueSettings(Settings):
    """The conversation that a phase continues."""

    continue_: Name | None = Field(None, alias="continue")
    """An earlier phase. Default: the previous phase."""


class ExpansionSettings(Settings):
    """The conversion of a plan's tasks to tasks of the run."""

    max: Annotated[int, Field(ge=1, le=1000)] = 20
    """The largest number of tasks."""
    workflow: WorkflowName | None = None
    """The workflow of each task. Default: none."""


def _session(value: Any) -> Any:
    match value:
        case "continue":
            return {}
        case dict() | BaseModel():
            return value
    message = f"a session can't be {describe_value(value)}"
    raise InvalidValue(message, "write `continue`, or {continue: PHASE}")


def _expand(value: Any) -> Any:
    match value:
        case True:
            return {}
        case False | None:
            return None
        case dict() | BaseModel():
            return value
    message = f"expand can't be {describe_value(value)}"
    raise InvalidValue(message, "write true, or a mapping with `max:` and `workflow:`")


_PRODUCES = short_form("kind", "a handoff", "its kind, or a mapping with `kind:` and `schema:`", Name | HandoffSettings)


class PhaseSettings(Settings):
    """One step of a workflow, run in its own sessions."""

    adapter: str | None = None
    """The adapter that runs it. Default: the adapter of the task."""
    fallback: Strings = ()
    """Adapters to use while `adapter` is in cooldown or disabled."""
    access: Literal["read", "write"] = "write"
    """With `read`, its changes are discarded."""
    produces: Annotated[HandoffSettings, _PRODUCES] | None = None
    """The kind of handoff for the next phase. Default: none, only its work."""
    prompt: Prompt | None = None
    """The prompt template. Default: the template of its kind, or of its name."""
    prompt_file: NotEmpty | None = None
    """A file with the prompt template, relative to this one."""
    needs: ValueNames | None = None
    """The values that it gets. Default: the values that its kind of phase needs, else all."""
    context: Context = Field(default_factory=dict)
    """Values for this phase only."""
    when: NotEmpty | None = None
    """An expression over the known values; if it is false, the phase is skipped."""
    approve: bool = False
    """Whether a user must approve its result before the next phase starts."""
    session: (
        Annotated[
            ContinueSettings,
            BeforeValidator(_session, json_schema_input_type=Literal["continue"] | ContinueSettings),
        ]
        | None
    ) = None
    """`continue`: continue the conversation of an earlier phase, if the adapter supports it."""
    handoff: Literal["direct", "mediated", "shared"] = "direct"
    """How its result reaches the next phase: unchanged, transformed, or under a key that other tasks can read."""
    transform: Name | None = None
    """With `mediated`: the transformation, as named by a plugin."""
    mediator: Name | None = None
    """With `mediated`: the phase that transforms the result; it must be the next phase."""
    key: SharedKey | None = None
    """With `shared`: the key."""
    until: Commands = ()
    """Shell commands that must succeed on its work before the phase is complete."""
    on_reject: Name | None = None
    """For a review: the earlier phase to return to after a rejection. Default: the last phase that writes."""
    max_rounds: Annotated[int, Field(ge=1, le=20)] = 3
    """How often `until` or a rejection may send work back before the task fails."""
    expand: Annotated[
        ExpansionSettings | None, BeforeValidator(_expand, json_schema_input_type=bool | ExpansionSettings)
    ] = None
    """For a plan: whether its tasks become tasks of the run."""
    timeout: Duration | None = None
    """The wall-clock limit of one session. Default: the timeout of the task."""

    @property
    def writes(self) -> bool:
        """Whether its changes are preserved."""
        return self.access == "write"

    @property
    def kind(self) -> str | None:
        """The kind of its handoff; None: it has no handoff except its work."""
        return None if self.produces is None else self.produces.kind


class Phase(PhaseSettings):
    """A resolved phase: template text, schema mapping, name of the continued phase."""

    name: str
    """Its name, unique in the workflow."""

    @property
    def handoff_schema(self) -> dict[str, Any] | None:
        """The JSON Schema of its handoff, if its kind is a custom one."""
        schema = None if self.produces is None else self.produces.schema_
        return schema if isinstance(schema, dict) else None

    @property
    def continues(self) -> str | None:
        """The earlier phase whose conversation it continues, if the adapter supports it.

        None: a new conversation.
        """
        return None if self.session is None else self.session.continue_

    @property
    def shows_diff(self) -> bool:
        """Whether its template may include the diff of earlier work."""
        return self.prompt is not None and "diff" in self.prompt

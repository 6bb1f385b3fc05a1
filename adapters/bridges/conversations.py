"""Start or resume a conversation with an agent, with MCP servers and a model."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from acp import schema

from adapters.bridges.lines import BridgeExit, write_line

#: Part of the id or name of a login method that reads a key from a variable, in contrast to a login in a browser.
_KEY: Final = re.compile(r"api[-_ ]?key", re.IGNORECASE)
_Servers = list[schema.HttpMcpServer | schema.SseMcpServer | schema.AcpMcpServer | schema.McpServerStdio]
_Started = schema.NewSessionResponse | schema.LoadSessionResponse


@dataclass(frozen=True, slots=True)
class ConversationRequest:
    """The settings of a conversation; `resume` is the id of an earlier one.

    Each server has a `name`, and either a `url` or a command `argv` with the names of its variables `env`.
    """

    model: str | None = None
    resume: str | None = None
    servers: Sequence[Mapping[str, Any]] = ()
    stop_gate: Sequence[str] = ()
    """A command to run after each turn; empty if there is none."""
    auth: str | None = None
    """The id of the agent's method to log in by; None if it needs no login."""


async def log_in(agent: Any, known: schema.InitializeResponse, method: str) -> None:
    """Log in by a method. Raises BridgeExit if the agent does not offer it."""
    offered = [one.id for one in known.auth_methods or ()]
    if method not in offered:
        names = f"only {', '.join(offered)}" if offered else "none"
        raise BridgeExit(f"the agent does not offer the login method {method!r}, {names}: correct `auth`", "invalid")
    await agent.authenticate(method_id=method)


def find_key_method(known: schema.InitializeResponse) -> str | None:
    """Return the id of the first login method that needs only a key in our environment, or None."""
    for method in known.auth_methods or ():
        if isinstance(method, schema.EnvVarAuthMethod):
            if all(one.name in os.environ for one in method.vars if not one.optional):
                return method.id
        elif not isinstance(method, schema.TerminalAuthMethod) and _KEY.search(f"{method.id} {method.name}"):
            return method.id
    return None


def check_can_resume(known: schema.InitializeResponse) -> None:
    """Raise BridgeExit if an agent can't resume conversations.

    The prompt for a resumed conversation is incomplete without its history. The next session starts a new conversation.
    """
    if known.agent_capabilities is None or not known.agent_capabilities.load_session:
        raise BridgeExit("the agent can't resume conversations: remove `resumes`", "transient")


def mcp_servers_for(known: schema.InitializeResponse, asked: Iterable[Mapping[str, Any]]) -> _Servers:
    """Return the servers that an agent supports, with variables from our environment."""
    ability = known.agent_capabilities
    takes_urls = ability is not None and ability.mcp_capabilities is not None and bool(ability.mcp_capabilities.http)
    servers: _Servers = []
    for server in asked:
        if server["url"] is None:
            servers.append(_command(server))
        elif takes_urls:
            servers.append(schema.HttpMcpServer(type="http", name=server["name"], url=server["url"], headers=[]))
        else:
            write_line("warned", text=f"the agent supports no server with a URL: {server['name']!r} is not available")
    return servers


def _command(server: Mapping[str, Any]) -> schema.McpServerStdio:
    program, *arguments = server["argv"]
    found = shutil.which(program)
    given = [schema.EnvVariable(name=name, value=os.environ[name]) for name in server["env"] if name in os.environ]
    path = program if found is None else str(Path(found).absolute())
    return schema.McpServerStdio(name=server["name"], command=path, args=arguments, env=given)


async def choose_model(agent: Any, session: str, started: _Started, model: str) -> None:
    """Choose a model. Raises BridgeExit if the agent does not offer it."""
    choice = _option(started, "model")
    offered = [] if choice is None else list(_values(choice.options))
    if choice is None or model not in offered:
        names = f"only {', '.join(offered[:20])}" if offered else "none: choose it with the agent's own arguments"
        raise BridgeExit(f"the agent does not offer the model {model!r}, {names}", "invalid")
    await agent.set_config_option(config_id=choice.id, session_id=session, value=model)


def _option(started: _Started, category: str) -> schema.SessionConfigOptionSelect | None:
    options = [
        option for option in started.config_options or () if isinstance(option, schema.SessionConfigOptionSelect)
    ]
    return next((option for option in options if option.category == category), None)


def _values(options: Iterable[schema.SessionConfigSelectOption | schema.SessionConfigSelectGroup]) -> Iterator[str]:
    for option in options:
        if isinstance(option, schema.SessionConfigSelectGroup):
            yield from _values(option.options)
        else:
            yield option.value

"""Codex, which prints JSON lines.

Not a profile: it takes MCP servers as TOML options, finds failures in several kinds of items, and denials by exit
codes.

See npm `@openai/codex` and https://developers.openai.com/codex/noninteractive. Codex reports failures only as text, in
`error` and then `turn.failed`, with the HTTP status if any. If its own sandbox prevents it from writing, it still exits
with 0, without changes. Without a network, it retries forever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import pluggy
from pydantic import AfterValidator, BaseModel, model_validator

from adapters.acp import Agent, AgentChoice
from adapters.failures import failure_class_for_status, make_failure, match_failure_class, one_line
from adapters.json_output import (
    as_count,
    as_text,
    concluded_failure,
    output_text,
    parse_object,
    parse_plain_line,
    plan_event,
)
from adapters.options import CliOptions, ProgramName, option_arguments
from adapters.rate_limits import with_reset_time
from orchestrator.client.commands import MCP_SERVER_NAME
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterAdapter
from orchestrator.protocols import (
    AgentMessage,
    Capability,
    CliWarning,
    ConversationStarted,
    FinalResult,
    Program,
    SessionCommand,
    SessionEnd,
    SessionEvent,
    SessionHome,
    SessionRequest,
    ToolCall,
    ToolDenied,
    ToolResult,
    UsageReport,
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

#: Keys of the default provider. The key of another provider is in the variable set by its `env_key`.
_KEYS: Final = ("CODEX_API_KEY", "CODEX_ACCESS_TOKEN")
_USUAL_KEY: Final = "OPENAI_API_KEY"
_VARIABLES: Final = ("CODEX_CA_CERTIFICATE", "OPENAI_ORGANIZATION", "OPENAI_PROJECT")
_FOLDER: Final = "CODEX_HOME"
_FOLDERS: Final = {_FOLDER: "~/.codex"}
#: User files that a task's own home links to.
_LOGIN: Final = "auth.json"
_LINKS: Final = {
    name: f"~/.codex/{name}" for name in (_LOGIN, "config.toml", "AGENTS.md", "prompts", "rules", "skills")
}
_LOG_IN: Final = (
    "run `codex login`, set CODEX_API_KEY, or add credit; the key of another provider is in the variable that its "
    "`env_key` names"
)
_MAKE_WRITABLE: Final = (
    "it needs to write to its own folder: keep `home: own`, or add that folder to `writable` (`[~/.codex]`)"
)
_SANDBOXES: Final[Mapping[str, tuple[str, ...]]] = {
    # Codex must not ask for permission either, because no user could respond.
    "none": ("--dangerously-bypass-approvals-and-sandbox",),
    # Passed as configuration, because `exec resume` does not accept the option.
    "workspace-write": ("-c", 'sandbox_mode="workspace-write"'),
    "read-only": ("-c", 'sandbox_mode="read-only"'),
}
#: A failure as the agent's only message.
_AGENT_REPORT: Final = re.compile(
    r"(?:exceeded retry limit|unexpected status [45]\d\d|stream disconnected|you've hit your usage limit"
    r"|quota exceeded).{0,400}\Z",
    re.IGNORECASE,
)
#: The modes of the agent that correspond to its own sandboxes.
_AGENT_MODES: Final = {"none": "agent-full-access", "workspace-write": "workspace-write", "read-only": "read-only"}
_AGENT_SETTINGS: Final = {
    "analytics.enabled": False,
    "feedback.enabled": False,
    "check_for_update_on_startup": False,
    "features.shell_snapshot": False,
}
#: The program that runs it as an agent of the Agent Client Protocol, and its npm package.
_AGENT: Final = "codex-acp"
_AGENT_PACKAGE: Final = "@agentclientprotocol/codex-acp"
_SETTINGS: Final = (
    *("-c", "analytics.enabled=false"),
    *("-c", "feedback.enabled=false"),
    *("-c", "check_for_update_on_startup=false"),
    # Disables a file with all variables, including keys, that would remain if it is killed.
    *("-c", "features.shell_snapshot=false"),
)

_STATUS: Final = re.compile(r"(?:unexpected status |last status: |\(status |^\{.*\"status\": ?)(\d{3})\b", re.DOTALL)
#: Messages without a status (codex-rs/protocol/src/error.rs). The first match counts.
_WORDS: Final[Mapping[FailureClass, re.Pattern[str]]] = {
    FailureClass.AUTH: re.compile(
        r"quota exceeded|out of credits|spend cap|to use codex with your chatgpt plan|missing environment variable"
        r"|not logged in|(?:log|sign) in again|access token could not be refreshed|invalid api key|incorrect api key",
        re.IGNORECASE,
    ),
    FailureClass.RATE_LIMITED: re.compile(r"hit your usage limit|rate limit (?:reached|exceeded)", re.IGNORECASE),
    FailureClass.LIMIT: re.compile(r"ran out of room in the model's context window|session budget exceeded"),
    FailureClass.REFUSED: re.compile(r"content_filter|\bflagged for\b|for safety reasons"),
    FailureClass.OVERLOADED: re.compile(r"model is at capacity|experiencing high demand|overloaded"),
    FailureClass.TRANSIENT: re.compile(
        r"stream disconnected before completion|connection failed|error sending request|request timed out"
        r"|error while reading the server response|timeout waiting for",
        re.IGNORECASE,
    ),
    FailureClass.INVALID: re.compile(
        r"initialize in-process app-server|CODEX_HOME points to|error loading config|unexpected argument"
        r"|invalid value|is not supported when using codex|does not exist or you do not have access"
        r"|\"invalid_request_error\"",
        re.IGNORECASE,
    ),
}
_UNWRITABLE: Final = re.compile(r"initialize in-process app-server|CODEX_HOME points to")
#: Writes prevented by its own sandbox appear only in its log.
_KEPT_FROM_WRITING: Final = re.compile(r"patch rejected: .+|Failed to write file .+")
_WITHOUT_SANDBOX: Final = "its own sandbox prevents writes: set `sandbox: none` and rely on the sandbox of the run"
_NO_SANDBOX: Final = "set `sandbox: none` for its adapter and rely on the sandbox of the run"
_RULES: Final = "a rule in its configuration denies it: change the rule to allow it"
#: Output of a command restricted by its own sandbox, which nothing else reports.
_KEPT: Final = re.compile(r"Read-only file system|Operation not permitted|Permission denied")
_RECONNECTING: Final = re.compile(r"Reconnecting\.\.\. ")
_PROVIDER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
#: Built-in providers, which can't be configured.
_BUILT_IN: Final = frozenset({"amazon-bedrock", "lmstudio", "ollama", "openai"})


def _check_provider(name: str) -> str:
    if not _PROVIDER.fullmatch(name):
        raise ValueError(f"{name[:60]!r} is not a provider name: use letters, digits, '_' and '-'")
    return name


_ProviderName = Annotated[str, AfterValidator(_check_provider)]


class CodexOptions(CliOptions):
    """Options of an adapter with `use: codex`."""

    bin: ProgramName = "codex"
    provider: _ProviderName | None = None
    """One of `model_providers` in its configuration, with its own key; by default, the configured one."""
    sandbox: Literal["none", "workspace-write", "read-only"] = "none"
    """Codex's own sandbox: none (intended for sandboxed sessions), or a mode that can't write in our sandbox."""
    home: Literal["own", "shared"] = "own"
    """The location of settings and conversations (`CODEX_HOME`): a folder per task, or yours."""

    @model_validator(mode="after")
    def _check_acp(self) -> Self:
        self.check_without_acp("args")
        return self


class CodexAdapter:
    """Runs `codex exec` with the prompt on standard input."""

    Options: ClassVar[type[BaseModel]] = CodexOptions

    def __init__(self, options: CodexOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities; only a task's own home keeps conversations."""
        can = {Capability.INSTRUCTIONS, Capability.MCP}
        return frozenset(can | {Capability.RESUME, Capability.ATTACH} if self._options.has_own_home else can)

    def programs(self) -> Sequence[Program]:
        """Return Codex, with its login status command unless it uses another provider."""
        is_own = self._options.provider in {None, "openai"}
        return (
            self._options.program(
                *("npm install -g @openai/codex", ">=0.169,<0.180", _KEYS if is_own else (), _LOG_IN),
                ready=("login", "status") if is_own else (),
                verified=("0.169.0",),
            ),
        )

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the command line. Retries can be limited only for a named provider."""
        options = self._options
        provider = () if options.provider is None else _provider_settings(options.provider)
        sandbox = _SANDBOXES[options.sandbox]
        own = {_FOLDER: str(request.home)} if options.has_own_home else {}
        variables = _VARIABLES if options.has_own_home else (_FOLDER, *_VARIABLES)
        env, passed = options.variables(("HOME", "USER", *_KEYS, _USUAL_KEY, *variables), **own)
        return SessionCommand(
            argv=(
                *(options.bin, *(() if request.interactive else ("exec",))),
                *(() if request.resume is None else ("resume",)),
                *(() if request.interactive else ("--json", "--skip-git-repo-check")),
                *(*sandbox, *_SETTINGS, *provider, *(_distrust(request.worktree) if request.interactive else ())),
                *(*option_arguments("--model", options.model), *_request_settings(request), *options.args),
                *(() if request.resume is None else (request.resume,)),
                *(() if request.interactive else ("-",)),
            ),
            stdin=None if request.interactive else request.prompt_file,
            env=env,
            pass_env=passed,
            home=SessionHome(links=_LINKS, renewed=(_LOGIN,), folders=_FOLDERS) if options.has_own_home else None,
        )

    def agent(self) -> Agent:
        """See `AgentCli`."""
        own, install = self.programs()[0], f"npm install -g {_AGENT_PACKAGE}"
        return Agent(
            self._options.agent_program(own, install, _AGENT),
            resumes=self._options.has_own_home,
            enforced=frozenset(),  # without a sandbox it never asks
            failure_in_answer=lambda text: _failure(text).failed if _AGENT_REPORT.match(text) else None,
        )

    def agent_command(self, request: SessionRequest) -> SessionCommand:
        """See `AgentCli`. The agent takes settings from variables."""
        options, own = self._options, self.command(request)
        settings: dict[str, Any] = dict(_AGENT_SETTINGS)
        if options.model is not None:
            settings["model"] = options.model
        env = {
            "CODEX_CONFIG": json.dumps(settings),
            "INITIAL_AGENT_MODE": _AGENT_MODES[options.sandbox],
            "NO_BROWSER": "1",
        }
        if options.provider is not None:
            env["MODEL_PROVIDER"] = options.provider
        return replace(own, argv=options.agent_argv(_AGENT), env={**env, **own.env})

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a JSON line; plain text is a message."""
        value = parse_object(line)
        if value is None:
            return parse_plain_line(line)
        match value:
            case {"type": "thread.started", "thread_id": str(thread)} if thread:
                return (ConversationStarted(thread),)
            case {"type": "item.started" | "item.completed" as when, "item": {"type": str(kind)} as item}:
                is_finished = when == "item.completed"
                is_boxed = self._options.sandbox != "none"
                return (
                    *_of_item(kind, item, is_finished=is_finished),
                    *(_denied(kind, item, is_boxed) if is_finished else ()),
                )
            case {"type": "turn.completed"}:
                return (*_of_usage(value.get("usage"), self._options.model), FinalResult())
            case {"type": "turn.failed"}:
                error = value.get("error")
                return (_failure(as_text(error.get("message")) if isinstance(error, dict) else ""),)
            case {"type": "error", "message": str(message)}:
                return (CliWarning(message) if _RECONNECTING.match(message) else _failure(message),)
            case _:
                return ()

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure in the result or plain output, with a limit's reset time."""
        return with_reset_time(concluded_failure(end) or _failure_in_text(end), end.time)


def _provider_settings(provider: str) -> tuple[str, ...]:
    """Choose a provider, limited to one retry: the scheduler retries failed sessions."""
    chosen = ("-c", f"model_provider={provider}")
    if provider in _BUILT_IN:
        return chosen
    table = f"model_providers.{provider}"
    return (*chosen, "-c", f"{table}.request_max_retries=1", "-c", f"{table}.stream_max_retries=1")


def _distrust(worktree: Path) -> tuple[str, ...]:
    """Return the setting that the worktree is not trusted: Codex cannot save an answer to a linked `config.toml`.

    Otherwise the user could not get past the question. Codex then ignores the repository's own settings.
    """
    return ("-c", f'projects={{{json.dumps(str(worktree))}={{trust_level="untrusted"}}}}')


def _request_settings(request: SessionRequest) -> Iterator[str]:
    """Yield the configuration for a request. JSON strings are valid TOML."""
    settings: dict[str, Any] = {}
    if request.instructions is not None:
        settings["developer_instructions"] = request.instructions
    for server in request.mcp_servers:
        # A dot would start another table, and Codex does not support quoted keys.
        table = f"mcp_servers.{server.name.replace('.', '_')}"
        if server.url is not None:
            settings[f"{table}.url"] = server.url
        else:
            settings |= {f"{table}.command": server.argv[0], f"{table}.args": [*server.argv[1:]]}
            settings[f"{table}.env_vars"] = [*server.env]
        if server.name == MCP_SERVER_NAME:  # in its own sandbox it would ask for permission and be denied
            settings[f"{table}.default_tools_approval_mode"] = "approve"
    for key, value in settings.items():
        yield from ("-c", f"{key}={json.dumps(value, ensure_ascii=False)}")


def _of_item(kind: str, item: Mapping[str, Any], *, is_finished: bool) -> Iterator[SessionEvent]:
    call = as_text(item.get("id")) or None
    match kind, is_finished:
        case "agent_message", True if as_text(item.get("text")).strip():
            yield AgentMessage(as_text(item["text"]))
        case "error", True:
            yield CliWarning(as_text(item.get("message")) or "an error")
        case "command_execution", False:
            yield ToolCall("shell", one_line(as_text(item.get("command"))), call=call)
        case "mcp_tool_call", False:
            name = ".".join(filter(None, (as_text(item.get(key)) for key in ("server", "tool")))) or "mcp"
            yield ToolCall(name, _arguments_of(item.get("arguments")), call=call)
        case "command_execution" | "mcp_tool_call", True if call is not None:
            yield ToolResult(call, _failure_of_tool(item), _output_of(item))
        case "todo_list", _ if plan := plan_event(item.get("items")):
            yield plan
        case "web_search", True:
            yield ToolCall("web_search", one_line(as_text(item.get("query"))))
        case "file_change", True:
            changes = item.get("changes")
            found = (
                [change.get("path") for change in changes if isinstance(change, dict)]
                if isinstance(changes, list)
                else []
            )
            paths = tuple(path for path in found if isinstance(path, str))
            yield ToolCall("edit", one_line(" ".join(paths)), paths, call)
            if call is not None:
                yield ToolResult(call, _failure_of_tool(item))
        case _:
            pass


def _arguments_of(given: Any) -> str:
    """Return the arguments of an MCP tool as one line."""
    return one_line(json.dumps(given, ensure_ascii=False)) if isinstance(given, dict) and given else ""


def _output_of(item: Mapping[str, Any]) -> str:
    """Return the output of a command, or the result of an MCP tool."""
    result = item.get("result")
    return output_text(result.get("content") if isinstance(result, dict) else item.get("aggregated_output"))


def _denied(kind: str, item: Mapping[str, Any], is_boxed: bool) -> Iterator[ToolDenied]:
    """Yield a denial for a declined command, or one that Codex's sandbox blocked."""
    output = as_text(item.get("aggregated_output"))
    is_kept = is_boxed and item.get("status") == "failed" and _KEPT.search(output) is not None
    if kind in {"command_execution", "file_change"} and (is_kept or item.get("status") == "declined"):
        used = [call for call in _of_item(kind, item, is_finished=kind == "file_change") if isinstance(call, ToolCall)]
        remedy = _NO_SANDBOX if is_boxed else _RULES
        yield from (ToolDenied(call.name, call.detail, remedy, as_text(item.get("id")) or None) for call in used)


def _failure_of_tool(item: Mapping[str, Any]) -> str | None:
    """Return the reason for a failed tool, with the last line of its output, or None."""
    code, error = item.get("exit_code"), item.get("error")
    printed = as_text(item.get("aggregated_output")).strip().rpartition("\n")[2]
    if as_text(item.get("status")) not in {"failed", "declined"} and code in {0, None} and error is None:
        return None
    said = as_text(error.get("message")) if isinstance(error, dict) else printed
    return one_line(": ".join(filter(None, (f"exit code {code}" if code else "", said))))


def _of_usage(usage: Any, model: str | None) -> Iterator[SessionEvent]:
    """Yield the tokens of the whole conversation, with those of earlier sessions."""
    if isinstance(usage, dict):
        # Input includes cached tokens, output includes reasoning tokens.
        sent, received = as_count(usage.get("input_tokens")), as_count(usage.get("output_tokens"))
        cached = as_count(usage.get("cached_input_tokens"))
        yield UsageReport(sent, received, is_cumulative=True, cached_tokens=cached, model=model, includes_resumed=True)


def _failure(message: str) -> FinalResult:
    failure = _class_of(message) or FailureClass.CRASHED
    return FinalResult("", _failed(failure, _unwrapped(message)))


def _unwrapped(message: str) -> str:
    """Return the message in an API's JSON response, or any other text unchanged."""
    response = parse_object(message) or {}
    error = response.get("error")
    return (as_text(error.get("message")) if isinstance(error, dict) else "") or message


def _class_of(message: str) -> FailureClass | None:
    by_words = match_failure_class(message, _WORDS)
    found = _STATUS.search(message)
    by_status = None if found is None else failure_class_for_status(int(found[1]))
    # Missing credit is reported only in the text: the status is that of too many requests.
    if by_words is FailureClass.AUTH and by_status is not FailureClass.OVERLOADED:
        return by_words
    return by_status or by_words


def _failure_in_text(end: SessionEnd) -> Failed | None:
    """Return the failure of the last retry, else the one on standard error."""
    match end.events[-1:]:
        case [CliWarning(text)] if _RECONNECTING.match(text):
            return _failure(text).failed
    if end.exit == 0:
        kept = _KEPT_FROM_WRITING.search(end.stderr)
        return None if kept is None else Failed(FailureClass.REFUSED, f"{one_line(kept[0])}: {_WITHOUT_SANDBOX}")
    if any(isinstance(event, ConversationStarted) for event in end.events):
        return None
    for line in reversed(end.stderr.splitlines()):
        if not line.startswith("WARNING") and (failure := _class_of(line[:4096])) is not None:
            return _failed(failure, line)
    return None


def _failed(failure: FailureClass, message: str) -> Failed:
    reason = one_line(message) or "it ended with an error"
    if failure is FailureClass.INVALID and _UNWRITABLE.search(reason):
        return Failed(failure, f"{reason}: {_MAKE_WRITABLE}")
    return make_failure(failure, reason, _LOG_IN)


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: codex`."""
    register("codex", AgentChoice(CodexAdapter, CodexOptions))

"""Claude Code, which prints JSON lines.

Not a profile: it takes settings with a hook as JSON, reports retries and denials of tools, and prices sessions by
version.

See npm `@anthropic-ai/claude-code` and https://code.claude.com/docs/en/headless. After an API error, its `result` has
`subtype: success` and `is_error: true`. A usage limit is preceded by a `rate_limit_event` with its reset time.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import pluggy
from pydantic import BaseModel, model_validator

from adapters.acp import Agent, AgentChoice
from adapters.failures import MAX_REASON_CHARS, failure_class_for_status, make_failure, match_failure_class, one_line
from adapters.json_output import (
    as_cost,
    as_count,
    as_text,
    concluded_failure,
    detect_interruption,
    output_text,
    parse_object,
    parse_plain_line,
    plan_event,
    tool_event,
)
from adapters.options import (
    MAY_RUN_COMMANDS,
    STOP_GATE_TIMEOUT,
    CliOptions,
    ProgramName,
    TurnLimit,
    UsDollars,
    option_arguments,
    smallest_limit,
)
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
    JsonObject,
    Program,
    SessionCommand,
    SessionEnd,
    SessionEvent,
    SessionHome,
    SessionRequest,
    StarterValue,
    ToolDenied,
    ToolResult,
    UsageReport,
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

_KEYS: Final = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN")
_ENDPOINT, _FOLDER = "ANTHROPIC_BASE_URL", "CLAUDE_CONFIG_DIR"
_MODE: Final = (
    "set `permission_mode: bypassPermissions` for its adapter (intended for sandboxed sessions), or allow the tool "
    "with `args: ['--allowedTools=TOOL']`"
)
_RULES: Final = "a rule or hook in its settings denies it: change the settings to allow it"
_LOG_IN: Final = "run `claude auth login`, set ANTHROPIC_API_KEY or CLAUDE_CODE_OAUTH_TOKEN, or add credit"
_PRESET: Final = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_MAX_RETRIES": "3",
    "DISABLE_AUTOUPDATER": "1",
    "MCP_CONNECTION_NONBLOCKING": "0",  # otherwise the first turn has no MCP tools
}

#: Messages in results and plain text without a status. The first match counts.
_WORDS: Final[Mapping[FailureClass, re.Pattern[str]]] = {
    FailureClass.RATE_LIMITED: re.compile(r"usage limit reached|hit your .*limit|out of (?:extra )?usage|\b429\b"),
    FailureClass.LIMIT: re.compile(r"prompt is too long", re.IGNORECASE),
    FailureClass.AUTH: re.compile(
        r"not logged in|run /login|invalid api key|failed to authenticate|oauth token|credit balance|\b401\b",
        re.IGNORECASE,
    ),
    FailureClass.OVERLOADED: re.compile(r"overloaded|\b529\b|\b503\b", re.IGNORECASE),
    FailureClass.INVALID: re.compile(r"cannot be used with root|unknown option|issue with the selected model"),
    FailureClass.TRANSIENT: re.compile(
        r"connection error|unable to connect|connection to the api was lost|ECONNREFUSED|ECONNRESET", re.IGNORECASE
    ),
}
_SUBTYPES: Final[Mapping[str, tuple[FailureClass, str]]] = {
    "error_max_turns": (FailureClass.LIMIT, "it reached its turn limit (--max-turns)"),
    "error_max_budget_usd": (FailureClass.LIMIT, "it reached its budget (--max-budget-usd)"),
    "error_max_structured_output_retries": (FailureClass.LIMIT, "its response never matched the requested schema"),
    "error_during_execution": (FailureClass.CRASHED, "it was interrupted, or failed with an internal error"),
}
_PATH_KEYS: Final = ("file_path", "notebook_path", "path")
#: User files that a task's own home links to.
_LOGIN: Final = ".credentials.json"
_LINKS: Final = {
    name: f"~/.claude/{name}"
    for name in (_LOGIN, "settings.json", "CLAUDE.md", "agents", "commands", "plugins", "skills")
}
_SERVERS: Final = "council-mcp.json"
#: Settings in addition to those of the user and the project. The hooks of all of them run.
_SETTINGS: Final = "council-settings.json"
#: Its own state, in its configuration folder.
_STATE: Final = ".claude.json"
#: Unless permissions are bypassed, Claude Code asks for permission to use MCP tools, and no user could respond. Our
# tools change no files. One word, because the option would also consume the words after it.
_ALLOWED: Final = f"--allowedTools=mcp__{MCP_SERVER_NAME}"
_HEADLESS: Final = ("-p", "--output-format", "stream-json", "--verbose")
_EDITORS: Final = "Edit|Write|MultiEdit|NotebookEdit"
_HOOK_TIMEOUT: Final = 10  # seconds
#: Token counts per model in `modelUsage`.
_TOKENS: Final = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheCreationInputTokens")
_DETAIL_KEYS: Final = ("command", "pattern", "description", "url", "query")


#: The program that runs it as an agent of the Agent Client Protocol, and its npm package.
_AGENT: Final = "claude-agent-acp"
_AGENT_PACKAGE: Final = "@agentclientprotocol/claude-agent-acp"


class ClaudeCodeOptions(CliOptions):
    """Options of an adapter with `use: claude-code`."""

    bin: ProgramName = "claude"
    permission_mode: Annotated[
        Literal["acceptEdits", "bypassPermissions"], StarterValue("bypassPermissions", MAY_RUN_COMMANDS)
    ] = "acceptEdits"
    """The actions that Claude Code may take without asking: file changes, or all (for sandboxed sessions)."""
    max_turns: TurnLimit | None = None
    """The turn limit of a session (`--max-turns`)."""
    max_cost: UsDollars | None = None
    """The cost limit of a session in US dollars (`--max-budget-usd`)."""
    home: Literal["own", "shared"] = "own"
    """The location of settings and conversations (`CLAUDE_CONFIG_DIR`): a folder per task, or yours."""

    @model_validator(mode="after")
    def _check_acp(self) -> Self:
        self.check_without_acp("max_turns", "max_cost", "args")
        return self


class ClaudeCodeAdapter:
    """Runs `claude -p` with the prompt on standard input."""

    Options: ClassVar[type[BaseModel]] = ClaudeCodeOptions

    def __init__(self, options: ClaudeCodeOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return all capabilities except READ_ONLY, which excludes running tests.

        RESUME needs a home that keeps conversations.
        """
        can = frozenset(Capability) - {Capability.READ_ONLY}
        return can if self._options.has_own_home else can - {Capability.RESUME, Capability.ATTACH}

    def programs(self) -> Sequence[Program]:
        """Return Claude Code with its login status command."""
        return (
            self._options.program(
                *("npm install -g @anthropic-ai/claude-code", ">=2.1,<3", _KEYS, _LOG_IN),
                ready=("auth", "status"),
                verified=("2.1.197", "2.1.300", "2.1.330", "2.1.331", "2.1.332"),
            ),
        )

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the command line; as root, `IS_SANDBOX` is needed to bypass permissions."""
        options = self._options
        mode = options.permission_mode
        settings = _settings(request, mode)
        preset = {**_PRESET, "IS_SANDBOX": "1"} if mode == "bypassPermissions" else _PRESET
        own = {_FOLDER: str(request.home)} if options.has_own_home else {}
        folders = () if options.has_own_home else (_FOLDER,)
        env, passed = options.variables(("HOME", "USER", *_KEYS, _ENDPOINT, *folders), **preset, **own)
        return SessionCommand(
            argv=(
                *(options.bin, *(() if request.interactive else _HEADLESS), "--permission-mode", mode),
                *option_arguments("--model", options.model),
                *option_arguments("--resume", request.resume),
                *option_arguments("--append-system-prompt", request.instructions),
                *(() if request.interactive else _limits(options, request)),
                *(("--mcp-config", str(request.home / _SERVERS)) if request.mcp_servers else ()),
                *(("--settings", str(request.home / _SETTINGS)) if settings else ()),
                *((_ALLOWED,) if any(server.name == MCP_SERVER_NAME for server in request.mcp_servers) else ()),
                *options.args,
            ),
            stdin=None if request.interactive else request.prompt_file,
            env=env,
            pass_env=passed,
            home=_home(request, settings, is_own=options.has_own_home),
            interrupt=True,  # on SIGTERM it leaves its tools' processes behind and prints no result
        )

    def agent(self) -> Agent:
        """See `AgentCli`."""
        options = self._options
        return Agent(
            options.agent_program(self.programs()[0], f"npm install -g {_AGENT_PACKAGE}", _AGENT),
            permissions="all" if options.permission_mode == "bypassPermissions" else "edits",
            remedy=_MODE,
            model=options.model,
            resumes=options.has_own_home,
        )

    def agent_command(self, request: SessionRequest) -> SessionCommand:
        """See `AgentCli`. It asks for permission for everything; hooks and gates are those of the bridge."""
        own = self.command(replace(request, pre_edit=(), stop_gate=()))
        return replace(own, argv=self._options.agent_argv(_AGENT))

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a JSON line; plain text is a message."""
        value = parse_object(line)
        if value is None:
            return parse_plain_line(line)
        match value.get("type"):
            case "system":
                return tuple(_of_system(value, self._remedy))
            case "assistant":
                return (*_of_message(value.get("message")), *_of_usage(value.get("message")))
            case "user":
                return tuple(_of_message(value.get("message")))
            case "rate_limit_event":
                return tuple(_of_limit(value.get("rate_limit_info")))
            case "result":
                return (*_denied(value.get("permission_denials"), self._remedy), *_of_result(value))
            case _:
                return ()

    @property
    def _remedy(self) -> str:
        """The remedy for a denied tool."""
        return _MODE if self._options.permission_mode == "acceptEdits" else _RULES

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure in the result or plain output, with a limit's reset time."""
        failed = concluded_failure(end) or _failure_in_text(end) or detect_interruption(end)
        if failed is None or failed.failure is not FailureClass.RATE_LIMITED or failed.until is not None:
            return failed
        ends = [
            event.failed.until for event in end.events if isinstance(event, FinalResult) and event.failed is not None
        ]
        until = next((end for end in reversed(ends) if end is not None), None)
        return with_reset_time(replace(failed, until=until), end.time)


def _limits(options: ClaudeCodeOptions, request: SessionRequest) -> tuple[str, ...]:
    return (
        *option_arguments("--max-turns", options.max_turns),
        *option_arguments("--max-budget-usd", smallest_limit(options.max_cost, request.max_cost)),
    )


def _home(request: SessionRequest, settings: JsonObject, *, is_own: bool) -> SessionHome | None:
    files = {_SERVERS: json.dumps({"mcpServers": _servers(request)})} if request.mcp_servers else {}
    if settings:
        files[_SETTINGS] = json.dumps(settings)
    if is_own and request.interactive:
        # Otherwise it starts with its introduction and login, and asks whether to trust the worktree. Sessions without
        # a terminal also trust it.
        trust = {str(request.worktree): {"hasTrustDialogAccepted": True}}
        files[_STATE] = json.dumps({"hasCompletedOnboarding": True, "projects": trust})
    if is_own:
        return SessionHome(files, _LINKS, (_LOGIN,), folders={_FOLDER: "~/.claude"})
    return SessionHome(files) if files else None


def _settings(request: SessionRequest, mode: str) -> JsonObject:
    hooks = _hooks(request)
    settings: JsonObject = {"hooks": hooks} if hooks else {}
    if request.interactive and mode == "bypassPermissions":
        settings["skipDangerousModePermissionPrompt"] = True  # the adapter's options choose this mode
    return settings


def _hooks(request: SessionRequest) -> JsonObject:
    hooks: JsonObject = {}
    if request.pre_edit:
        run = {"type": "command", "command": shlex.join(request.pre_edit), "timeout": _HOOK_TIMEOUT}
        hooks["PreToolUse"] = [{"matcher": _EDITORS, "hooks": [run]}]
    if request.post_tool:
        # A long timeout, because a message whose delivery is recorded must arrive.
        run = {"type": "command", "command": shlex.join(request.post_tool), "timeout": STOP_GATE_TIMEOUT}
        hooks["PostToolUse"] = [{"hooks": [run]}]
    if request.stop_gate:
        run = {"type": "command", "command": shlex.join(request.stop_gate), "timeout": STOP_GATE_TIMEOUT}
        hooks["Stop"] = [{"hooks": [run]}]
    return hooks


def _servers(request: SessionRequest) -> JsonObject:
    return {
        server.name: {"type": "http", "url": server.url}
        if server.url is not None
        # Servers receive session variables by name.
        else {
            "command": server.argv[0],
            "args": [*server.argv[1:]],
            "env": {name: f"${{{name}:-}}" for name in server.env},
        }
        # Otherwise the model sees only tool names and has to search for a tool before it can submit a handoff.
        | ({"alwaysLoad": True} if server.name == MCP_SERVER_NAME else {})
        for server in request.mcp_servers
    }


def _of_system(value: JsonObject, remedy: str) -> Iterator[SessionEvent]:
    session = as_text(value.get("session_id"))
    if value.get("subtype") == "init" and session:
        yield ConversationStarted(session)
        servers = value.get("mcp_servers")
        for server in servers if isinstance(servers, list) else ():
            if isinstance(server, dict) and server.get("status") == "failed":
                yield CliWarning(f"the MCP server {as_text(server.get('name'))} did not start")
    if value.get("subtype") == "permission_denied":
        name, reason = as_text(value.get("tool_name")) or "a tool", one_line(as_text(value.get("message")))
        yield ToolDenied(name, reason, remedy, as_text(value.get("tool_use_id")) or None)
    if value.get("subtype") == "api_retry":
        message = as_text(value.get("error")) or "an error"
        attempt, total = as_count(value.get("attempt")), as_count(value.get("max_retries"))
        status = as_count(value.get("error_status"))
        yield CliWarning(f"{message}{f' ({status})' if status else ''}, retry {attempt} of {total}")


def _denied(denials: Any, remedy: str) -> Iterator[ToolDenied]:
    """Yield the denied tools in a result, each with its main argument."""
    for denial in denials if isinstance(denials, list) else ():
        match denial:
            case {"tool_name": str(name), "tool_input": dict(option_arguments)}:
                detail = tool_event(name, option_arguments, _PATH_KEYS, _DETAIL_KEYS).detail
                yield ToolDenied(name, detail, remedy, as_text(denial.get("tool_use_id")) or None)
            case _:
                pass


def _of_message(message: Any) -> Iterator[SessionEvent]:
    content = message.get("content") if isinstance(message, dict) else None
    for block in content if isinstance(content, list) else ():
        match block:
            case {"type": "text", "text": str(text)} if text.strip():
                yield AgentMessage(text)
            case {"type": "tool_use", "name": "TodoWrite", "input": {"todos": todos}} if plan := plan_event(todos):
                yield plan
            case {"type": "tool_use", "name": str(name), "input": dict(option_arguments)}:
                yield tool_event(name, option_arguments, _PATH_KEYS, _DETAIL_KEYS, block.get("id"))
            case {"type": "tool_result", "tool_use_id": str(call)}:
                output = output_text(block.get("content"))
                yield ToolResult(call, one_line(output) if block.get("is_error") is True else None, output)
            case _:
                pass


def _of_usage(message: Any) -> Iterator[SessionEvent]:
    """Yield the usage so far of a model call, which each part of the response reports."""
    match message:
        case {"id": str(call), "usage": dict(usage)} if call:
            yield _spent(usage, call=call, model=as_text(message.get("model")) or None)
        case _:
            pass


def _spent(usage: Mapping[str, Any], **more: Any) -> UsageReport:
    made, read = (as_count(usage.get(f"cache_{kind}_input_tokens")) for kind in ("creation", "read"))
    sent = as_count(usage.get("input_tokens")) + made + read
    return UsageReport(sent, as_count(usage.get("output_tokens")), cached_tokens=read, **more)


def _cost_by_model(usage: Any) -> float | None:
    """Return the total cost of all models, or None if a model has no cost."""
    models = [*usage.values()] if isinstance(usage, dict) else []
    costs = [as_cost(model.get("costUSD")) if isinstance(model, dict) else None for model in models]
    known = [cost for cost in costs if cost is not None]
    return sum(known) if known and len(known) == len(costs) else None


def _tokens_by_model(usage: Any) -> int:
    models = [model for model in usage.values() if isinstance(model, dict)] if isinstance(usage, dict) else []
    return sum(as_count(model.get(key)) for model in models for key in _TOKENS)


def _of_limit(info: Any) -> Iterator[SessionEvent]:
    """Yield the limit of a rejected request.

    Paid usage may still continue the request; then the later result counts.
    """
    if isinstance(info, dict) and info.get("status") == "rejected":
        reason = f"the account reached its limit ({as_text(info.get('rateLimitType')) or 'usage'})"
        yield FinalResult("", Failed(FailureClass.RATE_LIMITED, reason, as_cost(info.get("resetsAt"))))


def _of_result(value: JsonObject) -> Iterator[SessionEvent]:
    usage = value.get("usage")
    if isinstance(usage, dict):
        # Since about 2.1.300, the total includes earlier sessions of the conversation; later versions add the new part.
        own = _cost_by_model(value.get("model_usage_since_last_result"))
        if own is None:
            total, priced = as_cost(value.get("total_cost_usd")), _tokens_by_model(value.get("modelUsage"))
            yield _spent(usage, cost=total, is_cumulative=True, priced_tokens=priced)
        else:
            yield _spent(usage, is_cumulative=True)
            yield UsageReport(cost=own)
    text = as_text(value.get("result"))
    yield FinalResult(text, _failure_of(value, text))


def _failure_of(value: JsonObject, text: str) -> Failed | None:
    reason = text.strip()[:MAX_REASON_CHARS]
    if (known := _SUBTYPES.get(as_text(value.get("subtype")))) is not None:
        return Failed(known[0], reason or known[1])
    if value.get("is_error") is not True:
        return None
    by_words = match_failure_class(text, _WORDS)
    failure = failure_class_for_status(as_count(value.get("api_error_status"))) or by_words or FailureClass.CRASHED
    # Missing credit is reported only in the text: the status is that of an invalid request.
    if failure is FailureClass.INVALID and by_words is not None:
        failure = by_words
    return make_failure(failure, reason or "it ended with an error", _LOG_IN)


def _failure_in_text(end: SessionEnd) -> Failed | None:
    said = [line for line in end.stdout.splitlines() if not line.startswith("{")]
    for line in [*said, *end.stderr.splitlines()][::-1]:
        if (failure := match_failure_class(line[:4096], _WORDS)) is not None:
            return make_failure(failure, line.strip()[:MAX_REASON_CHARS], _LOG_IN)
    return None


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: claude-code`."""
    register("claude-code", AgentChoice(ClaudeCodeAdapter, ClaudeCodeOptions))

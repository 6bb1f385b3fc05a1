"""Gemini CLI, which prints JSON lines.

Not a profile: its settings contain a hook and the MCP servers, and it reports usage per model in nested statistics.

See npm `@google/gemini-cli` and https://geminicli.com/docs/cli/headless/. Its result reports failures as an error name
and a message, with the HTTP status only if the message quotes the service's response. Failures before the first turn,
such as a missing login, are reported only on standard error.
"""

from __future__ import annotations

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
    as_count,
    as_text,
    concluded_failure,
    output_text,
    parse_object,
    parse_plain_line,
    plan_event,
    tool_event,
)
from adapters.options import MAY_RUN_COMMANDS, STOP_GATE_TIMEOUT, CliOptions, ProgramName, TurnLimit, option_arguments
from adapters.rate_limits import limit_reset_time
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
    SettingsOverlay,
    StarterValue,
    ToolDenied,
    ToolResult,
    UsageReport,
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

_KEYS: Final = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
_VARIABLES: Final = (
    *("GOOGLE_GEMINI_BASE_URL", "GOOGLE_VERTEX_BASE_URL", "GOOGLE_GENAI_API_VERSION"),
    *("GOOGLE_GENAI_USE_GCA", "GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_PROJECT_ID"),
    *("GOOGLE_CLOUD_LOCATION", "GOOGLE_APPLICATION_CREDENTIALS", "GEMINI_MODEL"),
)
_FOLDER: Final = "GEMINI_CLI_HOME"
#: User files that a task's own home links to.
_LOGIN: Final = ".gemini/oauth_creds.json"
_LINKS: Final = {
    name: f"~/{name}"
    for name in (
        *(_LOGIN, ".gemini/google_accounts.json", ".gemini/installation_id", ".gemini/GEMINI.md"),
        *(".gemini/commands", ".gemini/extensions"),
    )
}
_SETTINGS: Final = ".gemini/settings.json"
_EDITORS: Final = "^(write_file|replace)$"
_HOOK_TIMEOUT: Final = 10  # seconds
_LOG_IN: Final = (
    "run `gemini` once and log in, or set GEMINI_API_KEY; with GOOGLE_GEMINI_BASE_URL also `auth: gemini-api-key`"
)
_PRESET: Final = {
    "GEMINI_CLI_NO_RELAUNCH": "true",  # otherwise it runs itself as a child process, which receives no signals
    "GEMINI_CLI_TRUST_WORKSPACE": "true",  # otherwise it rejects folders not marked as trusted, such as all worktrees
    "GEMINI_TELEMETRY_ENABLED": "false",
    "NO_BROWSER": "true",  # otherwise it waits for a login in a browser
}

#: Error names in results. Others are classified by status or text.
_NAMES: Final[Mapping[str, FailureClass]] = {
    "TerminalQuotaError": FailureClass.RATE_LIMITED,
    "RetryableQuotaError": FailureClass.RATE_LIMITED,
    "FatalAuthenticationError": FailureClass.AUTH,
    "UnauthorizedError": FailureClass.AUTH,
    "ForbiddenError": FailureClass.AUTH,
    "AccountSuspendedError": FailureClass.AUTH,
    "ValidationRequiredError": FailureClass.AUTH,
    "ProjectIdRequiredError": FailureClass.AUTH,
    "FatalTurnLimitedError": FailureClass.LIMIT,
    "BadRequestError": FailureClass.INVALID,
    "ModelNotFoundError": FailureClass.INVALID,
    "FatalInputError": FailureClass.INVALID,
    "FatalConfigError": FailureClass.INVALID,
    "FatalSandboxError": FailureClass.INVALID,
    "FatalUntrustedWorkspaceError": FailureClass.INVALID,
    "FatalCancellationError": FailureClass.CRASHED,
    "FatalToolExecutionError": FailureClass.CRASHED,
}
#: Messages more specific than the status: an invalid key and a prompt that is too long have the status of an invalid
# request.
_PLAIN: Final[Mapping[FailureClass, re.Pattern[str]]] = {
    FailureClass.AUTH: re.compile(
        r"API[ _]KEY[ _](?:not valid|not found|INVALID|expired)|must specify the (?:GEMINI_API_KEY|GOOGLE_)"
        r"|set an Auth method|authentication is configured|authentication type is|Invalid auth method"
        r"|Failed to authenticate|Manual authorization is required|Authentication (?:failed|cancelled)",
        re.IGNORECASE,
    ),
    FailureClass.LIMIT: re.compile(
        r"exceeds the maximum number of tokens|exceeded the token limit|context window will overflow"
        r"|maximum session turns exceeded|reached max session turns",
        re.IGNORECASE,
    ),
}
#: Messages without a status. The first match counts.
_WORDS: Final[Mapping[FailureClass, re.Pattern[str]]] = {
    FailureClass.RATE_LIMITED: re.compile(
        r"RESOURCE_EXHAUSTED|resource has been exhausted|exhausted your|\bquota\b|to increase your limits",
        re.IGNORECASE,
    ),
    FailureClass.OVERLOADED: re.compile(r"\boverloaded\b|high demand|\bUNAVAILABLE\b", re.IGNORECASE),
    FailureClass.AUTH: re.compile(r"UNAUTHENTICATED|PERMISSION_DENIED|invalid_grant"),
    FailureClass.REFUSED: re.compile(r"was blocked due to"),
    FailureClass.TRANSIENT: re.compile(
        r"fetch failed|ECONNREFUSED|ECONNRESET|ENOTFOUND|ETIMEDOUT|EAI_AGAIN|socket hang up|API Error: terminated"
        r"|incomplete json segment|returned an empty response|premature close|DEADLINE_EXCEEDED",
        re.IGNORECASE,
    ),
    FailureClass.INVALID: re.compile(
        r"not running in a trusted directory|unknown argument|invalid values:|invalid approval mode|INVALID_ARGUMENT"
        r"|invalid custom base url|invalid configuration|no input provided|model is not found|is not found for API",
        re.IGNORECASE,
    ),
}
_NAME: Final = re.compile(r"\b([A-Z]\w+Error): ")
_STATUS: Final = re.compile(r"\b(?:status|code)\"?\s*:\s*([45][0-9]{2})\b")
_MESSAGE: Final = re.compile(r'"message"\s*:\s*"([^"]+)"')
_COLOR: Final = re.compile(r"\x1b\[[0-9;]*m")
#: Maximum characters of a line to search: the time for some patterns is quadratic.
_LONGEST_LINE: Final = 4096
_REPORT: Final = "Error when talking to Gemini API"
_READ_ONLY: Final = re.compile(r"critical error .*\b(?:EROFS|EACCES)\b.*'(.*/\.gemini)/")
_NO_RESULT: Final = "it ended without a result, as if stopped"
#: Error types of denied tools, and their messages if the type is generic.
_DENIALS: Final = frozenset({"path_not_in_workspace", "permission_denied", "policy_violation", "tool_not_registered"})
_KEPT_OFF: Final = re.compile(r"Path not in workspace|Access denied")
#: Output of a shell command that Gemini CLI never runs but reports as a success.
_BLOCKED: Final = "Blocked: command substitution detected in shell command."
_CALLED: Final = re.compile(r"([A-Za-z]+(?:_(?!_)[A-Za-z]+)*)")
_YOLO: Final = "set `approval_mode: yolo` for its adapter (intended for sandboxed sessions)"
_POLICY: Final = "a policy in its settings denies it: change the policy to allow it"
_PATH_KEYS: Final = ("file_path", "absolute_path")
_DETAIL_KEYS: Final = ("command", "pattern", "query", "dir_path", "path", "prompt", "name", "description")


class GeminiOptions(CliOptions):
    """Options of an adapter with `use: gemini`."""

    bin: ProgramName = "gemini"
    approval_mode: Annotated[Literal["auto_edit", "yolo"], StarterValue("yolo", MAY_RUN_COMMANDS)] = "auto_edit"
    """The actions that Gemini CLI may take without asking: file changes, or all (for sandboxed sessions)."""
    auth: Literal["gemini-api-key", "oauth-personal", "vertex-ai"] | None = None
    """The login method, as in the setting `security.auth.selectedType`; by default, your settings decide."""
    max_turns: TurnLimit | None = None
    """The turn limit of a session."""
    home: Literal["own", "shared"] = "own"
    """The location of settings and conversations (`GEMINI_CLI_HOME`): a folder per task, or yours."""

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if not self.has_own_home and (self.auth is not None or self.max_turns is not None):
            raise ValueError(
                "`auth` and `max_turns` need a home per task: keep `home: own`, or add them to your own settings.json"
            )
        return self


class GeminiAdapter:
    """Runs `gemini` with the prompt on standard input."""

    Options: ClassVar[type[BaseModel]] = GeminiOptions

    def __init__(self, options: GeminiOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities; only a task's own home has settings and conversations."""
        in_own = {Capability.MCP, Capability.PRE_EDIT, Capability.RESUME, Capability.ATTACH, Capability.STOP_GATE}
        return frozenset(in_own if self._options.has_own_home else ())

    def programs(self) -> Sequence[Program]:
        """Return Gemini CLI, which has no login status command."""
        install, verified = "npm install -g @google/gemini-cli", ("0.61.0",)
        return (self._options.program(install, ">=0.61,<1", _KEYS, _LOG_IN, verified=verified),)

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the command line; values without an option become settings."""
        options = self._options
        mode = options.approval_mode
        own = {_FOLDER: str(request.home)} if options.has_own_home else {}
        variables = _VARIABLES if options.has_own_home else (_FOLDER, *_VARIABLES)
        env, passed = options.variables(("HOME", *_KEYS, *variables), **_PRESET, **own)
        settings = {_SETTINGS: SettingsOverlay(f"~/{_SETTINGS}", _settings(options, request), _hooks(request))}
        return SessionCommand(
            argv=(
                *(options.bin, *(() if request.interactive else ("--output-format", "stream-json"))),
                *("--approval-mode", mode),
                *(
                    *option_arguments("--model", options.model),
                    *option_arguments("--resume", request.resume),
                    *options.args,
                ),
            ),
            stdin=None if request.interactive else request.prompt_file,
            env=env,
            pass_env=passed,
            home=SessionHome({}, _LINKS, (_LOGIN,), settings, {_FOLDER: "~"}) if options.has_own_home else None,
        )

    def agent(self) -> Agent:
        """See `AgentCli`."""
        options = self._options
        return Agent(
            options.agent_program(self.programs()[0], ""),
            permissions="all" if options.approval_mode == "yolo" else "edits",
            remedy=_YOLO,
            resumes=options.has_own_home,
        )

    def agent_command(self, request: SessionRequest) -> SessionCommand:
        """See `AgentCli`. It asks for permission for everything."""
        options = self._options
        argv = options.agent_argv(options.bin, "--acp", *option_arguments("--model", options.model), *options.args)
        return replace(self.command(request), argv=argv)

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a JSON line; plain text is a message."""
        value = parse_object(line)
        if value is None:
            return parse_plain_line(line)
        match value.get("type"):
            case "init" if session := as_text(value.get("session_id")):
                return (ConversationStarted(session),)
            case "message" if value.get("role") == "assistant" and (text := as_text(value.get("content"))):
                return (AgentMessage(text, part=value.get("delta") is True),)
            case "tool_use":
                return tuple(_of_tool(as_text(value.get("tool_name")), value.get("parameters"), value.get("tool_id")))
            case "tool_result":
                return tuple(_of_tool_result(value, self._options.approval_mode))
            case "error":
                return tuple(_of_error(value))
            case "result":
                return tuple(_of_result(value, self._options.model))
            case _:
                return ()

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure in the result if classified, else the one on standard error."""
        failed = concluded_failure(end)
        if failed is not None and failed.failure is FailureClass.CRASHED:
            failed = _earlier_failure(end) or _failure_reported(end.stderr) or failed
        if failed is None and not _has_result(end):
            # After the start, lines are about tools or errors that were handled.
            failed = _failure_reported(end.stderr) or (None if _has_begun(end) else _failure_in_lines(end.stderr))
            if failed is None and end.events:
                # After a signal it exits with 0 although it has not finished.
                failed = Failed(FailureClass.CRASHED, _NO_RESULT, unfinished=True)
        if failed is None or failed.failure is not FailureClass.RATE_LIMITED:
            return failed
        return Failed(failed.failure, failed.reason, _end_of_limit(end))


def _settings(options: GeminiOptions, request: SessionRequest) -> JsonObject:
    """Return settings without updates and statistics, and with fewer attempts.

    The scheduler retries failed sessions.
    """
    settings: JsonObject = {
        "general": {"enableAutoUpdate": False, "maxAttempts": 3},
        "privacy": {"usageStatisticsEnabled": False},
    }
    if options.auth is not None:
        settings["security"] = {"auth": {"selectedType": options.auth}}
    if options.max_turns is not None:
        settings["model"] = {"maxSessionTurns": options.max_turns}
    if request.mcp_servers:
        settings["mcpServers"] = {
            server.name: {"httpUrl": server.url, "trust": True}
            if server.url is not None
            else {
                "command": server.argv[0],
                "args": [*server.argv[1:]],
                "trust": True,
                "env": {name: f"${name}" for name in server.env},
            }
            for server in request.mcp_servers
        }
    return settings


def _hooks(request: SessionRequest) -> JsonObject:
    """Return the hooks of the session, in addition to the user's."""

    def run(command: Sequence[str], seconds: int) -> JsonObject:
        return {"name": "council", "type": "command", "command": shlex.join(command), "timeout": seconds * 1000}

    hooks: JsonObject = {}
    if request.pre_edit:
        hooks["BeforeTool"] = [{"matcher": _EDITORS, "hooks": [run(request.pre_edit, _HOOK_TIMEOUT)]}]
    if request.stop_gate:
        hooks["AfterAgent"] = [{"hooks": [run(request.stop_gate, STOP_GATE_TIMEOUT)]}]
    return {"hooks": hooks} if hooks else {}


def _of_tool(name: str, given: Any, call: Any) -> Iterator[SessionEvent]:
    if name == "write_todos" and isinstance(given, dict) and (plan := plan_event(given.get("todos"))):
        yield plan
    elif name:
        yield tool_event(name, given if isinstance(given, dict) else {}, _PATH_KEYS, _DETAIL_KEYS, call)


def _of_tool_result(value: JsonObject, mode: str) -> Iterator[SessionEvent]:
    error = value.get("error")
    error = error if isinstance(error, dict) else {}
    is_blocked = as_text(value.get("output")) == _BLOCKED
    message, call = _BLOCKED if is_blocked else one_line(as_text(error.get("message"))), as_text(value.get("tool_id"))
    has_failed = is_blocked or value.get("status") == "error"
    has_no_remedy = is_blocked or _KEPT_OFF.match(message) is not None
    if has_failed and (has_no_remedy or as_text(error.get("type")) in _DENIALS):
        tool = _CALLED.match(call)
        remedy = "" if has_no_remedy else _YOLO if mode == "auto_edit" else _POLICY
        yield ToolDenied(tool[1] if tool else "a tool", message, remedy, call or None)
    if call:
        yield ToolResult(call, message if has_failed else None, output_text(value.get("output")))
    elif has_failed and message:
        yield CliWarning(f"a tool failed: {message}")


def _of_error(value: JsonObject) -> Iterator[SessionEvent]:
    text = as_text(value.get("message"))
    if value.get("severity") == "error":
        yield FinalResult("", _failure("", text))
    elif text.strip():
        yield CliWarning(one_line(text))


def _of_result(value: JsonObject, model: str | None) -> Iterator[SessionEvent]:
    """Yield the usage and failure in a result.

    Success does not override an earlier error, because Gemini CLI stops after an error.
    """
    stats, error = value.get("stats"), value.get("error")
    stats = stats if isinstance(stats, dict) else {}
    sent, received = as_count(stats.get("input_tokens")), as_count(stats.get("output_tokens"))
    cached = as_count(stats.get("cached"))
    yield UsageReport(
        sent, received, is_cumulative=True, cached_tokens=cached, model=_most_used(stats.get("models")) or model
    )
    if isinstance(error, dict) or value.get("status") == "error":
        error = error if isinstance(error, dict) else {}
        yield FinalResult("", _failure(as_text(error.get("type")), as_text(error.get("message"))))


def _most_used(models: Any) -> str | None:
    """Return the model with the most tokens in a result."""
    found = models if isinstance(models, dict) else {}
    used = {name: as_count(counts.get("total_tokens")) for name, counts in found.items() if isinstance(counts, dict)}
    return max(used, key=lambda name: used[name], default=None)


def _failure(name: str, text: str) -> Failed:
    text = text.replace('\\"', '"')
    failure = (
        match_failure_class(text, _PLAIN)
        or _class_of_status(text)
        or _NAMES.get(name)
        or match_failure_class(text, _WORDS)
    )
    message = _MESSAGE.search(text)
    said = one_line(message[1] if message else text.removeprefix("[API Error: ").replace("]\n", "\n").removesuffix("]"))
    return make_failure(failure or FailureClass.CRASHED, said or "it ended with an error", _LOG_IN)


def _earlier_failure(end: SessionEnd) -> Failed | None:
    """Return the last specific failure before the result, which has less detail."""
    failures = [event.failed for event in end.events if isinstance(event, FinalResult) and event.failed is not None]
    return next((failed for failed in reversed(failures) if failed.failure is not FailureClass.CRASHED), None)


def _failure_reported(stderr: str) -> Failed | None:
    """Return the failure in an error report, which has its status near the end."""
    _, reported, report = stderr.rpartition(_REPORT)
    if not reported:
        return None
    names = _NAME.findall(report)
    failure = (
        match_failure_class(report, _PLAIN) or _class_of_status(report) or (_NAMES.get(names[-1]) if names else None)
    )
    return (
        None
        if failure is None
        else make_failure(failure, one_line(_NAME.split(report)[-1].partition("\n")[0]), _LOG_IN)
    )


def _failure_in_lines(stderr: str) -> Failed | None:
    for line in (line[:_LONGEST_LINE] for line in reversed(stderr.splitlines())):
        if (home := _READ_ONLY.search(line)) is not None:
            reason = f"it can't write to {home[1]}, which it needs to start"
            remedy = "keep `home: own`, or add that folder to `writable`"
            return Failed(FailureClass.INVALID, f"{reason}: {remedy}"[:MAX_REASON_CHARS])
        if (failure := match_failure_class(line, _PLAIN) or match_failure_class(line, _WORDS)) is not None:
            return make_failure(failure, one_line(_COLOR.sub("", line)), _LOG_IN)
    return None


def _class_of_status(text: str) -> FailureClass | None:
    found = _STATUS.search(text)
    return None if found is None else failure_class_for_status(int(found[1]))


def _has_begun(end: SessionEnd) -> bool:
    return any(not isinstance(event, AgentMessage) or event.part for event in end.events)


def _has_result(end: SessionEnd) -> bool:
    return any(isinstance(event, UsageReport | FinalResult) for event in end.events)


def _end_of_limit(end: SessionEnd) -> float | None:
    """Return the reset time of the limit, from the result or standard error."""
    results = [line for line in end.stdout.splitlines() if '"result"' in line]
    return next(filter(None, (limit_reset_time(text, end.time) for text in (*results[-1:], end.stderr))), None)


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: gemini`."""
    register("gemini", AgentChoice(GeminiAdapter, GeminiOptions))

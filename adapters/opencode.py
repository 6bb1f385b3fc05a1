"""opencode, which prints JSON lines.

Not a profile: it needs plugins of ours in its home, MCP servers in its configuration, and failures from its log.

See npm `opencode-ai` and https://opencode.ai/docs/cli. opencode prints no result: the session succeeded if its last
step finished with `stop`. It retries five times. The reasons for retries, and the cause of an `UnknownError`, are only
in its log, which is therefore sent to standard error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import reduce
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import pluggy
from pydantic import AfterValidator, BaseModel, Field, JsonValue, model_validator

from adapters.acp import Agent, AgentChoice
from adapters.bridges.tool_text import shorten
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
from adapters.options import INSTRUCTIONS_FILE, AdapterOptions, CliOptions, OptionValue, ProgramName, option_arguments
from adapters.rate_limits import parse_limit, with_reset_time
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.security.secrets import has_secret_key, secret_values
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterAdapter
from orchestrator.protocols import (
    AgentMessage,
    Capability,
    ConversationStarted,
    FinalResult,
    JsonObject,
    Program,
    SessionCommand,
    SessionEnd,
    SessionEvent,
    SessionHome,
    SessionRequest,
    ToolDenied,
    ToolResult,
    UsageReport,
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

_KEYS: Final = (
    *("ANTHROPIC_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_GENERATIVE_AI_API_KEY", "OPENAI_API_KEY"),
    *("OPENCODE_API_KEY", "OPENROUTER_API_KEY"),
)
_VARIABLES: Final = ("OPENCODE_CONFIG", "OPENCODE_CONFIG_DIR")
#: Its folders, keyed by name in a task's own home. They include the configuration folder, because opencode starts only
# if it can write there.
_FOLDERS: Final = {
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
    "XDG_DATA_HOME": "share",
    "XDG_STATE_HOME": "state",
}
_LOGIN: Final = "share/opencode/auth.json"
#: The folders of the user that `_LINKS` leads to.
_MOVED: Final = {"XDG_CONFIG_HOME": "~/.config", "XDG_DATA_HOME": "~/.local/share"}
#: User files that a task's own home links to, for opencode and git.
_LINKS: Final = {
    _LOGIN: "~/.local/share/opencode/auth.json",
    "config/git": "~/.config/git",
    **{
        f"config/opencode/{name}": f"~/.config/opencode/{name}"
        for name in (
            *("opencode.json", "opencode.jsonc", "config.json", "AGENTS.md"),
            *("agent", "agents", "command", "commands", "mode", "modes", "plugin", "plugins"),
            *("skill", "skills", "themes", "tool", "tools"),
        )
    },
}
#: Files without which opencode downloads a package of 63 MB into its configuration folder at each start. Our plugins do
# not use it, and linked plugins and tools of the user use the one next to the files that the links lead to.
_PACKAGE_FILES: Final[Mapping[str, str]] = {
    "config/opencode/node_modules/.keep": "",
    "config/opencode/package-lock.json": json.dumps({"packages": {"": {"dependencies": {"@opencode-ai/plugin": "*"}}}}),
}
_LOG_IN: Final = "run `opencode auth login`, set its provider's key (such as ANTHROPIC_API_KEY), or add credit"
_HEADLESS: Final = ("run", "--format", "json", "--auto", "--print-logs", "--log-level", "ERROR")
_PRESET: Final = {
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",  # there is a built-in list
    "OPENCODE_DISABLE_SHARE": "1",
}
_CONFIG: Final[Mapping[str, JsonValue]] = {"autoupdate": False, "share": "disabled"}
#: Files that opencode adds to a project's configuration folder and excludes from git.
_LEAVINGS: Final = tuple(
    f"/.opencode/{name}" for name in (".gitignore", "bun.lock", "node_modules/", "package-lock.json", "package.json")
)

#: Messages about missing credit, whose status is that of an invalid request or a temporary limit.
_WITHOUT_CREDIT: Final = re.compile(
    r"credit balance is too low|insufficient_quota|api[ _]key[ _](?:not valid|invalid)", re.IGNORECASE
)
_ERRORS: Final[Mapping[str, FailureClass]] = {
    "ProviderAuthError": FailureClass.AUTH,
    "ContextOverflowError": FailureClass.LIMIT,
    "MessageOutputLengthError": FailureClass.LIMIT,
    "StructuredOutputError": FailureClass.LIMIT,
    "ContentFilterError": FailureClass.REFUSED,
}
_REASONS: Final[Mapping[str, tuple[FailureClass, str]]] = {
    "length": (FailureClass.LIMIT, "its response was truncated at the model's limit: make the task smaller"),
    "content-filter": (FailureClass.REFUSED, "the provider's filter blocked its response"),
}
#: Log messages for events without a class. The first match counts.
_WORDS: Final[Mapping[FailureClass, re.Pattern[str]]] = {
    FailureClass.AUTH: re.compile(r"api key is missing|invalid (?:x-)?api[- ]key|incorrect api key", re.IGNORECASE),
    FailureClass.RATE_LIMITED: re.compile(r"rate[ _-]?limit|too many requests|usage limit", re.IGNORECASE),
    FailureClass.OVERLOADED: re.compile(r"overloaded|internal server error|service unavailable", re.IGNORECASE),
    FailureClass.TRANSIENT: re.compile(
        r"cannot connect to api|unable to connect|connection refused|connection was closed|ECONNREFUSED|ECONNRESET",
        re.IGNORECASE,
    ),
    FailureClass.INVALID: re.compile(
        r"model not found|ProviderModelNotFoundError|ProviderInitError|ConfigInvalidError|ConfigJsonError"
        r"|session not found|no providers are available",
        re.IGNORECASE,
    ),
}
_UNWRITABLE: Final = re.compile(
    r"\b(?:EACCES|ENOTDIR|EPERM|EROFS)\b.*\bmkdir\b|FileSystem\.\w+ \(/.*/opencode/"
    r"|unable to open database file|readonly database"
)
_WRITE_THERE: Final = (
    "keep `home: own`, or start it once manually and make its folders `writable` (~/.local/share/opencode, "
    "~/.local/state/opencode, ~/.cache/opencode)"
)
_DENIED: Final = ("The user has specified a rule which prevents", "The user rejected permission")
_ALLOW: Final = "allow it with `permission` in the adapter's `config`"
_ERROR_LOGGED: Final = re.compile(r"\berror(?:\.error)?=(\"(?:[^\"\\]|\\.)*\"|\S+)")
_LONGEST_LINE: Final = 4096
_DETAIL_KEYS: Final = ("command", "pattern", "description", "url", "query")
_PATCHED: Final = re.compile(r"^\*\*\* (?:Add File|Update File|Delete File|Move to): (.+)$", re.MULTILINE)


def _check_model(model: str) -> str:
    provider, slash, name = model.partition("/")
    if not (provider and slash and name):
        raise ValueError(f"{model[:60]!r} has no provider: write provider/model, as listed by `opencode models`")
    return model


def _check_config(config: dict[str, JsonValue]) -> dict[str, JsonValue]:
    for name, value in _texts("config", config):
        if has_secret_key(value) or secret_values({name: value}):
            raise ValueError(
                f"{name} looks like a secret, which does not belong in a file: write '{{env:NAME}}' as its value"
            )
    return config


def _texts(name: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    """Yield each text in a configuration with its key."""
    if isinstance(value, str):
        yield name, "" if value.startswith("{env:") else value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(name, inner)


_Model = Annotated[OptionValue, AfterValidator(_check_model)]
_Config = Annotated[dict[str, JsonValue], AfterValidator(_check_config)]

#: A plugin (https://opencode.ai/docs/plugins) that runs a command before a file is edited.
_HOOK_FILE: Final = "council-hook.js"
_HOOK: Final = """\
import { spawnSync } from "node:child_process"
const [program, ...args] = ARGV
const editors = ["write", "edit", "multiedit", "patch", "apply_patch"]
export const Council = async ({ directory }) => ({
  "tool.execute.before": async ({ tool }, { args: given }) => {
    if (!editors.includes(tool)) return
    const call = { hook_event_name: "PreToolUse", cwd: directory, tool_name: tool, tool_input: given }
    const done = spawnSync(program, args, { input: JSON.stringify(call), encoding: "utf8", timeout: 10000 })
    let output
    try { output = JSON.parse(done.stdout).hookSpecificOutput } catch { return }
    if (output?.permissionDecision === "deny") throw new Error(output.permissionDecisionReason)
  },
})
"""


#: A plugin that runs a command after each tool call, and adds its text to the result.
_MESSAGES_FILE: Final = "council-messages.js"
_MESSAGES: Final = """\
import { spawnSync } from "node:child_process"
const [program, ...args] = ARGV
const subagents = new Set()
export const CouncilMessages = async ({ directory }) => ({
  event: async ({ event }) => {
    if (event.type === "session.created" && event.properties.info.parentID) subagents.add(event.properties.info.id)
  },
  "tool.execute.after": async ({ tool, sessionID }, result) => {
    if (subagents.has(sessionID) || typeof result?.output !== "string") return
    const call = { hook_event_name: "PostToolUse", cwd: directory, tool_name: tool }
    const done = spawnSync(program, args, { input: JSON.stringify(call), encoding: "utf8" })
    if (done.stdout) result.output += "\\n\\n" + JSON.parse(done.stdout).hookSpecificOutput.additionalContext
  },
})
"""

#: A plugin that ends opencode when it would silently wait longer than this for a usage limit, possibly for hours. It
# first prints a line to standard error, for `parse_limit`.
_LIMIT_FILE: Final = "council-limit.js"
#: The variable with a configuration that overrides its files.
_CONTENT: Final = "OPENCODE_CONFIG_CONTENT"
_LIMIT: Final = """\
import { writeSync } from "node:fs"
const longest = 60000
export const CouncilLimit = async () => ({
  event: async ({ event }) => {
    const status = event.type === "session.status" ? event.properties.status : undefined
    if (status?.type !== "retry" || !(status.next - Date.now() > longest)) return
    writeSync(2, JSON.stringify({ type: "council.limited", message: status.message, until: status.next }) + "\\n")
    process.kill(process.pid, "SIGKILL")
  },
})
"""


class OpencodeOptions(CliOptions):
    """Options of an adapter with `use: opencode`."""

    bin: ProgramName = "opencode"
    model: _Model | None = None
    """The model as `provider/model`; by default, the one in its configuration."""
    agent: OptionValue | None = None
    """The agent, as in `--agent`; by default, the one in its configuration."""
    config: _Config = Field(default_factory=dict)
    """Configuration that overrides its files, in the format of `opencode.json`."""
    home: Literal["own", "shared"] = "own"
    """The location of logins and conversations (`XDG_DATA_HOME` and others): a folder per task, or yours."""

    @model_validator(mode="after")
    def _check_config(self) -> Self:
        _read_given_config(self)
        self.check_without_acp("agent")
        return self


class OpencodeAdapter:
    """Runs `opencode run` with the prompt on standard input."""

    Options: ClassVar[type[BaseModel]] = OpencodeOptions

    def __init__(self, options: OpencodeOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities. Only a task's own home keeps conversations."""
        can = {Capability.INSTRUCTIONS, Capability.MCP, Capability.PRE_EDIT, Capability.POST_TOOL}
        return frozenset(can | {Capability.RESUME, Capability.ATTACH} if self._options.has_own_home else can)

    def programs(self) -> Sequence[Program]:
        """Return opencode, which has no command to check a provider's key."""
        install, verified = "npm install -g opencode-ai", ("1.18.33",)
        return (self._options.program(install, ">=1.18,<2", _KEYS, _LOG_IN, verified=verified),)

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the command line; what the configuration does not deny is allowed."""
        options = self._options
        config = json.dumps(_config(options, request), ensure_ascii=False, sort_keys=True)
        own = {name: str(request.home / part) for name, part in _FOLDERS.items()} if options.has_own_home else {}
        variables = _VARIABLES if options.has_own_home else (*_VARIABLES, *_FOLDERS)
        env, passed = options.variables(("HOME", *_KEYS, *variables), **_PRESET, **own)
        env = {**env, _CONTENT: config}
        files = {_LIMIT_FILE: _LIMIT}
        if request.instructions is not None:
            files[INSTRUCTIONS_FILE] = request.instructions
        if request.pre_edit:
            files[_HOOK_FILE] = _HOOK.replace("ARGV", json.dumps([*request.pre_edit]))
        if request.post_tool:
            files[_MESSAGES_FILE] = _MESSAGES.replace("ARGV", json.dumps([*request.post_tool]))
        home = SessionHome(files)
        if options.has_own_home:
            home = SessionHome({**files, **_PACKAGE_FILES}, _LINKS, (_LOGIN,), folders=_MOVED)
        return SessionCommand(
            argv=(
                *(options.bin, *(() if request.interactive else _HEADLESS)),
                *option_arguments("--model", options.model),
                *option_arguments("--agent", options.agent),
                *option_arguments("--session", request.resume),
                *options.args,
            ),
            stdin=None if request.interactive else request.prompt_file,
            env=env,
            pass_env=passed,
            scratch_patterns=_LEAVINGS,
            home=home,
        )

    def agent(self) -> Agent:
        """See `AgentCli`."""
        chosen = self._options.agent_program(self.programs()[0], "")
        return Agent(
            chosen,
            model=self._options.model,
            resumes=self._options.has_own_home,
            enforced=frozenset({Capability.PRE_EDIT}),  # by its plugin; it asks only if configured to
        )

    def agent_command(self, request: SessionRequest) -> SessionCommand:
        """See `AgentCli`. Its plugins run in the same way."""
        options = self._options
        return replace(self.command(request), argv=options.agent_argv(options.bin, "acp", *options.args))

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a JSON line; plain text is a message."""
        value = parse_object(line)
        if value is None:
            return parse_plain_line(line)
        given = value.get("part")
        part: JsonObject = given if isinstance(given, dict) else {}
        match value.get("type"):
            case "step_start":
                session = as_text(value.get("sessionID"))
                return (ConversationStarted(session),) if session else ()
            case "text":
                text = as_text(part.get("text"))
                return (AgentMessage(text),) if text.strip() else ()
            case "tool_use":
                return tuple(_of_tool(part))
            case "step_finish":
                return tuple(_of_step(part, self._options.model))
            case "error":
                return tuple(_of_error(value))
            case _:
                return ()

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure in the events or, if that has no class, the one in the log."""
        failed = parse_limit(end.stderr) or concluded_failure(end)
        concluded = any(isinstance(event, FinalResult) for event in end.events)
        if concluded if failed is None else failed.failure is not FailureClass.CRASHED:
            return with_reset_time(failed, end.time)
        return with_reset_time(_failure_in_text(end.stderr) or failed or detect_interruption(end), end.time)


def _read_given_config(options: AdapterOptions) -> JsonObject:
    """Return the configuration in the `env` of an adapter's options.

    Raises ValueError if it can't be merged with ours.
    """
    values, names = options.given_variables()
    if _CONTENT in names:
        raise ValueError(f"`{_CONTENT}` can't be passed on, because it is merged with ours: set its content in `env`")
    config = parse_object(values.get(_CONTENT, "{}"))
    if config is None:
        raise ValueError(f"`{_CONTENT}` in `env` is not a JSON object")
    return config


def _merge(config: JsonObject, over: JsonObject) -> JsonObject:
    """Return a configuration with another over it: objects are merged, lists joined."""
    merged = {**config, **over}
    for name in config.keys() & over.keys():
        given, value = config[name], over[name]
        if isinstance(given, dict) and isinstance(value, dict):
            merged[name] = _merge(given, value)
        elif isinstance(given, list) and isinstance(value, list):
            merged[name] = [*given, *value]
    return merged


def _config(options: OpencodeOptions, request: SessionRequest) -> JsonObject:
    plugins = [_LIMIT_FILE]
    if request.pre_edit:
        plugins.append(_HOOK_FILE)
    if request.post_tool:
        plugins.append(_MESSAGES_FILE)
    own: JsonObject = {"plugin": [(request.home / name).as_uri() for name in plugins]}
    if request.instructions is not None:
        own["instructions"] = [str(request.home / INSTRUCTIONS_FILE)]
    if request.mcp_servers:
        own["mcp"] = {
            server.name: {"type": "remote", "url": server.url}
            if server.url is not None
            else {
                "type": "local",
                "command": [*server.argv],
                "environment": {name: f"{{env:{name}}}" for name in server.env},
            }
            for server in request.mcp_servers
        }
    return reduce(_merge, (_read_given_config(options), {**options.config}, own), {**_CONFIG})


def _of_tool(part: JsonObject) -> Iterator[SessionEvent]:
    state = part.get("state")
    name = as_text(part.get("tool"))
    if not isinstance(state, dict) or not name:
        return
    given = state.get("input")
    given = given if isinstance(given, dict) else {}
    call = as_text(part.get("callID")) or None
    if name == "todowrite" and (plan := plan_event(given.get("todos"))):
        yield plan
        return
    paths, patch = tuple(_paths(given)), as_text(given.get("patchText"))
    used = tool_event(name, given, ("filePath", "path"), _DETAIL_KEYS, call)
    detail = one_line(" ".join(paths)) or used.detail
    yield replace(used, detail=detail, paths=paths, diff=used.diff or shorten(patch))
    if as_text(state.get("error")).startswith(_DENIED):
        yield ToolDenied(name, detail, _ALLOW, call)
    if call is not None:
        yield ToolResult(call, _failure_of_tool(state), output_text(state.get("output")))


def _failure_of_tool(state: JsonObject) -> str | None:
    """Return the reason for a failed tool call.

    A nonzero exit code is a failure too, although opencode does not report it as one.
    """
    metadata = state.get("metadata")
    code = as_count(metadata.get("exit")) if isinstance(metadata, dict) else 0
    if state.get("status") == "error":
        return one_line(as_text(state.get("error")))
    return f"exit code {code}" if code else None


def _paths(given: JsonObject) -> Iterator[str]:
    for key in ("filePath", "path"):
        if isinstance(given.get(key), str):
            yield given[key]
    yield from _PATCHED.findall(as_text(given.get("patchText")))


def _of_step(part: JsonObject, model: str | None) -> Iterator[SessionEvent]:
    tokens = part.get("tokens")
    if isinstance(tokens, dict):
        cache = tokens.get("cache")
        cache = cache if isinstance(cache, dict) else {}
        sent = as_count(tokens.get("input")) + as_count(cache.get("read")) + as_count(cache.get("write"))
        received = as_count(tokens.get("output")) + as_count(tokens.get("reasoning"))
        # A cost of 0 may also mean that opencode does not know the price.
        cost = as_cost(part.get("cost")) or None
        yield UsageReport(sent, received, cost, cached_tokens=as_count(cache.get("read")), model=model)
    reason = as_text(part.get("reason"))
    if reason == "stop":
        yield FinalResult()
    elif reason in _REASONS:
        yield FinalResult("", Failed(*_REASONS[reason]))


def _of_error(value: JsonObject) -> Iterator[SessionEvent]:
    session = as_text(value.get("sessionID"))
    if session:
        yield ConversationStarted(session)
    error = value.get("error")
    error = error if isinstance(error, dict) else {}
    data = error.get("data")
    yield FinalResult("", _failure_of(as_text(error.get("name")), data if isinstance(data, dict) else {}, value))


def _failure_of(name: str, data: JsonObject, event: JsonObject) -> Failed:
    said = as_text(data.get("message")).strip()
    body = as_text(data.get("responseBody"))
    failure = _ERRORS.get(name)
    if failure is None and name == "APIError":
        failure = failure_class_for_status(as_count(data.get("statusCode"))) or match_failure_class(said, _WORDS)
        if failure is None and data.get("isRetryable") is True:
            failure = FailureClass.TRANSIENT
        if failure in {FailureClass.INVALID, FailureClass.RATE_LIMITED} and _WITHOUT_CREDIT.search(f"{said}\n{body}"):
            failure = FailureClass.AUTH
    failure = failure or match_failure_class(said, _WORDS) or FailureClass.CRASHED
    until = _instant(data.get("responseHeaders"), event) if failure is FailureClass.RATE_LIMITED else None
    reason = said[:MAX_REASON_CHARS] or f"it ended with an error: {name[:60] or 'unnamed'}"
    return make_failure(failure, reason, _LOG_IN, until)


def _instant(headers: Any, event: JsonObject) -> float | None:
    """Return the reset time in a Retry-After header (RFC 9110), or None."""
    value = as_text(headers.get("retry-after")) if isinstance(headers, dict) else ""
    if value.isascii() and value.isdigit() and len(value) < 10:
        then = as_count(event.get("timestamp"))
        return then / 1000 + int(value) if then else None
    try:
        date = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return _seconds(date)


def _seconds(date: datetime) -> float:
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _failure_in_text(log: str) -> Failed | None:
    """Return the failure for the last known error message in the log."""
    for line in log.splitlines()[::-1]:
        text = line[:_LONGEST_LINE]
        if _UNWRITABLE.search(text):
            return Failed(FailureClass.INVALID, f"{text.strip()[:MAX_REASON_CHARS]}: {_WRITE_THERE}")
        found = _ERROR_LOGGED.search(text)
        if found is not None and (failure := match_failure_class(found[1], _WORDS)) is not None:
            return make_failure(failure, found[1].strip('"')[:MAX_REASON_CHARS], _LOG_IN)
    return None


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: opencode`."""
    register("opencode", AgentChoice(OpencodeAdapter, OpencodeOptions))

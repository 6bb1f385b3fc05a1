"""Aider, which prints plain text.

See PyPI `aider-chat` and https://aider.chat/docs/config/options.html. Aider always exits with 0, so failures appear
only in its messages. Because it retries by itself, an error counts only if no response follows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

import pluggy
from pydantic import BaseModel

from adapters.failures import MAX_REASON_CHARS, make_failure
from adapters.json_output import concluded_failure
from adapters.options import (
    INSTRUCTIONS_FILE,
    CliOptions,
    ProgramName,
    option_arguments,
    own_home_variables,
)
from adapters.rate_limits import with_reset_time
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterAdapter
from orchestrator.protocols import (
    AgentMessage,
    Capability,
    CliWarning,
    FinalResult,
    Program,
    SessionCommand,
    SessionEnd,
    SessionEvent,
    SessionHome,
    SessionRequest,
    ToolCall,
    UsageReport,
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

_KEYS: Final = (*("ANTHROPIC_API_KEY", "DEEPSEEK_API_KEY", "GEMINI_API_KEY", "OPENAI_API_KEY", "OPENROUTER_API_KEY"),)
_VARIABLES: Final = ("OLLAMA_API_BASE", "OPENAI_API_BASE")
_LOG_IN: Final = "set its provider's key (such as ANTHROPIC_API_KEY); add other variables to `env`"
_ALONE: Final = (
    *("--yes-always", "--no-auto-commits", "--no-gitignore", "--no-check-update", "--analytics-disable"),
    *("--no-pretty", "--no-fancy-input", "--no-suggest-shell-commands", "--no-detect-urls", "--no-show-release-notes"),
    *("--input-history-file", "/dev/null", "--chat-history-file", "/dev/null"),
)

#: LiteLLM's error names (docs.litellm.ai, "Exception Mapping"), without the suffix `Error`.
_ERRORS: Final[Mapping[str, FailureClass]] = {
    "Authentication": FailureClass.AUTH,
    "PermissionDenied": FailureClass.AUTH,
    "RateLimit": FailureClass.RATE_LIMITED,
    "RouterRateLimit": FailureClass.RATE_LIMITED,
    "BudgetExceeded": FailureClass.LIMIT,
    "ContextWindowExceeded": FailureClass.LIMIT,
    "ContentPolicyViolation": FailureClass.REFUSED,
    "BadRequest": FailureClass.INVALID,
    "InvalidRequest": FailureClass.INVALID,
    "NotFound": FailureClass.INVALID,
    "UnprocessableEntity": FailureClass.INVALID,
    "UnsupportedParams": FailureClass.INVALID,
    "ServiceUnavailable": FailureClass.OVERLOADED,
    "InternalServer": FailureClass.OVERLOADED,
    "BadGateway": FailureClass.OVERLOADED,
    "Timeout": FailureClass.TRANSIENT,
    "APIConnection": FailureClass.TRANSIENT,
}
#: An error that interrupts a response is in the middle of a line and contains the provider's name.
_ERROR: Final = re.compile(
    r"^litellm\.(?P<first>\w+?)(?:Error)?: "
    r"|litellm\.(?P<within>\w+?)(?:Error)?: (?:(?:litellm\.)?\w+: )?\w+Exception - "
)
#: LiteLLM reports an unreachable server as an internal error.
_UNREACHED: Final = re.compile(r" - (?:\[Errno \d+\] )?Connection (?:error|refused|reset)")
_NO_KEY: Final = "No LLM model was specified and no API keys were provided."
_TOO_LONG: Final = re.compile(r"Model \S+ has hit a token limit!")
_INTERRUPTED: Final = re.compile(r"\^C (?:again to exit|KeyboardInterrupt)")
_EDIT: Final = re.compile(r"Applied edit to (.+)")
_COUNT: Final = r"([0-9][0-9.,]*)(k?)"
_TOKENS: Final = re.compile(rf"Tokens: {_COUNT} sent,(?: .*,)? {_COUNT} received\.")
_COST: Final = re.compile(r"(?:^|received\. )Cost: \$([0-9.]+) message")
_WARNING: Final = re.compile(
    r"Retrying in |The LLM did not conform|Only \d+ reflections allowed|Warning(?: for \S+)?: "
)


class AiderOptions(CliOptions):
    """Options of an adapter with `use: aider`."""

    bin: ProgramName = "aider"


class AiderAdapter:
    """Runs `aider` with the prompt in a file."""

    Options: ClassVar[type[BaseModel]] = AiderOptions

    def __init__(self, options: AiderOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return Aider's capabilities."""
        return frozenset({Capability.INSTRUCTIONS, Capability.READ_ONLY})

    def programs(self) -> Sequence[Program]:
        """Return the program `aider`."""
        install = "`uv tool install aider-chat` or `pipx install aider-chat`"
        return (self._options.program(install, ">=0.86,<0.87", _KEYS, _LOG_IN),)

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the command line. The tags cache in the worktree is not part of the work."""
        options = self._options
        files = {} if request.instructions is None else {INSTRUCTIONS_FILE: request.instructions}
        # Aider wraps lines at the terminal's width (80 without a terminal), and with --yes-always it opens a page of
        # its manual after many errors.
        preset = {"COLUMNS": "1000", "BROWSER": "true", **own_home_variables(options, request)}
        env, passed = options.variables(("HOME", *_KEYS, *_VARIABLES), **preset)
        return SessionCommand(
            argv=(
                *(
                    options.bin,
                    *option_arguments("--model", options.model),
                    "--message-file",
                    str(request.prompt_file),
                    *_ALONE,
                ),
                *(("--read", str(request.home / INSTRUCTIONS_FILE)) if files else ()),
                *(("--chat-mode", "ask") if request.read_only else ()),
                *options.args,
            ),
            env=env,
            pass_env=passed,
            scratch_patterns=("/.aider*",),
            home=SessionHome(files) if files or options.has_own_home else None,
        )

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a line; reported tokens mean a successful response."""
        text = line.strip()
        spent = _spent(text)
        if spent is not None:
            return spent, FinalResult()
        if (edit := _EDIT.fullmatch(text)) is not None:
            return (ToolCall("edit", edit[1], (edit[1],)),)
        if (failed := _failure(text)) is not None:
            return (FinalResult(text, failed),)
        if _WARNING.match(text):
            return (CliWarning(text),)
        return (AgentMessage(line),) if text else ()

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure for the last error unless a response followed."""
        return with_reset_time(concluded_failure(end), end.time)


def _spent(text: str) -> UsageReport | None:
    tokens, cost = _TOKENS.search(text), _COST.search(text)
    if tokens is None and cost is None:
        return None
    sent, received = (0, 0) if tokens is None else (_count(*tokens.group(1, 2)), _count(*tokens.group(3, 4)))
    # It counts tokens itself, and computes the cost from them.
    return UsageReport(sent, received, None if cost is None else _number(cost[1]), is_estimate=True)


def _count(digits: str, thousands: str) -> int:
    return round(_number(digits.replace(",", "")) * (1000 if thousands else 1))


def _number(digits: str) -> float:
    try:
        return float(digits[:20])
    except ValueError:  # 1.2.3
        return 0.0


def _failure(text: str) -> Failed | None:
    if text.startswith(_NO_KEY):
        return Failed(FailureClass.AUTH, f"{text} {_LOG_IN}"[:MAX_REASON_CHARS])
    if _INTERRUPTED.fullmatch(text):
        return Failed(FailureClass.CRASHED, "it was interrupted")
    if _TOO_LONG.match(text):
        return Failed(FailureClass.LIMIT, f"{text[:MAX_REASON_CHARS]} Make the task smaller or use another model")
    error = _ERROR.search(text)
    if error is None:
        return None
    text = text[error.start() :]
    failure = _ERRORS.get(error["first"] or error["within"], FailureClass.CRASHED)
    if failure is FailureClass.OVERLOADED and _UNREACHED.search(text):
        failure = FailureClass.TRANSIENT
    return make_failure(failure, text[:MAX_REASON_CHARS], _LOG_IN)


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: aider`."""
    register("aider", AiderAdapter)

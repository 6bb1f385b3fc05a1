"""Classify the errors of an Agent Client Protocol agent."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import acp

from adapters.bridges.http_status import failure_name_for_status
from adapters.bridges.lines import BridgeExit

#: The code of the error of an agent that needs a login first (agentclientprotocol.com/protocol/v1/schema, ErrorCode).
AUTH_REQUIRED: Final = -32000
#: Messages that are unambiguous for any error code: Gemini CLI uses 500 for all connection errors.
_CERTAIN_PATTERNS: Final[Mapping[str, re.Pattern[str]]] = {
    "transient": re.compile(
        r"fetch failed|\bterminated$|ECONN(?:REFUSED|RESET)|ENOTFOUND|ETIMEDOUT|EAI_AGAIN|socket hang up"
        r"|premature close|cannot connect to api|unable to connect|connection (?:error|refused|was closed)",
        re.IGNORECASE,
    ),
    "limit": re.compile(
        r"prompt is too long|token count .*exceeds|context length|context window|output token maximum", re.IGNORECASE
    ),
}
_STATUS: Final = re.compile(r"\bAPI Error: ([45]\d\d)\b")
#: Messages of errors without a code; the first match counts.
_ERROR_PATTERNS: Final[Mapping[str, re.Pattern[str]]] = {
    "rate_limited": re.compile(
        r"rate.?limit|usage.?limit|hit your .*limit|limit (?:reached|exceeded)|too many requests|quota|exhausted"
        r"|\b429\b",
        re.IGNORECASE,
    ),
    "auth": re.compile(r"authenticat|not logged in|/login|api.?key|unauthorized|\b40[13]\b", re.IGNORECASE),
    "overloaded": re.compile(r"overloaded|unavailable|internal server error|\b5(?:00|02|03|29)\b", re.IGNORECASE),
}


def make_exit(error: acp.RequestError, methods: Sequence[Any] = ()) -> BridgeExit:
    """Return the end of a conversation after an error; `methods` are the agent's ways to log in."""
    message = error_text(error)
    failure = "auth" if error.code == AUTH_REQUIRED else _failure(error.code, message)
    if failure != "auth":
        return BridgeExit(f"the agent reports: {message}", failure)
    ways = ", ".join(method.name for method in methods)
    return BridgeExit(f"the agent reports: {message}: log in with the agent{f' ({ways})' if ways else ''}", failure)


def error_text(error: acp.RequestError) -> str:
    """Return the message and details of an error as one line."""
    details = error.data.get("details") or error.data.get("message") if isinstance(error.data, dict) else error.data
    said = _message_in(str(error))
    return " ".join(f"{said}{f': {details}' if isinstance(details, str) and details else ''}".split())[:300]


def _message_in(text: str) -> str:
    """Return the message in an API's JSON error, or any other text unchanged."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return text
    return message if isinstance(message, str) else text


def _failure(code: int, message: str) -> str:
    """Return the failure class of an error code, which may be an HTTP status."""
    found = _STATUS.search(message)
    status = int(found[1]) if found is not None else code if code < 600 else 0
    by_status = failure_name_for_status(status)
    return _named(_CERTAIN_PATTERNS, message) or by_status or _named(_ERROR_PATTERNS, message) or "crashed"


def _named(patterns: Mapping[str, re.Pattern[str]], message: str) -> str | None:
    return next((name for name, pattern in patterns.items() if pattern.search(message)), None)

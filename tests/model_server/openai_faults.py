"""Errors of the OpenAI APIs: https://platform.openai.com/docs/guides/error-codes."""

from __future__ import annotations

from typing import Final

from tests.model_server.conversation import ApiFault, Json

_FAULTS: Final = {
    400: ("invalid_request_error", None, "The request is invalid."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("invalid_request_error", "unsupported_country_region_territory", "Access is denied."),
    404: ("invalid_request_error", "model_not_found", "The model does not exist or you do not have access to it."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests."),
    500: ("server_error", None, "The server had an error while processing your request."),
    503: ("server_error", None, "The engine is currently overloaded, please try again later."),
}
_TOO_LONG: Final = (
    "invalid_request_error",
    "context_length_exceeded",
    "This model's maximum context length is 128000 tokens. However, your messages resulted in 200000 tokens.",
)


def openai_error(fault: ApiFault) -> Json:
    """Return the body of an error."""
    reported = _FAULTS.get(fault.status, _FAULTS[400 if fault.status < 500 else 500])
    kind, code, message = _TOO_LONG if fault.is_too_long else reported
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}

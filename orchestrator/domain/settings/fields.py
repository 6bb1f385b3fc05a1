"""Types of single settings: in config files, Python values, and documents.

In a file, durations and sizes are strings with units; in Python and in documents they are seconds and bytes.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    ValidationInfo,
    WithJsonSchema,
)

from orchestrator.domain.settings.failures import RETRYABLE, FailureClass
from orchestrator.domain.settings.names import (
    BRANCH_PATTERN,
    KEPT_PATTERN,
    NAME_PATTERN,
    PATH_PATTERN,
    check_branch,
    check_kept_path,
    check_name,
    check_path,
    check_repo,
)
from orchestrator.domain.settings.path_patterns import check_pattern
from orchestrator.domain.settings.quantities import (
    COUNT_PATTERN,
    DURATION_PATTERN,
    MAX_COUNT,
    MAX_DURATION,
    MAX_RETENTION,
    OPTIONAL_DURATION_PATTERN,
    SIZE_PATTERN,
    check_bytes,
    check_seconds,
    format_duration,
    format_size,
    parse_count,
    parse_duration,
    parse_optional_duration,
    parse_size,
)
from orchestrator.domain.wording import describe_value, quote_text
from orchestrator.errors import InvalidValue

#: The value of `workflow` for a task without a workflow, where the defaults name one.
NO_WORKFLOW: Final = "none"
#: Size limit of one `context:` mapping as JSON, in bytes.
MAX_CONTEXT_BYTES: Final = 64 << 10
#: The contexts of pydantic for values that are read from a file, and written for one.
FROM_FILE: Final = {"from_file": True}
TO_FILE: Final = {"to_file": True}

_ENV_NAME: Final = "[A-Za-z_][A-Za-z0-9_]*"
_VALUE_NAME: Final = "[A-Za-z_][A-Za-z0-9_]{0,63}"
_ACCOUNT_VALUE: Final = rf"\$(?:{_ENV_NAME})|~?/[^\x00-\x1f]+"
_NOT_BLANK: Final = r"\S"


def _is_from_file(info: ValidationInfo) -> bool:
    return bool(info.context and info.context.get("from_file"))


def _is_number(value: Any, info: ValidationInfo) -> bool:
    return type(value) in {int, float} and not _is_from_file(info)


def _duration(value: Any, info: ValidationInfo) -> float:
    return check_seconds(value) if _is_number(value, info) else parse_duration(value)


def _optional_duration(longest: float) -> BeforeValidator:
    def read(value: Any, info: ValidationInfo) -> float | None:
        if value is None and not _is_from_file(info):
            return None
        if _is_number(value, info):
            return check_seconds(value, longest=longest)
        return parse_optional_duration(value, longest=longest)

    return BeforeValidator(read)


def _size(value: Any, info: ValidationInfo) -> int:
    return check_bytes(value) if type(value) is int and not _is_from_file(info) else parse_size(value)


def _write_duration(seconds: float | None, info: SerializationInfo) -> Any:
    return format_duration(seconds) if info.context and info.context.get("to_file") else seconds


def _write_size(size: int, info: SerializationInfo) -> Any:
    return format_size(size) if info.context and info.context.get("to_file") else size


def _text(pattern: str) -> WithJsonSchema:
    """Return the JSON Schema of a string validated here: a pattern, for editors."""
    return WithJsonSchema({"type": "string", "pattern": pattern})


def _check_prompt(prompt: str) -> str:
    if not prompt.strip():
        raise InvalidValue("the prompt is empty", "describe the task")
    return prompt


def _check_env_name(name: str) -> str:
    if not re.fullmatch(_ENV_NAME, name):
        message = f"{quote_text(name)} is not a valid variable name"
        raise InvalidValue(message, "use letters, digits and '_', not starting with a digit")
    return name


def _check_retryable(name: Any) -> Any:
    if not isinstance(name, str) or name not in RETRYABLE:
        text = quote_text(name) if isinstance(name, str) else describe_value(name)
        raise InvalidValue(f"{text} is not a retryable failure class", f"use {', '.join(sorted(RETRYABLE))}")
    return FailureClass(name)


def _check_command(command: str) -> str:
    if not command.strip() or "\0" in command:
        raise InvalidValue("a command is empty or contains a NUL character", "write a shell command, or remove it")
    return command


def _check_host(text: str) -> str:
    from orchestrator.domain.security.hosts import parse_allowed_host  # noqa: PLC0415  few runs name hosts

    return str(parse_allowed_host(text))


def _check_account_value(value: str) -> str:
    if re.fullmatch(_ACCOUNT_VALUE, value) is None:  # perhaps a key, which must not be printed
        message = "a value of an account is neither one of your variables nor a folder"
        raise InvalidValue(message, "write $NAME for your variable NAME, or a folder such as ~/.some-cli-work")
    return value


def is_value_name(name: str) -> bool:
    """Return whether a string can name a value in the context of a phase."""
    return re.fullmatch(_VALUE_NAME, name) is not None


def _check_value_name(name: str) -> str:
    if not is_value_name(name):
        message = f"{quote_text(name)} is not a valid value name"
        raise InvalidValue(message, "use up to 64 letters, digits and '_', not starting with a digit")
    return name


def _check_context(context: dict[str, Any]) -> dict[str, Any]:
    size = len(json.dumps(context, ensure_ascii=False, default=str).encode())
    if size > MAX_CONTEXT_BYTES:
        message = f"these values take {size} bytes"
        raise InvalidValue(message, f"use at most {MAX_CONTEXT_BYTES}, or write the name of a file to read")
    return context


def _check_workflow_name(name: str) -> str:
    if name == NO_WORKFLOW:
        raise InvalidValue(f"{NO_WORKFLOW!r} is reserved for tasks without a workflow", "choose another name")
    return check_name(name)


def _check_key(key: str) -> str:
    for part in key.split("/"):
        check_name(part)
    return key


class Settings(BaseModel):
    """The base of all settings: unknown keys and values of another type are errors."""

    # Building a model takes a millisecond, and no program needs all of them.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True, serialize_by_alias=True)


def short_form(key: str, message: str, expected: str, forms: Any) -> BeforeValidator:
    """Return a validator that reads a string as a mapping with it under `key`.

    `message` and `expected` describe the setting and its `forms` (types for the JSON Schema) in errors.
    """

    def read(value: Any) -> Any:
        match value:
            case str():
                return {key: value}
            case dict() | BaseModel():
                return value
        raise InvalidValue(f"{message} can't be {describe_value(value)}", f"write {expected}")

    return BeforeValidator(read, json_schema_input_type=forms)


Name = Annotated[str, AfterValidator(check_name), _text(NAME_PATTERN)]
Branch = Annotated[str, AfterValidator(check_branch), _text(BRANCH_PATTERN)]
Repository = Annotated[str, AfterValidator(check_repo), _text(_NOT_BLANK)]
Duration = Annotated[float, BeforeValidator(_duration), PlainSerializer(_write_duration), _text(DURATION_PATTERN)]
#: None: no limit.
OptionalDuration = Annotated[
    float | None,
    _optional_duration(MAX_DURATION),
    PlainSerializer(_write_duration),
    _text(OPTIONAL_DURATION_PATTERN),
]
#: None: unlimited.
OptionalRetention = Annotated[
    float | None,
    _optional_duration(MAX_RETENTION),
    PlainSerializer(_write_duration),
    _text(OPTIONAL_DURATION_PATTERN),
]
Size = Annotated[int, BeforeValidator(_size), PlainSerializer(_write_size), _text(SIZE_PATTERN)]
_COUNT_FORMS: Final = [
    {"type": "integer", "minimum": 1, "maximum": MAX_COUNT},
    {"type": "string", "pattern": COUNT_PATTERN},
]
Count = Annotated[int, BeforeValidator(parse_count), WithJsonSchema({"anyOf": _COUNT_FORMS})]
Attempts = Annotated[int, Field(ge=1, le=100)]
Prompt = Annotated[str, AfterValidator(_check_prompt), _text(_NOT_BLANK)]
RetryableClass = Annotated[
    FailureClass, Field(strict=False), BeforeValidator(_check_retryable), WithJsonSchema({"enum": sorted(RETRYABLE)})
]
EnvName = Annotated[str, AfterValidator(_check_env_name), _text(f"^{_ENV_NAME}$")]
Command = Annotated[str, AfterValidator(_check_command), _text(_NOT_BLANK)]
AllowedHost = Annotated[str, AfterValidator(_check_host), _text(r"^(?:\*\.)?[^\s/@*]+$")]
PathPattern = Annotated[str, AfterValidator(check_pattern), _text(r"^(?!/)[^\\]+$")]
NotEmpty = Annotated[str, Field(min_length=1)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Paths = Annotated[tuple[NotEmpty, ...], Field(strict=False)]
RepositoryPath = Annotated[str, AfterValidator(check_path), _text(PATH_PATTERN)]
RepositoryPaths = Annotated[tuple[RepositoryPath, ...], Field(strict=False)]
KeptPaths = Annotated[
    tuple[Annotated[str, AfterValidator(check_kept_path), _text(KEPT_PATTERN)], ...], Field(strict=False)
]
Commands = Annotated[tuple[Command, ...], Field(strict=False)]
#: A variable of an account: `$NAME`, taken from the user's environment, or a folder.
AccountValue = Annotated[str, AfterValidator(_check_account_value), _text(f"^(?:{_ACCOUNT_VALUE})$")]
EnvNames = Annotated[tuple[EnvName, ...], Field(strict=False)]
ValueName = Annotated[str, AfterValidator(_check_value_name), _text(f"^{_VALUE_NAME}$")]
ValueNames = Annotated[tuple[ValueName, ...], Field(strict=False)]
Context = Annotated[dict[ValueName, Any], AfterValidator(_check_context)]
WorkflowName = Annotated[str, AfterValidator(_check_workflow_name), _text(NAME_PATTERN)]
SharedKey = Annotated[str, AfterValidator(_check_key), _text(_NOT_BLANK)]

"""A scripted GitHub whose requests and answers are compared with the OpenAPI description of the real one.

Not compared: GraphQL, errors, and fields that the description requires but the scripted server leaves out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from jsonschema import Draft202012Validator

from orchestrator.testing.forge_servers import GitHubServer
from orchestrator.testing.forge_servers.server import Answer

_OPERATIONS: Final[Mapping[str, Any]] = json.loads((Path(__file__).parent / "github.json").read_text())["operations"]
_PATTERNS: Final = {
    operation: re.compile(re.sub(r"\{\w+\}", "[^/]+", operation.partition(" ")[2])) for operation in _OPERATIONS
}


class ValidatedGitHub(GitHubServer):
    """A scripted GitHub that collects the differences between its traffic and the description."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.differences: list[str] = []

    def handle(self, method: str, target: str, headers: Mapping[str, str], data: bytes) -> tuple[Answer, bool]:
        """Answer a request, and compare both with the description unless a test has replaced the answer."""
        answer, is_lost = super().handle(method, target, headers, data)
        path = urlsplit(target).path.removeprefix(urlsplit(self.url).path)
        is_api = path.startswith(("/repos/", "/user", "/search/"))
        if is_api and answer.status < 300 and not self._redirects:
            self.differences += find_differences(method.lower(), path, target, data, answer)
        return answer, is_lost

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        if raised[0] is None:
            assert not self.differences, "\n".join(dict.fromkeys(self.differences))


def find_differences(method: str, path: str, target: str, data: bytes, answer: Answer) -> Iterator[str]:
    """Yield what the description does not allow in a request and its answer."""
    operation = next(
        (name for name, one in _PATTERNS.items() if name.startswith(f"{method} ") and one.fullmatch(path)), None
    )
    if operation is None:
        yield f"{method} {path} is not described"
        return
    described = _OPERATIONS[operation]
    for name, _ in parse_qsl(urlsplit(target).query):
        if name not in described["query"]:
            yield f"{operation} has no parameter {name}"
    if data:
        yield from _compare(f"body of {operation}", described["body"] or {"type": "null"}, json.loads(data))
    if str(answer.status) not in described["statuses"]:
        yield f"{operation} does not answer {answer.status}"
    elif answer.content is not None:
        schema = described["answers"].get(str(answer.status), {"type": "null"})
        content = json.loads(answer.content) if isinstance(answer.content, str) else answer.content
        yield from _compare(f"answer of {operation}", schema, content)


def _compare(what: str, schema: Mapping[str, Any], value: object) -> Iterator[str]:
    for error in Draft202012Validator(schema).iter_errors(value):
        yield f"{what}, {error.json_path}: {error.message[:300]}"

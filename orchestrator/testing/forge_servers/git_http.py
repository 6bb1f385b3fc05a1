"""Serve a bare repository by git's smart HTTP protocol, with `git http-backend` as a CGI program."""

from __future__ import annotations

import os
import subprocess
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Final

from orchestrator.testing.forge_servers.server import Answer

#: The variables of CGI (RFC 3875) for the headers that the program reads.
_HEADERS: Final = {
    "Content-Type": "CONTENT_TYPE",
    "Content-Encoding": "HTTP_CONTENT_ENCODING",
    "Git-Protocol": "GIT_PROTOCOL",
}


@dataclass(frozen=True)
class CgiRequest:
    """A user's request, whose path is relative to the repository."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    data: bytes
    user: str


def is_push(path: str, query: str) -> bool:
    """Return whether a request belongs to a push."""
    return path == "git-receive-pack" or query == "service=git-receive-pack"


def read_password(headers: Mapping[str, str]) -> str | None:
    """Return the password of basic authentication; None if there is none."""
    scheme, _, value = headers.get("Authorization", "").partition(" ")
    return b64decode(value).decode().partition(":")[2] if scheme == "Basic" else None


def run_backend(git_dir: Path, request: CgiRequest) -> Answer:
    """Return the answer of `git http-backend`."""
    environ = {
        "PATH": os.environ["PATH"],
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_HTTP_EXPORT_ALL": "1",
        "GIT_PROJECT_ROOT": str(git_dir),
        "PATH_INFO": f"/{request.path}",
        "REQUEST_METHOD": request.method,
        "QUERY_STRING": request.query,
        "CONTENT_LENGTH": str(len(request.data)),
        "REMOTE_USER": request.user,  # without a user, it refuses pushes
        **{variable: request.headers[name] for name, variable in _HEADERS.items() if name in request.headers},
    }
    command = ["git", "http-backend"]
    done = subprocess.run(command, input=request.data, env=environ, capture_output=True, check=True)
    head, _, content = done.stdout.partition(b"\r\n\r\n")
    fields = dict(BytesHeaderParser().parsebytes(head).items())
    status = int(fields.pop("Status", "200").split()[0])
    return Answer(status, content, fields)

"""Store which config files the user has confirmed, by real path.

    $XDG_CONFIG_HOME/council/trust.json    {"version": 1, "files": {PATH: [DIGEST, …]}}

Each digest is of one line of `config.permissions`: values of variables are not stored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import anyio.to_thread

from orchestrator.config.model import RunConfig
from orchestrator.config.permissions import list_permission_requests
from orchestrator.errors import RefusedError, to_unusable_error
from orchestrator.system.file_lock import FileLock
from orchestrator.system.files import atomic_write

#: If set to 1, every file is trusted, for continuous integration and other unattended use.
TRUST_VARIABLE = "COUNCIL_TRUST"


async def list_requests(config: RunConfig, environ: Mapping[str, str], *, is_chosen: bool) -> Sequence[str]:
    """Return the permissions that a run's file requests and that the user must confirm.

    A run without a file needs no confirmation. Neither does a file outside any checkout that the user has chosen
    (`is_chosen`).
    """
    file = config.path
    if trusts_all(environ) or not await anyio.Path(file).is_file():
        return ()
    top = await anyio.to_thread.run_sync(enclosing_checkout, file)
    return () if top is None and is_chosen else list_permission_requests(config, top or file.parent)


def unconfirmed_error(file: Path, requests: Iterable[str], remedy: str) -> RefusedError:
    """Return the refusal of a file with unconfirmed requests."""
    return RefusedError(f"{file} has unconfirmed requests: {'; '.join(requests)}", remedy)


def trusts_all(environ: Mapping[str, str]) -> bool:
    """Return True if the environment declares every file trusted."""
    return environ.get(TRUST_VARIABLE, "") == "1"


def enclosing_checkout(file: Path) -> Path | None:
    """Return the root of the innermost checkout that contains a file, or None.

    Blocks.
    """
    folder = Path(os.path.realpath(file)).parent
    return next((one for one in (folder, *folder.parents) if os.path.lexists(one / ".git")), None)


async def find_unconfirmed(file: Path, requests: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Return the requests of a file that are not confirmed on this machine."""
    if not requests:
        return []
    known = await anyio.to_thread.run_sync(lambda: _read(_trust_file(environ)).get(os.path.realpath(file), []))
    return [one for one in requests if _digest(one) not in known]


async def confirm_requests(file: Path, requests: Iterable[str], environ: Mapping[str, str]) -> None:
    """Record exactly these requests of a file as confirmed, replacing earlier ones.

    Raises RefusedError if the file of confirmations is not writable.
    """
    path, digests = _trust_file(environ), [_digest(one) for one in requests]
    try:
        await anyio.to_thread.run_sync(lambda: path.parent.mkdir(mode=0o700, parents=True, exist_ok=True))
        async with FileLock(path.with_suffix(".lock")).hold():
            await anyio.to_thread.run_sync(lambda: _write(path, {**_read(path), os.path.realpath(file): digests}))
    except OSError as error:
        remedy = f"make the folder writable, or set {TRUST_VARIABLE}=1"
        raise to_unusable_error(error, f"{path} is not writable", remedy) from None


def _trust_file(environ: Mapping[str, str]) -> Path:
    folder = environ.get("XDG_CONFIG_HOME") or (environ.get("HOME") and f"{environ['HOME']}/.config")
    if not folder:
        raise RefusedError("neither XDG_CONFIG_HOME nor HOME is set", f"set one of them, or {TRUST_VARIABLE}=1")
    return Path(folder).absolute() / "council" / "trust.json"


def _digest(request: str) -> str:
    return hashlib.sha256(request.encode(errors="surrogatepass")).hexdigest()


def _read(path: Path) -> dict[str, list[str]]:
    """Return the confirmed requests; empty if the file is missing or invalid."""
    try:
        value = json.loads(path.read_bytes())
        return {str(file): [str(one) for one in digests] for file, digests in value["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(path: Path, files: Mapping[str, Sequence[str]]) -> None:
    atomic_write(path, json.dumps({"version": 1, "files": files}, indent=1), durable=True)

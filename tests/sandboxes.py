"""The kinds of sandbox supported by this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import anyio
import pytest

from orchestrator.errors import RefusedError
from orchestrator.sessions.sandbox.policy import SandboxKind, choose_sandbox

#: The environment at start: some tests change theirs.
_PATH = {"PATH": os.environ["PATH"]}


@cache
def sandbox_problem(kind: SandboxKind, *, network: bool = True, hosts: Sequence[str] = ()) -> str | None:
    """Return why a kind of sandbox does not work on this machine, or None."""

    async def choose() -> str | None:
        try:
            await choose_sandbox(kind.value, network=network, hosts=hosts, environ=_PATH)
        except RefusedError as refused:
            return refused.message
        return None

    with ThreadPoolExecutor(1) as own_loop:  # the caller's loop may be running
        return own_loop.submit(anyio.run, choose).result()


def require_sandbox(kind: SandboxKind, *, network: bool = True, hosts: Sequence[str] = ()) -> SandboxKind:
    """Return the kind; skip the test if it does not work here."""
    if (why := sandbox_problem(kind, network=network, hosts=hosts)) is not None:
        pytest.skip(why)
    return kind


def default_sandbox() -> dict[str, str]:
    return {"sandbox": "off"} if WORKING_SANDBOXES == (SandboxKind.OFF,) else {}


#: Supported kinds, the strongest first.
WORKING_SANDBOXES = tuple(
    kind for kind in (SandboxKind.BUBBLEWRAP, SandboxKind.LANDLOCK, SandboxKind.OFF) if not sandbox_problem(kind)
)
#: The strongest kind, and the others with the slow tests.
SANDBOX_PARAMS = (WORKING_SANDBOXES[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in WORKING_SANDBOXES[1:]))
#: Settings without which `sandbox: auto` is rejected.
needs_sandbox = pytest.mark.skipif(WORKING_SANDBOXES == (SandboxKind.OFF,), reason="no sandbox works on this machine")

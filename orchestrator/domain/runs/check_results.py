"""The recorded results of checks, which depend only on a tree, a command and its environment."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict

from orchestrator.domain.settings.run_settings import Check

#: Seconds for which a passed check is reused: what its key does not cover, such as installed programs, may change.
MAX_CHECK_AGE: Final = 7 * 86_400.0


class CheckRecord(BaseModel):
    """A check that passed. Times are wall-clock seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str
    """The shell command."""
    tree: str
    """The id of the tree that it passed on."""
    run: str
    """The run that checked it."""
    task: str
    """The task whose merge had the tree."""
    passed: float
    """When it passed."""
    seconds: float
    """How long it took."""
    log: str
    """The path of its output, on the machine that ran it."""
    host: str
    """That machine."""
    is_flaky: bool = False
    """Whether it had failed on the same tree before."""

    def is_valid(self, now: float) -> bool:
        """Return True if the result may be reused."""
        return 0 <= now - self.passed < MAX_CHECK_AGE


class CheckKey(NamedTuple):
    """What identifies the results of checks."""

    tree: str
    checks: tuple[Check, ...]
    environment: str
    """A digest of everything else that the results depend on."""

    def record_id(self, command: str) -> str:
        """Return the id of the recorded result of one of the commands."""
        return digest_facts(self.tree, command, self.environment)


def digest_facts(*facts: Any) -> str:
    """Return a digest of facts, as JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]

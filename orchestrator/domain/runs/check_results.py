"""The recorded results of checks, which depend only on a tree, a command and its environment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

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


def check_digest(tree: str, command: str, environment: Sequence[Any]) -> str:
    """Return the id of a check's result; `environment` has everything else that the result depends on, as JSON."""
    facts = json.dumps([tree, command, environment], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:40]

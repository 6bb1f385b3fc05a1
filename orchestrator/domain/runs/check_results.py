"""The results of checks. Recorded successes depend only on a tree, a command and its environment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple

from orchestrator.domain.documents.stored import StoredDocument
from orchestrator.domain.settings.run_settings import Check

#: Seconds for which a passed check is reused: what its key does not cover, such as installed programs, may change.
MAX_CHECK_AGE: Final = 7 * 86_400.0


class CheckOutcome(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    FLAKY = "flaky"  #: it failed, and passed when it was repeated on the same tree
    SKIPPED = "skipped"  #: the work changes none of its `paths`


class CheckSource(StrEnum):
    """The source of a task's check result."""

    RUN = "run"  #: it ran for the task
    JOINED = "joined"  #: it ran for another task of the run, at the same time or in the same batch
    CACHE = "cache"  #: it was recorded earlier


class CheckRecord(StoredDocument):
    """A check that ended, or was skipped. Times are wall-clock seconds."""

    command: str
    """The shell command."""
    outcome: CheckOutcome
    """`passed`, `failed`, `flaky` (it failed, and passed when it was repeated), or `skipped`: no changed path matches
    `paths`."""
    source: CheckSource = CheckSource.RUN
    """`run`, `joined` (it ran for another task of the run) or `cache`."""
    tree: str
    """The id of the tree that it ran on."""
    commit: str
    """The commit with that tree."""
    run: str
    """The run that ran it."""
    task: str
    """The task that it ran for."""
    ended: float
    """When it ended."""
    seconds: float
    """How long it took."""
    host: str
    """The machine that ran it."""
    log: str
    """The path of its output, on that machine; empty for a skipped check."""
    failed_tests: tuple[str, ...] = ()
    """The first failed tests in its report, also for a flaky check."""
    failed_log: str | None = None
    """For a flaky check, the path of the output of the failure."""
    paths: tuple[str, ...] = ()
    """For a skipped check, its path patterns."""


def attribute_checks(records: Sequence[CheckRecord], task: str) -> tuple[CheckRecord, ...]:
    """Return the records as the results of a task, which other tasks may share."""
    return tuple(
        record.model_copy(update={"source": CheckSource.JOINED})
        if record.source is CheckSource.RUN and record.task != task
        else record
        for record in records
    )


class CheckKey(NamedTuple):
    """The key of the results of checks."""

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

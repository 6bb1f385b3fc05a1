"""The topic `checks`: recorded results of checks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from orchestrator.api.topic import Topic
from orchestrator.domain.runs.check_results import CheckRecord
from orchestrator.engine.state.records import check_key, list_checks
from orchestrator.errors import RefusedError, VersionConflict
from orchestrator.protocols import Commit, JsonObject, Write


@dataclass(frozen=True, slots=True)
class RecordedCheck:
    """A success that is not repeated on the same files."""

    digest: str
    """Identifies the files, the command and its environment."""
    version: int
    """The version of its document."""
    record: CheckRecord

    def to_json(self) -> JsonObject:
        """Return the object for `--json`."""
        return {"digest": self.digest, **self.record.model_dump(mode="json", exclude={"source"})}


class Checks(Topic):
    """The recorded successes of checks, of all runs. Available as `council.checks`."""

    async def list(self) -> Sequence[RecordedCheck]:
        """Return the recorded checks, oldest first."""
        found = await list_checks(self._context.store)
        checks = [RecordedCheck(digest, version, record) for digest, (version, record) in found.items()]
        return sorted(checks, key=lambda check: (check.record.ended, check.digest))

    async def forget(self, *digests: str, command: str | None = None) -> Sequence[RecordedCheck]:
        """Delete recorded checks, so that they run again; return the deleted ones.

        `digests` are beginnings of digests, each of exactly one check; without any, all checks, or those with a
        `command`, are deleted. Raises RefusedError for an unknown or ambiguous digest.
        """
        context, found = self._context, await self.list()
        await context.check_writable()
        chosen = [_find(found, digest) for digest in dict.fromkeys(digests)] if digests else found
        chosen = [check for check in chosen if command is None or check.record.command == command]
        deleted = []
        for check in chosen:
            with suppress(VersionConflict):  # a check was recorded again, or another process deleted it
                await context.store.commit(Commit([Write(check_key(check.digest), check.version, None)]))
                deleted.append(check)
        return deleted


def _find(checks: Sequence[RecordedCheck], digest: str) -> RecordedCheck:
    matches = [check for check in checks if check.digest.startswith(digest)]
    if len(matches) != 1:
        problem = "is recorded" if not matches else f"is unique: {len(matches)} are recorded"
        raise RefusedError(f"no check {digest!r} {problem}", "`council checks list --json` prints all digests")
    return matches[0]

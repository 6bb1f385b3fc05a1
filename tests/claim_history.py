"""Check the history of a store for violations of the rules of claims.

Pass the records of a store in order, from the first; `violations` lists commits that should have been rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from orchestrator.domain.events.runs import RunRemoved
from orchestrator.domain.scheduling.claims import Claim, OrchestratorLease
from orchestrator.locking.claims import CLAIM_KIND
from orchestrator.protocols import CommitRecord, JsonObject, Key, Store
from orchestrator.state.documents.validation import filter_readable

#: Returns the claim under which a document's new value was written: (task, epoch, orchestrator), or None.
Authorship = Callable[[Key, JsonObject], tuple[str, int, str] | None]


async def read_claims(store: Store, run: str) -> dict[str, Claim]:
    """Return the claims on a run's tasks, including released ones, keyed by task."""
    documents = filter_readable(await store.list(CLAIM_KIND, f"{run}/"))
    return {document.key.id.partition("/")[2]: Claim.model_validate_json(document.encoded) for document in documents}


@dataclass
class ClaimHistory:
    """The claims of all runs of a store, up to the last record passed.

    - An orchestrator's record begins at epoch 1 and is not written after a change of its epoch. It is only deleted with
      the record of its run, which ends it.
    - The epoch of a claim is its version; it is acquired by active orchestrators and released by its owner.
      Of a released one, only the attempt count may be reset.
    - Writes under a claim are made by its owner under its epoch.
    - The epoch of a merge lease rises with each change of its holder.
    """

    authorship: Authorship = lambda _key, _value: None
    violations: list[str] = field(default_factory=list)
    claims: dict[str, Claim] = field(default_factory=dict)
    """By run and task, as `run/task`."""
    orchestrators: dict[str, OrchestratorLease] = field(default_factory=dict)
    """By run and name, as `run/name`."""
    takeovers: int = 0
    """How often a claim went from one orchestrator to another that had not been given it."""
    _leases: dict[Key, JsonObject] = field(default_factory=dict)
    _versions: dict[Key, int] = field(default_factory=dict)

    def add(self, record: CommitRecord) -> None:
        """Check the next record."""
        before, over = dict[str, Claim](), {name for name, one in self.orchestrators.items() if one.epoch != 1}
        found: list[str] = []
        for key, (version, value) in record.documents.items():
            if version != self._versions.get(key, 0) + 1:
                found.append(f"{key} went from version {self._versions.get(key, 0)} to {version}")
            self._versions[key] = version
            if key.kind == "orchestrator":
                runs = {event.data["run"] for event in record.events if event.type == RunRemoved.type}
                found += self._orchestrator(key.id, value, runs)
            elif key.kind == "claim":
                if (claim := self.claims.get(key.id)) is not None:
                    before[key.id] = claim
                found += self._claim(key.id, version, value, over)
            elif key.kind == "lease" and key.id.startswith("merge/"):
                found += self._lease(key, value)
        for key, (_, value) in record.documents.items():
            if value is not None and (written := self.authorship(key, value)) is not None:
                found += self._work(key, written, before)
        self.violations += [f"at {record.position}: {one}" for one in found]

    def _orchestrator(self, name: str, value: JsonObject | None, removed: set[str]) -> Iterator[str]:
        if value is None:
            known = self.orchestrators[name]
            self.orchestrators[name] = known.model_copy(update={"epoch": known.epoch + 1})
            if name.partition("/")[0] not in removed:
                yield f"the record of {name} was deleted"
            return
        before, one = self.orchestrators.get(name), OrchestratorLease.model_validate(value)
        self.orchestrators[name] = one
        if before is None and one.epoch != 1:
            yield f"{name} began at epoch {one.epoch}"
        if before is not None and before.epoch != 1:
            yield f"{name} wrote its record although it was over: {before.reason}"

    def _claim(self, task: str, version: int, value: JsonObject | None, over: set[str]) -> Iterator[str]:
        if value is None:
            yield f"the claim on {task} was deleted"
            return
        before, claim = self.claims.get(task), Claim.model_validate(value)
        self.claims[task] = claim
        run, owner = task.partition("/")[0], claim.owner.id
        held = before.owner.id if before is not None and before.released is None else None
        if claim.epoch != version:
            yield f"the claim on {task} has epoch {claim.epoch} in version {version}"
        is_afresh = before is not None and claim == before.model_copy(update={"epoch": claim.epoch, "retries": 0})
        if claim.released is not None and held != owner and not is_afresh:
            yield f"{owner} released {task}, which {held or 'nobody'} had"
        if claim.released is None and f"{run}/{owner}" not in self.orchestrators:
            yield f"{owner} took {task} without having joined"
        if claim.released is None and f"{run}/{owner}" in over:
            yield f"{owner} took {task} although it was over"
        self.takeovers += held is not None and owner != held

    def _work(self, key: Key, written: tuple[str, int, str], before: dict[str, Claim]) -> Iterator[str]:
        task, epoch, owner = written
        # The commit that acquires or releases a claim may write under it too.
        claims = [one for one in (before.get(task), self.claims.get(task)) if one is not None and one.released is None]
        if not any((one.epoch, one.owner.id) == (epoch, owner) for one in claims):
            now = self.claims.get(task)
            has = "nobody has it" if now is None else f"{now.owner.id} has it at {now.epoch}, released {now.released}"
            yield f"{owner} wrote {key} under epoch {epoch} of the claim on {task}, but {has}"

    def _lease(self, key: Key, value: JsonObject | None) -> Iterator[str]:
        if value is None:
            yield f"{key} was deleted"
            return
        before = self._leases.get(key, {"epoch": 0, "holder": None})
        self._leases[key] = value
        rises, has_changed = value["epoch"] - before["epoch"], before["holder"] != value["holder"]
        if not int(has_changed) <= rises <= 1:
            yield f"{key} went from epoch {before['epoch']} to {value['epoch']}"

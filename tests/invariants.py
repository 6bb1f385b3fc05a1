"""The invariants of every run, crash and recovery, checked at the end of each integration and crash test.

The numbers are those of the project's list of invariants:

 1 a task has at most one landing on first-parent, exactly one once landed    8 attempts are recorded before spawns
 2 the target's tree equals its merges in order                               9 no process is left over
 3 epochs rise strictly                                                      10 no temporary or incomplete file remains
 5 the log is intact, versions have no gaps                                  11 fsck and worktree list succeed
 6 replaying the log gives the state                                         12 the user's repository is unchanged
 7 tasks start after their needs landed; none is lost or invented            14 no secret is in a log, record or commit
17 workflow records are consistent                                           15 state files are private
18 every recorded event has a class, and the fields of that class

(4 and 16 are covered by time and processes in the calling tests; 13 is `finish` of the crash tests; for 14 the tests
pass the canaries that they planted.)
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

import anyio.to_thread
from pydantic import TypeAdapter, ValidationError

from orchestrator.domain.documents.times import Instant
from orchestrator.domain.events import EVENT_TYPES
from orchestrator.domain.runs.model import RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import UNSUCCESSFUL_STATUSES, TaskStatus
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.engine.phases.verification import RunVerification, verify_run
from orchestrator.engine.session_api.contexts import KIND as CONTEXT
from orchestrator.plugins import load_plugins
from orchestrator.project import Project
from orchestrator.protocols import CommitRecord, Event, JsonObject, Key, Store
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.target_branch import TASK_TRAILER
from orchestrator.repo.worktrees.hub import Hub, find_hub
from orchestrator.repo.worktrees.slots import list_slots, read_record, read_slot_session
from orchestrator.repo.worktrees.worktrees import list_lock_files
from orchestrator.state.stores.file import open_file_store
from orchestrator.system.clock import SystemClock
from tests.claim_history import ClaimHistory
from tests.fingerprint import Fingerprint
from tests.stores import SERVER_SCHEMES, open_store


@dataclass(frozen=True, slots=True)
class RunUnderTest:
    """The user's checkout, its fingerprint from before, and the ledger of the fake CLI."""

    top: Path
    environ: Mapping[str, str]
    before: Fingerprint | None = None
    target_checked_out: bool = True
    spawns: Path | None = None
    canaries: tuple[bytes, ...] = ()
    """Secrets that the tests gave to programs, and that may be nowhere."""

    @property
    def git(self) -> Git:
        return Git(None, as_user=True, environ=self.environ)


@dataclass(frozen=True, slots=True)
class _State:
    records: list[CommitRecord]
    documents: dict[Key, JsonObject]
    damage: int
    checks: list[RunVerification]

    def of(self, kind: str) -> dict[str, JsonObject]:
        return {key.id: value for key, value in self.documents.items() if key.kind == kind}


async def assert_invariants(scene: RunUnderTest) -> None:
    """Raise AssertionError with all violated invariants."""
    state = await _read(scene)
    broken = [violation async for violation in _violations(scene, state)]
    assert not broken, "\n".join(broken)


async def _read(scene: RunUnderTest) -> _State:
    state = scene.environ.get("COUNCIL_STATE", "")
    url = state if state.startswith(SERVER_SCHEMES) else ""
    async with open_store(url) if url else open_file_store(Project(scene.top).store(), SystemClock()) as store:
        last, records = await store.position(), list[CommitRecord]()
        if last:
            async for record in store.watch():
                records.append(record)
                if record.position == last:
                    break
        kinds = {key.kind for record in records for key in record.documents}
        found = [document for kind in sorted(kinds) for document in await store.list(kind)]
        documents = {one.key: one.value for one in found}
        runs = [key.id for key, value in documents.items() if key.kind == "run" and value.get("workflows")]
        return _State(records, documents, len(store.damage), await _checked(scene, store, runs))


async def _checked(scene: RunUnderTest, store: Store, runs: Sequence[str]) -> list[RunVerification]:
    if not runs:
        return []
    plugins = await anyio.to_thread.run_sync(load_plugins, scene.environ)
    kinds, constraints = plugins.checked_kinds(), plugins.constraints
    return [await verify_run(store, run, kinds, constraints, SystemClock(), scene.environ) for run in runs]


async def _violations(scene: RunUnderTest, state: _State) -> AsyncIterator[str]:
    for violation in (*_log(state), *_events(state), *_modes(scene.top), *_workflows(state)):
        yield violation
    async for violation in _secrets(scene, state):
        yield violation
    for value in state.of("run").values():
        run = RunDocument.model_validate(value)
        tasks = {
            key.partition("/")[2]: TaskDocument.model_validate(task)
            for key, task in state.of("task").items()
            if key.startswith(f"{run.id}/")
        }
        specs = {task: TaskSpec.model_validate(state.of("spec")[f"{run.id}/{task}"]) for task in run.tasks}
        for violation in (
            *_attempts(scene, run, tasks, specs),
            *_unsettled(run, tasks),
            *_left_overs(run, tasks, scene),
        ):
            yield violation
        async for violation in _landings(scene, run, tasks):
            yield violation
        async for violation in _starts(run, tasks, specs, scene):
            yield violation
        async for violation in _stacks(run, tasks, scene):
            yield violation
    async for violation in _repository(scene, state):
        yield violation


def _log(state: _State) -> list[str]:
    broken = [f"5: {state.damage} damaged places in the log"] if state.damage else []
    versions: dict[Key, int] = defaultdict(int)
    replayed: dict[Key, JsonObject] = {}
    epochs: dict[Key, int] = defaultdict(int)
    claims = ClaimHistory()
    for record in state.records:
        claims.add(record)
        for key, (version, value) in record.documents.items():
            if version != versions[key] + 1:
                broken.append(f"5: {key} went from version {versions[key]} to {version}")
            versions[key] = version
            replayed.pop(key, None)
            if value is not None:
                if key.kind != CONTEXT:  # it expires, which records do not show
                    replayed[key] = value
                if key.kind == "lease":
                    # A waiter for the lease is written to its document under the epoch of the holder.
                    is_same = key.id.startswith("merge/") and value["epoch"] == epochs[key]
                    if value["epoch"] <= epochs[key] and not is_same:
                        broken.append(f"3: {key} went from epoch {epochs[key]} to {value['epoch']}")
                    epochs[key] = value["epoch"]
    broken += [f"3: {one}" for one in claims.violations]
    if replayed != {key: value for key, value in state.documents.items() if key.kind != CONTEXT}:
        broken.append("6: replaying the log gives another state")
    return broken


def _events(state: _State) -> list[str]:
    found = (find_event_error(event) for record in state.records for event in record.events)
    return [f"18: {error}" for error in found if error is not None]


def find_event_error(event: Event) -> str | None:
    """Return the difference between a recorded event and its class, or None."""
    if event.type not in EVENT_TYPES:
        return f"{event.type} is in no module of orchestrator.domain.events"
    adapters, known = _field_adapters(event.type), EVENT_TYPES[event.type].from_data(event.data)
    if known is None or known.data() != event.data:
        return f"{event.type} has the fields {sorted(event.data)} instead of {sorted(adapters)}"
    for name, value in event.data.items():
        try:
            adapters[name].validate_python(value, strict=True)
        except ValidationError as error:
            return f"{event.type}.{name}: {error.errors()[0]['msg']}"
    return None


@cache
def _field_adapters(name: str) -> Mapping[str, TypeAdapter[object]]:
    hints = get_type_hints(EVENT_TYPES[name], localns={"Instant": Instant})
    return {field: TypeAdapter(hints[field]) for field in EVENT_TYPES[name].field_types}


def _workflows(state: _State) -> list[str]:
    broken = [f"17: {one.rule}: {one}" for check in state.checks for one in check.violations]
    return broken + [f"17: {one}" for check in state.checks for task in check.tasks for one in task.skipped_checks]


def _modes(top: Path) -> list[str]:
    folder = Project(top).folder
    # Home contents of a session are below the home itself.
    homes = {home for home in folder.glob("logs/*/homes/*/*") if home.is_dir()}
    paths = [folder, *(path for path in folder.rglob("*") if not homes.intersection(path.parents))]
    return [f"15: {path} is open to others" for path in paths if path.stat().st_mode & 0o077]


def _attempts(
    scene: RunUnderTest, run: RunDocument, tasks: Mapping[str, TaskDocument], specs: Mapping[str, TaskSpec]
) -> list[str]:
    broken = [] if set(tasks) == set(run.tasks) else ["7: the run's tasks and their records differ"]
    for task, document in tasks.items():
        if [one.number for one in document.attempts] != list(range(1, len(document.attempts) + 1)):
            broken.append(f"8: the attempts of {task} are not numbered in turn")
        if document.failures > specs[task].attempts:
            broken.append(f"8: {task} failed {document.failures} times, its limit is {specs[task].attempts}")
    if scene.spawns is not None and scene.spawns.exists():
        spawned = Counter(tuple(line.split()) for line in scene.spawns.read_text().splitlines())
        for (name, task, attempt), times in spawned.items():
            if name == run.id and (times > 1 or int(attempt) > len(tasks[task].attempts)):
                broken.append(f"8: attempt {attempt} of {task} ran {times} times")
    return broken


async def _secrets(scene: RunUnderTest, state: _State) -> AsyncIterator[str]:
    if not scene.canaries:
        return
    for path in Project(scene.top).folder.rglob("*"):
        if path.is_file() and (found := _canary(scene, path.read_bytes())):
            yield f"14: {path} has {found!r}"
    # The trusted repository uses the hub's objects; unreferenced ones count as well.
    repositories = {hub.trusted for hub in _hubs(state, scene)} | {scene.top / ".git"}
    for repository in repositories:
        arguments = ("cat-file", "--batch-all-objects", "--batch", "--unordered")
        objects = await scene.git(*arguments, cwd=repository)
        if found := _canary(scene, objects.stdout):
            yield f"14: an object of {repository} has {found!r}"


def _canary(scene: RunUnderTest, data: bytes) -> bytes | None:
    return next((canary for canary in scene.canaries if canary in data), None)


def _unsettled(run: RunDocument, tasks: Mapping[str, TaskDocument]) -> list[str]:
    if run.ended is None:
        return []
    stages = {TaskStatus.RUNNING, TaskStatus.CHECKING, TaskStatus.LANDING}
    return [f"16: {task} is {one.status}, the run is over" for task, one in tasks.items() if one.status in stages]


def _hubs(state: _State, scene: RunUnderTest) -> Iterator[Hub]:
    for value in state.of("run").values():
        yield find_hub(RunDocument.model_validate(value), scene.environ)


def _left_overs(run: RunDocument, tasks: Mapping[str, TaskDocument], scene: RunUnderTest) -> list[str]:
    hub = find_hub(run, scene.environ)
    broken = [f"10: {lock.path} is left" for lock in list_lock_files(hub)]
    kept = {f"{task}.{one.number}" for task, document in tasks.items() for one in document.attempts if one.is_kept}
    indexes = hub.indexes.glob(f"{run.id}-*")
    broken += [f"10: {path} is left" for path in indexes if path.name.removeprefix(f"{run.id}-") not in kept]
    if (hub.sessions / run.id).exists():
        left = (hub.sessions / run.id).iterdir()
        broken += [f"10: {path} is left" for path in left if path.name not in kept]
    return broken + _processes(hub, hub.sessions / run.id)


async def _places(hub: Hub) -> list[str]:
    """Check that each checkout is clean, preserved for a session, or in use."""
    broken = [f"10: {path} is left" for path in hub.slots.glob("*.new")]
    broken += [f"10: {path} was not deleted" for path in hub.trash.glob("*")]
    for place in list_slots(hub):
        if not await place.lock.is_held():
            broken += [f"10: {path} is left" for path in (*place.root.glob("*.new"), *place.scratch.glob("*"))]
            if read_record(place) is None and read_slot_session(place) is None:
                broken.append(f"10: {place.root} is nobody's, and not clean")
    return broken


def _processes(hub: Hub, sessions: Path) -> list[str]:
    """Find leftover processes of sessions and checks, by folder and environment."""
    marker = b"COUNCIL_PROMPT_FILE=" + os.fsencode(sessions) + b"/"
    broken = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            place, environ = (process / "cwd").readlink(), (process / "environ").read_bytes()
        except OSError:
            continue
        if place.is_relative_to(hub.root) or any(one.startswith(marker) for one in environ.split(b"\0")):
            broken.append(f"9: process {process.name} is running in {place}")
    return broken


async def _landings(scene: RunUnderTest, run: RunDocument, tasks: Mapping[str, TaskDocument]) -> AsyncIterator[str]:
    git = scene.git
    form = f"--format=%H %P %T %(trailers:key={TASK_TRAILER},valueonly,separator=%x20)"
    exists = await git("rev-parse", "--verify", "--quiet", f"refs/heads/{run.target}", cwd=scene.top, ok=(0, 1))
    lines = []
    if not exists.returncode:
        log = await git("log", "--first-parent", form, f"{run.start}..refs/heads/{run.target}", cwd=scene.top)
        lines = [line.split() for line in log.stdout.decode().splitlines()]
    commits: dict[str, list[str]] = defaultdict(list)
    for commit, *rest in lines:
        if len(rest) == 4:  # two parents, a tree, a trailer: a landing
            first, second, tree, label = rest
            commits[label].append(commit)
            options = ("--write-tree", "--no-messages", "--name-only")
            merged = await git("merge-tree", *options, first, second, cwd=scene.top, ok=(0, 1))
            expected, *conflicts = merged.stdout.decode().splitlines()
            changed = await git("diff-tree", "-r", "--name-only", expected, tree, cwd=scene.top)
            # Only a structural merge driver resolves conflicts in a merge, and only in the conflicting files.
            message = (await git("log", "-1", "--format=%B", commit, cwd=scene.top)).stdout.decode()
            is_named = bool(conflicts) == ("Conflicts merged by" in message)
            if not is_named or not set(changed.stdout.decode().splitlines()) <= set(conflicts):
                yield f"2: {commit} is not the merge of its parents"
    for task, document in tasks.items():
        found = commits[f"{run.id}/{task}"]
        landed_here = document.status is TaskStatus.LANDED and document.landed in {line[0] for line in lines}
        if len(found) > 1:
            yield f"1: {task} landed {len(found)} times"
        if document.status is TaskStatus.LANDED and not (found == [document.landed] or (not found and landed_here)):
            yield f"1: {task} is landed as {document.landed}, the target has {found}"
        if document.status in UNSUCCESSFUL_STATUSES and found:
            yield f"1: {task} is {document.status} but on the target as {found}"


async def _starts(
    run: RunDocument, tasks: Mapping[str, TaskDocument], specs: Mapping[str, TaskSpec], scene: RunUnderTest
) -> AsyncIterator[str]:
    git = Git(find_hub(run, scene.environ).trusted, environ=scene.environ)
    for task, spec in specs.items():
        for need in spec.needs:
            for attempt in tasks[task].attempts:
                landed = tasks[need].landed
                if tasks[need].status is TaskStatus.DONE:
                    continue
                if need in spec.built_needs and need in attempt.stacked_on:
                    if not await git.is_ancestor(attempt.stacked_on[need], attempt.base):
                        yield f"7: attempt {attempt.number} of {task} started without the work of {need}"
                elif landed is None:
                    yield f"7: {task} started before {need} had landed"
                elif not await git.is_ancestor(landed, attempt.base):
                    yield f"7: attempt {attempt.number} of {task} started without the landing of {need}"


async def _stacks(run: RunDocument, tasks: Mapping[str, TaskDocument], scene: RunUnderTest) -> AsyncIterator[str]:
    git = Git(find_hub(run, scene.environ).trusted, environ=scene.environ)
    for task, document in tasks.items():
        for need in document.stack if document.landed is not None else ():
            landed = tasks[need].landed
            if landed is None or not await git.is_ancestor(landed, document.landed or ""):
                yield f"7: {task} landed with the work of {need}, which had not landed"


async def _repository(scene: RunUnderTest, state: _State) -> AsyncIterator[str]:
    targets = {value["target"] for value in state.of("run").values()}
    for root in {hub.root for hub in _hubs(state, scene)}:
        for violation in await _places(Hub(root)):
            yield violation
        checked = await Git(Hub(root).trusted, environ=scene.environ)("fsck", "--no-dangling", ok=range(256))
        if checked.returncode:
            yield f"11: fsck of {root}: {checked.stderr.decode().strip()}"
    for arguments in (("fsck", "--no-dangling"), ("worktree", "list")):
        done = await scene.git(*arguments, cwd=scene.top, ok=range(256))
        if done.returncode:
            yield f"11: {arguments[0]}: {done.stderr.decode().strip()}"
    status = await scene.git("status", "--porcelain", "--untracked-files=all", cwd=scene.top)
    if scene.before is not None:
        if status.stdout:
            yield f"12: the checkout is dirty: {status.stdout.decode().strip()}"
        after = Fingerprint.of(scene.top)
        for target in targets:
            changed = scene.before.changes(after, target=target, checked_out=scene.target_checked_out)
            if changed and len(targets) == 1:
                yield f"12: changed in the user's repository: {', '.join(changed)}"

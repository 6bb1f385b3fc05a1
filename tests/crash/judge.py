"""An external judge of a run: from git, the log and /proc, finds lost, repeated and leftover work."""

from __future__ import annotations

import os
import subprocess
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import SUCCESS_STATUSES, TaskStatus
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import CommandResult, Repository
from tests.crash.workload import Workload

#: Files that a killed git leaves behind.
_STALE = ("*.lock", "tmp_objdir-*", "tmp_pack_*", "tmp_idx_*", "*.keep")


@dataclass(frozen=True)
class RunProcess:
    """A process of a run: its id and kind."""

    pid: int
    kind: str
    command: str


def find_processes(root: Path, commands: Container[int], without: bytes) -> Iterator[RunProcess]:
    """Yield the processes that use a folder, except those with `without` in their environment."""
    wanted = os.fsencode(root)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environ = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            if without in environ or (folder / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z":
                continue
            is_found = wanted in command or wanted in environ or _is_beneath(folder / "cwd", wanted)
            # Our forked processes are recognizable by open files only.
            if is_found or (
                b"python" in command and any(_is_beneath(one, wanted) for one in (folder / "fd").iterdir())
            ):
                pid = int(folder.name)
                kind = "orchestrator" if pid in commands else _kind(command.split(b"\0"))
                yield RunProcess(pid, kind, os.fsdecode(command.replace(b"\0", b" "))[:300])
        except OSError:  # the process ended
            continue


def _is_beneath(link: Path, wanted: bytes) -> bool:
    return wanted in os.fsencode(link.readlink())


def _kind(command: Sequence[bytes]) -> str:
    program = Path(os.fsdecode(command[0])).name
    if program.startswith("git") or program == "bwrap":
        return program.partition("-")[0]
    for name, words in {"supervisor": (b"supervisor", b"command_server"), "session": (b"fake_cli",)}.items():
        if any(word in one for word in words for one in command):
            return name
    return "check"


@dataclass(frozen=True)
class UserCommit:
    """A commit of the user: its message, and the lines it adds to and removes from files."""

    message: str
    added: Mapping[str, str]
    deleted: str | None = None


@dataclass(frozen=True)
class Judge:
    """The expected work in a repository, the user's commits, and the exit codes of commands."""

    repository: Repository
    workload: Workload
    start: str
    """The target's commit before the run."""
    commits: Sequence[UserCommit]
    commands: Sequence[tuple[str, CommandResult]]

    async def findings(self) -> list[str]:
        """Return all problems of an ended run."""
        found = [*self._commands(), *self._target(), *self._user(), *self._checkout(), *self._left()]
        return [*found, *self._tasks(*await self._recorded())]

    def _commands(self) -> Iterator[str]:
        for name, ended in self.commands:
            if ended.code not in {0, 1, 2, -9, *([130] if name == "status" else [])}:
                yield f"`council {name}` ended with {ended.code}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}"
            elif "Traceback" in ended.stdout + ended.stderr:
                yield f"`council {name}` printed a traceback: {ended.stdout[-2000:]}{ended.stderr[-2000:]}"

    def _target(self) -> Iterator[str]:
        git = self.repository.git
        moves = [line.split() for line in (self.repository.top / ".git/logs/refs/heads/main").read_text().splitlines()]
        line = git("rev-list", "--first-parent", "--reverse", f"{self.start}..main").split()
        known = [self.start, *line]
        if git("rev-parse", "main") != known[-1]:
            yield "the target does not descend from where it was"
        place = {commit: number for number, commit in enumerate(known)}
        after = [place.get(move[1], -1) for move in moves if move[0] in place]
        if after != sorted(after) or -1 in after:
            yield f"the target went back: {moves}"

    def _lines(self) -> Counter[tuple[str, str]]:
        """Count the additions of each line by the target's commits, minus removals."""
        found: Counter[tuple[str, str]] = Counter()
        options = ("--first-parent", "-m", "--patch", "--unified=0", "--no-renames", "--format=")
        path = ""
        for line in self.repository.git("log", *options, f"{self.start}..main").splitlines():
            if line.startswith(("+++ b/", "--- a/")):
                path = line[6:]
            elif line.startswith(("+", "-")) and not line.startswith(("+++ /dev", "--- /dev")):
                found[path, line] += 1
        return found

    def _user(self) -> Iterator[str]:
        git, lines = self.repository.git, self._lines()
        messages = Counter(git("log", "--first-parent", "--format=%s", f"{self.start}..main").splitlines())
        for commit in self.commits:
            if messages[commit.message] != 1:
                yield f"the user's commit {commit.message!r} is {messages[commit.message]} times on the target"
            for path, line in commit.added.items():
                if lines[path, f"+{line}"] != 1:
                    yield f"the user's line {line!r} was added to {path} {lines[path, '+' + line]} times"
        gone = {commit.deleted for commit in self.commits}
        for commit in self.commits:
            for path, line in commit.added.items():
                found = lines[path, f"-{line}"]
                if found != (path in gone):
                    yield f"the user's line {line!r} was removed from {path} {found} times"

    def _checkout(self) -> Iterator[str]:
        git = self.repository.git
        if status := git("status", "--porcelain", "--untracked-files=all"):
            yield f"the checkout is dirty: {status[:2000]}"
        if git("symbolic-ref", "HEAD") != "refs/heads/main":
            yield "the checkout is on another branch"

    def _left(self) -> Iterator[str]:
        root = self.repository.top.parent
        # Not at any depth: a sandbox leaves empty mount points in its session's folder.
        homes = (root.glob(f"council-home/*/{name}.git") for name in ("hub", "trusted"))
        repositories = [self.repository.top / ".git", *(one for found in homes for one in found)]
        for repository in repositories:
            for pattern in _STALE:
                yield from (f"left over: {path}" for path in repository.rglob(pattern))
            command = ["git", "fsck", "--no-dangling"]
            environ = {**self.repository.environ, "GIT_DIR": str(repository)}
            done = subprocess.run(command, env=environ, cwd=root, check=False, capture_output=True, text=True)
            if done.returncode or "missing" in done.stdout + done.stderr:
                yield f"git fsck of {repository}: {done.stdout}{done.stderr}"
        for path in root.glob("council-home/**/indexes/**/*.lock"):
            yield f"left over: {path}"
        for path in root.rglob("*.broken"):
            yield f"two sessions had {path.stem} at once: {path.read_text()}"
        for words in ("state verify", "check"):
            ended = self.repository.council(*words.split())
            if ended.code:
                yield f"`council {words}` found: {ended.stdout}{ended.stderr}"
        if locks := self.repository.council("locks", "--json").result["locks"]:
            yield f"still locked: {locks}"

    async def _recorded(self) -> tuple[dict[str, TaskDocument], dict[str, set[int]]]:
        """Return the logged tasks, and the attempts of whose plans each was recorded as a part."""
        run = self.repository.council("status", "--json").result["run"]
        plans: dict[str, set[int]] = defaultdict(set)
        async with FileStore.open(self.repository.log, SystemClock()) as store:
            found = {one.key.id.partition("/")[2]: one.value for one in await store.list("task", f"{run}/")}
            last = await store.position()
            async for record in store.watch():
                for key, (_, value) in record.documents.items():
                    if key.kind == "spec" and value is not None and value.get("plan"):
                        plans[key.id.partition("/")[2]].add(int(value["plan"].rpartition("/")[2]))
                if record.position == last:
                    break
        return {task: TaskDocument.model_validate(value) for task, value in found.items()}, plans

    def _tasks(self, documents: Mapping[str, TaskDocument], plans: Mapping[str, set[int]]) -> Iterator[str]:
        lines, known = self._lines(), set[tuple[str, str]]()
        yield from (f"{task} was a part of the plans of attempts {one}" for task, one in plans.items() if len(one) > 1)
        for task, document in documents.items():
            job = self.workload.jobs.get(task)
            expected = self.workload.lines_for_part(task, max(plans[task])) if job is None else job.lines
            wanted = int(document.status is TaskStatus.LANDED)
            for path, line in expected.items():
                known.add((path, f"+{line}"))
                if (found := lines[path, f"+{line}"]) != wanted:
                    yield f"{task} is {document.status}, and its line {line!r} was added to {path} {found} times"
            if job is not None and job.must_land and document.status not in SUCCESS_STATUSES:
                yield f"{task} should have landed and is {document.status}: {document.reason}"
            if document.status is TaskStatus.DONE:
                yield from self._expansion(task, document, documents)
        ours = ("tasks/", "parts/", "owned/", "bad/")
        for path, line in lines.keys() - known:
            if path.startswith(ours):
                yield f"no task was to change {path} by {line!r}"

    def _expansion(self, task: str, document: TaskDocument, documents: Mapping[str, TaskDocument]) -> Iterator[str]:
        for part in document.subtasks:
            if part not in documents or documents[part].status not in SUCCESS_STATUSES:
                found = documents[part].status if part in documents else "not there"
                yield f"{task} is done, and its part {part} is {found}"

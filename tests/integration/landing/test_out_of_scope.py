"""The ownership check before a landing: reject out-of-scope changes, extend the scope, or allow them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.path_ownership import MAX_OWNED_CHARS, MAX_OWNED_PATTERNS, PathOwnership
from orchestrator.engine.landing.ownership_check import OwnershipViolation
from orchestrator.locking.ownership import OwnershipRegistry, claim_key, ownership_scope
from orchestrator.protocols import Commit, Guard, Write
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import CommandResult, Repository
from tests.waiting import wait_for

pytestmark = [pytest.mark.extended_rest, pytest.mark.sandbox]

DEFAULTS = {"backoff": {"initial": "10ms", "max": "10ms", "jitter": False}, "timeout": "60s"}


def run(repository: Repository, *tasks: dict[str, Any], **defaults: Any) -> CommandResult:
    config = repository.configure(list(tasks), defaults={**DEFAULTS, **defaults})
    return repository.council("run", str(config), "--json")


def events(ended: CommandResult, event: str) -> list[dict[str, Any]]:
    return [line for line in ended.lines if line.get("event") == event]


async def test_out_of_scope_work_is_rejected_and_reported_to_the_next_attempt(repository: Repository) -> None:
    """It starts with the in-scope work.

    Everything else is restored: changed, new or deleted files, and folders in place of files.
    """
    repository.commit({"gone.txt": "x\n", "file": "x\n", "deep/er.txt": "x\n"}, "more")
    repository.remember()
    outside = ["append README.md evil", "write new.txt x", "delete gone.txt", "delete file", "write file/in x"]
    outside += ["wipe deep", "write deep x"]
    first = ["write src/a.txt one", *outside]
    prompt = "\n".join([f"attempt 1 {step}" for step in first] + ["attempt 2 append src/a.txt two", "keep-prompt"])
    ended = run(repository, {"id": "t", "prompt": prompt, "owns": ["src/**"]})
    assert ended.states == {"t": "landed"}, ended
    assert repository.git("diff", "--name-only", "HEAD^1", "HEAD") == "src/a.txt"
    assert (repository.top / "src/a.txt").read_text() == "one\ntwo\n"
    (retried,) = events(ended, "task.retrying")
    assert retried["outcome"] == "out_of_scope"
    assert sorted(retried["paths"]) == ["README.md", "deep", "deep/er.txt", "file", "file/in", "gone.txt", "new.txt"]
    reported = Path(ended.result["tasks"][0]["log"]).with_name("t.2.stdout").read_text()
    forbidden, _, allowed = reported.partition("do not change]")[2].partition("the task may change]")
    assert '"new.txt"' in forbidden
    assert '"src/**"' in allowed
    await repository.assert_invariants()


@pytest.mark.extended
async def test_repeated_out_of_scope_work_fails_and_is_preserved(repository: Repository) -> None:
    """The last attempt's branch has all of it; the reason names the paths; the printed setting lets a retry land."""
    each = {"id": "t", "prompt": "append README.md x", "owns": ["src/**"]}
    ended = run(repository, each, attempts=2)
    (task,) = ended.result["tasks"]
    assert (task["status"], task["failure"], task["attempts"]) == ("failed", "out_of_scope", 2)
    assert "README.md" in task["reason"]
    assert (Path(ended.result["repository"]) / "refs/heads" / task["branch"]).exists()
    assert "set `on_out_of_scope: extend` for t in" in repository.council("status").stdout
    repository.configure([each], defaults={**DEFAULTS, "attempts": 2, "on_out_of_scope": "extend"})
    assert repository.council("retry", "t", "--reload").code == 0
    assert repository.council("resume", "--json").states == {"t": "landed"}
    await repository.assert_invariants()


async def test_out_of_scope_task_does_not_affect_others(repository: Repository) -> None:
    """Of three concurrent tasks two land; a file name can't break out of the report that quotes it."""
    tasks: list[dict[str, Any]] = [
        {"id": "a", "prompt": "write a.txt x", "owns": ["a.txt"]},
        {"id": "b", "prompt": "write c.txt x", "owns": ["b.txt"]},
        {"id": "c", "prompt": "write d.txt x"},
    ]
    ended = run(repository, *tasks, attempts=1)
    assert ended.states == {"a": "landed", "b": "failed", "c": "landed"}, ended
    await repository.assert_invariants()


async def test_task_without_owns_may_change_anything(repository: Repository) -> None:
    ended = run(repository, {"id": "t", "prompt": "append README.md x"}, on_out_of_scope="retry")
    assert ended.states == {"t": "landed"}, ended


async def test_allow_lands_out_of_scope_work_and_reports_it_once(repository: Repository) -> None:
    """After its checks; the event names the out-of-scope changes, and a task may override the defaults."""
    tasks: list[dict[str, Any]] = [
        {"id": "free", "prompt": "append README.md x\nwrite src/a.txt x", "owns": ["src/**"]},
        {"id": "held", "prompt": "write b.txt x", "owns": ["docs/**"], "on_out_of_scope": "retry"},
    ]
    ended = run(repository, *tasks, on_out_of_scope="allow", attempts=1, checks=["true"])
    assert ended.states == {"free": "landed", "held": "failed"}, ended
    (allowed,) = events(ended, "task.out_of_scope_allowed")
    assert (allowed["task"], allowed["paths"]) == ("free", ["README.md"])
    await repository.assert_invariants()


async def test_extend_lands_unowned_paths(repository: Repository) -> None:
    task = {"id": "t", "prompt": "append README.md x", "owns": ["src/**"], "on_out_of_scope": "extend"}
    ended = run(repository, task)
    assert ended.states == {"t": "landed"}, ended
    assert [line["paths"] for line in events(ended, "task.ownership_extended")] == [["README.md"]]


async def test_own_lock_does_not_extend_the_scope(repository: Repository) -> None:
    """A session locks and changes a path that its task does not own: the lock does not make it land."""
    adapter = {
        "use": "command",
        "argv": ["sh", "-c", "council lock ci.yaml && echo evil >ci.yaml && echo x >src/a.txt"],
    }
    task = {"id": "t", "prompt": "x", "owns": ["src/**"], "attempts": 1}
    ended = repository.council("run", str(repository.configure([task], adapters={"odd": adapter})), "--json")
    (failed,) = ended.result["tasks"]
    assert (failed["status"], failed["failure"]) == ("failed", "out_of_scope"), failed
    assert "ci.yaml" in failed["reason"]
    assert not (repository.top / "ci.yaml").exists()
    await repository.assert_invariants()


@pytest.mark.extended
@pytest.mark.parametrize("checks", [pytest.param([], marks=pytest.mark.slow), ["true"]])
async def test_path_locked_by_another_session_waits_to_land(repository: Repository, checks: list[str]) -> None:
    """Even without `owns`: it lands onto the work of the lock's owner, once that has ended."""
    held, freed = (repository.spawns.parent / name for name in ("held", "freed"))
    script = f"council lock README.md && touch {held}; until [ -e {freed} ]; do sleep 0.05; done; sed -i 1d README.md"
    holder = {"use": "command", "argv": ["sh", "-c", script], "writable": [str(held.parent)]}
    tasks: list[dict[str, Any]] = [
        {"id": "holder", "prompt": "x", "priority": 10, "adapter": "holder"},
        {"id": "other", "prompt": f"await {held}\nappend README.md x", "adapter": "fake", "checks": checks},
        {"id": "free", "prompt": f"await {held}\nwrite free.txt x", "adapter": "fake"},
    ]
    repository.commit({"README.md": "one\n" + 9 * "more\n"}, "longer")
    repository.remember()
    path = repository.configure(tasks, capacity=3)
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "adapters": {**config["adapters"], "holder": holder}}))
    running = repository.start("run", str(path), "--json")

    def found() -> dict[str, dict[str, Any]]:
        return {task["id"]: task for task in repository.council("status", "--json").result.get("tasks", [])}

    wait_for(lambda: found() and found()["free"]["status"] == "landed" and found()["other"]["reason"], 60)
    waiting = found()["other"]
    assert waiting["status"] == "queued"
    assert "README.md is locked by task holder of run" in waiting["reason"]
    assert (repository.top / "README.md").read_text().endswith("more\n")
    freed.touch()
    running.communicate(timeout=60)
    assert {task: one["status"] for task, one in found().items()} == dict.fromkeys(
        ["holder", "other", "free"], "landed"
    )
    assert (repository.top / "README.md").read_text() == 9 * "more\n" + "x\n"
    await repository.assert_invariants()


async def test_extend_accepts_any_file_name(repository: Repository) -> None:
    """Even names that no pattern can express; the rest of the run is not delayed."""
    program = repository.top.parent / "odd.py"
    names = {b"back\\slash", b"na\xefve", b"[star]*?", b"two\nlines"}
    program.write_text(f"for name in {names!r}: open(name, 'w').write('x')\n")
    adapter = {"use": "command", "argv": [sys.executable, "-S", str(program)], "readable": [str(program.parent)]}
    task = {"id": "t", "prompt": "x", "owns": ["src/**"], "on_out_of_scope": "extend", "attempts": 1}
    ended = repository.council("run", str(repository.configure([task], adapters={"odd": adapter})), "--json")
    assert ended.states == {"t": "landed"}, ended
    landed = subprocess.run(
        ["git", "ls-tree", "-z", "--name-only", "main"], cwd=repository.top, check=True, capture_output=True
    )
    assert names <= set(landed.stdout.split(b"\0"))
    await repository.assert_invariants()


async def test_extend_rejects_too_many_paths(repository: Repository) -> None:
    """A record is bounded; the reason has the limit."""
    program = repository.top.parent / "many.py"
    program.write_text(f"for n in range({MAX_OWNED_PATTERNS + 1}): open(f'{{n}}.txt', 'w').write('x')\n")
    adapter = {"use": "command", "argv": [sys.executable, "-S", str(program)], "readable": [str(program.parent)]}
    task = {"id": "t", "prompt": "x", "owns": ["src/**"], "on_out_of_scope": "extend", "attempts": 1}
    ended = repository.council("run", str(repository.configure([task], adapters={"many": adapter})), "--json")
    assert ended.states == {"t": "failed"}, ended
    assert f"(limits per session: {MAX_OWNED_PATTERNS} and {MAX_OWNED_CHARS})" in ended.result["tasks"][0]["reason"]
    (failed,) = events(ended, "task.failed")
    assert 0 < len(failed["paths"]) < MAX_OWNED_PATTERNS
    await repository.assert_invariants()


def test_many_paths_are_shortened_in_the_report() -> None:
    """A session may leave any number of files; prompt and record stay bounded and contain the number."""
    escape = OwnershipViolation(tuple(f"node_modules/{'d' * 100}/{number}" for number in range(100_000)), ("src/**",))
    assert len(escape.render_feedback("mark")) < 100_000
    assert '"node_modules' in escape.render_feedback("mark")
    assert "and 99800 more\n[mark the task may change]" in escape.render_feedback("mark")
    assert len(escape.recorded) == 200


@pytest.mark.extended_variants
@pytest.mark.parametrize("pattern", ["*.md", "other/**"])
async def test_extend_rejects_paths_owned_by_another_session(repository: Repository, pattern: str) -> None:
    """A live session of another run owns it: the reason names it. Its other paths do not matter."""
    site = await find_run_repository(str(repository.top), is_url=False, environ=repository.environ)
    session = SessionName("another", "task", 1)
    async with FileStore.open(repository.log, SystemClock()) as store:
        key = claim_key(session)
        await store.commit(Commit([Write(key, 0, {"epoch": 1, "released": None})]))
        registry = OwnershipRegistry(store, SystemClock(), ownership_scope(site.location, "main"))
        assert await registry.acquire(session, [pattern], orchestrator="o", claim=Guard(key, 1)) is None
    task = {"id": "t", "prompt": "append README.md x", "owns": ["src/**"], "on_out_of_scope": "extend", "attempts": 1}
    ended = run(repository, task)
    expected = "failed" if pattern == "*.md" else "landed"
    assert ended.states == {"t": expected}, ended
    if expected == "failed":
        assert "task task of run another owns README.md (as *.md)" in ended.result["tasks"][0]["reason"]


@pytest.mark.extended
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
async def test_other_attempt_blocks_extend_only(repository: Repository, processes: int) -> None:
    """Declared or locked, in the same process or another: `extend` rejects with the owner; `allow` lands."""
    held, freed = (repository.spawns.parent / name for name in ("held", "freed"))
    script = f"council lock README.md && touch {held}; until [ -e {freed} ]; do sleep 0.05; done; echo z >mine.txt"
    holder = {"use": "command", "argv": ["sh", "-c", script], "writable": [str(held.parent)]}
    outside = {"owns": ["docs/**"], "attempts": 1, "adapter": "fake"}
    tasks: list[dict[str, Any]] = [
        {"id": "holder", "prompt": "x", "owns": ["mine.txt"], "priority": 10, "adapter": "holder"},
        {"id": "locked", "prompt": f"await {held}\nappend README.md x", "on_out_of_scope": "extend", **outside},
        {"id": "declared", "prompt": f"await {held}\nwrite mine.txt y", "on_out_of_scope": "extend", **outside},
        {"id": "allowed", "prompt": f"await {held}\nwrite mine.txt z", "on_out_of_scope": "allow", **outside},
    ]
    path = repository.configure(tasks, capacity=1 if processes == 2 else 2)
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "adapters": {**config["adapters"], "holder": holder}}))
    running = [repository.start("run", str(path), "--json")]
    wait_for(held.exists)
    if processes == 2:
        running.append(repository.start("work", "--json"))

    def found() -> dict[str, dict[str, Any]]:
        return {task["id"]: task for task in repository.council("status", "--json").result["tasks"]}

    wait_for(lambda: [one["status"] for one in found().values()] == ["running", "failed", "failed", "landed"], 60)
    tasks_now = found()
    freed.touch()
    for one in running:
        one.communicate(timeout=60)
    assert "task holder of run" in tasks_now["locked"]["reason"]
    assert "owns README.md" in tasks_now["locked"]["reason"]
    assert "owns mine.txt" in tasks_now["declared"]["reason"]
    assert {task: one["failure"] for task, one in found().items()} == {
        "holder": None,
        "locked": "out_of_scope",
        "declared": "out_of_scope",
        "allowed": None,
    }
    assert found()["holder"]["status"] == "landed"
    await repository.assert_invariants()


def test_lock_covers_a_replaced_path() -> None:
    """A file or link in place of a parent folder of the locked path, which need not exist yet."""
    nothing = PathOwnership(run="r", task="t", attempt=1, patterns=(), since=0.0, orchestrator="o", epoch=1)
    holding = nothing.with_patterns(["src/new/deep/x.py", "a[b]"], 1.0, is_lock=True)
    for path in ("src/new/deep/x.py", "src/new/deep", "src", "src/new/deep/x.py/more", "ab"):
        assert holding.find_lock([path]) is not None, path
    for path in ("src/new/deep/y.py", "src/ne", "a", "other"):
        assert holding.find_lock([path]) is None, path

"""Preparation of worktrees, from the file to the landing: setup, hooks, provided files, ports, caches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.sandboxes import default_sandbox

SECRET = "s3cr3t-Val-0123456789"


@pytest.fixture
def outside(repository: Repository) -> Path:
    """Return a folder that sessions and commands may write, for traces."""
    folder = repository.top.parent / "outside"
    folder.mkdir()
    return folder


def shell(repository: Repository, outside: Path, scripts: Mapping[str, str], **settings: Any) -> Path:
    """Configure tasks that are shell scripts."""
    adapters = settings.pop("adapters", {"sh": {}})
    script = {"use": "command", "argv": ["sh", "-e", "{prompt_file}"]}
    made = {name: {**script, **more} for name, more in adapters.items()}
    listed = [
        {"id": name, "prompt": prompt, "adapter": next(iter(made)), "attempts": 1} for name, prompt in scripts.items()
    ]
    more: Sequence[Mapping[str, Any]] = settings.pop("tasks", listed)
    return repository.configure(more, writable=[str(outside)], adapters=made, **settings)


def run(repository: Repository, config: Path, code: int = 0) -> CommandResult:
    """Run a file to its end."""
    ended = repository.council("run", str(config), "--json")
    assert ended.code == code, (ended.result, ended.stderr)
    return ended


def lines(path: Path) -> list[str]:
    """Return the lines of a trace."""
    return path.read_text().splitlines() if path.exists() else []


def many(number: int, script: str) -> dict[str, str]:
    """Return tasks with the same script, in which `@` is the task's name."""
    return {f"t{one}": script.replace("@", f"t{one}") for one in range(number)}


async def test_setup_runs_once_per_slot_and_again_for_changed_inputs(repository: Repository, outside: Path) -> None:
    """Not in the next run either; its files are no work of a session, and are made again for other inputs."""
    repository.commit({"lock": "one\n", ".gitignore": "made/\n"}, "inputs")
    repository.remember()
    step = f"mkdir -p made && cp lock made/lock && echo note > note && git rev-parse HEAD && pwd >> {outside}/setups"
    worktrees = {"setup": [{"run": step, "inputs": ["lock"]}]}
    script = "cmp lock made/lock && test -f note && echo @ > @.txt"
    config = shell(repository, outside, many(6, script), worktrees=worktrees, capacity=2)
    done = run(repository, config)
    first = lines(outside / "setups")
    assert len(first) == len(set(first)) <= 3, "once per slot"
    assert [one["commands"] for one in done.lines if one.get("event") == "slot.setup_started"] == [[step]] * len(first)
    took = [one["seconds"] for one in done.lines if one.get("event") == "slot.setup_finished"]
    assert len(took) == len(first)
    assert min(took) > 0
    run(repository, shell(repository, outside, many(3, script.replace("@.", "@b.")), worktrees=worktrees, capacity=2))
    assert lines(outside / "setups") == first, "the next run reuses the slots unchanged"
    repository.commit({"lock": "two\n"}, "other inputs")
    run(repository, shell(repository, outside, many(2, script.replace("@.", "@c.")), worktrees=worktrees, capacity=2))
    assert len(lines(outside / "setups")) > len(first)
    assert "note" not in repository.git("ls-files").split()
    repository.remember()
    await repository.assert_invariants()


@pytest.mark.extended
async def test_session_that_damages_the_setup_discards_its_slot(repository: Repository, outside: Path) -> None:
    repository.commit({".gitignore": "made/\n"}, "ignored")
    repository.remember()
    worktrees = {"setup": [f"mkdir made && echo good > made/file && echo x >> {outside}/setups"]}
    script = "grep -qx good made/file && echo bad > made/file && echo more > made/more && echo @ > @.txt"
    run(repository, shell(repository, outside, many(4, script), worktrees=worktrees, capacity=1))
    assert len(lines(outside / "setups")) >= 4
    await repository.assert_invariants()


async def test_failed_setup_is_tried_once_and_reported(repository: Repository, outside: Path) -> None:
    """Every task has the reason, with the cause above the notes of the command, and its log; no session started."""
    said = r"no such package\n\nnpm notice New version!\n[notice] A new release is there\nhint: see above\n"
    worktrees = {"setup": [f"echo x >> {outside}/setups; printf '{said}' >&2; exit 7"]}
    tasks = many(5, f"echo x >> {outside}/sessions")
    config = shell(repository, outside, tasks, worktrees=worktrees, capacity=2, network="off")
    ended = run(repository, config, 1)
    assert {task["failure"] for task in ended.result["tasks"]} == {"setup_failed"}
    for task in ended.result["tasks"]:
        assert "no such package" in task["reason"]
        assert "exit code 7" in task["reason"]
        assert ("`network: off` may be the cause" in task["reason"]) == (not default_sandbox())
    shown = " ".join(repository.council("status").stdout.split())
    assert ("no such package" in shown, "notice" in shown, "(log: /" in shown) == (True, False, True), shown
    assert len(lines(outside / "setups")) <= 3, "slots created at the same time"
    assert not lines(outside / "sessions")
    await repository.assert_invariants()


async def test_hooks_run_around_each_session(repository: Repository, outside: Path) -> None:
    """A failing hook before a session fails the attempt; one after it is reported, and its changes are work."""
    worktrees = {
        "before_run": ["echo before > started", f"test $COUNCIL_TASK != bad && echo $COUNCIL_TASK >> {outside}/before"],
        "after_run": ["test -f started && echo formatted >> $COUNCIL_TASK.txt", "exit 3"],
    }
    tasks = {"good": "cat started > good.txt; rm started", "bad": "echo x > bad.txt", "other": "mv started other.txt"}
    worktrees["after_run"][0] = "echo formatted >> $COUNCIL_TASK.txt"
    ended = run(repository, shell(repository, outside, tasks, worktrees=worktrees), 1)
    assert ended.states == {"good": "landed", "bad": "failed", "other": "landed"}
    assert sorted(lines(outside / "before")) == ["good", "other"]
    assert repository.git("show", "HEAD:good.txt").splitlines() == ["before", "formatted"]
    reported = map(json.loads, ended.stdout.splitlines())
    failed = [event for event in reported if event.get("event") == "task.after_run_failed"]
    assert {event["task"] for event in failed} == {"good", "other"}
    assert all("exit code 3" in event["reason"] for event in failed)
    await repository.assert_invariants()


async def test_files_of_the_user_are_provided_and_never_landed(repository: Repository, outside: Path) -> None:
    """In sessions and checks; forced commits of them are dropped, and their secrets are in no log."""
    repository.commit({".gitignore": ".env\ndata/\n"}, "ignored")
    (repository.top / ".env").write_text(f"SERVICE_TOKEN={SECRET}\n")
    (repository.top / "data").mkdir()
    (repository.top / "data" / "large").write_text("large\n")
    repository.remember()
    tasks = {
        "reads": ". ./.env; echo $SERVICE_TOKEN; cat data/large; test -L data; echo a > a.txt",
        "forces": "git add -f .env && git commit -qm forced; echo b > b.txt",
    }
    config = shell(
        repository,
        outside,
        tasks,
        worktrees={"copy": [".env"], "link": ["data"]},
        defaults={"checks": [f"grep -q {SECRET} .env && cat data/large"]},
    )
    ended = run(repository, config)
    assert not {".env", "data"} & set(repository.git("log", "--all", "--name-only", "--format=").split())
    logs = "".join(path.read_text() for path in (repository.top / ".council" / "logs").rglob("*stdout*"))
    assert "large" in logs
    assert "[redacted]" in logs
    assert SECRET not in logs
    assert SECRET not in json.dumps(ended.result)


async def test_live_sessions_share_no_port_or_name(repository: Repository, outside: Path) -> None:
    """Each listens on its first port while the others do; checks have one too."""
    (outside / "serve.py").write_text(
        "import os, socket, sys, time\n"
        "server = socket.create_server(('127.0.0.1', int(os.environ['COUNCIL_PORT_0'])))\n"
        "print(os.environ['COUNCIL_NAME'], os.environ['COUNCIL_PORT_2'])\n"
    )
    waits = f'until [ "$(ls {outside}/up | wc -l)" -ge 4 ]; do sleep 0.05; done'
    (outside / "up").mkdir()
    reported = f"echo $COUNCIL_NAME $COUNCIL_PORT_0 >> {outside}/had; touch {outside}/up/@"
    script = f"python3 {outside}/serve.py > @.txt; {reported}; {waits}"
    config = shell(
        repository,
        outside,
        many(4, script),
        worktrees={"ports": 3},
        capacity=4,
        defaults={"checks": [f"python3 {outside}/serve.py"]},
    )
    run(repository, config)
    had = [line.split() for line in lines(outside / "had")]
    assert len({name for name, _ in had}) == len({port for _, port in had}) == 4
    ports = sorted(int(port) for _, port in had)
    assert all(two - one >= 3 for one, two in pairwise(ports))
    await repository.assert_invariants()


@pytest.mark.extended
async def test_ignored_files_reach_the_next_session_only_if_kept(repository: Repository, outside: Path) -> None:
    """Shared caches are for all sessions, those of an adapter for its own, all others for none."""
    repository.commit({".gitignore": "cache/\n.tool/\njunk/\n"}, "ignored")
    repository.remember()
    look = f"for i in cache .tool junk; do test ! -e $i || echo @ $i >> {outside}/seen; done; "
    leave = "mkdir -p cache .tool junk; echo @ > @.txt"
    tasks = [
        {"id": "t0", "prompt": (look + leave).replace("@", "t0"), "adapter": "one"},
        {"id": "t1", "prompt": (look + leave).replace("@", "t1"), "adapter": "one", "needs": ["t0"]},
        {"id": "t2", "prompt": (look + leave).replace("@", "t2"), "adapter": "two", "needs": ["t1"]},
    ]
    config = shell(
        repository,
        outside,
        {},
        tasks=tasks,
        adapters={"one": {"keep_ignored": [".tool"]}, "two": {}},
        worktrees={"keep_ignored": ["cache"], "max": 1},
        capacity=1,
    )
    run(repository, config)
    assert lines(outside / "seen") == ["t1 cache", "t1 .tool", "t2 cache"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_unselected_folders_are_absent_and_not_lost(repository: Repository, outside: Path) -> None:
    """A session sees the top and the named folders; the landed commit has all others too."""
    repository.commit({"docs/a.md": "a\n", "src/deep/b.py": "b\n", "tests/c.py": "c\n"}, "folders")
    repository.remember()
    script = "test ! -e docs && test ! -e tests && test -f src/deep/b.py && git status --porcelain && echo n > src/@.py"
    tasks = {**many(2, script), "outside": "mkdir docs && echo new > docs/new.md && echo changed > docs/a.md"}
    ended = run(repository, shell(repository, outside, tasks, worktrees={"sparse": ["src"]}, capacity=2))
    assert ended.states == dict.fromkeys(tasks, "landed")
    assert repository.git("show", "HEAD:docs/a.md") == "changed"
    assert {"docs/a.md", "docs/new.md", "tests/c.py", "src/t0.py"} <= set(repository.git("ls-files").split())
    await repository.assert_invariants()


@pytest.mark.extended
async def test_output_of_teardown_is_recorded(repository: Repository, outside: Path) -> None:
    """It runs in a slot before its deletion, with the slot's own name."""
    worktrees = {
        "setup": [f"echo $COUNCIL_NAME >> {outside}/up; echo x > made"],
        "teardown": [f"echo $COUNCIL_NAME >> {outside}/down"],
    }
    run(repository, shell(repository, outside, {"a": "echo y > made; echo a > a.txt"}, worktrees=worktrees))
    gone = lines(outside / "down")
    assert gone
    assert set(gone) <= set(lines(outside / "up"))


@pytest.mark.extended
async def test_removed_setup_files_are_recreated(repository: Repository, outside: Path) -> None:
    """Whichever adapter keeps them: sessions of every adapter find them."""
    repository.commit({".gitignore": "modules/\n"}, "ignored")
    repository.remember()
    worktrees = {"setup": ["mkdir modules && echo x > modules/x"], "max": 1}
    look = f"test -f modules/x || echo @ >> {outside}/missed; echo @ > @.txt"
    tasks = [
        {"id": "a1", "prompt": look.replace("@", "a1"), "adapter": "a"},
        {"id": "b1", "prompt": look.replace("@", "b1") + "; rm -rf modules", "adapter": "b", "needs": ["a1"]},
        {"id": "a2", "prompt": look.replace("@", "a2") + "; rm -rf modules", "adapter": "a", "needs": ["b1"]},
        {"id": "b2", "prompt": look.replace("@", "b2"), "adapter": "b", "needs": ["a2"]},
    ]
    adapters = {"a": {"keep_ignored": ["modules"]}, "b": {}}
    run(repository, shell(repository, outside, {}, tasks=tasks, adapters=adapters, worktrees=worktrees, capacity=1))
    assert not lines(outside / "missed")
    await repository.assert_invariants()

"""Runs whose tasks are issues of a scripted forge, with real processes."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.testing.forge_servers import GitHubServer, GitLabServer
from orchestrator.testing.forge_servers.pull_requests import PullRequestServer
from orchestrator.testing.forge_servers.server import ForgeServer
from tests.conftest import CommandResult, Repository
from tests.integration.plugins.test_pull_requests import give_token
from tests.waiting import wait_for

SERVERS: dict[str, type[ForgeServer]] = {"github": GitHubServer, "gitlab": GitLabServer}


@pytest.fixture(params=["github", pytest.param("gitlab", marks=pytest.mark.extended)])
def forge(request: pytest.FixtureRequest, repository: Repository) -> Iterator[ForgeServer]:
    """Yield a server whose token the commands of the repository have."""
    repository.environ["FORGE_TOKEN"] = "t0ken"
    with SERVERS[request.param]() as server:
        yield server


def trackers(forge: ForgeServer, **options: Any) -> dict[str, Any]:
    """Return the trackers of a run."""
    use, key = ("github", "repo") if isinstance(forge, GitHubServer) else ("gitlab", "project")
    common = {"api": forge.url, "token": "FORGE_TOKEN", "sync_interval": "200ms", "labels": ["work"]}
    return {"board": {"use": use, key: forge.repository, **common, **options}}


def shown(forge: ForgeServer, number: int) -> str:
    """Return the comment with the state on an issue, which must not be repeated."""
    [comment] = [one.body for one in forge.issue(number).comments if "council:state" in one.body] or [""]
    return comment


async def test_issues_land_and_people_direct_them(repository: Repository, forge: ForgeServer) -> None:
    """One issue needs another; a person closes a third one while its session runs, and retries a fourth one."""
    forge.add_issue("Write one", "write one.txt 1", ["work"])
    forge.add_issue("Write two", "Blocked by #1\nappend one.txt 2", ["work"])
    hanging = forge.add_issue("Hang", "hang", ["work"])
    failing = forge.add_issue("Fail", "exit 1 no", ["work"])
    config = repository.configure([], trackers=trackers(forge), defaults={"attempts": 1})
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: "council: running" in shown(forge, hanging) and "council: failed" in shown(forge, failing))
    forge.edit(failing, body="write four.txt 4")
    forge.comment(failing, "/council retry")
    wait_for(lambda: "tracker.requested" in repository.council("state", "log", "--json").stdout)
    forge.close(hanging)
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    states = {"issue-1": "landed", "issue-2": "landed", "issue-3": "cancelled", "issue-4": "failed"}
    assert ended.states == states, ended
    assert (repository.top / "one.txt").read_text() == "1\n2\n"
    assert [forge.issue(number).is_open for number in (1, 2, 3, 4)] == [False, False, False, True]
    assert [label for number in (1, 2, 3, 4) for label in forge.issue(number).labels if "council" in label] == [
        "council:landed", "council:landed", "council:cancelled", "council:failed"
    ]  # fmt: skip
    requested = [line for line in ended.lines if line.get("event") == "tracker.requested"]
    assert sorted((one["action"], one["task"]) for one in requested) == [("cancel", "issue-3"), ("retry", "issue-4")]
    await repository.assert_invariants()


async def test_sync_of_an_ended_run_records_a_request_once(repository: Repository, forge: ForgeServer) -> None:
    """`resume` performs it; a refused request is reported, and an unreachable forge too."""
    forge.add_issue("Fail", "exit 1 no", ["work"])
    forge.add_issue("Write", "write two.txt 2", ["work"])
    config = repository.configure([], trackers=trackers(forge, close=False), defaults={"attempts": 1})
    assert repository.council("run", str(config)).code == 1
    forge.comment(1, "/council retry")
    forge.comment(2, "/council approve")
    synced = repository.council("sync", "--json")
    [report] = synced.result["trackers"]
    assert (report["shown"], report["requested"], len(report["refused"])) == (2, ["retry issue-1"], 1), synced
    again = repository.council("sync")
    assert (again.code, again.stdout) == (0, "board: 2 tasks shown\n"), again
    status = repository.council("sync", "--status")
    assert (status.code, status.stdout) == (0, "board: 2 tasks, 2 ended, 2 requests handled\n"), status
    before = len(repository.spawns.read_text().splitlines())
    resumed = repository.council("resume", "--json")
    assert resumed.states == {"issue-1": "failed", "issue-2": "landed"}, resumed
    assert len(repository.spawns.read_text().splitlines()) == before + 1
    assert "council: failed" in shown(forge, 1)
    assert forge.issue(2).is_open
    forge.fail_next(1, 401)
    failed = repository.council("sync")
    assert (failed.code, "tracker 'board': 127.0.0.1 answered 401" in failed.stderr) == (2, True), failed
    assert "t0ken" not in repository.council("state", "log", "--json").stdout
    await repository.assert_invariants()


def test_run_without_trackers_has_nothing_to_sync(repository: Repository) -> None:
    assert repository.council("run", str(repository.configure([{"id": "a", "prompt": "write a.txt 1"}]))).code == 0
    synced = repository.council("sync")
    assert (synced.code, "has no trackers: add some to the file" in synced.stderr) == (2, True), synced


@pytest.mark.extended
async def test_outage_of_the_forge_delays_no_work(repository: Repository, forge: ForgeServer) -> None:
    """It is reported, and the board shows the end once it answers again."""
    gate = repository.spawns.parent / "gate"
    forge.add_issue("Wait", f"await {gate}\nwrite one.txt 1", ["work"])
    config = repository.configure([], trackers=trackers(forge))
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: "council: running" in shown(forge, 1))
    forge.fail_next(100, 503)
    wait_for(lambda: "failing: " in repository.council("sync", "--status").stdout)
    forge.recover()
    gate.touch()
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert ended.states == {"issue-1": "landed"}, ended
    events = [line["event"] for line in ended.lines if line.get("event", "").startswith("tracker.")]
    assert events == ["tracker.failing", "tracker.recovered"]
    assert "council: landed" in shown(forge, 1)
    await repository.assert_invariants()


async def test_followed_issues_join_an_active_run(repository: Repository, forge: ForgeServer) -> None:
    """The run begins without any; an invalid issue is reported once and refused; a resumed run goes on."""
    config = repository.configure([], trackers=trackers(forge))
    child = repository.start("run", str(config), "--follow", "--json")
    wait_for(lambda: "running" in repository.council("status").stdout)
    first = forge.add_issue("Write one", "write one.txt 1", ["work"])
    wait_for(lambda: "council:landed" in forge.issue(first).labels)
    refused = forge.add_issue("Refused", "write two.txt 2", ["work", "adapter: nobody"])
    second = forge.add_issue("Write three", f"Blocked by #{first}\nappend one.txt 3", ["work"])
    wait_for(lambda: "council:landed" in forge.issue(second).labels)
    child.send_signal(signal.SIGINT)
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert ended.states == {"issue-1": "landed", "issue-3": "landed"}, ended
    assert ended.result["status"] == "interrupted"
    [event] = [line for line in ended.lines if line.get("event") == "tracker.task_refused"]
    assert (event["task"], "nobody" in event["reason"]) == (f"issue-{refused}", True)
    resumed = repository.start("resume", "--json")
    third = forge.add_issue("Write four", "append one.txt 4", ["work"])
    wait_for(lambda: "council:landed" in forge.issue(third).labels)
    resumed.send_signal(signal.SIGINT)
    resumed.communicate(timeout=60)
    assert (repository.top / "one.txt").read_text() == "1\n3\n4\n"
    await repository.assert_invariants()


async def test_killed_while_a_new_issue_joins(repository: Repository, forge: ForgeServer) -> None:
    """It joins once, and its work lands in the resumed run."""
    forge.add_issue("Write one", "write one.txt 1", ["work"])
    config = repository.configure([], trackers=trackers(forge))
    child = repository.start("run", str(config), "--follow", failpoints="run.extended=kill")
    wait_for(lambda: "council:landed" in forge.issue(1).labels)
    new = forge.add_issue("Write two", "append one.txt 2", ["work"])
    child.communicate(timeout=60)
    resumed = repository.start("resume", "--json")
    wait_for(lambda: "council:landed" in forge.issue(new).labels)
    resumed.send_signal(signal.SIGINT)
    output, error = resumed.communicate(timeout=60)
    ended = CommandResult(resumed.wait(), output, error)
    assert ended.states == {"issue-1": "landed", "issue-2": "landed"}, ended
    assert (repository.top / "one.txt").read_text() == "1\n2\n"
    await repository.assert_invariants()


def test_following_needs_a_tracker(repository: Repository) -> None:
    """The message says so before anything starts."""
    ended = repository.council("run", str(repository.configure([{"id": "one", "prompt": "hang"}])), "--follow")
    assert (ended.code, "--follow needs a tracker" in ended.stderr) == (2, True), ended


async def test_edited_issue_reaches_the_session(repository: Repository, forge: ForgeServer) -> None:
    """Once, if its author has write access; an unchanged issue causes no message."""
    forge.add_user("stranger")
    go = repository.spawns.parent / "go"
    edited = forge.add_issue("Write one", f"write one.txt 1\nawait {go}\nkeep-prompt", ["work"])
    foreign = forge.add_issue("Write two", f"write two.txt 1\nawait {go}", ["work"], author="stranger")
    config = repository.configure([], trackers=trackers(forge))
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: repository.spawns.exists() and repository.spawns.read_text().count("\n") == 2)
    forge.edit(edited, body="write one.txt 2\nkeep-prompt")
    forge.edit(foreign, body="write two.txt 2")
    wait_for(lambda: "task.message_sent" in repository.council("state", "log", "--json").stdout)
    go.touch()
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert ended.states == {"issue-1": "landed", "issue-2": "landed"}, ended
    assert (repository.top / "one.txt").read_text() == "2\n"
    assert (repository.top / "two.txt").read_text() == "1\n"
    sent = [line["task"] for line in ended.lines if line.get("event") == "task.message_sent"]
    assert sent == ["issue-1"]
    await repository.assert_invariants()


async def test_requests_of_an_earlier_run_are_not_repeated(repository: Repository, forge: ForgeServer) -> None:
    """A comment cancelled the task in one run: the next run works on the issue."""
    forge.add_issue("Write one", "without go hang\nwrite one.txt 1", ["work"])
    config = repository.configure([], trackers=trackers(forge))
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: "council: running" in shown(forge, 1))
    forge.comment(1, "/council cancel")
    assert child.communicate(timeout=60)
    repository.commit({"go": ""})
    again = repository.council("run", str(config), "--json")
    assert again.states == {"issue-1": "landed"}, again
    assert "on `main`" in shown(forge, 1)


@pytest.fixture
def machines(repository: Repository, forge: ForgeServer, tmp_path: Path) -> list[Repository]:
    """Return two machines with folders, homes and stores of their own, whose runs push to the forge."""
    give_token(repository)
    repository.git("clone", "--quiet", "--bare", str(repository.top), str(tmp_path / "forge.git"))
    assert isinstance(forge, PullRequestServer)
    forge.git_dir = tmp_path / "forge.git"
    made = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        (folder / "ledger").mkdir(parents=True)
        environ = {**repository.environ, "COUNCIL_HOME": str(folder / "home")}
        made.append(Repository(folder, environ, folder / "ledger" / "spawns"))
        replace(made[-1], top=folder / "project").configure(  # it writes the file next to the repository
            [], repo=forge.clone_url, trackers=trackers(forge, stale_after="10s"), writable=[str(tmp_path)]
        )
    return made


def shown_run(forge: ForgeServer, number: int) -> str:
    """Return the run that an issue shows; empty without one."""
    return "".join(re.findall(r'"run": "([^"]*)"', shown(forge, number)))


async def test_machines_share_a_board(machines: list[Repository], forge: ForgeServer, tmp_path: Path) -> None:
    """Each issue is worked on once: the second machine leaves the issue of the first one alone."""
    first, second = machines
    gate = tmp_path / "gate"
    forge.add_issue("Write one", f"await {gate}\nwrite one.txt 1", ["work"])
    child = first.start("run", "council.yaml", "--json")
    wait_for(lambda: "council: running" in shown(forge, 1))
    nothing = second.council("run", "council.yaml")
    assert (nothing.code, "those of an active run are not free" in nothing.stderr) == (2, True), nothing
    forge.add_issue("Write two", "write two.txt 2", ["work"])
    other = second.council("run", "council.yaml", "--json")
    assert other.states == {"issue-2": "landed"}, other
    gate.touch()
    output, error = child.communicate(timeout=60)
    assert CommandResult(child.wait(), output, error).states == {"issue-1": "landed"}
    assert isinstance(forge, PullRequestServer)
    assert forge.git("ls-tree", "--name-only", "main").split() == ["README.md", "one.txt", "src", "two.txt"]
    assert [one.spawns.read_text().count("\n") for one in machines] == [1, 1]


async def test_a_dead_machine_is_replaced(machines: list[Repository], forge: ForgeServer, tmp_path: Path) -> None:
    """Its claim expires, and the other machine works on its issue. If it comes back, it leaves the issue alone."""
    first, second = machines
    gate = tmp_path / "gate"
    forge.add_issue("Write one", f"await {gate}\nwrite one.txt 1", ["work"])
    killed = first.start("run", "council.yaml")
    wait_for(lambda: "council: running" in shown(forge, 1) and first.spawns.exists())
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    dead = shown_run(forge, 1)
    early = second.council("run", "council.yaml")
    assert (early.code, "no open task" in early.stderr) == (2, True), early
    wait_for(lambda: second.council("run", "council.yaml", "--dry-run").code == 0)
    child = second.start("run", "council.yaml", "--json")
    wait_for(lambda: shown_run(forge, 1) not in ("", dead) and "council: running" in shown(forge, 1))
    taken = shown_run(forge, 1)
    synced = first.council("sync")
    assert "not shown: issue-1, which another run works on" in synced.stdout, synced
    resumed = first.council("resume", "--json")
    assert resumed.states == {"issue-1": "cancelled"}, resumed
    [left] = resumed.result["tasks"]
    assert left["reason"] == "ignored: another run works on it", resumed
    assert shown_run(forge, 1) == taken
    gate.touch()
    output, error = child.communicate(timeout=60)
    assert CommandResult(child.wait(), output, error).states == {"issue-1": "landed"}
    first.council("sync")
    assert (shown_run(forge, 1), forge.issue(1).labels) == (taken, ["work", "council:landed"])
    assert [one.spawns.read_text().count("\n") for one in machines] == [1, 1]


@pytest.mark.parametrize("dies", [False, True])
async def test_one_of_two_machines_gets_a_new_issue(
    machines: list[Repository], forge: ForgeServer, tmp_path: Path, dies: bool
) -> None:
    """Both see it at once, and may begin; one leaves it alone, and takes it over if the other one dies."""
    gate = tmp_path / "gate"
    children = [one.start("run", "council.yaml", "--follow", "--json") for one in machines]
    wait_for(lambda: all("running" in one.council("status").stdout for one in machines))
    forge.add_issue("Write one", f"await {gate}\nwrite one.txt 1", ["work"])
    wait_for(lambda: "council:running" in forge.issue(1).labels)
    [left] = wait_for(lambda: [one for one in machines if "cancelled" in one.council("status").stdout])
    if dies:
        winner = children.pop(1 - machines.index(left))
        winner.send_signal(signal.SIGKILL)
        winner.communicate(timeout=60)
    gate.touch()
    wait_for(lambda: "council:landed" in forge.issue(1).labels and "council: landed" in shown(forge, 1))
    states = []
    for child in children:
        child.send_signal(signal.SIGINT)
        output, error = child.communicate(timeout=60)
        states.append(CommandResult(child.wait(), output, error).states["issue-1"])
    assert sorted(states) == (["landed"] if dies else ["cancelled", "landed"])
    assert "council: landed" in shown(forge, 1)

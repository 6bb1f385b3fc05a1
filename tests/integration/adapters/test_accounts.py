"""Accounts of an adapter in real runs: a limit or a failed login of one leaves the work to the others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.api.council import Council
from orchestrator.engine.reports.report import RunReport
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository
from tests.fakes.script import ROOT, install
from tests.integration.runs.test_scheduler import until_event
from tests.integration.runs.test_shared_runs import QUICK, happened
from tests.waiting import wait_for

WORK, PRIVATE = "value-of-work-8141", "value-of-private-2718"
#: It notes its start and end, obeys the state of its account, and writes a file.
PROGRAM = """
echo "start $ACCOUNT_KEY $COUNCIL_TASK" >> {folder}/sessions
state=$(cat {folder}/$ACCOUNT_KEY)
case "$state" in
  limit*) echo "limit reached, again in ${{state#limit }} s"; exit 1 ;;
  locked) echo "not logged in"; exit 1 ;;
esac
while [ -e {folder}/gate ]; do sleep 0.05; done
echo x > "$COUNCIL_TASK.txt"
echo "end $ACCOUNT_KEY $COUNCIL_TASK" >> {folder}/sessions
"""
FAILURES = {"auth": "not logged in", "rate_limited": r"limit reached, again in (?P<seconds>\d+) s"}


class Accounts:
    """A program with two accounts, whose states are files."""

    def __init__(self, repository: Repository, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        repository.environ.update(LOGIN_OF_WORK=WORK, LOGIN_OF_PRIVATE=PRIVATE)
        self.set(WORK, "ready")
        self.set(PRIVATE, "ready")

    def set(self, account: str, state: str) -> None:
        (self.folder / account).write_text(state)

    def adapter(self, **more: Any) -> dict[str, Any]:
        """Return the entry of the adapter."""
        return {
            "use": "command",
            "argv": ["sh", "-c", PROGRAM.format(folder=self.folder)],
            "failures": FAILURES,
            "writable": [str(self.folder)],
            "accounts": {
                "work": {"ACCOUNT_KEY": "$LOGIN_OF_WORK"},
                "private": {"ACCOUNT_KEY": "$LOGIN_OF_PRIVATE"},
            },
            **more,
        }

    @property
    def sessions(self) -> list[tuple[str, str, str]]:
        """What happened, the account and the task, in order."""
        file = self.folder / "sessions"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(one, account, task) for one, account, task in map(str.split, lines)]

    def starts(self, account: str) -> int:
        return sum(one[:2] == ("start", account) for one in self.sessions)


@pytest.fixture
def accounts(repository: Repository, tmp_path: Path) -> Accounts:
    return Accounts(repository, tmp_path / "accounts")


def tasks(count: int) -> list[dict[str, Any]]:
    return [{"id": f"t{one}", "prompt": "x"} for one in range(count)]


async def test_limit_of_one_account_leaves_the_work_to_the_other(repository: Repository, accounts: Accounts) -> None:
    """With its own usage, and with the secret nowhere."""
    accounts.set(WORK, "limit 18000")
    path = repository.configure(tasks(3), adapters={"cli": accounts.adapter(capacity=1)})
    ended = repository.council("run", str(path), "--json")
    assert ended.states == dict.fromkeys(("t0", "t1", "t2"), "landed"), ended
    assert accounts.starts(WORK) == 1
    assert [one["name"] for one in ended.result["adapters"]] == ["cli@work"]
    used = repository.council("usage", "--json").result["adapters"]
    assert {name: one["sessions"] for name, one in used.items()} == {"cli@work": 1, "cli@private": 3}
    assert "Adapter cli@work is paused until" in repository.council("status").stdout
    kept = [one.read_bytes() for one in repository.top.joinpath(".council").rglob("*") if one.is_file()]
    assert not [text for text in kept if WORK.encode() in text or PRIVATE.encode() in text]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_failed_login_of_one_account_leaves_the_work_to_the_other(
    repository: Repository, accounts: Accounts
) -> None:
    """The report names the account, and the name of the adapter enables it again."""
    accounts.set(WORK, "locked")
    path = repository.configure(tasks(2), adapters={"cli": accounts.adapter()})
    ended = repository.council("run", str(path), "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    [disabled] = ended.result["adapters"]
    assert disabled["name"] == "cli@work"
    assert disabled["disabled_reason"] == "not logged in (account 'work', with ACCOUNT_KEY=$LOGIN_OF_WORK)"
    enabled = repository.council("adapters", "enable", "cli", "--run", ended.result["run"], "--json")
    assert (enabled.code, enabled.result["adapters"]) == (0, []), enabled
    await repository.assert_invariants()


@pytest.mark.extended
async def test_commands_show_each_account(repository: Repository, accounts: Accounts) -> None:
    """By its name in a run, with what `adapters test` finds out about it."""
    path = repository.configure(tasks(1), adapters={"cli": accounts.adapter()})
    path.rename(repository.top / "council.yaml")
    listed = [one["name"] for one in repository.council("adapters", "--json").result["adapters"]]
    assert listed == ["cli@work", "cli@private"]
    tested = repository.council("adapters", "test", "cli@private", "--json")
    assert tested.result["live"]["adapter"] == "cli@private", tested
    assert accounts.sessions[0][:2] == ("start", PRIVATE)
    chosen = repository.council("run", "--task", "x", "--adapter", "cli@private", "--json")
    assert (chosen.states, chosen.result["tasks"][0]["adapter"]) == ({"task-1": "landed"}, "cli@private"), chosen
    repository.council("run", "--task", "x", "--adapter", "cli", "--json")
    assert accounts.starts(WORK) == 1


@pytest.mark.extended
async def test_one_session_probes_an_account_after_its_cooldown(repository: Repository, accounts: Accounts) -> None:
    """Two sessions meet the limit at once: one cooldown; then one session, and after its end the others."""
    accounts.set(WORK, "limit 18000")
    accounts.set(PRIVATE, "limit 90000")
    path = repository.configure(tasks(4), adapters={"cli": accounts.adapter()})
    clock = ManualClock()
    reports: list[RunReport] = []
    async with Council.open(path, clock=clock, environ=repository.environ) as council:
        run = await council.runs.create()

        async def execute() -> None:
            reports.append(await council.runs.resume(run))

        async with anyio.create_task_group() as group:
            group.start_soon(execute)
            await until_event(council, "run.waiting", 1)
            assert accounts.starts(WORK) == 4
            assert accounts.starts(PRIVATE) == 4
            (accounts.folder / "gate").touch()
            accounts.set(WORK, "ready")
            clock.advance(18_000)
            await until_event(council, "task.started", 9)
            with anyio.fail_after(60):
                while accounts.starts(WORK) < 5:
                    await anyio.sleep(0.02)
            await anyio.wait_all_tasks_blocked()
            assert accounts.starts(WORK) == 5
            (accounts.folder / "gate").unlink()
        events = [one.event async for one in council.runs.events(run, after=0)]
    assert {task.status for task in reports[0].tasks} == {"landed"}
    assert accounts.starts(WORK) == 8
    assert [one[0] for one in accounts.sessions[8:10]] == ["start", "end"]
    cooled = [one.data["adapter"] for one in events if one.type == "adapter.cooling_down"]
    assert cooled == ["cli@work", "cli@private"]
    assert accounts.starts(PRIVATE) == 4
    await repository.assert_invariants()


@pytest.mark.extended
async def test_two_processes_probe_an_account_once(repository: Repository, accounts: Accounts) -> None:
    """They share the cooldown and the probe; after its end, both continue."""
    adapter = accounts.adapter(accounts={"work": {"ACCOUNT_KEY": "$LOGIN_OF_WORK"}})
    accounts.set(WORK, "limit 4")
    (accounts.folder / "gate").touch()
    path = repository.configure(tasks(8), adapters={"cli": adapter}, capacity=4, coordination=QUICK)
    children = [repository.start("run", str(path), "--json")]
    wait_for(lambda: repository.council("status", "--json").result.get("status") == "running")
    children.append(repository.start("work", "--json"))
    wait_for(lambda: len(repository.council("status", "--json").result["orchestrators"]) == 2)
    wait_for(lambda: not repository.council("status", "--json").result["sessions"])
    before = len(accounts.sessions)
    accounts.set(WORK, "ready")
    wait_for(lambda: len(accounts.sessions) > before, 30)
    (accounts.folder / "gate").unlink()
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert set(repository.council("status", "--json").states.values()) == {"landed"}
    probe = accounts.sessions[before][2]
    assert accounts.sessions[before : before + 2] == [("start", WORK, probe), ("end", WORK, probe)]
    await repository.assert_invariants()


async def test_limit_in_one_run_delays_the_sessions_of_other_runs(repository: Repository, accounts: Accounts) -> None:
    """A later run starts no session before the end of the limit, and its report has the reason."""
    adapter = accounts.adapter(accounts={"work": {"ACCOUNT_KEY": "$LOGIN_OF_WORK"}})
    accounts.set(WORK, "limit 18000")
    path = repository.configure(tasks(1), adapters={"cli": adapter})
    clock = ManualClock()
    async with Council.open(path, clock=clock, environ=repository.environ) as council:
        first, second = await council.runs.create(), await council.runs.create()
        async with anyio.create_task_group() as group:
            group.start_soon(council.runs.resume, first)
            await until_event(council, "adapter.cooling_down", 1)
            group.start_soon(council.runs.resume, second)
            await until_event(council, "run.waiting", 2)
            assert accounts.starts(WORK) == 1
            [waiting] = (await council.runs.status(second)).adapters
            assert waiting.cooldown_until == clock.now() + 18_000
            accounts.set(WORK, "ready")
            (accounts.folder / "gate").touch()
            clock.advance(18_000)
            with anyio.fail_after(60):
                while accounts.starts(WORK) < 2:
                    await anyio.sleep(0.02)
            await anyio.wait_all_tasks_blocked()
            assert accounts.starts(WORK) == 2  # the probe of one run, for which the other one waits
            (accounts.folder / "gate").unlink()
            await until_event(council, "task.landed", 1)
            clock.advance(60)
            await until_event(council, "run.finished", 2)
        events = [one.event async for one in council.runs.events(second, after=0)]
    [cooled] = [one.data for one in events if one.type == "adapter.cooling_down"]
    assert cooled["reason"] == f"limit reached, again in 18000 s (in run {first})"
    await repository.assert_invariants()


@pytest.mark.extended
async def test_killed_run_does_not_block_the_probe_of_another(repository: Repository, accounts: Accounts) -> None:
    """Its task still counts as running, but its process has ended."""
    adapter = accounts.adapter(accounts={"work": {"ACCOUNT_KEY": "$LOGIN_OF_WORK"}})
    accounts.set(WORK, "limit 5")
    (accounts.folder / "gate").touch()
    path = repository.configure(tasks(1), adapters={"cli": adapter})
    probing = repository.start("run", str(path))
    wait_for(lambda: repository.council("status", "--json").result.get("adapters"), 30)  # the limit is recorded
    accounts.set(WORK, "ready")
    wait_for(lambda: accounts.starts(WORK) == 2, 30)
    probing.kill()
    probing.communicate()
    (accounts.folder / "gate").unlink()
    [killed] = [one["run"] for one in repository.council("runs", "--json").result["runs"]]
    ended = repository.council("run", str(path), "--json")
    assert ended.states == {"t0": "landed"}, ended
    resumed = repository.council("resume", killed, "--json")
    assert resumed.states == {"t0": "no_change"}, resumed  # the same work has landed
    await repository.assert_invariants()


@pytest.mark.extended
async def test_task_stays_with_the_account_of_its_conversation(repository: Repository, tmp_path: Path) -> None:
    """Or begins a new conversation on another one, and says so."""
    install(tmp_path / "bin", "claude", "tests.fakes.claude")
    repository.environ["PATH"] = f"{tmp_path / 'bin'}:{repository.environ['PATH']}"
    accounts = {}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        accounts[name] = {"CLAUDE_CONFIG_DIR": str(tmp_path / name)}
    settings = {
        "adapters": {"claude": {"use": "claude-code", "accounts": accounts}},
        "readable": [str(tmp_path / "bin"), sys.prefix, str(ROOT / "tests")],
        "workflows": {"two": ["plan", {"build": {"session": {"continue": "plan"}}}]},
    }
    limited = "attempt 1 fail limit 18000\nattempt 2 write {0}.txt x\nattempt 3 write {0}.txt y"
    works = "attempt 1 write b.txt x\nattempt 2 write b.txt y"

    def run(*tasks: dict[str, Any]) -> list[tuple[str, bool]]:
        """Run tasks one session at a time; return the adapters of the first one."""
        ended = repository.council("run", str(repository.configure(tasks, capacity=1, **settings)), "--json")
        assert set(ended.states.values()) == {"landed"}, ended
        shown = repository.council("state", "history", f"task/{ended.result['run']}/t", "--json")
        return [(one["adapter"], one["resumed"]) for one in shown.result["versions"][0]["new"]["attempts"]]

    stays = run({"id": "t", "prompt": limited.format("a"), "workflow": "two"})
    assert stays == [("claude@first", False), ("claude@second", False), ("claude@second", True)]
    # Another model, because runs with the same definition share the pause. Between its phases, another task meets
    # the limit.
    settings["adapters"] = {"claude": {"use": "claude-code", "accounts": accounts, "model": "other"}}
    moves = run({"id": "t", "prompt": works, "workflow": "two"}, {"id": "other", "prompt": limited.format("c")})
    assert moves == [("claude@first", False), ("claude@second", False)]
    reasons = [one.data.get("reason") for one in await happened(repository) if one.type == "task.started"]
    assert reasons.count("new conversation, because that of session 1 is on claude@first") == 1, reasons
    await repository.assert_invariants()

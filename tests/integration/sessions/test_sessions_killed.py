"""Sessions with all possible resources, while they, their supervisor or their process are killed."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.sessions.sandbox.policy import SandboxKind
from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.integration.runs.test_shared_runs import QUICK, ended, states
from tests.sandboxes import SANDBOX_PARAMS
from tests.waiting import wait_for

pytestmark = [pytest.mark.extended, pytest.mark.sandbox]

#: Takes all resources and stays; a later attempt takes them again, and ends.
HOLDER = """
council lock a.txt lib || exit 9
council report --file a.txt --message "attempt $COUNCIL_ATTEMPT" || exit 9
echo '{}' >"$COUNCIL_HANDOFF"
echo "$COUNCIL_ATTEMPT" >>"$LEDGER/held"
if [ "$COUNCIL_ATTEMPT" = 1 ]; then sleep 600; fi
council peers --json >"$LEDGER/peers"
echo x >a.txt
"""


@pytest.fixture(params=SANDBOX_PARAMS)
def kind(request: pytest.FixtureRequest) -> SandboxKind:
    """Yield each kind of sandbox available here, and none."""
    return SandboxKind(request.param)


def adapter(repository: Repository, script: str) -> dict[str, Any]:
    """Return an adapter whose program is a script; `LEDGER` is a writable folder."""
    ledger = str(repository.spawns.parent)
    return {"use": "command", "argv": ["bash", "-c", script], "env": {"LEDGER": ledger}, "writable": [ledger]}


def program(repository: Repository, task: str) -> psutil.Process:
    """Return the process that an adapter has started for a task, inside the sandbox."""
    wanted = {"COUNCIL_TASK": task, "LEDGER": str(repository.spawns.parent)}
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if one.name() == "bash" and wanted.items() <= one.environ().items():
                return one
    raise AssertionError(f"nothing of {task} runs")


def supervisor(repository: Repository, task: str) -> psutil.Process:
    """Return the supervisor of a task's session: the holder of its lock."""
    inodes = {str(lock.stat().st_ino) for lock in sessions(repository, f"{task}.*/lock")}
    held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    [pid] = [one[4] for one in held if one[1] == "FLOCK" and one[5].rpartition(":")[2] in inodes]
    return psutil.Process(int(pid))


def sessions(repository: Repository, pattern: str = "*") -> list[Path]:
    """Return the content of the session folders of a run."""
    result = repository.council("status", "--json").result
    return sorted((Path(result["repository"]).parent / "sessions" / result["run"]).glob(pattern))


@pytest.mark.parametrize(
    "killed",
    [
        "supervisor",
        "orchestrator, next to another",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("program", "orchestrator, resumed")),
    ],
)
async def test_resources_of_a_killed_session_are_free(repository: Repository, kind: SandboxKind, killed: str) -> None:
    """Paths, file locks, record, socket and handoff: the next attempt gets them, and the first counts as dead."""
    task = {"id": "t", "prompt": "x", "owns": ["src/**", "a.txt"]}
    path = repository.configure(
        [task], adapters={"odd": adapter(repository, HOLDER)}, sandbox=kind.value, coordination=QUICK
    )
    running = repository.start("run", str(path), "--json")
    held = repository.spawns.parent / "held"
    wait_for(held.exists)
    assert {one["layer"] for one in repository.council("locks", "--json").result["locks"]} >= {"file", "ownership"}
    if killed == "program":
        program(repository, "t").kill()
    elif killed == "supervisor":
        supervisor(repository, "t").kill()
    else:
        helper = repository.start("work", "--json") if "another" in killed else None
        if helper is not None:
            wait_for(lambda: "run.joined" in repository.council("state", "log", "--json").stdout)
        running.send_signal(signal.SIGKILL)
        ended(running)
        running = helper or repository.start("resume", "--json")
    wait_for(lambda: held.read_text().split() == ["1", "2"], 60)
    running.communicate(timeout=60)
    seen = json.loads((repository.spawns.parent / "peers").read_text())["peers"]
    assert [(one["attempt"], one["is_me"]) for one in seen] == [(2, True)]
    assert states(repository) == {"t": "landed"}
    assert repository.council("locks", "--json").result["locks"] == []
    assert repository.council("status", "--json").result["sessions"] == []
    assert sessions(repository, "*/socket") == []
    assert bool(sessions(repository)) is (killed == "supervisor")  # a slot of unknown state is preserved
    await repository.assert_invariants()


async def test_queued_work_keeps_its_paths_when_its_process_is_killed(repository: Repository) -> None:
    """The next owner gets them: a third process starts no task with the same paths before it has landed."""
    built, checked = (repository.spawns.parent / name for name in ("built", "checked"))
    tasks: list[dict[str, Any]] = [
        {
            "id": "a",
            "prompt": f"await {built}\nappend README.md a",
            "owns": ["README.md"],
            "priority": 10,
            "allow_failing_base": True,
            "checks": [f"until test -e {checked}; do sleep 0.05; done"],
        },
        {"id": "b", "prompt": "append README.md b", "owns": ["README.md"]},
    ]
    path = repository.configure(tasks, sandbox="off", capacity=1, coordination=QUICK)
    owner = repository.start("run", str(path), "--json", failpoints="landing.checking=kill")
    wait_for(repository.spawns.exists)
    others = [repository.start("work", "--json") for _ in range(2)]
    wait_for(lambda: log(repository).count("run.joined") == 2)
    built.touch()
    assert ended(owner) == [-signal.SIGKILL]
    wait_for(lambda: log(repository).count("task.checking") == 2)
    locks = repository.council("locks", "--json").result["locks"]
    checked.touch()
    assert ended(*others) == [0, 0]
    owners = [user["owner"] for one in locks if "README.md" in one["resources"] for user in one["holders"]]
    assert [owner.rpartition("/")[2] for owner in owners] == ["a.1"], locks
    assert states(repository) == {"a": "landed", "b": "landed"}
    assert "task.conflict" not in log(repository)
    assert (repository.top / "README.md").read_text() == "# Project\na\nb\n"
    await repository.assert_invariants()


#: Locks two files in the order of its task and releases them, repeatedly; ends on request.
CROSSING = """
[ "$COUNCIL_TASK" = x ] && set -- a.txt b.txt || set -- b.txt a.txt
until [ -e "$LEDGER/enough" ]; do
    council lock $1 --wait 2 && council lock $2 --wait 0.$((RANDOM % 9)) &&
        echo "$COUNCIL_TASK.$COUNCIL_ATTEMPT" >>"$LEDGER/rounds"
    council unlock $1 $2
done
echo done >$COUNCIL_TASK.txt
"""


@pytest.mark.slow
async def test_opposite_lock_orders_end_despite_killed_holders(repository: Repository) -> None:
    """In two processes: the survivors and new sessions get both files each time."""
    rounds, enough = (repository.spawns.parent / name for name in ("rounds", "enough"))
    tasks = [{"id": name, "prompt": "x", "attempts": 9} for name in ("x", "y")]
    settings = {"sandbox": "off", "capacity": 1, "coordination": {**QUICK, "max_retries": 9}}
    path = repository.configure(tasks, adapters={"odd": adapter(repository, CROSSING)}, **settings)
    processes = [repository.start("run", str(path), "--json")]
    wait_for(rounds.exists)
    processes.append(repository.start("work", "--json"))

    def had(task: str) -> int:
        return sum(line.startswith(f"{task}.") for line in rounds.read_text().splitlines())

    def both_go_on() -> None:
        before = {task: had(task) for task in ("x", "y")}
        wait_for(lambda: all(had(task) > before[task] + 1 for task in before), 60)

    both_go_on()
    for number in range(6):
        victim = (program if number % 2 else supervisor)(repository, "xy"[number // 2 % 2])
        victim.kill()
        both_go_on()
    owner = processes.pop(0)
    owner.send_signal(signal.SIGKILL)
    assert ended(owner) == [-signal.SIGKILL]
    processes.append(repository.start("work", "--json"))
    both_go_on()
    enough.touch()
    assert set(ended(*processes)) == {0}
    assert states(repository) == {"x": "landed", "y": "landed"}
    assert repository.council("locks", "--json").result["locks"] == []


def log(repository: Repository) -> list[str]:
    """Return the types of all events so far."""
    said = repository.council("state", "log", "--json").stdout.splitlines()
    return [event["event"] for line in said for event in json.loads(line).get("events", [])]


def start_waiting_session(repository: Repository) -> tuple[StartedCommand, psutil.Process]:
    """Start a run of two tasks, the first of which waits for the file `go`; return it and its fork server."""
    folder = repository.spawns.parent
    script = f"touch {folder}/is-there; until [ -e {folder}/go ]; do read -t 0.1 <> <(:); done; echo x > one.txt"
    sh = {"use": "command", "argv": ["bash", "{prompt_file}"], "writable": [str(folder)]}
    tasks: list[dict[str, Any]] = [
        {"id": "one", "prompt": script},
        {"id": "two", "prompt": "echo x > two.txt", "needs": ["one"]},
    ]
    run = repository.start("run", str(repository.configure(tasks, adapters={"sh": sh}, capacity=1)), "--json")
    wait_for((folder / "is-there").exists)
    [server] = [one for one in psutil.Process(run.pid).children() if "serve" in " ".join(one.cmdline())]
    return run, server


async def test_sessions_work_without_their_fork_server(repository: Repository) -> None:
    """It is killed during one session: that one ends as usual, and the next one starts without it."""
    run, server = start_waiting_session(repository)
    server.kill()
    (repository.spawns.parent / "go").touch()
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 0, (stdout, stderr)
    result = json.loads(stdout.splitlines()[-1])
    assert [(task["status"], task["attempts"]) for task in result["tasks"]] == [("landed", 1)] * 2, result
    await repository.assert_invariants()


@pytest.mark.parametrize("stopped", ["fork server", "supervisor"])
async def test_run_continues_after_its_fork_server_or_a_supervisor_was_stopped(
    repository: Repository, stopped: str
) -> None:
    """It gets SIGSTOP during one session, and is resumed; otherwise no session would start or end."""
    run, server = start_waiting_session(repository)
    victim = server if stopped == "fork server" else supervisor(repository, "one")
    assert stopped == "fork server" or victim.ppid() == server.pid
    victim.suspend()
    (repository.spawns.parent / "go").touch()
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 0, (stdout, stderr)
    assert [task["status"] for task in json.loads(stdout.splitlines()[-1])["tasks"]] == ["landed"] * 2
    await repository.assert_invariants()

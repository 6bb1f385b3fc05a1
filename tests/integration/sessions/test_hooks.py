"""User commands around sessions: sandboxed, bounded, reported, and not repeated without need."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import anyio
import psutil
import pytest

from orchestrator.domain.runs.outcome import Failed, Interrupted, Outcome, ResourcesExhausted
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.run_settings import SandboxSettings, SetupStep
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.log_files import list_attempt_streams
from orchestrator.sessions.sandbox.policy import SandboxKind
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.setup.environment import attempt_variables, build_base_environment
from orchestrator.sessions.setup.shell import (
    CommandFailed,
    CommandNotRun,
    CommandStopped,
    CommandSucceeded,
    Shell,
    ShellCommand,
    ShellResult,
)
from orchestrator.sessions.setup.worktree_setup import (
    first_step_to_run,
    hook_outcome,
    read_setup_keys,
    run_all,
    run_until_failure,
    session_commands,
    setup_commands,
    teardown_commands,
)
from tests.conftest import Repository
from tests.processes import child_processes
from tests.sandboxes import require_sandbox
from tests.waiting import wait_for

pytestmark = pytest.mark.sandbox

KINDS = [SandboxKind.BUBBLEWRAP, SandboxKind.LANDLOCK] if sys.platform == "linux" else [SandboxKind.OFF]


class HookCheckout:
    """A checkout without a session, next to hidden and foreign folders."""

    def __init__(self, top: Path, kind: SandboxKind) -> None:
        self.tree, self.logs, self.hidden = top / "checkout" / "tree", top / "logs", top / "hidden"
        for folder in (self.tree, self.hidden, top / "readable"):
            folder.mkdir(parents=True)
        (self.hidden / "secret").write_text("canary")
        environ = {"PATH": os.environ["PATH"], "GIVEN": "g", "OTHER": "o"}
        variables = {"COUNCIL_NAME": "slot-1", "COUNCIL_PORT_0": "5000"}
        fencing = RunSandbox(
            kind,
            (self.hidden,),
            SandboxSettings(readable=(sys.prefix,)),
        )
        self.shell = Shell(
            sandbox=fencing,
            scope=SandboxScope((self.tree,), (top / "readable",), top / "checkout" / "tmp"),
            cwd=self.tree,
            lock=top / "checkout" / "lock",
            environment=build_base_environment(["GIVEN"], environ, self.tree, variables),
            redactor=Redactor(["the-secret-value"]),
        )
        self.top = top

    def command(self, text: str, timeout: float = 60) -> ShellCommand:
        return ShellCommand(text, self.logs / "log", timeout, "worktrees.hooks_timeout")

    def output(self, log: str = "log") -> str:
        return (self.logs / log).read_text()


@pytest.fixture(params=KINDS)
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> HookCheckout:
    """A checkout in a sandbox that works on this machine."""
    return HookCheckout(tmp_path, require_sandbox(request.param))


async def test_command_gets_its_checkout_only(checkout: HookCheckout) -> None:
    """It writes there and in its scratch folder, which is its home; its environment has only the given variables."""
    script = f"""
    echo made >made && echo x >"$HOME/x" && mktemp >/dev/null || exit 1
    touch {checkout.top}/planted {checkout.hidden}/planted {checkout.top}/readable/planted 2>/dev/null
    ls {checkout.top}/readable && ! cat {checkout.hidden}/secret 2>/dev/null || exit 2
    echo "$GIVEN-$OTHER-$COUNCIL_NAME-$COUNCIL_PORT_0-$COUNCIL_TASK-$GIT_CEILING_DIRECTORIES"
    echo the-secret-value >&2
    """
    assert await checkout.shell.run(checkout.command(script)) == CommandSucceeded()
    assert (checkout.tree / "made").read_text() == "made\n"
    assert (checkout.top / "checkout/tmp/x").exists()
    assert not any(
        (folder / "planted").exists() for folder in (checkout.top, checkout.hidden, checkout.top / "readable")
    )
    assert checkout.output() == f"g--slot-1-5000--{checkout.tree.parent}\n[redacted]\n"


@pytest.mark.extended_variants
async def test_failed_command_has_its_output(checkout: HookCheckout) -> None:
    """An exit code, or a timeout with the setting's name."""
    result = await checkout.shell.run(checkout.command("echo no such package; exit 3"))
    log = checkout.logs / "log"
    assert result == CommandFailed("echo no such package; exit 3", "ended with exit code 3", "no such package\n", log)
    result = await checkout.shell.run(checkout.command("echo begun; sleep 600 & sleep 600", timeout=1))
    assert isinstance(result, CommandFailed)
    assert result.how_it_ended == "exceeded its timeout of 1 s (`worktrees.hooks_timeout`)"
    assert result.output == "begun\n"
    assert not child_processes()


async def test_command_leaves_no_process(checkout: HookCheckout) -> None:
    assert await checkout.shell.run(checkout.command("sleep 600 & echo started")) == CommandSucceeded()
    assert not child_processes()
    assert not [one for one in psutil.process_iter(["cwd"]) if one.info["cwd"] == str(checkout.tree)]


async def test_cancelled_command_gets_its_grace_period(checkout: HookCheckout) -> None:
    """It can clean up; none of its processes survives the cancellation."""
    script = "trap 'echo cleaned >cleaned; exit' TERM; touch ready; while :; do sleep 0.05; done"
    async with anyio.create_task_group() as group:
        group.start_soon(checkout.shell.run, checkout.command(script))
        await anyio.to_thread.run_sync(wait_for, (checkout.tree / "ready").exists)
        group.cancel_scope.cancel()
    assert (checkout.tree / "cleaned").exists()
    assert not child_processes()


async def test_command_without_its_supervisor_is_not_done(checkout: HookCheckout) -> None:
    """All processes with its mark are killed, so that nothing writes there any more."""
    results: list[object] = []

    async def run() -> None:
        results.append(await checkout.shell.run(checkout.command("touch ready; sleep 600")))

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await anyio.to_thread.run_sync(wait_for, (checkout.tree / "ready").exists)
        child_processes()[0].kill()
    assert isinstance(results[0], CommandNotRun)
    wait_for(lambda: not [one for one in psutil.process_iter(["cwd"]) if one.info["cwd"] == str(checkout.tree)])


async def test_unstartable_command_is_not_a_failed_one(checkout: HookCheckout) -> None:
    """Its folder is missing, or its log can't be written."""
    result = await replace(checkout.shell, cwd=checkout.top / "gone").run(checkout.command("true"))
    assert isinstance(result, CommandNotRun)
    assert str(checkout.top / "gone") in result.reason
    shutil.rmtree(checkout.logs)
    checkout.logs.write_text("a file")
    result = await checkout.shell.run(checkout.command("true"))
    assert isinstance(result, CommandNotRun)
    assert not result.exhausted


@pytest.mark.extended_variants
async def test_steps_run_up_to_the_first_failure(checkout: HookCheckout) -> None:
    """The progress is reported, each step has a log; a repeat starts after the last success."""
    steps = [SetupStep(run="echo 1 >>ran"), SetupStep(run="test -e allowed && echo 2 >>ran", timeout=30)]
    steps.append(SetupStep(run="echo 3 >>ran"))
    done, last = await run_until_failure(checkout.shell, setup_commands(steps, 0, checkout.logs, 7))
    assert (done, type(last)) == (1, CommandFailed)
    assert sorted(path.name for path in checkout.logs.iterdir()) == ["slot-7.setup1", "slot-7.setup2"]
    (checkout.tree / "allowed").touch()
    ended = await run_until_failure(checkout.shell, setup_commands(steps, done, checkout.logs, 7))
    assert ended == (2, CommandSucceeded())
    assert (checkout.tree / "ran").read_text() == "1\n2\n3\n"
    assert (checkout.logs / "slot-7.setup3").exists()


@pytest.mark.extended_variants
async def test_reporting_hook_prevents_nothing(checkout: HookCheckout) -> None:
    """Each command of a teardown runs, regardless of the outcome of the others."""
    lines = ["echo 1 >>ran; false", "echo 2 >>ran", "echo 3 >>ran; exit 4"]
    outcomes = await run_all(checkout.shell, teardown_commands(lines, 60.0, checkout.logs, 7))
    assert [one.how_it_ended for one in outcomes if isinstance(one, CommandFailed)] == [
        "ended with exit code 1",
        "ended with exit code 4",
    ]
    assert (checkout.tree / "ran").read_text() == "1\n2\n3\n"


@pytest.mark.extended_variants
async def test_attempt_hooks_have_its_variables_and_log(checkout: HookCheckout) -> None:
    """Their logs are streams of the attempt, in the order of execution."""
    worktree = Worktree(Hub(checkout.top / "hub"), "run1", "task", 2)
    shell = replace(checkout.shell, environment={**checkout.shell.environment, **attempt_variables(worktree)})
    for stage in ("before", "after"):
        lines = ["echo $COUNCIL_TASK.$COUNCIL_ATTEMPT"]
        assert await run_all(shell, session_commands(stage, lines, 60.0, checkout.logs, worktree)) == []
    assert checkout.output("task.2.before1") == checkout.output("task.2.after1") == "task.2\n"
    names = [path.name.removeprefix("task.2.") for path in checkout.logs.iterdir()]
    assert list_attempt_streams([*names, "check10", "check9", "stderr", "stdout", "stdout1", "check", "x"]) == [
        *("before1", "stdout", "stderr", "after1", "check9", "check10")
    ]


@pytest.mark.parametrize(
    ("ended", "outcome"),
    [
        (CommandSucceeded(), None),
        (
            CommandFailed("make\n  venv", "ended with exit code 3", "no such package\n", Path("log")),
            Failed(FailureClass.SETUP_FAILED, "`make venv` ended with exit code 3 before the session\nno such package"),
        ),
        (CommandStopped(), Interrupted("the run was stopped")),
        (CommandNotRun("why"), Failed(FailureClass.TRANSIENT, "a command before the session was not run: why")),
        (CommandNotRun("why", exhausted=True), ResourcesExhausted("a command before the session was not run: why")),
    ],
)
def test_setup_failures_are_distinguished(ended: ShellResult, outcome: Outcome | None) -> None:
    """A failing command needs a fix by the user; a temporary failure is retried."""
    assert hook_outcome(ended) == outcome


async def test_logs_show_the_commands_around_a_session(repository: Repository) -> None:
    """`council logs` prints a hook's output as part of the attempt."""
    ended = repository.council("run", str(repository.configure([{"id": "t", "prompt": "write a.txt a\nprint mine"}])))
    assert ended.code == 0, ended
    logs = next((repository.top / ".council/logs").iterdir())
    (logs / "t.1.before1").write_text("from before\n")
    (logs / "t.1.after1").write_text("from after\n")
    shown = repository.council("logs", "t").stdout
    assert shown.index("from before") < shown.index("mine") < shown.index("from after")


async def test_setup_keys_follow_the_files_of_the_commit(repository: Repository) -> None:
    """A changed input, a new one, a folder's and a deleted one; other changes and unusual names have no effect."""
    steps = (
        SetupStep(run="a", inputs=("requirements.txt", "later.txt")),
        SetupStep(run="b", inputs=("tools", "*.md")),
    )
    git = Git(repository.top / ".git", environ=repository.environ)
    first: list[int] = []
    done: tuple[str, ...] = ()
    for files in (
        {"requirements.txt": "1\n", "tools/deep/x": "1\n"},
        {"other.txt": "1\n", "more.md": "1\n"},
        {"tools/deep/x": "2\n"},
        {"*.md": "1\n"},
        {"later.txt": "1\n"},
        {"requirements.txt": "2\n"},
    ):
        wanted = await read_setup_keys(git, repository.commit(files), steps, sparse=("src",), env=("A",))
        first.append(first_step_to_run(done, wanted))
        done = wanted
    repository.git("rm", "--quiet", "later.txt")
    first.append(
        first_step_to_run(done, await read_setup_keys(git, repository.commit({}), steps, sparse=("src",), env=("A",)))
    )
    assert first == [0, 2, 1, 1, 0, 0, 0]
    without = (SetupStep(run="a"),)
    assert await read_setup_keys(git, "HEAD", without) == await read_setup_keys(git, "HEAD~3", without)

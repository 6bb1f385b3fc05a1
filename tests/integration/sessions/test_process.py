"""Subprocess execution with real programs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import anyio
import psutil
import pytest

from orchestrator.system import process
from orchestrator.system.file_lock import FileLock
from tests.waiting import wait_for

ENV = {"PATH": os.defpath}


async def test_command_gets_exactly_the_given_environment_and_input() -> None:
    """Nothing of our environment reaches the command; its output and exit code are returned."""
    done = await process.run(["sh", "-c", "cat; env >&2; exit 3"], env={"PATH": os.defpath, "X": "1"}, input=b"\xff\0")
    assert (done.returncode, done.stdout) == (3, b"\xff\0")
    assert set(done.stderr.split()) - {b"PWD=" + os.fsencode(Path.cwd()), b"_=/usr/bin/env", b"SHLVL=0"} == {
        b"PATH=" + os.fsencode(os.defpath),
        b"X=1",
    }


async def test_streamed_command_gets_its_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_IDLE_POLL_SECONDS", 0.05)
    data = bytes(1 << 20)  # more than a pipe buffer
    done = await process.run(["sh", "-c", "sleep 0.3; cat"], env={"PATH": os.defpath}, input=data)
    assert done.stdout == data


async def test_command_without_input_reads_nothing() -> None:
    """A command that asks a question fails at once instead of waiting for the terminal."""
    done = await process.run(["sh", "-c", "read answer || echo nobody"], env=ENV, timeout=20)
    assert done.stdout == b"nobody\n"


async def test_command_runs_in_its_own_session(tmp_path: Path) -> None:
    """Ctrl-C in our terminal does not reach it, and it starts in the given folder."""
    code = "import os; print(os.getsid(0) == os.getpid(), os.getcwd())"
    done = await process.run([sys.executable, "-ISc", code], env=ENV, cwd=tmp_path)
    assert done.stdout.decode().split() == ["True", str(tmp_path.resolve())]


async def test_only_kept_descriptors_reach_the_command(tmp_path: Path) -> None:
    """No other descriptor does, even an inheritable one."""
    kept, other = (os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("kept", "other"))
    os.set_inheritable(other, True)
    code = (
        "import os, sys\n"
        "for fd in map(int, sys.argv[1:]):\n"
        " try: os.fstat(fd); print('open')\n"
        " except OSError: print('closed')"
    )
    argv = [sys.executable, "-ISc", code, str(kept), str(other)]
    done = await process.run(argv, env=ENV, keep_fds=[kept])
    os.close(kept)
    os.close(other)
    assert done.stdout.split() == [b"open", b"closed"]


async def test_slow_command_is_killed_with_its_group(tmp_path: Path) -> None:
    """The timeout ends the command and its children, even if those hold the pipe."""
    pid_file = tmp_path / "pid"
    script = f"sleep 300 & echo $! > {pid_file}; wait"
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"killed: it ran longer than 0\.5 s"):
        await process.run(["sh", "-c", script], env=ENV, timeout=0.5)
    assert time.monotonic() - began < 10
    wait_for(lambda: not _is_alive(int(pid_file.read_text())), 10)


#: Leaves a stopped process in a process group of its own, and waits for it.
FROZEN = "setsid -w sh -c 'echo $$ > pid.new; mv pid.new pid; kill -STOP $$' & wait"


@pytest.mark.extended
async def test_command_with_a_stopped_process_is_killed_completely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing would resume it: a waiter would wait forever."""
    monkeypatch.setattr(process, "STOPPED_TIMEOUT", 0.5)
    with pytest.raises(TimeoutError, match=r"killed: it was stopped for \d+ s"):
        await process.run(["sh", "-c", FROZEN], env=ENV, cwd=tmp_path)
    wait_for(lambda: not _is_alive(int((tmp_path / "pid").read_text())), 10)


@pytest.mark.extended
async def test_idle_command_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses no processor time; a busy one is left alone."""
    monkeypatch.setattr(process, "IDLE_TIMEOUT", 3.0)
    with pytest.raises(TimeoutError, match=r"killed: it did nothing for \d+ s"):
        await process.run(["sleep", "60"], env=ENV)
    busy = "import time\nuntil = time.monotonic() + 6\nwhile time.monotonic() < until: pass"
    assert (await process.run([sys.executable, "-ISc", busy], env=ENV)).returncode == 0


#: Runs a command that holds a lock.
HOLDER = (
    "import anyio, os, sys\nfrom orchestrator.system.file_lock import FileLock\n"
    "from orchestrator.system.process import run\n"
    "async def main():\n async with FileLock(__import__('pathlib').Path('lock')).hold() as held:\n"
    "  await run(['sh', '-c', sys.argv[1]], env={'PATH': os.defpath}, keep_fds=[held.fd])\n"
    "anyio.run(main)"
)


#: Runs a command that holds a lock, and on request another one.
HOLDER_OF_TWO = (
    "import anyio, os, sys\nfrom pathlib import Path\nfrom orchestrator.system.file_lock import FileLock\n"
    "from orchestrator.system.process import run\n"
    "async def main():\n async with FileLock(Path('lock')).hold() as held, anyio.create_task_group() as both:\n"
    "  async def one(script): await run(['sh', '-c', script], env={'PATH': os.defpath}, keep_fds=[held.fd])\n"
    "  both.start_soon(one, sys.argv[1])\n"
    "  while not Path('go').exists(): await anyio.sleep(0.01)\n"
    "  await one('echo > second')\n"
    "anyio.run(main)"
)


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_frozen_command_does_not_outlive_its_starter(tmp_path: Path, is_replaced: bool) -> None:
    """It and its children are killed and its lock is free; a replaced keeper process knows it too."""
    with subprocess.Popen([sys.executable, "-c", HOLDER_OF_TWO, f"sleep 1; {FROZEN}"], cwd=tmp_path) as starter:
        wait_for((tmp_path / "pid").exists)
        if is_replaced:
            children = psutil.Process(starter.pid).children()
            (keeper,) = [one for one in children if "orchestrator.system.command_reaper" in " ".join(one.cmdline())]
            keeper.kill()
            wait_for(lambda: keeper.status() == psutil.STATUS_ZOMBIE, 10)
            (tmp_path / "go").touch()
            wait_for((tmp_path / "second").exists)
        starter.kill()
    wait_for(lambda: not _is_alive(int((tmp_path / "pid").read_text())), 10)
    async with FileLock(tmp_path / "lock").hold(5):
        pass


async def test_active_command_finishes_after_its_starter(tmp_path: Path) -> None:
    """A half-done push would leave a checkout to repair; its lock is held until it has ended."""
    slow = "echo > started; sleep 2; echo > finished"
    with subprocess.Popen([sys.executable, "-c", HOLDER, slow], cwd=tmp_path) as starter:
        wait_for((tmp_path / "started").exists)
        starter.kill()
    async with FileLock(tmp_path / "lock").hold(15):
        assert (tmp_path / "finished").exists()


async def test_cancellation_does_not_interrupt_a_command(tmp_path: Path) -> None:
    """A cancelled caller waits for a running command: an interrupted git command is worse than a late stop."""
    script = "echo > started; while [ ! -e go ]; do sleep 0.01; done; echo > finished"
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: process.run(["sh", "-c", script], env=ENV, cwd=tmp_path, timeout=60))
        while not (tmp_path / "started").exists():
            await anyio.sleep(0.01)
        group.cancel_scope.cancel()
        (tmp_path / "go").touch()
    assert (tmp_path / "finished").exists()


async def test_missing_program_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        await process.run(["no-such-program"], env=ENV)


async def test_spawned_program_exchanges_data_while_it_runs() -> None:
    """Input arrives at once, and both outputs come through one pipe."""
    child = await process.spawn(["sh", "-c", "read a; echo got $a >&2"], env=ENV, cwd=Path("/"))
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        child.stdin.write(b"this\n")
        assert child.stdout.read() == b"got this\n"
    assert child.wait() == 0


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

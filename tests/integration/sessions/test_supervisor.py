"""The supervisor against real programs that misbehave in every way seen in real CLIs."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from orchestrator.domain.runs.outcome import ProcessExit
from orchestrator.errors import LeaseLost, LockHeld, SessionError
from orchestrator.sessions.supervision.supervisor_client import (
    SupervisedCommand,
    is_session_alive,
    open_fork_server,
    run_supervised,
    stop_supervised,
    wait_until_released,
)
from tests.processes import child_processes

MIB = 1 << 20
Agent = Callable[..., SupervisedCommand]

LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has child subreapers")


@pytest.fixture(autouse=True, params=["started", "forked"])
async def _supervisor_start(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Run each test with a spawned and with a forked supervisor."""
    if request.param == "started":
        yield
    else:
        async with open_fork_server():
            yield


@pytest.fixture(autouse=True)
def _no_survivors(tmp_path: Path) -> Iterator[None]:
    """Check that no program of the test is left: each has the test's folder in its argv."""
    yield
    survivors = [process for process in psutil.process_iter(["cmdline"]) if _is_of_test(process, tmp_path)]
    for process in survivors:
        process.kill()
    assert not survivors


def _is_of_test(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in word for word in process.info["cmdline"] or ())


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    """Return the command that runs a Python program with the test's folder as its first argument."""

    def make(source: str, **changes: Any) -> SupervisedCommand:
        script = tmp_path / "agent.py"
        script.write_text("import os, signal, sys, time\nos.chdir(sys.argv[1])\n" + source)
        command = SupervisedCommand(
            argv=[sys.executable, "-I", "-S", str(script), str(tmp_path)],
            env={"PATH": os.defpath},
            cwd=tmp_path,
            stdin=None,
            stdout=tmp_path / "stdout",
            stderr=tmp_path / "stderr",
            cap=MIB,
            timeout=60,
            grace=10,
            lock=tmp_path / "task.1.lock",
        )
        return replace(command, **changes)

    return make


async def wait_until(condition: Callable[[], object], within: float = 20) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"condition not reached within {within} s"
        await anyio.sleep(0.005)


def supervisors() -> list[psutil.Process]:
    """Return our children, with the fork server replaced by its children."""
    found: list[psutil.Process] = []
    for child in child_processes():
        found += child.children() if "serve()" in "".join(child.cmdline()) else [child]
    return found


async def wait_for_no_children() -> None:
    """Wait for a process that has just reported its end; a zombie would stay."""
    await wait_until(lambda: not supervisors(), within=2)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def open_fds() -> set[str]:
    return {path.name for path in Path("/dev/fd").iterdir() if path.is_symlink()}


def is_free(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


async def cancel_when_ready(command: SupervisedCommand, ready: Callable[[], object]) -> float:
    """Run `command`, cancel it when `ready()`, and return the seconds that the cancellation took."""
    cancelled_at = 0.0
    async with anyio.create_task_group() as group:
        group.start_soon(run_supervised, command)
        await wait_until(ready)
        cancelled_at = time.monotonic()
        group.cancel_scope.cancel()
    return time.monotonic() - cancelled_at


# A well-behaved program


async def test_exit_and_output_of_a_program_are_reported(agent: Agent, tmp_path: Path) -> None:
    """Its exit code, its output and the path of it, and that nothing had to be killed."""
    command = agent("print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert await run_supervised(command) == ProcessExit(3, None, "exit", None, 4, 4, 0, None)
    assert (tmp_path / "stdout").read_bytes() == b"out\n"
    assert (tmp_path / "stderr").read_bytes() == b"err\n"


async def test_program_ended_by_a_signal_is_reported_as_such(agent: Agent) -> None:
    ended = await run_supervised(agent("os.kill(os.getpid(), signal.SIGSEGV)"))
    assert (ended.exit, ended.signal, ended.ended_by) == (None, signal.SIGSEGV, "exit")


async def test_prompt_is_the_input_of_the_program(agent: Agent, tmp_path: Path) -> None:
    """A prompt file arrives on standard input byte for byte; without one the input is empty."""
    prompt = tmp_path / "prompt"
    prompt.write_bytes(b"-x\xff\n" * 100_000)
    echo = "sys.stdout.buffer.write(sys.stdin.buffer.read())"
    await run_supervised(agent(echo, stdin=prompt))
    assert (tmp_path / "stdout").read_bytes() == prompt.read_bytes()
    assert await run_supervised(agent(echo)) == ProcessExit(0, None, "exit", None, 0, 0, 0, None)


async def test_program_starts_with_clean_signals_and_descriptors(agent: Agent, tmp_path: Path) -> None:
    """Exactly the given environment (however large), the default umask and signals, no other descriptors."""
    env = {"LC_ALL": "C.UTF-8", "BIG": "x" * 100_000, "MORE": "y" * 100_000, "ODD": "caf\udce9 \n"}
    source = """
print({key: len(value) for key, value in os.environb.items()} | {b"ODD": os.environb[b"ODD"]})
print(oct(os.umask(0)), os.getsid(0) == os.getpid(), sorted(map(int, os.listdir("/dev/fd")))[:-1])
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
print(int(status["SigBlk"], 16), int(status["SigIgn"], 16) & ~(1 << 12 | 1 << 24 | 3 << 31))
    # Left out: what Python ignores itself (PIPE, XFSZ), and 32 and 33, which only the C library can set.
"""
    if sys.platform != "linux":
        source = source.partition("status =")[0]
    umask = os.umask(0o077)
    try:
        await run_supervised(agent(source, env=env))
    finally:
        os.umask(umask)
    lines = (tmp_path / "stdout").read_text().splitlines()
    assert lines[:2] == [
        str({b"LC_ALL": 7, b"BIG": 100_000, b"MORE": 100_000, b"ODD": b"caf\xe9 \n"}),
        "0o22 True [0, 1, 2]",
    ]
    assert lines[2:] == (["0 0"] if sys.platform == "linux" else [])


async def test_broken_pipe_ends_a_program_as_usual(tmp_path: Path, agent: Agent) -> None:
    """The shell's `yes | head` does not hang on an ignored SIGPIPE."""
    command = agent("", argv=["sh", "-c", 'yes | head -1; echo "${1##*/}"', "sh", str(tmp_path)])
    ended = await run_supervised(command)
    assert (ended.exit, (tmp_path / "stdout").read_text()) == (0, f"y\n{tmp_path.name}\n")
    assert (tmp_path / "stderr").read_text() == ""


async def test_program_that_asks_the_terminal_fails_immediately(agent: Agent, tmp_path: Path) -> None:
    """Without a terminal a question is an error, not an endless wait."""
    ended = await run_supervised(agent("os.open('/dev/tty', os.O_RDWR)"))
    assert ended.exit == 1
    assert "/dev/tty" in (tmp_path / "stderr").read_text()


# Programs that can't start


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"argv": ["no-such-program"]}, "no-such-program: No such file or directory"),
        ({"argv": ["./agent.py"]}, "./agent.py: Permission denied"),
        ({"argv": ["sh", "nul\0"]}, "sh: embedded null byte"),
        ({"cwd": Path("/gone")}, "/gone: No such file or directory"),
        ({"stdin": Path("/gone/prompt")}, "/gone/prompt: No such file or directory"),
        ({"stdout": Path("/gone/out")}, "/gone/out: No such file or directory"),
        ({"lock": Path("/gone/lock")}, "/gone/lock: No such file or directory"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
async def test_unstartable_program_is_reported_with_the_reason(
    agent: Agent, change: dict[str, object], why: str
) -> None:
    """A missing program, folder or file is an outcome of the session, not a crash."""
    assert await run_supervised(agent("", **change)) == ProcessExit(None, None, "exit", why, 0, 0, 0, None)


@LINUX_ONLY
async def test_exhausted_machine_is_distinguished_from_a_missing_program(agent: Agent, tmp_path: Path) -> None:
    """After descriptors ran out a retry may help; for a missing program it does not."""
    assert not (await run_supervised(agent("", argv=["no-such-program"]))).exhausted
    command = agent("open('ran', 'w')")
    ended: list[ProcessExit] = []

    async def run() -> None:
        ended.append(await run_supervised(command))

    # The supervisor waits for the lock, and can be caught before it opens anything else. The lock is taken by another
    # name: a child that has not executed the supervisor yet has this file open too.
    other_name = tmp_path / "lock-by-another-name"
    command.lock.touch()
    other_name.hardlink_to(command.lock)
    with other_name.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await wait_until(lambda: any(_has_open(child, command.lock) for child in supervisors()))
            (supervisor,) = supervisors()
            taken = {int(fd.name) for fd in Path(f"/proc/{supervisor.pid}/fd").iterdir()}
            supervisor.rlimit(psutil.RLIMIT_NOFILE, (min(set(range(len(taken) + 1)) - taken), 1 << 10))
            fcntl.flock(file, fcntl.LOCK_UN)
    assert ended[0].exhausted
    assert "Too many open files" in (ended[0].spawn_error or "")
    assert not (tmp_path / "ran").exists()


def _has_open(process: psutil.Process, path: Path) -> bool:
    return any(file.path == str(path) for file in process.open_files())


@pytest.mark.extended_variants
async def test_session_does_not_start_next_to_an_earlier_one(agent: Agent, tmp_path: Path) -> None:
    """While the session's lock is held, the CLI is not run a second time."""
    command = agent("open('ran', 'w')")
    with command.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ended = await run_supervised(command)
    assert ended.spawn_error is not None
    assert "still holds the lock" in ended.spawn_error
    assert not (tmp_path / "ran").exists()


# Ends


async def test_slow_program_is_ended(agent: Agent) -> None:
    """SIGTERM enforces the wall-clock limit, and the result reports it."""
    ended = await run_supervised(agent("time.sleep(300)", timeout=0.2))
    assert (ended.exit, ended.signal, ended.ended_by) == (None, signal.SIGTERM, "timeout")


@pytest.mark.extended_variants
async def test_program_that_ignores_sigterm_is_killed_after_the_grace_period(agent: Agent) -> None:
    began = time.monotonic()
    ended = await run_supervised(
        agent("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)", timeout=0.5, grace=0.3)
    )
    assert (ended.exit, ended.signal, ended.ended_by) == (None, signal.SIGKILL, "timeout")
    assert 0.8 <= time.monotonic() - began < 5


LAST_WORD = """
def end(*_):
    with open("last-word", "w") as file:
        file.write("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open("ready", "w").close()
while True: time.sleep(0.05)  # Python sees a signal that comes just before a sleep only after it
"""


async def test_stopped_program_can_save_its_work(agent: Agent, tmp_path: Path) -> None:
    """Its program gets SIGTERM first, and the wait ends when it does."""
    took = await cancel_when_ready(agent(LAST_WORD), (tmp_path / "ready").exists)
    assert (tmp_path / "last-word").read_text() == "saved"
    assert took < 5


@LINUX_ONLY
async def test_wrapper_that_ends_first_leaves_the_program_its_grace_period(agent: Agent, tmp_path: Path) -> None:
    """Some CLIs are a loader that dies of SIGTERM while the real program, in its own session, cleans up."""
    source = "if os.fork(): time.sleep(300)\nos.setsid()\n" + LAST_WORD.replace(
        "    with", "    time.sleep(0.2)\n    with"
    )
    took = await cancel_when_ready(agent(source), (tmp_path / "ready").exists)
    assert (tmp_path / "last-word").read_text() == "saved"
    assert took < 5


DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("pid.new", "w").write(str(os.getpid()))
        os.rename("pid.new", "pid")
        time.sleep(300)
    os._exit(0)
"""


@LINUX_ONLY
async def test_leftover_processes_are_killed_and_counted(agent: Agent, tmp_path: Path) -> None:
    """A daemon that holds the output open neither survives nor delays the end."""
    began = time.monotonic()
    ended = await run_supervised(agent(DAEMON + "while not os.path.exists('pid'): pass"))
    assert (ended.exit, ended.ended_by, ended.killed) == (0, "exit", 1)
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert time.monotonic() - began < 10


@LINUX_ONLY
async def test_fast_forking_process_does_not_escape(agent: Agent, tmp_path: Path) -> None:
    """Processes are stopped before they are killed, so a program that forks from pid to pid is also caught."""
    source = """
end = time.monotonic() + 90  # in case nobody catches it
if os.fork() == 0:
    for _ in range(4): os.fork()
    while time.monotonic() < end:
        os.setsid() if os.getsid(0) != os.getpid() else None
        if os.fork(): os._exit(0)
time.sleep(0.2)
"""
    began = time.monotonic()
    ended = await run_supervised(agent(source))
    assert (ended.exit, ended.ended_by) == (0, "exit")
    assert ended.killed >= 16
    assert time.monotonic() - began < 80  # they were killed, and did not end by themselves


@LINUX_ONLY
async def test_foreign_holder_of_the_output_does_not_delay_the_end(agent: Agent, tmp_path: Path) -> None:
    """The end of the pipe is not awaited: a process outside of the session may have it open, and write to it."""
    source = "open('pid.new', 'w').write(str(os.getpid())); os.rename('pid.new', 'pid')\n"
    source += "while not os.path.exists('go'): time.sleep(0.01)"
    strangers: list[subprocess.Popen[bytes]] = []

    async def write() -> None:
        await wait_until((tmp_path / "pid").exists)
        with Path(f"/proc/{(tmp_path / 'pid').read_text()}/fd/1").open("wb") as pipe:
            strangers.append(subprocess.Popen(["yes", str(tmp_path)], stdout=pipe, stderr=subprocess.DEVNULL))
        (tmp_path / "go").touch()

    try:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(write)
                assert (await run_supervised(agent(source))).exit == 0
    finally:
        for stranger in strangers:
            stranger.kill()
            stranger.wait()


@pytest.mark.extended_variants
@LINUX_ONLY
async def test_program_that_closes_its_output_costs_nothing(agent: Agent, tmp_path: Path) -> None:
    """The supervisor of a silent, long-running program does not spin."""
    source = """
os.close(1); os.close(2)
spent = lambda: sum(map(int, open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()[11:13]))
before = spent()
time.sleep(0.5)
open("ticks", "w").write(str(spent() - before))
"""
    assert (await run_supervised(agent(source))).exit == 0
    assert int((tmp_path / "ticks").read_text()) <= 0.03 * os.sysconf("SC_CLK_TCK")


# Silence


@pytest.mark.extended_variants
async def test_silent_program_is_ended(agent: Agent, tmp_path: Path) -> None:
    """A program without output and changes is stopped long before its limit, with that reason."""
    (tmp_path / "tree").mkdir()
    began = time.monotonic()
    command = agent("print('running', flush=True)\n" + LAST_WORD, idle_timeout=1.0, watched=(tmp_path / "tree",))
    ended = await run_supervised(command)
    assert (ended.exit, ended.ended_by) == (0, "idle_timeout")
    assert (tmp_path / "last-word").exists()
    assert 1.0 <= time.monotonic() - began < 20


@pytest.mark.extended_variants
@pytest.mark.parametrize("sign", ["os.utime('tree/deep/file', (1, 1))", "print('.', flush=True)"])
async def test_program_with_activity_continues(agent: Agent, tmp_path: Path, sign: str) -> None:
    """A change deep in a watched folder counts like output, whatever time the file claims."""
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "file").touch()
    source = f"end = time.monotonic() + 4\nwhile time.monotonic() < end: {sign}; time.sleep(0.05)"
    ended = await run_supervised(agent(source, idle_timeout=1.5, watched=(tmp_path / "tree",)))
    assert (ended.exit, ended.ended_by) == (0, "exit")


@pytest.mark.extended_variants
async def test_unwatchable_folder_ends_nothing(agent: Agent, tmp_path: Path) -> None:
    """An unreadable folder is no proof of silence; the wall-clock limit remains."""
    command = agent("time.sleep(300)", idle_timeout=0.2, watched=(tmp_path / "gone",), timeout=1.5)
    assert (await run_supervised(command)).ended_by == "timeout"


# Output


SECRETS = r"sk-[A-Za-z0-9]{20,}|(?i:bearer) \S{10,}"


async def test_secrets_do_not_reach_the_disk(agent: Agent, tmp_path: Path) -> None:
    """However a secret is split into writes, and whether the line ever ends, it is redacted; the count is of all."""
    source = """
secret = b"sk-" + b"a1" * 15
for number in range(len(secret)):
    os.write(1, b"one " + secret[:number]); time.sleep(0.005); os.write(1, secret[number:] + b" two\\n")
os.write(1, b"last " + secret)
os.write(2, b"x" * 300_000 + b" Bearer 0123456789 " + b"y" * 300_000)
"""
    ended = await run_supervised(agent(source, redact=SECRETS))
    assert (ended.exit, ended.stdout_bytes) == (0, 33 * (4 + 33 + 5) + 5 + 33)
    assert (tmp_path / "stdout").read_text() == "one [redacted] two\n" * 33 + "last [redacted]"
    assert (tmp_path / "stderr").read_bytes() == b"x" * 300_000 + b" [redacted] " + b"y" * 300_000


async def test_complete_lines_are_read_while_the_program_runs(agent: Agent, tmp_path: Path) -> None:
    """A follower of the file sees each line as soon as it is complete."""
    source = "os.write(1, b'whole\\nhalf')\nwhile not os.path.exists('go'): time.sleep(0.01)"
    async with anyio.create_task_group() as group:
        group.start_soon(run_supervised, agent(source, redact=SECRETS))
        await wait_until(lambda: (tmp_path / "stdout").exists() and (tmp_path / "stdout").read_bytes() == b"whole\n")
        (tmp_path / "go").touch()
    assert (tmp_path / "stdout").read_bytes() == b"whole\nhalf"


@pytest.mark.extended_variants
@pytest.mark.parametrize("lead", range(0, 60, 6))
async def test_half_a_secret_at_a_gap_is_removed(agent: Agent, tmp_path: Path, lead: int) -> None:
    """If the middle of the output is omitted, neither side keeps a part of a secret; all bytes are counted."""
    source = f"""
os.write(1, b"-" * {lead})
for _ in range(100): os.write(1, (b"sk-" + b"A" * 55 + b"\\n") * 1000)
"""
    ended = await run_supervised(agent(source, cap=100_000, redact=SECRETS))
    kept = (tmp_path / "stdout").read_text()
    head, _, rest = kept.partition("\n[… ")
    left_out, _, tail = rest.partition(" bytes left out …]\n")
    assert ended.stdout_bytes == 5_900_000 + lead
    assert set((head.lstrip("-") + "\n" + tail).split()) == {"[redacted]"}
    lines = len(head.split()) + len(tail.split())
    assert int(left_out) == 5_900_000 + lead - lines * 59 - lead
    assert lines > 15_000


async def test_omitted_output_starts_and_ends_with_no_part_of_a_key(agent: Agent, tmp_path: Path) -> None:
    """A private key cut by the gap is removed from both sides."""
    source = """
begin, end = (b"-----" + word + b" RSA PRIVATE KEY-----\\n" for word in (b"BEGIN", b"END"))
key = begin + b"MIIEvQIBADANBgkqhkiG\\n" * 100 + end
os.write(1, b"say\\n" + key + b"said\\n")
for _ in range(2000): os.write(1, key)
os.write(1, b"done\\n")
"""
    await run_supervised(agent(source, cap=30_000, redact=SECRETS))
    kept = (tmp_path / "stdout").read_text()
    assert kept.startswith("say\n[redacted]\nsaid\n[redacted]")
    assert kept.endswith("[redacted]\ndone\n")
    assert "MII" not in kept
    assert "KEY" not in kept


async def test_invalid_pattern_starts_nothing(agent: Agent, tmp_path: Path) -> None:
    """Without redaction nothing is run."""
    ended = await run_supervised(agent("open('ran', 'w')", redact="("))
    assert ended.spawn_error is not None
    assert "pattern" in ended.spawn_error
    assert not (tmp_path / "ran").exists()


@pytest.mark.extended_variants
@LINUX_ONLY
async def test_output_flood_is_truncated_in_the_middle_with_bounded_memory(agent: Agent, tmp_path: Path) -> None:
    """Of 1 GiB the first bytes and the last MiB are kept, with the omitted count between them."""
    source = """
chunk = b"x" * (1 << 20)
for _ in range(1024): os.write(1, chunk)
os.write(1, b"the last word\\n")
peak = [line for line in open(f"/proc/{os.getppid()}/status") if line.startswith("VmHWM")]
open("peak", "w").write(peak[0].split()[1])
"""
    ended = await run_supervised(agent(source, cap=3 * MIB))
    total = 1024 * MIB + len("the last word\n")
    assert (ended.exit, ended.stdout_bytes) == (0, total)
    assert int((tmp_path / "peak").read_text()) < 40 * 1024  # KiB
    kept = (tmp_path / "stdout").read_bytes()
    note = f"\n[… {total - 4 * MIB} bytes left out …]\n".encode()
    assert kept[: 3 * MIB] == b"x" * 3 * MIB
    assert kept[3 * MIB :] == note + b"x" * (MIB - 14) + b"the last word\n"
    assert stat.S_IMODE((tmp_path / "stdout").stat().st_mode) == 0o600


async def test_output_between_the_cap_and_the_tail_is_complete(agent: Agent, tmp_path: Path) -> None:
    """A binary line of 3 MB without an end is kept byte for byte."""
    line = b"\xff\xfe\x00\r" * 750_000
    ended = await run_supervised(agent("os.write(2, b'\\xff\\xfe\\0\\r' * 750_000)", cap=2 * MIB))
    assert ended.stderr_bytes == len(line)
    assert (tmp_path / "stderr").read_bytes() == line


async def test_output_on_a_full_disk_is_reported_and_the_program_continues(agent: Agent, tmp_path: Path) -> None:
    """A full disk loses output, which is reported, but not the session."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    ended = await run_supervised(agent("print('x' * 100_000); open('done', 'w')", stdout=Path("/dev/full")))
    assert (ended.exit, ended.stdout_bytes, ended.output_error) == (0, 100_001, "No space left on device")
    assert (tmp_path / "done").exists()


# The orchestrator's side


NASTY = """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
if len(sys.argv) == 2:
    for name in "ab":
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.setsid()
                os.execve(sys.executable, [sys.executable, "-I", "-S", *sys.argv[:2], name], {})
            os._exit(0)
    sys.argv.append("cli")
while True:
    with open("grows-" + sys.argv[2], "a") as file:
        file.write(f"{os.getpid()}\\n")
    os.write(1, b"noise" * 1000)
"""

ORCHESTRATOR = """
import sys, anyio
from pathlib import Path
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand, run_supervised

folder = Path(sys.argv[1])
anyio.run(run_supervised, SupervisedCommand(
    argv=[sys.executable, "-I", "-S", str(folder / "agent.py"), str(folder)], env={}, cwd=folder, stdin=None,
    stdout=folder / "stdout", stderr=folder / "stderr", cap=1000, timeout=60, grace=30, lock=folder / "task.1.lock"))
"""


@pytest.mark.extended_variants
@LINUX_ONLY
async def test_killed_orchestrator_leaves_no_process(agent: Agent, tmp_path: Path) -> None:
    """After kill -9 of the orchestrator, stubborn, detached and environment-clearing processes die within 2 s."""
    command = agent(NASTY)
    growing = [tmp_path / f"grows-{name}" for name in ("cli", "a", "b")]
    orchestrator = subprocess.Popen([sys.executable, "-c", ORCHESTRATOR, str(tmp_path)])
    try:
        await wait_until(lambda: all(path.exists() and path.stat().st_size for path in growing))
        pids = [int(path.read_text().split()[0]) for path in growing]
        with pytest.raises(LockHeld):
            await wait_until_released(command.lock, timeout=0)
        assert all(map(is_alive, pids))
    finally:
        orchestrator.kill()
        orchestrator.wait()
    killed_at = time.monotonic()
    while not is_free(command.lock):
        assert time.monotonic() < killed_at + 2
    assert not any(map(is_alive, pids))
    sizes = [path.stat().st_size for path in growing]
    await anyio.sleep(0.05)  # long enough for hundreds of lines
    assert [path.stat().st_size for path in growing] == sizes


@LINUX_ONLY
async def test_stop_ends_everything_after_the_grace_period(agent: Agent, tmp_path: Path) -> None:
    growing = [tmp_path / f"grows-{name}" for name in ("cli", "a", "b")]
    command = agent(NASTY, grace=0.2)
    took = await cancel_when_ready(command, lambda: all(path.exists() and path.stat().st_size for path in growing))
    assert not any(is_alive(int(path.read_text().split()[0])) for path in growing)
    assert is_free(command.lock)
    assert took < 5


async def test_session_lock_is_held_while_the_session_lives(agent: Agent, tmp_path: Path) -> None:
    """A waiter for the lock continues only when nothing of the session is left."""
    command = agent("open('ready', 'w')\nwhile not os.path.exists('go'): time.sleep(0.01)\nopen('done', 'w')")
    async with anyio.create_task_group() as group:
        group.start_soon(run_supervised, command)
        await wait_until((tmp_path / "ready").exists)
        with pytest.raises(LockHeld, match=r"task\.1\.lock is locked by process \d+ \(alive"):
            await wait_until_released(command.lock, timeout=0.05)
        (tmp_path / "go").touch()
        await wait_until_released(command.lock, timeout=20)
        assert (tmp_path / "done").exists()


async def test_session_that_never_started_is_released(tmp_path: Path) -> None:
    """Without a lock file there is nothing to wait for, and none is created."""
    await wait_until_released(tmp_path / "never" / "task.lock", timeout=0)


async def test_lock_removed_during_the_check_has_no_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process cleans up the same session, and finishes meanwhile."""
    lock = tmp_path / "session" / "lock"
    lock.parent.mkdir()
    lock.touch()
    exists = anyio.Path.exists

    async def go_after_that(path: anyio.Path) -> bool:
        is_there = await exists(path)
        shutil.rmtree(lock.parent)
        return is_there

    monkeypatch.setattr(anyio.Path, "exists", go_after_that)
    await wait_until_released(lock, timeout=0)
    assert not lock.parent.exists()
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "delay", [0, 0.02, 0.06, *(pytest.param(one, marks=pytest.mark.slow) for one in (0.005, 0.01, 0.03, 0.04))]
)
async def test_cancellation_during_the_start_leaves_nothing(agent: Agent, delay: float) -> None:
    """However early it comes: no process, open descriptor or zombie."""
    command = agent("time.sleep(300)")
    before = open_fds()
    with anyio.move_on_after(delay):
        await run_supervised(command)
    await wait_for_no_children()
    assert not command.lock.exists() or is_free(command.lock)
    assert open_fds() == before


async def test_program_of_a_session_cancelled_before_its_start_never_runs(agent: Agent, tmp_path: Path) -> None:
    """A session stopped while its supervisor starts costs no call of a model."""

    async def cancel() -> None:
        scope.cancel()

    with anyio.CancelScope() as scope:
        await run_supervised(agent("open('ran', 'w'); time.sleep(300)"), may_start=cancel)
    assert scope.cancelled_caught
    assert not (tmp_path / "ran").exists()


async def test_program_that_may_not_start_never_runs(agent: Agent, tmp_path: Path) -> None:
    """The permission is requested under the session's lock: a process that finds it free knows the answer."""
    command = agent("open('ran', 'w')")

    async def refuse() -> None:
        assert await is_session_alive(command.lock)
        raise LeaseLost("the claim", 1, 2)

    with pytest.raises(LeaseLost):
        await run_supervised(command, may_start=refuse)
    assert not await is_session_alive(command.lock)
    assert not (tmp_path / "ran").exists()


@pytest.mark.extended_variants
@LINUX_ONLY
async def test_frozen_session_ends_with_all_its_processes(agent: Agent, tmp_path: Path) -> None:
    """Its orchestrator is dead; the woken supervisor also kills processes that cleared their environment."""
    command = agent(NASTY)
    growing = [tmp_path / f"grows-{name}" for name in ("cli", "a", "b")]
    orchestrator = subprocess.Popen([sys.executable, "-c", ORCHESTRATOR, str(tmp_path)])
    await wait_until(lambda: all(path.exists() and path.stat().st_size for path in growing))
    pids = [int(path.read_text().split()[0]) for path in growing]
    frozen = [*psutil.Process(orchestrator.pid).children(), psutil.Process(pids[0])]
    for process in frozen:
        process.suspend()
    orchestrator.kill()
    orchestrator.wait()
    await anyio.sleep(0.1)
    assert all(map(is_alive, pids))
    await stop_supervised(command.lock, b"nobody has this", 10)
    assert not any(map(is_alive, pids))


@LINUX_ONLY
async def test_cancelled_session_ends_despite_a_stopped_supervisor(agent: Agent, tmp_path: Path) -> None:
    """The supervisor is resumed (SIGCONT) and ends the session as usual."""

    def stopped() -> bool:
        if not (tmp_path / "ready").exists():
            return False
        (supervisor,) = supervisors()
        supervisor.suspend()
        return supervisor.status() == psutil.STATUS_STOPPED

    took = await cancel_when_ready(agent("open('ready', 'w').close(); time.sleep(300)", grace=1), stopped)
    assert took < 4
    await wait_for_no_children()


@pytest.mark.extended_variants
@LINUX_ONLY
async def test_session_waiting_for_a_frozen_orchestrator_ends_before_it_starts(agent: Agent, tmp_path: Path) -> None:
    """A process that takes over need not wait, and the orchestrator notices when it wakes."""
    command = agent("open('ran', 'w')")

    async def be_taken_over() -> None:
        await stop_supervised(command.lock, b"nobody has this", 10)
        assert not await is_session_alive(command.lock)

    ended = await run_supervised(command, may_start=be_taken_over)
    assert (ended.exit, ended.ended_by) == (None, "stop")
    assert not (tmp_path / "ran").exists()


async def test_failing_callback_ends_the_session(agent: Agent) -> None:
    """An exception in the caller's code leaves no CLI running."""

    def fail() -> None:
        raise ZeroDivisionError

    command = agent("time.sleep(300)")
    with pytest.raises(ZeroDivisionError):
        await run_supervised(command, on_spawned=fail)
    await wait_for_no_children()


@LINUX_ONLY
async def test_killed_supervisor_is_an_error_and_ends_its_program(agent: Agent, tmp_path: Path) -> None:
    """Without a report the outcome is unknown; its CLI dies with the supervisor."""
    source = "open('pid.new', 'w').write(str(os.getpid())); os.rename('pid.new', 'pid'); time.sleep(300)"

    async def kill() -> None:
        await wait_until((tmp_path / "pid").exists)
        supervisors()[0].kill()

    async with anyio.create_task_group() as group:
        group.start_soon(kill)
        with pytest.raises(
            SessionError, match=r"^the supervisor of the session ended without a report: it was killed:"
        ):
            await run_supervised(agent(source))
    await wait_until(lambda: not is_alive(int((tmp_path / "pid").read_text())), within=2)
    await wait_for_no_children()


@LINUX_ONLY
async def test_daemon_of_a_killed_supervisor_is_killed_by_the_fork_server(agent: Agent, tmp_path: Path) -> None:
    """It carries no mark of its session; daemons left after the last session are also killed."""

    async def kill() -> None:
        await wait_until((tmp_path / "pid").exists)
        supervisors()[0].kill()

    async with open_fork_server(), anyio.create_task_group() as group:
        group.start_soon(kill)
        with pytest.raises(SessionError, match="it was killed:"):
            await run_supervised(agent(DAEMON + "time.sleep(300)", env={}))
    assert not is_alive(int((tmp_path / "pid").read_text()))


async def test_supervisor_is_stopped_by_sigterm_only(agent: Agent, tmp_path: Path) -> None:
    """SIGTERM to the supervisor is a stop; it ignores hang-ups and interrupts."""

    async def interfere() -> None:
        await wait_until((tmp_path / "ready").exists)
        (supervisor,) = supervisors()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            supervisor.send_signal(number)

    async with anyio.create_task_group() as group:
        group.start_soon(interfere)
        ended = await run_supervised(agent(LAST_WORD))
    assert (ended.exit, ended.ended_by) == (0, "stop")
    assert (tmp_path / "last-word").exists()


@pytest.mark.parametrize("count", [15, pytest.param(50, marks=pytest.mark.slow)])
async def test_many_concurrent_sessions_leave_nothing_open(agent: Agent, tmp_path: Path, count: int) -> None:
    """Each gets its own result, and no descriptor, thread or zombie stays."""
    before = open_fds()
    template = agent("print(sys.argv[2]); sys.exit(int(sys.argv[2]))")
    ends: dict[int, ProcessExit] = {}

    async def work(number: int) -> None:
        command = replace(
            template,
            argv=[*template.argv, str(number)],
            stdout=tmp_path / f"{number}.out",
            stderr=tmp_path / f"{number}.err",
            lock=tmp_path / f"{number}.lock",
        )
        ends[number] = await run_supervised(command)

    async with anyio.create_task_group() as group:
        for number in range(count):
            group.start_soon(work, number)
    assert [ends[number].exit for number in range(count)] == list(range(count))
    assert [(tmp_path / f"{number}.out").read_text() for number in range(count)] == [f"{n}\n" for n in range(count)]
    await wait_for_no_children()
    assert open_fds() == before


async def test_unstartable_supervisor_is_an_error(agent: Agent) -> None:
    """When descriptors run out the error is raised, and nothing is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The first thread and the descriptors of its event loop exist already.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(open_fds()) + 2, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            await run_supervised(agent(""))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await wait_for_no_children()

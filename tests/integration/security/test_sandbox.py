"""The sandbox against a program that tries to escape, and the needs of an honest program inside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from orchestrator.domain.runs.outcome import ProcessExit
from orchestrator.errors import RefusedError, SessionError
from orchestrator.sessions.sandbox.policy import SandboxKind, SandboxPolicy, choose_sandbox, sandbox_command
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand, run_supervised
from orchestrator.system.process_table import start_ticks
from tests.processes import child_processes
from tests.sandboxes import require_sandbox
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.sandbox,
    pytest.mark.skipif(sys.platform != "linux", reason="there is a sandbox on Linux only"),
]

HOSTILE = Path(__file__).with_name("hostile.py")
ON_FILES = [
    *("read_hidden", "list_hidden", "write_hidden", "read_hidden_file", "read_hidden_inside_writable"),
    *("read_through_symlink", "write_through_symlink", "write_outside", "overwrite", "truncate", "hardlink"),
    *("own_root", "own_folder", "others_root", "others_environment"),
    *("rename_out", "rename_over"),
]
ON_THE_MACHINE = [
    *("write_root", "parents_root", "ptrace", "remount", "remount_as_root_of_a_namespace", "device"),
    *("rename_in", "delete"),
]


class Folders:
    """Folders of a machine: a readable one, in it a hidden one, in that a usable one."""

    def __init__(self, top: Path) -> None:
        self.home, self.outside, self.scratch = top / "house", top / "outside", top / "scratch"
        self.hidden = self.home / "hidden"
        self.objects, self.tree = self.hidden / "objects", self.hidden / "sessions" / "tree"
        for folder in (self.home, self.outside, self.objects, self.tree / "private", self.tree / "work"):
            folder.mkdir(parents=True)
        for path in (self.hidden / "secret", self.home / "hidden-file", self.tree / "private" / "secret"):
            path.write_text("canary")
        (self.home / "kept").write_text("kept")
        (self.objects / "object").write_text("object")

    def policy(self, **changes: Any) -> SandboxPolicy:
        # The interpreter may be in a folder for temporary files, like these folders.
        readable = (self.home, self.outside, self.objects, HOSTILE, Path(sys.prefix), Path(sys.base_prefix))
        policy = SandboxPolicy((self.tree / "work", self.home / "gone"), readable, (self.hidden,), self.scratch)
        return replace(policy, **changes)

    def command(self, argv: list[str], **changes: Any) -> SupervisedCommand:
        command = SupervisedCommand(
            argv=argv,
            env={"PATH": os.environ["PATH"]},
            cwd=self.tree / "work",
            stdin=None,
            stdout=self.home.parent / "stdout",
            stderr=self.home.parent / "stderr",
            cap=1 << 20,
            timeout=60,
            grace=10,
            lock=self.home.parent / "task.1.lock",
        )
        return replace(command, **changes)

    def output(self) -> str:
        return (self.home.parent / "stdout").read_text() + (self.home.parent / "stderr").read_text()


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


@pytest.fixture(params=[SandboxKind.BUBBLEWRAP, SandboxKind.LANDLOCK])
def kind(request: pytest.FixtureRequest) -> SandboxKind:
    """Yield each kind of sandbox available here."""
    return require_sandbox(request.param)


@pytest.fixture
def bubblewrap() -> SandboxKind:
    return require_sandbox(SandboxKind.BUBBLEWRAP)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process of the same user outside of the sandbox."""
    process = subprocess.Popen(["sleep", "300"], env={"CANARY": "x", "PATH": os.defpath})
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def attack(
    folders: Folders, kind: SandboxKind, policy: SandboxPolicy, attacks: list[str], pid: int = 1, port: int = 0
) -> list[str]:
    """Run the hostile program in the sandbox and return the names of the successful attacks."""
    setting: dict[str, object] = {
        "tree": str(policy.writable[0]),
        "house": str(folders.home),
        "hidden": str(folders.hidden),
    }
    setting |= {"outside": str(folders.outside), "pid": pid, "port": port}
    argv = [sys.executable, "-I", "-S", str(HOSTILE), json.dumps(setting), *attacks]
    ended = await run_supervised(sandbox_command(kind, folders.command(argv), policy))
    assert (ended.exit, ended.spawn_error) == (0, None), folders.output()
    succeeded: list[str] = json.loads((folders.home.parent / "stdout").read_text())
    return succeeded


# Attacks that must fail


@pytest.mark.extended_variants
async def test_hidden_files_are_unreadable_and_outside_is_unwritable(
    folders: Folders, kind: SandboxKind, bystander: subprocess.Popen[bytes]
) -> None:
    """By links, names, /proc, mounts, devices or namespaces."""
    policy = folders.policy(hidden=(folders.hidden, folders.home / "hidden-file"))
    assert await attack(folders, kind, policy, ON_FILES + ON_THE_MACHINE, bystander.pid) == []
    assert (folders.home / "kept").read_text() == "kept"
    assert names(folders.home) == ["hidden", "hidden-file", "kept"]
    assert names(folders.hidden) == ["objects", "secret", "sessions"]
    assert names(folders.outside) == []


async def test_attacks_work_without_a_sandbox(folders: Folders, bystander: subprocess.Popen[bytes]) -> None:
    """Each of those that can be tried without harm succeeds."""
    attacks = [*ON_FILES, "chmod", "others_signal", "rename_in"]
    assert (
        await attack(folders, SandboxKind.OFF, folders.policy(writable=(folders.tree,)), attacks, bystander.pid)
        == attacks
    )


async def test_hidden_folder_inside_a_writable_one_is_hidden(folders: Folders, kind: SandboxKind) -> None:
    """The more specific path wins, in both directions."""
    policy = folders.policy(writable=(folders.tree,), hidden=(folders.hidden, folders.tree / "private"))
    assert await attack(folders, kind, policy, ["read_hidden", "read_hidden_inside_writable"]) == []
    script = f"echo ok >{folders.tree}/work/new && cat {folders.objects}/object && ! echo x >{folders.objects}/object"
    ended = await run_supervised(sandbox_command(kind, folders.command(["sh", "-c", script]), policy))
    assert (ended.exit, (folders.tree / "work" / "new").read_text()) == (0, "ok\n"), folders.output()
    assert (folders.objects / "object").read_text() == "object"


async def test_target_of_a_hidden_symlink_is_hidden(folders: Folders, kind: SandboxKind) -> None:
    alias = folders.home.parent / "alias"
    alias.symlink_to(folders.hidden)
    assert await attack(folders, kind, folders.policy(hidden=(alias,)), ["read_hidden", "own_root"]) == []


async def test_part_of_the_system_can_be_hidden(folders: Folders, kind: SandboxKind) -> None:
    shown = next(path for path in (Path("/usr/share"), Path("/usr/lib")) if path.is_dir())
    hidden = next(path for path in shown.iterdir() if path.is_dir() and not path.is_symlink() and any(path.iterdir()))
    script = f"! ls {hidden}/* && ! touch {hidden}/x && ls /usr/bin/env"
    ended = await run_supervised(
        sandbox_command(kind, folders.command(["sh", "-c", script]), folders.policy(hidden=(hidden,)))
    )
    assert ended.exit == 0, folders.output()


async def test_outside_processes_are_unreachable(
    folders: Folders, kind: SandboxKind, bystander: subprocess.Popen[bytes]
) -> None:
    attacks = ["others_signal", "ptrace", "others_environment", "others_root"]
    if kind is SandboxKind.BUBBLEWRAP:
        attacks.append("everybodys_signal")
    assert await attack(folders, kind, folders.policy(), attacks, bystander.pid) == []
    assert bystander.poll() is None


async def test_services_of_the_machine_are_unreachable(folders: Folders, bubblewrap: SandboxKind) -> None:
    """/run contains only the files for name resolution, and a hidden socket can't be connected to."""
    with socket.socket(socket.AF_UNIX) as listening:
        with contextlib.chdir(folders.hidden):  # a socket path is limited in length
            listening.bind("socket")
        listening.listen()
        assert await attack(folders, SandboxKind.OFF, folders.policy(), ["socket_file"]) == ["socket_file"]
        assert await attack(folders, bubblewrap, folders.policy(), ["services", "socket_file"]) == []


async def test_network_is_unreachable_if_off(folders: Folders, bubblewrap: SandboxKind, server: socket.socket) -> None:
    """Only a working loopback of its own is left, and no server of the machine is reachable."""
    port = server.getsockname()[1]
    attacks = ["network", "interfaces"]
    assert "network" in await attack(folders, bubblewrap, folders.policy(), attacks, port=port)
    assert await attack(folders, bubblewrap, folders.policy(network=False), attacks, port=port) == []
    source = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())"
    alone = folders.command([sys.executable, "-I", "-S", "-c", source])
    assert (await run_supervised(sandbox_command(bubblewrap, alone, folders.policy(network=False)))).exit == 0, (
        folders.output()
    )


# Needs that must work


async def test_needs_of_an_agent_work(folders: Folders, kind: SandboxKind) -> None:
    """Files, temporary files, subprocesses, shared memory, locks, devices, and its own interpreter.

    With Landlock shared memory is opt-in, because it includes the shared memory of other processes.
    """
    source = """
import multiprocessing, os, pathlib, subprocess, sys, tempfile
pathlib.Path("a/b").mkdir(parents=True); pathlib.Path("a/b/c").write_text("x"); os.rename("a/b/c", "a/d")
os.symlink("d", "a/e"); os.link("a/d", "a/f"); os.mkfifo("a/g"); os.truncate("a/f", 0); os.chmod("a/d", 0o755)
with tempfile.NamedTemporaryFile("w+") as file, tempfile.TemporaryDirectory() as folder:
    file.write("x"); assert file.name.startswith(os.environ["TMPDIR"]), file.name
lock = multiprocessing.Lock()
with lock: pass
assert multiprocessing.get_context("fork").Pool(2).map(abs, [-1, -2]) == [1, 2]
open("/dev/null", "w").write("x"); assert len(open("/dev/urandom", "rb").read(8)) == 8
subprocess.run([sys.executable, "-c", "print('child')"], check=True); os.listdir("/proc/self/fd"); os.listdir("/usr")
open("/dev/stdout", "w").close(); subprocess.run("echo x | cat > from-shell", shell=True, check=True)
"""
    shared = (Path("/dev/shm"),) if kind is SandboxKind.LANDLOCK else ()
    policy = folders.policy(writable=(folders.tree / "work", *shared))
    ended = await run_supervised(sandbox_command(kind, folders.command([sys.executable, "-c", source]), policy))
    assert (ended.exit, ended.spawn_error) == (0, None), folders.output()
    assert (folders.tree / "work" / "from-shell").read_text() == "x\n"


async def test_commit_with_borrowed_objects_works(folders: Folders, kind: SandboxKind) -> None:
    """The session's git directory borrows objects from a read-only folder inside a hidden one."""
    env = {"PATH": os.environ["PATH"], "HOME": str(folders.outside), "GIT_CONFIG_GLOBAL": os.devnull}
    env |= {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    hub, own, tree = folders.objects / "hub.git", folders.tree / "work" / "git", folders.tree / "work" / "tree"
    seed = f"""set -e
    git init -q {folders.outside}/seed; cd {folders.outside}/seed; echo 1 >file; git add .; git commit -qm first
    git clone -q --bare . {hub}; git init -q --bare {own}; echo {hub}/objects >{own}/objects/info/alternates
    mkdir {tree}; git --git-dir {own} update-ref refs/heads/work $(git rev-parse HEAD)
    git --git-dir {own} symbolic-ref HEAD refs/heads/work; git --git-dir {own} config core.bare false
    echo "gitdir: {own}" >{tree}/.git; git -C {tree} reset -q --hard"""
    subprocess.run(["sh", "-c", seed], env=env, check=True)
    script = "echo 2 >>file && git add --all && git commit -qm second && git log --oneline && git fsck && git status"
    command = folders.command(["sh", "-c", script], cwd=tree, env=env)
    ended = await run_supervised(sandbox_command(kind, command, folders.policy()))
    assert ended.exit == 0, folders.output()
    log = subprocess.run(["git", "log", "--format=%s"], cwd=tree, env=env, capture_output=True, text=True, check=True)
    assert log.stdout.split() == ["second", "first"]


async def test_sandboxed_program_starts_as_clean_as_without(folders: Folders, kind: SandboxKind) -> None:
    """Only the three standard descriptors, and the given folder, arguments and environment."""
    source = "import os, sys; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"
    source += "; print(os.getcwd(), sys.argv[1], os.environ['A'])"
    command = folders.command([sys.executable, "-I", "-S", "-c", source, "-x"], env={"A": "b"})
    assert (await run_supervised(sandbox_command(kind, command, folders.policy()))).exit == 0, folders.output()
    assert (folders.home.parent / "stdout").read_text() == f"[0, 1, 2]\n{folders.tree / 'work'} -x b\n"


# Ends


async def test_missing_program_is_distinguished_from_a_failing_one(folders: Folders, kind: SandboxKind) -> None:
    """By the program's name and the reason, as without a sandbox; exit code 1 is the program's own."""
    ended = await run_supervised(sandbox_command(kind, folders.command(["no-such-program"]), folders.policy()))
    assert ended == ProcessExit(None, None, "exit", "no-such-program: No such file or directory", 0, 0, 0, None)
    (folders.tree / "work" / "text").write_text("not a program")
    ended = await run_supervised(sandbox_command(kind, folders.command(["./text"]), folders.policy()))
    assert ended.spawn_error == "./text: Permission denied"
    script = "echo 'bwrap: execvp x: No such file or directory' >&2; exit 1"
    ended = await run_supervised(sandbox_command(kind, folders.command(["sh", "-c", script]), folders.policy()))
    assert (ended.exit, ended.spawn_error) == (1, None)


async def test_crash_is_reported_from_a_sandbox(folders: Folders, kind: SandboxKind) -> None:
    """As a signal, or in bubblewrap as a shell reports it."""
    ended = await run_supervised(
        sandbox_command(kind, folders.command(["sh", "-c", "kill -SEGV $$"]), folders.policy())
    )
    expected = (139, None) if kind is SandboxKind.BUBBLEWRAP else (None, signal.SIGSEGV)
    assert (ended.exit, ended.signal) == expected


SAVES = """
import os, signal, sys, time
def end(*_):
    time.sleep(0.2)
    open("last-word", "w").write("saved")
    sys.exit(7)
if len(sys.argv) > 1 and os.fork():  # a loader that dies of the signal while the real program cleans up
    time.sleep(300)
signal.signal(signal.SIGTERM, end)
open("ready", "w").close()
while True: time.sleep(0.05)  # Python sees a signal that comes just before a sleep only after it
"""


@pytest.mark.extended_variants
@pytest.mark.parametrize("loader", [[], ["loader"]], ids=["program", "loader"])
async def test_stopped_program_has_its_grace_period(folders: Folders, kind: SandboxKind, loader: list[str]) -> None:
    """At the limit, program and descendants get SIGTERM and time to save, and the wait ends when they do."""
    began = time.monotonic()
    command = folders.command([sys.executable, "-I", "-S", "-c", SAVES, *loader], timeout=2)
    ended = await run_supervised(sandbox_command(kind, command, folders.policy()))
    assert (folders.tree / "work" / "last-word").read_text() == "saved"
    assert (ended.exit, ended.signal) == ((None, signal.SIGTERM) if loader else (7, None))
    assert ended.ended_by == "timeout"
    assert time.monotonic() - began < 8


@pytest.mark.extended_variants
async def test_program_that_ignores_sigterm_is_killed(folders: Folders, kind: SandboxKind) -> None:
    command = folders.command(["sh", "-c", "trap '' TERM; sleep 300; sleep 300"], timeout=0.5, grace=0.3)
    ended = await run_supervised(sandbox_command(kind, command, folders.policy()))
    assert (ended.exit, ended.signal, ended.ended_by) == (None, signal.SIGKILL, "timeout")


@pytest.mark.extended_variants
@pytest.mark.parametrize("interrupt", [False, True])
async def test_stop_during_the_start_takes_no_grace_period(folders: Folders, interrupt: bool) -> None:
    """A sandbox whose program has not started has nothing to save."""
    began = time.monotonic()
    stuck = folders.command(["sh", "-c", "sleep 300; :"], wrapped=True, timeout=0.5, grace=60, interrupt=interrupt)
    ended = await run_supervised(stuck)
    assert (ended.ended_by, ended.spawn_error) == ("timeout", None)
    assert time.monotonic() - began < 20


async def test_sandbox_killed_during_the_start_is_not_a_machine_error(folders: Folders) -> None:
    """The exit code has the signal: the session has crashed, and its task may be retried."""
    ended = await run_supervised(folders.command(["sh", "-c", "sh -c 'kill -KILL $$'; exit $?"], wrapped=True))
    assert (ended.spawn_error, ended.signal, ended.exit) == (None, signal.SIGKILL, None)
    unsaid = await run_supervised(folders.command(["sh", "-c", "exit 1"], wrapped=True))
    assert unsaid.spawn_error == "the sandbox could not be created: no error message"


@pytest.mark.parametrize("interrupt", [False, True])
@pytest.mark.parametrize("delay", [0.02, 0.04, 0.06])
async def test_cancellation_during_the_start_leaves_nothing(
    folders: Folders, kind: SandboxKind, delay: float, interrupt: bool
) -> None:
    command = folders.command(["sleep", "300"], grace=30, interrupt=interrupt)
    with anyio.move_on_after(delay):
        await run_supervised(sandbox_command(kind, command, folders.policy()))
    assert not child_processes()


DETACHED = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
if sys.argv[1:]:
    while True:
        open("grows", "a").write("x"); time.sleep(0.01)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", sys.orig_argv[4], "daemon"], {})
    os._exit(0)
time.sleep(300)
"""


async def test_killed_supervisor_leaves_no_process(folders: Folders, bubblewrap: SandboxKind) -> None:
    """In a PID namespace even a daemon with its own session and an empty environment dies."""
    grows = folders.tree / "work" / "grows"

    async def kill() -> None:
        await wait_until(lambda: grows.exists() and grows.stat().st_size)
        child_processes()[0].kill()

    command = folders.command([sys.executable, "-I", "-S", "-c", DETACHED])
    async with anyio.create_task_group() as group:
        group.start_soon(kill)
        with pytest.raises(SessionError):
            await run_supervised(sandbox_command(bubblewrap, command, folders.policy()))
    await wait_until(lambda: not any(_is_daemon(process) for process in psutil.process_iter(["cmdline", "cwd"])))
    size = grows.stat().st_size
    await anyio.sleep(0.1)
    assert grows.stat().st_size == size


def _is_daemon(process: psutil.Process) -> bool:
    return "daemon" in (process.info["cmdline"] or ()) and DETACHED in process.info["cmdline"]


async def wait_until(condition: Callable[[], object], within: float = 20) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"condition not reached within {within} s"
        await anyio.sleep(0.01)


# Selection


async def test_unusable_bubblewrap_is_not_chosen(tmp_path: Path) -> None:
    """It has to work, not only exist; its error output is reported."""
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.defpath}"}
    output = r"uid map: Permission denied.*apparmor_restrict_unprivileged_userns=0.*`sandbox: off`"
    with pytest.raises(RefusedError, match=output):
        await choose_sandbox("bubblewrap", network=True, environ=environ)
    require_sandbox(SandboxKind.LANDLOCK)
    for network in (True, False):
        assert await choose_sandbox("auto", network=network, environ=environ) is SandboxKind.LANDLOCK


async def test_bubblewrap_killed_at_its_start_is_probed_again(tmp_path: Path) -> None:
    """No weaker kind is chosen instead, and its child processes do not stay."""
    fake, left = tmp_path / "bwrap", tmp_path / "left"
    fake.write_text(f"""#!/bin/sh
case "$*" in
    --version) [ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; kill -9 $$; }}; echo bubblewrap 0.8.0 ;;
    *) [ -e {left} ] || {{ sleep 600 </dev/null & echo $! >{left}; kill -9 $$; }}
       case "$*" in *--disable-userns*) ;; *) exit 1 ;; esac ;;
esac
""")
    fake.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.defpath}"}
    assert await choose_sandbox("auto", network=True, environ=environ) is SandboxKind.BUBBLEWRAP
    wait_for(lambda: start_ticks(int(left.read_text())) is None)


async def test_sandbox_off_can_not_turn_the_network_off() -> None:
    """A limit that can't be enforced is rejected, not ignored."""
    with pytest.raises(RefusedError, match="`network: off` needs a sandbox"):
        await choose_sandbox("off", network=False, environ=os.environ)


async def test_missing_bubblewrap_has_its_installation_as_remedy(tmp_path: Path) -> None:
    """An explicit kind is never replaced by another one."""
    with pytest.raises(RefusedError, match="`bwrap` is not on PATH: install bubblewrap"):
        await choose_sandbox("bubblewrap", network=True, environ={"PATH": str(tmp_path)})


async def test_auto_prefers_bubblewrap(bubblewrap: SandboxKind) -> None:
    """The stronger kind is preferred if it works, with and without a network."""
    for network in (True, False):
        assert await choose_sandbox("auto", network=network, environ=os.environ) is bubblewrap

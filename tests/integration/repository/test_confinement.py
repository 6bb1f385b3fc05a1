"""Git that reads agent-writable files runs in a sandbox: hostile content can't make it do harm."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.domain.security.secrets import Redactor
from orchestrator.errors import GitError
from orchestrator.repo.git.command import Git
from orchestrator.repo.intake.collect import collect_work
from orchestrator.repo.intake.diffs import diff_session
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.intake.quarantine import Quarantine
from orchestrator.repo.worktrees.hub import create_hub, locate_hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sandbox import confinement, landlock
from orchestrator.sandbox.confinement import Confinement, Mechanism
from tests.conftest import Repository
from tests.hub_fixture import HubFixture

pytestmark = pytest.mark.sandbox

RULES = IntakeRules(Redactor([]))
_EXCHANGE = 2  # RENAME_EXCHANGE, renameat2(2)


@pytest.fixture(params=[Mechanism.LANDLOCK, Mechanism.BUBBLEWRAP])
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mechanism:
    """A sandbox kind that works on this machine."""
    wanted: Mechanism = request.param
    with monkeypatch.context() as patched:
        if wanted is Mechanism.BUBBLEWRAP:
            patched.setattr(landlock, "abi_version", lambda: 0)
        if confinement.best_mechanism.__wrapped__() is not wanted:
            pytest.skip(f"{wanted} is not available on this machine")
    monkeypatch.setattr(confinement, "best_mechanism", lambda: wanted)
    return wanted


class Attempt:
    """An agent's worktree, and our operations on it."""

    def __init__(self, yard: HubFixture, worktree: Worktree, base: str) -> None:
        self.git, self.worktree, self.base, self.tree = yard.git, worktree, base, worktree.tree

    def run(self, *arguments: str, cwd: str = ".") -> None:
        """Run git as the agent would."""
        identity = ("-c", "user.name=agent", "-c", "user.email=agent@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=self.tree / cwd, check=True, capture_output=True)


@pytest.fixture
async def attempt(repository: Repository, tmp_path: Path, environ: dict[str, str]) -> Attempt:
    yard = await HubFixture.of(repository.top, tmp_path / "council-home", environ)
    base = await yard.fetch()
    async with yard.open() as pool:
        worktree, checkout = await yard.begin(pool, "task", base)
        await pool.slots.detach(checkout)
    return Attempt(yard, worktree, base)


def plant_repository(attempt: Attempt, marker: Path) -> None:
    """Create a repository in the worktree whose configuration names programs for everything git may start."""
    command = f"touch {marker}; cat"
    attempt.run("init", "--quiet", "nested")
    nested = attempt.tree / "nested"
    (nested / ".gitattributes").write_text("* filter=evil diff=evil\n")
    (nested / "file").write_text("one\n")
    attempt.run("add", "--all", cwd="nested")
    attempt.run("commit", "--quiet", "--message", "nested", cwd="nested")
    for key in ("filter.evil.clean", "filter.evil.smudge", "diff.external", "diff.evil.textconv", "core.fsmonitor"):
        attempt.run("config", key, command, cwd="nested")
    (nested / "file").touch()


@pytest.mark.parametrize("extra", ["nothing", "an unreadable file", "an empty repository"])
async def test_collect_of_a_nested_repository_runs_none_of_its_programs(
    attempt: Attempt, tmp_path: Path, mechanism: Mechanism, extra: str
) -> None:
    """A file that can't be added fails the first `git add` halfway, so that the next one enters the repository."""
    marker = tmp_path / "it-ran"
    plant_repository(attempt, marker)
    if extra == "an empty repository":
        attempt.run("init", "--quiet", "zzz")
    elif extra == "an unreadable file":
        (attempt.tree / "bad").mkdir()
        (attempt.tree / "bad" / "x").write_text("x")
        (attempt.tree / "bad" / "x").chmod(0o000)
    left = await collect_work(attempt.git, attempt.worktree, attempt.base, "work\n", rules=RULES)
    assert not marker.exists()
    assert left.refused is not None


async def test_confined_git_with_hostile_configuration_starts_no_program(
    attempt: Attempt, tmp_path: Path, mechanism: Mechanism
) -> None:
    """Even if an agent could choose the configuration that our git reads."""
    marker = tmp_path / "it-ran"
    (attempt.tree / ".gitattributes").write_text("* filter=evil\n")
    (attempt.tree / "file").write_text("one\n")
    hostile = ("-c", f"filter.evil.clean=touch {marker}; cat", "-c", "filter.evil.required=true")
    env = {"GIT_WORK_TREE": str(attempt.tree), "GIT_INDEX_FILE": str(attempt.worktree.index)}
    confined = attempt.git.confined(
        readable=(attempt.tree, attempt.worktree.hub.objects), writable=(attempt.worktree.index_folder,)
    )
    with pytest.raises(GitError):
        await confined(*hostile, "add", "file", env=env, cwd=attempt.tree)
    assert not marker.exists()


PROBES: dict[str, str] = {
    "reads what is hidden": "open({hidden!r}).read()",
    "reads through a link": "open({link!r}).read()",
    "lists the home": "__import__('os').listdir({home!r})",
    "writes outside": "open({outside!r}, 'w')",
    "writes where it may read": "open({readable!r} + '/new', 'w')",
    "starts a shell": "__import__('subprocess').run(['/bin/sh', '-c', 'exit 0'])",
    "starts what it wrote": "__import__('subprocess').run([{planted!r}])",
    "connects": "__import__('socket').create_connection(('127.0.0.1', {port}), 5)",
}


@pytest.mark.parametrize("probe", PROBES)
def test_confined_program_can_do_nothing_else(tmp_path: Path, mechanism: Mechanism, probe: str) -> None:
    """It reads and writes only its given paths; the probe is Python, which can try more than git."""
    readable, writable, home = tmp_path / "readable", tmp_path / "writable", tmp_path / "home"
    for folder in (readable, writable, home):
        folder.mkdir()
    (home / "secret").write_text("canary")
    (readable / "link").symlink_to(home / "secret")
    (readable / "given").write_text("given")
    planted = writable / "planted"
    planted.write_text("#!/bin/sh\nexit 0\n")
    planted.chmod(0o755)
    # The interpreter's libraries correspond to git's exec path.
    given = Confinement(Path(sys.executable).resolve(), (Path(sys.base_prefix, "lib"),), (readable,), (writable,))
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {
            "hidden": str(home / "secret"),
            "link": str(readable / "link"),
            "home": str(home),
            "outside": str(home / "new"),
            "readable": str(readable),
            "planted": str(planted),
            "port": server.getsockname()[1],
        }
        reading, writing = str(readable / "given"), str(writable / "made")
        code = (
            f"assert open({reading!r}).read() == 'given'; open({writing!r}, 'w').close(); print('honest', flush=True);"
            f"{PROBES[probe].format(**names)}; print('done')"
        )

        def start(argv: object) -> subprocess.CompletedProcess[str]:
            assert isinstance(argv, list)
            return subprocess.run(argv, check=False, capture_output=True, text=True, cwd="/", timeout=60)

        done = given.start([str(Path(sys.executable).resolve()), "-I", "-c", code], start)
    assert done.stdout == "honest\n", done
    assert (writable / "made").exists()


async def test_confinement_does_not_affect_the_process(attempt: Attempt, tmp_path: Path, mechanism: Mechanism) -> None:
    """Rights are dropped in one thread alone."""
    await attempt.git.confined(readable=(attempt.worktree.hub.objects,))("rev-parse", "--git-dir")
    (tmp_path / "mine").write_text("x")
    assert subprocess.run(["/bin/sh", "-c", "exit 0"], check=False).returncode == 0


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[Callable[[], int]]:
    """Exchange two files repeatedly while the body runs; yields the counter."""
    libc, stopped, count = ctypes.CDLL(None), threading.Event(), 0

    def swap() -> None:
        nonlocal count
        while not stopped.is_set():
            libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), _EXCHANGE)
            count += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield lambda: count
    finally:
        stopped.set()
        thread.join()


@pytest.mark.extended_variants
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can exchange two files at once")
async def test_live_diff_reads_nothing_behind_a_link(attempt: Attempt, tmp_path: Path, mechanism: Mechanism) -> None:
    """A file that becomes a link between two reads is not followed out of the worktree."""
    secret = tmp_path / "secret"
    secret.write_text("canary\n")
    (attempt.tree / "file").write_text("plain\n")
    aside = attempt.worktree.git_dir / "aside"
    aside.symlink_to(secret)
    with swapping(attempt.tree / "file", aside) as swapped:
        for _ in range(15):
            shown = await diff_session(attempt.git, attempt.worktree, attempt.base, rules=RULES)
            assert b"+canary" not in shown
    assert swapped() > 100


async def test_object_with_a_wrong_name_does_not_enter_the_hub(
    repository: Repository, tmp_path: Path, environ: dict[str, str]
) -> None:
    """Objects written by a git that read an agent's files are hashed before anything relies on them."""
    hub = locate_hub(str(repository.top), tmp_path / "council-home")
    await create_hub(hub, "sha1", environ)
    quarantine = Quarantine(tmp_path / "quarantine", hub.objects)
    quarantine.empty()
    git = Git(hub.trusted, environ=environ)
    name = await git.line("hash-object", "-w", "--stdin", env=quarantine.write_env, input_=b"good")
    other = await git.line("hash-object", "-w", "--stdin", env=quarantine.write_env, input_=b"other")
    (quarantine.objects / name[:2] / name[2:]).unlink()
    (quarantine.objects / other[:2] / other[2:]).rename(quarantine.objects / name[:2] / name[2:])
    with pytest.raises(OSError, match=name):
        quarantine.admit_objects()
    assert (await git("cat-file", "-e", name, ok=(0, 1))).returncode == 1


async def test_collect_after_a_killed_git_ignores_its_lock(attempt: Attempt) -> None:
    """A command that was killed at its limit leaves a lock on our index, which nobody else uses."""
    (attempt.tree / "new").write_text("x")
    attempt.worktree.index.with_name("index.lock").touch()
    left = await collect_work(attempt.git, attempt.worktree, attempt.base, "work\n", rules=RULES)
    assert left.refused is None
    assert left.commit is not None

"""Output and exit code of commands after temporary failures."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio.to_thread
import pytest

from orchestrator.__main__ import main as start_council
from orchestrator.cli.core.error_boundary import ErrorLog, error_boundary
from orchestrator.cli.render.output import Output
from orchestrator.errors import ClaimLost, GitError, LeaseLost, is_resource_exhaustion
from orchestrator.repo.worktrees.hub import create_folders
from orchestrator.system.file_lock import FileLock


@pytest.mark.parametrize("is_grouped", [False, True])
async def test_lock_timeout_is_not_an_internal_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, is_grouped: bool
) -> None:
    """One line with the holder and the fix, and exit code 1, also from an exception group."""
    lock = FileLock(tmp_path / "session.lock")
    async with lock.hold():
        error = await lock.held_error()
    raised = ExceptionGroup("tasks", [error]) if is_grouped else error
    with pytest.raises(SystemExit) as end, error_boundary(Output(as_json=True), ErrorLog()):
        raise raised
    assert end.value.code == 1
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "unavailable"
    assert result["error"].startswith(f"{lock.path} is locked by process")
    assert result["remedy"] == "wait for it to end or stop it"
    with pytest.raises(SystemExit), error_boundary(Output(as_json=False), ErrorLog()):
        raise raised
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("run", "command"), [(None, "council resume"), ("20260102-ab", "council resume 20260102-ab")])
def test_internal_error_names_the_run_that_it_interrupted(
    capsys: pytest.CaptureFixture[str], run: str | None, command: str
) -> None:
    """`council resume` alone would resume the newest run, which may be another one."""
    log = ErrorLog()
    log.run = run
    with pytest.raises(SystemExit) as end, error_boundary(Output(as_json=False), log):
        raise ZeroDivisionError
    assert end.value.code == 3
    assert f": `{command}` continues the run." in capsys.readouterr().err


def read_head(path: Path) -> bytes:
    """Read from an open file."""
    with path.open("rb") as file:
        return file.read(10)


def read_descriptor(path: Path) -> bytes:
    """Read without a file object."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 10)
    finally:
        os.close(descriptor)


def test_read_only_file_system_is_unavailable(capsys: pytest.CaptureFixture[str]) -> None:
    """As with a full disk, a session without a setup waits and uses no attempt."""
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "/place")
    assert is_resource_exhaustion(error)
    with pytest.raises(SystemExit) as end, error_boundary(Output(as_json=False), ErrorLog()):
        raise error
    assert end.value.code == 1
    reported = "council: /place: read-only file system: mount it writable; no recorded work is lost\n"
    assert capsys.readouterr().err == reported


@pytest.mark.parametrize(
    ("error", "subject"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO), "/slots/1"), "/slots/1"),
        (GitError(["git", "fetch", "x"], 128, "unable to write loose object file: Input/output error"), "git fetch"),
    ],
)
def test_input_output_error_is_reported_but_not_waited_for(
    capsys: pytest.CaptureFixture[str], error: OSError | GitError, subject: str
) -> None:
    """A fault of the disk is no internal error, and may last: nothing waits for its end."""
    assert not is_resource_exhaustion(error)
    with pytest.raises(SystemExit) as end, error_boundary(Output(as_json=False), ErrorLog()):
        raise error
    assert end.value.code == 1
    reported = f"council: {subject}: input/output error: check the disk and its file system; no recorded work is lost\n"
    assert capsys.readouterr().err == reported


@pytest.mark.parametrize("limit", [5, 6])
def test_command_without_free_descriptors_prints_one_line(tmp_path: Path, limit: int) -> None:
    """Neither the event loop nor a coroutine that was never awaited adds a traceback or a warning."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "runs"], cwd=tmp_path, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
    assert "too many open files: raise the limit of open files (`ulimit -n`)" in done.stderr


@pytest.mark.parametrize("message", ["Too many open files", "Too many open files in system (os error 23)"])
@pytest.mark.parametrize("kind", [ImportError, type("PanicException", (BaseException,), {})])
def test_compiled_module_without_descriptors_is_unavailable(
    capsys: pytest.CaptureFixture[str], kind: type[BaseException], message: str
) -> None:
    """Such an error has no errno, and may be no Exception."""
    with pytest.raises(SystemExit) as end, error_boundary(Output(as_json=False), ErrorLog()):
        raise kind(f"cannot open shared object file: {message}")
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("council: too many open files")


def test_import_without_descriptors_prints_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the error boundary is imported."""
    monkeypatch.setattr(sys, "argv", ["council", "runs"])
    monkeypatch.setitem(sys.modules, "orchestrator.cli.main", None)
    with pytest.raises(ImportError):
        start_council()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.delitem(sys.modules, "orchestrator.client.quick_parser")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        with pytest.raises(SystemExit) as end:
            start_council()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    reported = "council: too many open files: raise the limit of open files (`ulimit -n`)\n"
    assert (end.value.code, capsys.readouterr().err) == (1, reported)


def test_file_in_the_place_of_a_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the folders of a hub are created."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "sessions").touch()
    attempts: list[Callable[[], object]] = [
        lambda: create_folders(hub),
        lambda: (hub / "sessions/run/t.1").mkdir(parents=True),
    ]
    for attempt in attempts:
        with pytest.raises(SystemExit) as end, error_boundary(Output(as_json=False), ErrorLog()):
            attempt()
        reported = f"council: {hub}/sessions is a file, and a folder is needed there: move it to another place\n"
        assert (end.value.code, capsys.readouterr().err) == (2, reported)


@pytest.mark.parametrize("read", [Path.read_bytes, Path.read_text, read_head, read_descriptor])
async def test_failed_read_names_its_file(capsys: pytest.CaptureFixture[str], read: Callable[[Path], object]) -> None:
    """Also in a thread, where the error has no file name."""
    memory = Path("/proc/self/mem")  # nothing is mapped at its start
    with pytest.raises(OSError, match="Input/output error") as raised:
        await anyio.to_thread.run_sync(read, memory)
    assert raised.value.filename is None
    with pytest.raises(SystemExit) as end, error_boundary(Output(as_json=False), ErrorLog()):
        raise raised.value
    reported = f"council: {memory}: input/output error: check the disk and its file system; no recorded work is lost\n"
    assert (end.value.code, capsys.readouterr().err) == (1, reported)


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize(
    "lost", [LeaseLost("the lease on merges to main", 1, 2), ClaimLost("t", 1, 2, "other")], ids=["lease", "claim"]
)
def test_lost_lease_is_not_an_internal_error(
    capsys: pytest.CaptureFixture[str], lost: LeaseLost, *, is_grouped: bool
) -> None:
    """Another process continued after this one was stopped: one line, exit code 1, no log."""
    raised = ExceptionGroup("tasks", [ValueError("its result"), lost]) if is_grouped else lost
    with pytest.raises(SystemExit) as end, error_boundary(Output(as_json=False), ErrorLog()):
        raise raised
    assert end.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "took over" in line
    assert "(epoch 2, expected 1)" in line
    assert "Details" not in line


@pytest.mark.parametrize("is_anywhere_writable", [False, True])
def test_internal_error_with_an_unwritable_log_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, is_anywhere_writable: bool
) -> None:
    """A temporary log replaces the project's; without room for any the error itself is still printed."""
    log, temporary = ErrorLog(), tmp_path / "tmp"
    log.path = tmp_path / "missing" / "council.log"
    if is_anywhere_writable:
        temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.raises(SystemExit) as end, error_boundary(Output(as_json=False), log):
        raise ValueError("odd")
    assert end.value.code == 3
    reported = capsys.readouterr().err
    assert reported.startswith("council: internal error: ValueError: odd\n")
    assert "Traceback" not in reported
    written = list(temporary.glob("*/council.log"))
    assert f"Details: {written[0]}" in reported if written else "Details" not in reported, reported
    assert bool(written) is is_anywhere_writable

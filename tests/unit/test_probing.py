"""Probing of programs that may do anything instead of answering."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from pydantic import BaseModel, ConfigDict

from orchestrator.engine.diagnostics import programs
from orchestrator.engine.diagnostics.findings import describe
from orchestrator.engine.diagnostics.programs import check_program, make_default_adapters, probe_adapters, read_version
from orchestrator.errors import RefusedError
from orchestrator.protocols import (
    Capability,
    Failed,
    Program,
    SessionCommand,
    SessionEnd,
    SessionEvent,
    SessionHome,
    SessionRequest,
)
from orchestrator.system.process import CompletedCommand
from tests.waiting import wait_for

MakeProgram = Callable[[str, str], Path]


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ProgramAdapter:
    """An adapter with the given programs."""

    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, *programs: Program, **command: Any) -> None:
        self._programs, self._command = programs, command

    def capabilities(self) -> frozenset[Capability]:
        return frozenset()

    def programs(self) -> Sequence[Program]:
        return self._programs

    def command(self, request: SessionRequest) -> SessionCommand:
        return SessionCommand(argv=["x"], **self._command)

    def parse(self, line: str) -> Sequence[SessionEvent]:
        return ()

    def verdict(self, end: SessionEnd) -> Failed | None:
        return None


class HomeAdapter(ProgramAdapter):
    """An adapter whose programs have a task home."""

    def command(self, request: SessionRequest) -> SessionCommand:
        links = {"login": "~/.tool/login"}
        return SessionCommand(
            ["x"], env={"TOOL_HOME": str(request.home / "kept")}, home=SessionHome({"kept/set": "1"}, links)
        )


@pytest.fixture
def bin_folder(tmp_path: Path, environ: dict[str, str]) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    environ["PATH"] = f"{folder}{os.pathsep}{environ['PATH']}"
    return folder


@pytest.fixture
def program(bin_folder: Path) -> MakeProgram:
    """Put a shell script on PATH."""

    def make(name: str, script: str) -> Path:
        path = bin_folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


async def test_program_with_a_task_home_is_probed_in_one(
    program: MakeProgram, environ: dict[str, str], tmp_path: Path
) -> None:
    """The home has the user's login, and is deleted with everything written to it."""
    log = tmp_path / "log"
    looks = (
        f'echo "$TOOL_HOME" > {log}; touch "$TOOL_HOME/new"; [ -e "$TOOL_HOME/set" ] && [ -e "$TOOL_HOME/../login" ]'
    )
    program("tool", looks)
    environ["HOME"] = str(tmp_path / "user")
    adapter = HomeAdapter(Program("tool", ready=["ready"], log_in="log in"))
    without = (await probe_adapters({"it": adapter}, environ))["it"].programs[0]
    (tmp_path / "user/.tool").mkdir(parents=True)
    (tmp_path / "user/.tool/login").touch()
    with_login = (await probe_adapters({"it": adapter}, environ))["it"].programs[0]
    assert (without.ready, with_login.ready) == (False, True)
    home = Path(log.read_text().strip())
    assert not home.parent.exists()
    assert home.is_relative_to(tempfile.gettempdir())


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ("tool 1.2.3\n", "1.2.3"),
        ("2.0.31 (Some Tool)\n", "2.0.31"),
        ("\x1b[1mtool\x1b[0m v1.2.3-beta.1\x1b]0;title 9.9\x07\n", "1.2.3b1"),
        ("tool/0.46.0 linux-x64 node-v20.1.0\n", "0.46.0"),
        ("/usr/lib/python3.11/site.py: warning\ntool 4.5\n", "4.5"),
        ("go version go1.22.1 linux/amd64\n", "1.22.1"),
        ("git version 2.39.5.windows.1\n", "2.39.5"),
        ("tool 1.2.3-nightly.20250101+abc\n", "1.2.3"),
        ("tool 1.2.\n", "1.2"),
        ("tool, the newest\n", None),
        ("12345\n", None),
        ("", None),
    ],
)
def test_version_is_parsed_from_output(printed: str, version: str | None) -> None:
    """The first dotted number, within any text."""
    for answer in (CompletedCommand(0, printed.encode(), b""), CompletedCommand(0, b"", printed.encode())):
        found = read_version(answer)
        assert (None if found is None else str(found)) == version


def test_version_is_parsed_quickly_from_anything() -> None:
    """Output crafted for slow regex matching is not slow."""
    started = time.monotonic()
    for part in ("1", "1.", "1a", "\x1b]", "\x1b[", "v", "1.1-"):
        read_version(CompletedCommand(0, (part * (65536 // len(part))).encode(), b""))
    assert time.monotonic() - started < 20


def test_output_of_a_failed_command_is_not_a_version() -> None:
    """Numbers in an error message do not count."""
    status = check_program(
        Program("tool", version=("-V",)), "/bin/tool", CompletedCommand(2, b"", b"no -V, since 3.1\n\n")
    )
    assert status.version is None
    assert status.error == "failed with exit code 2: no -V, since 3.1"


@pytest.mark.parametrize(
    ("supported", "is_supported"), [(">=2,<3", True), (">=3", False), ("", None), (">=2.1b1", True)]
)
def test_version_is_compared_with_the_supported_ones(supported: str, is_supported: bool | None) -> None:
    """Including pre-releases."""
    answer = CompletedCommand(0, b"tool 2.1rc1", b"")
    assert (
        check_program(Program("tool", version=("-V",), supported=supported), "/bin/tool", answer).is_supported
        is is_supported
    )


def test_invalid_range_is_reported() -> None:
    """A plugin's mistake is reported and has no other effect."""
    status = check_program(
        Program("tool", version=("-V",), supported="two"), "/bin/tool", CompletedCommand(0, b"2.0", b"")
    )
    assert (status.version, status.is_supported) == ("2.0", None)
    assert "'two'" in str(status.error)


@pytest.mark.parametrize(
    ("verified", "compared"),
    [
        (("1.9", "2.0"), "newer"),
        (("2.10", "2.2"), "older"),
        (("2.1rc1",), None),
        (("1.0", "3.0"), None),
        ((), None),
        (None, None),
    ],
)
def test_version_is_compared_with_the_verified_ones(verified: Sequence[str] | None, compared: str | None) -> None:
    """It is newer or older than all of them, or neither."""
    answer = CompletedCommand(0, b"tool 2.1rc1", b"")
    status = check_program(Program("tool", version=("-V",), verified=verified), "/bin/tool", answer)
    assert (status.compared, status.error) == (compared, None)


def test_invalid_verified_version_is_reported() -> None:
    status = check_program(
        Program("tool", version=("-V",), verified=("two",)), "/bin/tool", CompletedCommand(0, b"2.0", b"")
    )
    assert (status.version, status.compared) == ("2.0", None)
    assert "'two'" in str(status.error)


@pytest.mark.parametrize(
    ("answer", "has_key", "ready"),
    [
        (CompletedCommand(0, b"", b""), False, True),
        (CompletedCommand(1, b"", b"log in"), False, False),
        (CompletedCommand(-11, b"", b""), False, None),
        ("did not end", False, None),
        (None, True, True),
        (None, False, None),
    ],
)
def test_readiness_is_an_exit_code_or_a_key(
    answer: CompletedCommand | str | None, has_key: bool, ready: bool | None
) -> None:
    """A key counts as a login; a crash or a hang is no answer; a negative answer gets the remedy."""
    status = check_program(
        Program("tool", ready=("s",), log_in="run `tool login`"), "/t", None, answer, has_key=has_key
    )
    assert status.ready is ready
    assert status.remedy == ("run `tool login`" if ready is False else None)


async def test_programs_are_found_and_probed(program: MakeProgram, environ: dict[str, str]) -> None:
    """Path, version and login of a program that answers; the remedy for a missing one."""
    path = program("tool", 'case "$1" in --version) echo tool 1.2.3;; status) test -n "$LOGIN";; esac')
    known = Program("tool", version=("--version",), supported="<2", ready=("status",), log_in="log in")
    adapters = {
        "in": ProgramAdapter(known, env={"LOGIN": "1"}),
        "out": ProgramAdapter(known),
        "missing": ProgramAdapter(Program("no-such-tool", install="get it")),
    }
    found = await probe_adapters(adapters, environ)
    assert [one.programs[0].ready for one in found.values()] == [True, False, None]
    first = found["in"].programs[0]
    assert (first.path, first.version, first.is_supported) == (str(path), "1.2.3", True)
    assert found["out"].programs[0].remedy == "log in"
    missing = found["missing"]
    assert (missing.programs[0].path, missing.programs[0].remedy, missing.is_installed) == (None, "get it", False)


async def test_program_that_is_not_executable_is_distinguished(program: MakeProgram, environ: dict[str, str]) -> None:
    path = program("tool", "exit 0")
    path.chmod(0o644)
    status = (await probe_adapters({"a": ProgramAdapter(Program("tool"))}, environ))["a"].programs[0]
    assert (status.path, describe(status)) == (None, f"tool: not executable ({path})")
    assert str(status.remedy).startswith(f"`chmod +x {path}`")


async def test_key_replaces_a_login(program: MakeProgram, environ: dict[str, str], tmp_path: Path) -> None:
    """A program with one of its keys is ready without a probe, if the key reaches it."""
    program("tool", f"touch {tmp_path}/asked; exit 1")
    wanted = Program("tool", ready=("status",), keys=("OTHER_KEY", "TOOL_KEY"))
    found = await probe_adapters({"a": ProgramAdapter(wanted, pass_env=["TOOL_KEY"])}, {**environ, "TOOL_KEY": "k"})
    assert found["a"].programs[0].ready is True
    assert not (tmp_path / "asked").exists()


async def test_program_gets_a_minimal_environment(
    program: MakeProgram, environ: dict[str, str], tmp_path: Path
) -> None:
    """The base environment, HOME and the adapter's variables, empty stdin, an empty folder."""
    program("tool", f"env > {tmp_path}/env; pwd > {tmp_path}/cwd; ls -A >> {tmp_path}/cwd; cat; echo 1.0")
    given = {**environ, "SECRET": "s", "PASSED": "p"}
    adapter = ProgramAdapter(Program("tool", version=("-V",)), pass_env=["PASSED"], env={"SET": "v"})
    assert (await probe_adapters({"a": adapter}, given))["a"].programs[0].version == "1.0"
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert {"PATH", "HOME", "PASSED", "SET"} <= names
    assert not {"SECRET", "COUNCIL_HOME", "GIT_CONFIG_GLOBAL"} & names
    folder, *entries = (tmp_path / "cwd").read_text().splitlines()
    assert entries == []
    assert not Path(folder).exists()


async def test_hanging_program_is_killed(
    program: MakeProgram, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Within its time limit, without a second probe and with all child processes."""
    monkeypatch.setattr(programs, "_TIMEOUT", 0.5)
    program("tool", f"trap '' TERM\necho $$ > {tmp_path}/pid\nwhile :; do sleep 1; done")
    adapters = {"a": ProgramAdapter(Program("tool", version=("-V",), ready=("s",)))}
    status = (await probe_adapters(adapters, environ))["a"].programs[0]
    assert (status.version, status.ready) == (None, None)
    assert status.error == "`tool -V` did not finish within 0.5 s"
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not psutil.pid_exists(pid))


async def test_endless_output_is_stopped(program: MakeProgram, environ: dict[str, str]) -> None:
    """Endless output on either stream is stopped long before the timeout."""
    program("loud", "exec yes")
    program("angry", "exec yes >&2")
    adapters = {name: ProgramAdapter(Program(name, version=("-V",))) for name in ("loud", "angry")}
    found = await probe_adapters(adapters, environ)
    assert {one.programs[0].error for one in found.values()} == {"it prints too much output"}


async def test_child_processes_are_killed(program: MakeProgram, environ: dict[str, str], tmp_path: Path) -> None:
    """Neither one that keeps the output open nor one in another process session survives or delays the probe."""
    program("tool", f"sleep 1000 & echo $! > {tmp_path}/a\nsetsid sleep 1000 & echo $! > {tmp_path}/b\necho 1.2")
    found = await probe_adapters({"a": ProgramAdapter(Program("tool", version=("-V",)))}, environ)
    assert (found["a"].programs[0].version, found["a"].programs[0].error) == ("1.2", None)
    for name in ("a", "b"):
        pid = int((tmp_path / name).read_text())
        wait_for(lambda pid=pid: not psutil.pid_exists(pid))  # type: ignore[misc]


async def test_unstartable_program_is_reported(program: MakeProgram, environ: dict[str, str]) -> None:
    """An executable file that is not a program is found and has no version."""
    path = program("tool", "")
    path.write_bytes(b"\x7fELF not at all")
    status = (await probe_adapters({"a": ProgramAdapter(Program("tool", version=("-V",)))}, environ))["a"].programs[0]
    assert status.path == str(path)
    assert str(status.error).startswith("can't be started")


async def test_printed_secrets_are_hidden(program: MakeProgram, environ: dict[str, str]) -> None:
    """A key that was passed on does not appear."""
    program("tool", 'echo "bad key $TOOL_KEY" >&2; exit 1')
    adapter = ProgramAdapter(Program("tool", version=("-V",)), pass_env=["TOOL_KEY"])
    found = await probe_adapters({"a": adapter}, {**environ, "TOOL_KEY": "hunter2-hunter2-hunter2"})
    assert found["a"].programs[0].error == "failed with exit code 1: bad key [redacted]"


async def test_programs_are_probed_concurrently_and_once(
    program: MakeProgram, environ: dict[str, str], tmp_path: Path
) -> None:
    """Four slow programs take the time of one, and a shared program is probed once."""
    script = f"echo x >> {tmp_path}/$(basename $0).asked; while [ $(ls {tmp_path}/*.asked | wc -l) -lt 4 ]; do :; done"
    programs = [Program(f"tool{number}", version=("-V",)) for number in range(4)]
    for one in programs:
        program(one.name, f"{script}; echo 1.0")
    adapters = {"all": ProgramAdapter(*programs), "again": ProgramAdapter(programs[0])}
    found = await probe_adapters(adapters, environ)
    assert [one.version for one in found["all"].programs] == ["1.0"] * 4
    assert found["again"].programs == found["all"].programs[:1]
    assert (tmp_path / "tool0.asked").read_text() == "x\n"


async def test_failing_adapter_is_reported(environ: dict[str, str]) -> None:
    """An exception of a plugin affects its adapter only."""

    class Broken(ProgramAdapter):
        def command(self, request: SessionRequest) -> SessionCommand:
            raise RefusedError("no model is set", "set one")

    found = await probe_adapters({"broken": Broken(), "fine": ProgramAdapter()}, environ)
    assert found["broken"].error == "no model is set: set one"
    assert found["fine"].error is None


def test_types_without_required_options_are_created() -> None:
    """The missing options of a type are named, or the reason why it fails."""

    class Needy(ProgramAdapter):
        class Options(BaseModel):
            argv: list[str]
            model: str
            effort: str = "low"

    class Broken(ProgramAdapter):
        def __init__(self, options: Any) -> None:
            raise OSError("no home")

    types: dict[str, Any] = {"fine": ProgramAdapter, "needy": Needy, "broken": Broken}
    made, needs = make_default_adapters(types)
    assert list(made) == ["fine"]
    assert needs == {"needy": "needs argv, model", "broken": "can't be created: OSError: no home"}


async def test_adapter_on_our_python_is_probed(environ: dict[str, str]) -> None:
    """An adapter that runs on our Python is not necessarily installed for other users of that Python."""
    adapters = {
        code: ProgramAdapter(Program(sys.executable, ready=("-c", f"raise SystemExit({code})"))) for code in (0, 1)
    }
    found = await probe_adapters(adapters, environ)
    assert [found[code].is_installed for code in (0, 1)] == [True, False]

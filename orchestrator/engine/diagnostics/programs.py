"""Probe the programs that adapters need: path, version, readiness.

Programs are untrusted: each runs without input, in an empty folder, with a session-like home if needed, for at most ten
seconds. At most 64 KiB of its output are read, and its remaining processes are killed.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

import anyio
import anyio.to_thread
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from orchestrator.config.adapters import make_trial_request
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.errors import PluginFailed, RefusedError, plugin_code
from orchestrator.protocols import Adapter, AdapterType, JsonObject, Program, SessionHome
from orchestrator.sessions.setup.adapter_homes import set_up
from orchestrator.sessions.setup.environment import BASE_VARIABLES, passed_variables
from orchestrator.system.process import CompletedCommand, kill_by_environment, run_untrusted

K = TypeVar("K", bound=Hashable)

_TIMEOUT: Final = 10.0  # seconds for each command
_MAX_CONCURRENT: Final = 8
_MAX_OUTPUT: Final = 64 << 10
_MAX_MESSAGE_LENGTH: Final = 200
_MARK: Final = "COUNCIL_PROBE"
_HOME_PLACEHOLDER: Final = Path("/council-home-of-a-probe")

# CSI and OSC sequences of ECMA-48, the latter terminated by BEL or ST; then all other escapes.
_ESCAPES: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.")
_NUMBERS: Final = r"(\d{1,9}(?:\.\d{1,9}){1,4})([-+.]?[A-Za-z][A-Za-z0-9.+-]{0,40})?"
#: A separate number, else a number with a prefix, such as `go1.22.1` and `codex/0.46.0`.
_VERSIONS: Final = (re.compile(rf"(?<![A-Za-z0-9./_-])v?{_NUMBERS}"), re.compile(_NUMBERS))


@dataclass(frozen=True, slots=True)
class ProgramStatus:
    """The status of a program; None: unknown."""

    name: str
    path: str | None
    """Its path; None: not on PATH, or not executable."""
    version: str | None = None
    supported: str = ""
    """The versions that its adapter supports."""
    is_supported: bool | None = None
    """Whether its version is supported."""
    ready: bool | None = None
    """Whether it reports that it is ready: logged in, its server available."""
    error: str | None = None
    """The error of the probe, or of the search for the program, such as `not on PATH`."""
    remedy: str | None = None
    """How to make it ready."""
    verified: Sequence[str] | None = None
    """The versions that its adapter was run with; empty: none, None: unknown."""
    compared: Literal["newer", "older"] | None = None
    """Whether its version is newer, or older, than all of these."""
    edits: bool = True
    """Whether it can change files."""


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """The programs of an adapter, or the error of the adapter itself."""

    programs: Sequence[ProgramStatus]
    error: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the adapter needs programs, and all of them are installed.

        If the program is this process's own Python, used as a client of a server, the server must be ready.
        """
        return bool(self.programs) and all(
            program.path is not None and (program.ready is not False or program.path != sys.executable)
            for program in self.programs
        )

    def to_json(self) -> JsonObject:
        """Return the object for `--json`."""
        return asdict(self)


def make_default_adapters(types: Mapping[str, AdapterType]) -> tuple[dict[str, Adapter], dict[str, str]]:
    """Return adapters without options, and the requirements of the other types."""
    made: dict[str, Adapter] = {}
    needs: dict[str, str] = {}
    for name, adapter_type in sorted(types.items()):
        try:
            with plugin_code(ValidationError):
                made[name] = adapter_type(adapter_type.Options.model_validate({}))
        except ValidationError as error:
            missing = [".".join(map(str, one["loc"])) for one in error.errors() if one["type"] == "missing"]
            needs[name] = f"needs {', '.join(missing)}" if missing else "has no valid default options"
        except PluginFailed as failed:
            needs[name] = f"can't be created: {failed}"
    return made, needs


async def probe_adapters(adapters: Mapping[K, Adapter], environ: Mapping[str, str]) -> dict[K, AdapterStatus]:
    """Return the status of all adapters; each program is probed once, concurrently."""
    wanted, broken = await anyio.to_thread.run_sync(_programs_of, adapters, environ)
    mark = f"{_MARK}={secrets.token_hex(8)}"
    questions = {repr(one): one for found in wanted.values() for one in found}
    answers: dict[str, ProgramStatus] = {}
    limiter = anyio.CapacityLimiter(_MAX_CONCURRENT)

    async def ask(key: str, question: _ProbeRequest) -> None:
        async with limiter:
            answers[key] = await _probe(question, {_MARK: mark.partition("=")[2]}, environ)

    try:
        async with anyio.create_task_group() as group:
            for key, question in questions.items():
                group.start_soon(ask, key, question)
    finally:
        # Processes that left the process group still have the mark.
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(kill_by_environment, mark.encode())
    return {
        name: AdapterStatus([answers[repr(one)] for one in wanted.get(name, ())], broken.get(name)) for name in adapters
    }


async def find_unusable_adapters(adapters: Mapping[str, Adapter], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the adapters that don't work on this machine, each with the reason."""
    found = await probe_adapters(adapters, environ)
    return {name: reason for name, status in found.items() if (reason := _obstacle(status)) is not None}


def _obstacle(status: AdapterStatus) -> str | None:
    if status.error is not None:
        return status.error
    return next((f"{one.name} is not installed here" for one in status.programs if one.path is None), None)


class _ProbeRequest(NamedTuple):
    """A program to probe, its sorted environment, and the content of its home.

    In variables, `_HOME_PLACEHOLDER` stands for the path of the home.
    """

    program: Program
    env: tuple[tuple[str, str], ...]
    home: SessionHome | None


def _programs_of(
    adapters: Mapping[K, Adapter], environ: Mapping[str, str]
) -> tuple[dict[K, list[_ProbeRequest]], dict[K, str]]:
    """Return each adapter's programs and environment, and errors of broken adapters."""
    found: dict[K, list[_ProbeRequest]] = {}
    broken: dict[K, str] = {}
    for name, adapter in adapters.items():
        try:
            with plugin_code():
                command = adapter.command(make_trial_request("task", "Do nothing.", _HOME_PLACEHOLDER))
                base = {key: environ[key] for key in (*BASE_VARIABLES, "HOME") if key in environ}
                env = {"PATH": os.defpath, **base, **passed_variables(command, environ), **command.env}
                variables, programs = tuple(sorted(env.items())), adapter.programs()
                found[name] = [_ProbeRequest(program, variables, command.home) for program in programs]
        except PluginFailed as failed:
            broken[name] = str(failed)
    return found, broken


async def _probe(question: _ProbeRequest, more: Mapping[str, str], environ: Mapping[str, str]) -> ProgramStatus:
    program, env = question.program, {**dict(question.env), **more}
    path = await anyio.to_thread.run_sync(_find, program.name, env["PATH"])
    if path is None:
        return await anyio.to_thread.run_sync(_describe_missing, program, env["PATH"])
    try:
        folder = Path(await anyio.to_thread.run_sync(partial(tempfile.mkdtemp, prefix="council-probe-")))
    except OSError as error:
        return check_program(program, path, f"probe failed: can't create a temporary folder ({error.strerror})")
    home = folder.with_name(f"{folder.name}-home")
    env = {name: value.replace(str(_HOME_PLACEHOLDER), str(home)) for name, value in env.items()}
    has_key = any(env.get(key) for key in program.keys)
    try:
        if question.home is not None:
            await set_up(home, question.home, environ)
        version = await _run_probe([path, *program.version], env, folder) if program.version else None
        # A program that failed to report its version would probably hang again.
        is_requested = bool(program.ready) and not has_key and not isinstance(version, str)
        ready = await _run_probe([path, *program.ready], env, folder) if is_requested else None
    except (OSError, RefusedError) as error:
        return check_program(program, path, f"can't create its home: {error}")
    finally:
        with anyio.CancelScope(shield=True):
            for place in (folder, home):
                await anyio.to_thread.run_sync(partial(shutil.rmtree, place, ignore_errors=True))
    return check_program(program, path, version, ready, has_key=has_key, hide=secret_values(env))


def _find(name: str, path: str) -> str | None:
    found = shutil.which(name, path=path)
    return None if found is None else str(Path(found).absolute())


def explain_missing(program: Program, path: str | None) -> tuple[str, str]:
    """Return the reason why a program is not found, and the remedy. Blocks."""
    if (found := shutil.which(program.name, os.F_OK, path)) is not None:
        return f"not executable ({found})", f"`chmod +x {shlex.quote(found)}`, or correct the adapter"
    return "not on PATH", program.install


def _describe_missing(program: Program, path: str) -> ProgramStatus:
    reason, remedy = explain_missing(program, path)
    return ProgramStatus(
        program.name,
        None,
        supported=program.supported,
        error=reason,
        remedy=remedy,
        verified=program.verified,
        edits=program.edits,
    )


async def _run_probe(argv: Sequence[str], env: Mapping[str, str], folder: Path) -> CompletedCommand | str:
    """Run a command; return its result, or the reason for a failure to run it."""
    asked = " ".join((Path(argv[0]).name, *argv[1:]))
    own = {**env, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    try:
        return await run_untrusted(argv, env=own, cwd=folder, timeout=_TIMEOUT, max_output=_MAX_OUTPUT)
    except TimeoutError:
        return f"`{asked}` did not finish within {_TIMEOUT:g} s"
    except OSError as error:
        return f"can't be started: {error.strerror}"


def check_program(
    program: Program,
    path: str,
    version: CompletedCommand | str | None = None,
    ready: CompletedCommand | str | None = None,
    *,
    has_key: bool = False,
    hide: Iterable[str] = (),
) -> ProgramStatus:
    """Return the status of a program, from the results of its probes. Pure.

    `path` is its location. `version` and `ready` are the results of its commands, or the reasons why they could not be
    run; None if they were not run. `has_key`: one of its `keys` is set. `hide` are secrets that it may have printed.
    """
    found = read_version(version) if isinstance(version, CompletedCommand) else None
    is_supported, odd = _is_supported(found, program.supported)
    compared, invalid = _compare(found, program.verified or ())
    is_ready = True if has_key else _is_ready(ready)
    failures = [
        _describe_failure(version) if found is None else None,
        odd,
        invalid,
        _describe_failure(ready) if is_ready is None else None,
    ]
    failure = next(filter(None, failures), None)
    log_in = program.log_in or f"log in to {program.name}, or start its server"
    return ProgramStatus(
        name=program.name,
        path=path,
        version=None if found is None else str(found),
        supported=program.supported,
        is_supported=is_supported,
        ready=is_ready,
        error=None if failure is None else Redactor(hide).text(failure),
        remedy=log_in if is_ready is False else None,
        verified=program.verified,
        compared=compared,
        edits=program.edits,
    )


def read_version(answer: CompletedCommand) -> Version | None:
    """Return the first version number in standard output, else in standard error."""
    if answer.returncode > 0:
        return None
    for output in (answer.stdout, answer.stderr):
        text = _readable(output)
        for pattern in _VERSIONS:
            match = pattern.search(text)
            if match is not None:
                return _version(match[1], match[2] or "")
    return None


def _version(release: str, suffix: str) -> Version:
    """Return a version with its suffix, if the suffix is valid (PEP 440)."""
    try:
        return Version(release + suffix.rstrip(".+-"))
    except InvalidVersion:
        return Version(release)


def _is_supported(version: Version | None, supported: str) -> tuple[bool | None, str | None]:
    if version is None or not supported:
        return None, None
    try:
        return SpecifierSet(supported).contains(version, prereleases=True), None
    except InvalidSpecifier:
        return None, f"its adapter has an invalid range of supported versions: {supported!r}"


def _compare(version: Version | None, verified: Sequence[str]) -> tuple[Literal["newer", "older"] | None, str | None]:
    try:
        known = sorted(map(Version, verified))
    except InvalidVersion as error:
        return None, f"its adapter has an invalid verified version: {error}"
    if version is None or not known or known[0] <= version <= known[-1]:
        return None, None
    return "newer" if version > known[-1] else "older", None


def _is_ready(answer: CompletedCommand | str | None) -> bool | None:
    if not isinstance(answer, CompletedCommand) or answer.returncode < 0:
        return None
    return answer.returncode == 0


def _describe_failure(answer: CompletedCommand | str | None) -> str | None:
    if not isinstance(answer, CompletedCommand):
        return answer
    if answer.returncode == 0:
        return "version unknown"
    if len(answer.stdout) + len(answer.stderr) >= _MAX_OUTPUT:
        return "it prints too much output"
    how = f"exit code {answer.returncode}" if answer.returncode > 0 else f"signal {-answer.returncode}"
    words = _last_line(answer.stderr) or _last_line(answer.stdout)
    return f"failed with {how}: {words}" if words else f"failed with {how}"


def _last_line(output: bytes) -> str:
    lines = [" ".join(line.split()) for line in _readable(output).splitlines()]
    return next((line for line in reversed(lines) if line), "")[:_MAX_MESSAGE_LENGTH]


def _readable(output: bytes) -> str:
    text = _ESCAPES.sub("", output.decode(errors="replace"))
    return "".join(char if char.isprintable() or char in "\n\t" else " " for char in text)

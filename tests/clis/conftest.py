"""Fixtures for real CLIs: a user's setup, a repository, and the model server."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.project import Project
from orchestrator.state.stores.file import open_file_store
from orchestrator.system.clock import SystemClock
from tests.clis.install import installed, verified_versions
from tests.clis.programs import CLIS, Program, selected
from tests.command_server import StartedCommand
from tests.conftest import FAKE_CLI, CommandResult, Repository
from tests.fingerprint import Fingerprint
from tests.model_server import ModelServer
from tests.transcripts.programs.case import MODEL
from tests.waiting import wait_for

#: A port without a listener.
NOWHERE: Final = "http://127.0.0.1:9"
_LONGEST: Final = 280.0  # seconds per run: some CLIs start in ten on a busy machine
SELECTED: Final = selected(os.environ.get("CLIS", ""))


@dataclass(frozen=True)
class Stage:
    """Runs of CLIs by name; `url` is their model server."""

    repository: Repository
    server: ModelServer
    programs: Mapping[str, Program]
    url: str
    _before: list[Fingerprint] = field(default_factory=list)

    @property
    def home(self) -> Path:
        """Return the user's home."""
        return Path(self.repository.environ["HOME"])

    def set_up(self, *, logged_in: bool = True) -> None:
        """Write the CLIs' files at home, and set their variables."""
        environ = self.repository.environ
        environ["PATH"] = os.pathsep.join((str(CLIS / "bin"), str(CLIS / "node_modules/.bin"), environ["PATH"]))
        for name, program in self.programs.items():
            if program.needs is not None and shutil.which(program.needs, path=environ["PATH"]) is None:
                reason = installed().get(program.needs, {}).get("error")
                if reason is not None and not os.environ.get("CLIS"):
                    pytest.skip(f"{name} cannot be installed here: {reason}")
                pytest.fail(f"{name} is not installed in {CLIS}: run `make test-clis`, or choose others by CLIS")
            for path, content in program.files.items():
                text = content if isinstance(content, str) else json.dumps(content)
                (self.home / path).parent.mkdir(parents=True, exist_ok=True)
                (self.home / path).write_text(self._with_url(text))
            given = {**program.environ, **(program.keys if logged_in else {})}
            for variable, value in given.items():
                environ[variable] = str(self.home / value[2:]) if value.startswith("~/") else self._with_url(value)
        self._before[:] = [Fingerprint.of(self.home)]

    def configure(self, tasks: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
        """Write a config with tasks for these CLIs and default adapter options."""
        adapters = {name: json.loads(self._with_url(json.dumps(one.adapter))) for name, one in self.programs.items()}
        # All of this may be in `/tmp`, which is private in a session.
        readable = [sys.prefix, str(FAKE_CLI.parents[1]), str(CLIS), str(self.home)]
        # mini-swe-agent changes the first line.
        scripts = [{**task, "prompt": f"Follow the script.\n{task['prompt']}"} for task in tasks]
        return self.repository.configure(scripts, adapters=adapters, readable=readable, **settings)

    def start(self, prompt: str, settings: Mapping[str, Any] | None = None, **more: Any) -> StartedCommand:
        """Start a run of one task; `settings` are of the run, other options of the task."""
        task = {"id": "task", "adapter": next(iter(self.programs)), "timeout": "3m", "prompt": prompt, **more}
        path = self.configure([task], **(settings or {}))
        return self.repository.start("run", str(path), "--json")

    def run(self, prompt: str, settings: Mapping[str, Any] | None = None, **more: Any) -> CommandResult:
        """Run one task to its end."""
        return self.end(self.start(prompt, settings, **more))

    def end(self, started: StartedCommand) -> CommandResult:
        """Wait for the end of a run."""
        try:
            stdout, stderr = started.communicate(timeout=_LONGEST)
        finally:
            started.kill()
        return CommandResult(started.returncode, stdout, stderr)

    def diagnostics(self, ended: CommandResult) -> str:
        """Return the diagnostics of a failed run."""
        lines = [ended.stderr]
        for task in ended.result.get("tasks", [ended.result]):
            lines.append(json.dumps(task, indent=1))
            for stream in ("stdout", "stderr"):
                for log in sorted(Project(self.repository.top).folder.glob(f"logs/*/{task.get('id')}.*.{stream}")):
                    lines += [f"--- {log.name}", log.read_text()[-2000:]]
        return "\n".join(lines)

    async def tasks(self) -> list[TaskDocument]:
        """Return the recorded tasks."""
        async with open_file_store(Project(self.repository.top).store(), SystemClock()) as store:
            return [TaskDocument.model_validate(one.value) for one in await store.list("task")]

    async def task(self) -> TaskDocument:
        """Return the only task."""
        (task,) = await self.tasks()
        return task

    def clients(self) -> list[psutil.Process]:
        """Return the processes other than ours that are connected to the server."""
        found = []
        for process in psutil.process_iter():
            try:
                ends = [one.raddr[1:] for one in process.net_connections("tcp4")]  # () for listening sockets
            except psutil.Error:  # it ended, or is not the user's
                continue
            if (self._port,) in ends and process.pid != os.getpid():
                found.append(process)
        return found

    async def assert_clean(self) -> None:
        """Check the invariants of every run, that the home is unchanged, and that no npm package was requested."""
        await self.repository.assert_invariants(canaries=["a-key-for-nothing"])
        assert [one.path for one in self.server.requests if one.path.startswith("/@")] == []
        renewed = {path for program in self.programs.values() for path in program.renews}
        after, (before,) = Fingerprint.of(self.home), self._before
        assert {path: of for path, of in after.files.items() if path not in renewed} == {
            path: of for path, of in before.files.items() if path not in renewed
        }
        wait_for(lambda: not self.clients())

    @cached_property
    def _port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    def _with_url(self, text: str) -> str:
        return text.replace(MODEL, self.url)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize each test that takes a CLI by all selected ones that change files."""
    is_open = "name" in metafunc.fixturenames and not any(metafunc.definition.iter_markers("parametrize"))
    if is_open:
        metafunc.parametrize("name", [name for name, program in SELECTED.items() if program.edits])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a table: each CLI with its version, and its failed tests."""
    outcomes = {outcome: _tests_by_cli(terminalreporter.stats.get(outcome, ())) for outcome in ("passed", "failed")}
    verified, versions = verified_versions(), installed()
    terminalreporter.section("CLIs")
    for name, program in SELECTED.items():
        found = versions.get(program.needs or "", {})
        version = found.get("version", "") if program.needs else "-"
        is_new = program.needs is not None and version not in verified.get(program.needs, (version,))
        passed, failed = (outcomes[one].get(name, []) for one in ("passed", "failed"))
        if not (passed or failed or "error" in found):
            continue
        terminalreporter.write_line(
            f"{name:15} {version or 'not installed':15} {'unverified' if is_new else '':10} {len(passed):3} passed "
            f"{len(failed):3} failed {', '.join(failed) or found.get('error', '')}".rstrip()
        )


def _tests_by_cli(reports: Iterable[pytest.TestReport]) -> Mapping[str, Sequence[str]]:
    found: dict[str, list[str]] = {}
    for report in reports:
        test, _, parameters = report.nodeid.rpartition("::")[2].removesuffix("]").partition("[")
        cli = next((name for name in SELECTED if parameters == name or parameters.startswith(f"{name}-")), None)
        if cli is not None:
            found.setdefault(cli, []).append(test.removeprefix("test_"))
    return found


@pytest.fixture
def server() -> Iterator[ModelServer]:
    """Return the server of all models."""
    with ModelServer() as made:
        yield made


@pytest.fixture
def program(name: str) -> Program:
    """Return the CLI under test."""
    return SELECTED[name]


@pytest.fixture
def stage(repository: Repository, server: ModelServer, name: str, program: Program) -> Stage:
    """Return a stage with one configured CLI."""
    made = Stage(repository, server, {name: program}, server.url)
    made.set_up()
    return made


@pytest.fixture
def logged_out(repository: Repository, server: ModelServer, name: str, program: Program) -> Stage:
    """Return a stage with one CLI without a login."""
    made = Stage(repository, server, {name: program}, server.url)
    made.set_up(logged_in=False)
    return made


@pytest.fixture
def unreachable(repository: Repository, server: ModelServer, name: str, program: Program) -> Stage:
    """Return a stage with one CLI without a server."""
    made = Stage(repository, server, {name: program}, NOWHERE)
    made.set_up()
    return made

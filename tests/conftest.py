"""Shared fixtures: an isolated environment, real repositories, the real command."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import tests.fake_cli
from orchestrator.project import Project, council_home
from orchestrator.state.log.identity import ensure_log
from tests import command_server
from tests.command_server import StartedCommand
from tests.fakes.script import install
from tests.fingerprint import Fingerprint
from tests.hypothesis_settings import DEFAULT_EXAMPLES, example_settings
from tests.invariants import RunUnderTest, assert_invariants
from tests.sandboxes import default_sandbox

# Signals ignored because the tests run in the background would be ignored by the programs under test too.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# Load on the machine must not fail a test.
settings.register_profile(
    "suite", example_settings(DEFAULT_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
)
settings.load_profile("suite")

FAKE_CLI = Path(tests.fake_cli.__file__)


def hermetic_environ(folder: Path) -> dict[str, str]:
    """Return an environment isolated from the machine, with a home in a folder."""
    home = folder / "home"
    home.mkdir()
    return {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "HOME": str(home),
        "COUNCIL_HOME": str(folder / "council-home"),
        "COUNCIL_TRUST": "1",
        "LC_ALL": "C.UTF-8",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but the first parameters of some tests as extended only, and all but the first tests of some modules.

    Of each extended test, the short form runs one parameter, which is not always the first.
    """
    seen = set[str]()
    extended = dict[str, list[pytest.Item]]()
    first = dict[str, str]()
    for item in items:
        module, name = item.nodeid.partition("::")[0], item.nodeid.partition("[")[0]
        is_variant = name in seen and item.get_closest_marker("extended_variants") is not None
        is_other = item.get_closest_marker("extended_rest") is not None and first.get(module, name) != name
        if is_variant or is_other:
            item.add_marker(pytest.mark.extended)
        seen.add(name)
        if item.get_closest_marker("extended") is not None:
            extended.setdefault(name, []).append(item)
        if item.get_closest_marker("slow") is None and item.get_closest_marker("extended") is None:
            first.setdefault(module, name)
    for name, variants in extended.items():
        chosen = zlib.crc32(name.encode()) % len(variants)
        for item in variants[:chosen] + variants[chosen + 1 :]:
            item.add_marker(pytest.mark.further_parameters)


def pytest_collection_finish() -> None:
    """Exclude thousands of tests from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the complete environment of everything that a test starts."""
    made = hermetic_environ(tmp_path)
    for name in list(os.environ):
        if name not in made and not name.startswith(("PYTEST", "COV", "LD_")):
            monkeypatch.delenv(name)
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    return made


@dataclass(frozen=True)
class CommandResult:
    """The result of a command."""

    code: int
    stdout: str
    stderr: str

    @classmethod
    def of(cls, child: StartedCommand, timeout: float = 60) -> CommandResult:
        """Wait for the end of a started command, and return its result."""
        stdout, stderr = child.communicate(timeout=timeout)
        return cls(child.returncode, stdout, stderr)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Return the printed JSON lines."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def result(self) -> dict[str, Any]:
        """Return the last JSON line."""
        return self.lines[-1]

    @property
    def states(self) -> dict[str, str]:
        """Return the state of each task in the result."""
        return {task["id"]: task["status"] for task in self.result["tasks"]}


@dataclass(frozen=True)
class Repository:
    """A user's repository and commands run in it."""

    top: Path
    environ: dict[str, str]
    spawns: Path
    before: list[Fingerprint] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """Return the log folder of its store, registered like by a command."""
        return self.log_in(Project(self.top).state_folder)

    def log_in(self, folder: Path) -> Path:
        """Return the log folder of the store in a folder."""
        return ensure_log(folder, council_home(self.environ))

    def git(self, *arguments: str) -> str:
        identity = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in
                    (("NAME", "User"), ("EMAIL", "user@example.org"))}  # fmt: skip
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.top,
            env={**self.environ, **identity},
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.rstrip("\n")

    def commit(self, files: Mapping[str, str], message: str = "change") -> str:
        """Write files, commit them, return the commit id."""
        for name, content in files.items():
            path = self.top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)
        return self.git("rev-parse", "HEAD")

    def fake_adapter(self, **more: Any) -> dict[str, Any]:
        """Return the adapter entry of the fake CLI, extended by `more`."""
        return {
            "use": "command",
            "argv": [sys.executable, "-S", str(FAKE_CLI), "{prompt_file}"],
            "env": {"FAKE_CLI_LEDGER": str(self.spawns)},
            "writable": [str(self.spawns.parent)],
            **more,
        }

    def configure(self, tasks: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
        """Write a config of tasks for the fake CLI next to the repository; return its path."""
        config = {
            "version": 1,
            "repo": str(self.top),
            "target": "main",
            "readable": [sys.prefix, str(FAKE_CLI.parents[1])],
            "adapters": {"fake": self.fake_adapter()},
            "defaults": {"backoff": {"initial": "10ms", "max": "10ms", "jitter": False}, "timeout": "60s"},
            "tasks": list(tasks),
            **default_sandbox(),
            **settings,
        }
        path = self.top.parent / "council.yaml"
        path.write_text(json.dumps(config))  # JSON is valid YAML
        return path

    def remember(self) -> None:
        """Take the fingerprint for the final comparison."""
        self.before[:] = [Fingerprint.of(self.top)]

    def start(self, *arguments: str, failpoints: str = "") -> StartedCommand:
        """Start the real command in its own process group."""
        armed = {"COUNCIL_FAILPOINTS": failpoints} if failpoints else {}
        return command_server.start_command(arguments, self.top, {**self.environ, **armed})

    def council(self, *arguments: str, failpoints: str = "", timeout: float = 300) -> CommandResult:
        """Run the real command to its end."""
        child = self.start(*arguments, failpoints=failpoints)
        try:
            stdout, stderr = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.communicate()
            raise
        return CommandResult(child.returncode, stdout, stderr)

    async def assert_invariants(self, *, target_checked_out: bool = True, canaries: Sequence[str] = ()) -> None:
        """Check the invariants of every run; `canaries` are secrets that programs received."""
        before = self.before[0] if self.before else None
        secrets = tuple(canary.encode() for canary in canaries)
        await assert_invariants(RunUnderTest(self.top, self.environ, before, target_checked_out, self.spawns, secrets))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the template of `repository`: a copy is ten times as fast as git."""
    folder = tmp_path_factory.mktemp("template")
    made = Repository(folder / "project", hermetic_environ(folder), folder / "spawns")
    made.top.mkdir()
    made.git("init", "--quiet", "--initial-branch=main")
    made.commit({"README.md": "# Project\n", "src/app.py": "def main():\n    return 0\n"}, "first")
    return made.top


@pytest.fixture
def repository(tmp_path: Path, environ: dict[str, str], template: Path) -> Repository:
    """Return a repository with one commit on the checked-out `main`."""
    made = Repository(tmp_path / "project", environ, tmp_path / "ledger" / "spawns")
    made.spawns.parent.mkdir()
    shutil.copytree(template, made.top)
    made.git("update-index", "--refresh")  # otherwise the next command that reads the files would write it
    made.remember()
    return made


@pytest.fixture
def claude(repository: Repository, tmp_path: Path) -> Repository:
    """Put a fake `claude` on PATH, which calls hooks and continues conversations."""
    install(tmp_path / "bin", "claude", "tests.fakes.claude")
    repository.environ["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{repository.environ['PATH']}"
    repository.environ["ANTHROPIC_API_KEY"] = "k"
    return repository

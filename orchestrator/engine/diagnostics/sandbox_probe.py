"""Find the programs available in the sandbox of sessions and checks."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.config.adapters import make_trial_request
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.domain.sessions.shell_commands import is_in_worktree, make_lookup_command
from orchestrator.domain.settings.run_settings import AdapterConfig, PathAccess, SandboxSettings
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.run_context import open_sandbox
from orchestrator.errors import RefusedError, ResourceShortage
from orchestrator.project import Project, council_home
from orchestrator.protocols import Adapter, SessionCommand
from orchestrator.repo.git.command import printable_name
from orchestrator.repo.source.run_repository import RunRepository
from orchestrator.repo.worktrees.hub import locate_hub
from orchestrator.sessions.sandbox.policy import SandboxKind
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.setup.environment import build_base_environment
from orchestrator.sessions.setup.shell import (
    CommandFailed,
    CommandNotRun,
    CommandStopped,
    CommandSucceeded,
    Shell,
    ShellCommand,
)

#: The timeout of a probe with all of its commands, in seconds.
_TIMEOUT = 30.0
_NO_REACH = PathAccess()
DEFAULT_SANDBOX = SandboxSettings()


@dataclass(frozen=True, slots=True)
class SandboxProbe:
    """The sandbox of a run's checks, and the environment of its commands."""

    sandbox: RunSandbox
    environ: Mapping[str, str]

    @classmethod
    async def open(
        cls,
        config: SandboxSettings,
        site: RunRepository,
        project: Project,
        stores: Sequence[Path],
        environ: Mapping[str, str],
    ) -> SandboxProbe | None:
        """Return a probe of the sandbox; None if this machine does not support it.

        `stores` are the local paths of the store.
        """
        try:
            hub = locate_hub(site.identity, council_home(environ))
            sandbox = await open_sandbox(config, site, project, stores, hub, environ)
        except RefusedError:
            return None
        # Probe commands need no hosts, and a proxy would be slow.
        return cls(
            replace(sandbox, config=config.model_copy(update={"network": "on" if config.has_network else "off"})),
            environ,
        )

    async def find_succeeding(
        self, commands: Sequence[str], env: Sequence[str] = (), reach: PathAccess = _NO_REACH
    ) -> set[str]:
        """Return the shell commands that succeed in an empty folder.

        `env` names additional variables, `reach` additional paths that the commands may read and write.
        """
        if not commands:
            return set()
        script = "".join(f"(eval {shlex.quote(command)}) >/dev/null 2>&1 </dev/null && echo {number}\n"
                         for number, command in enumerate(commands))  # fmt: skip
        folder = Path(await anyio.to_thread.run_sync(partial(tempfile.mkdtemp, prefix="council-probe-")))
        try:
            tree, scratch, log = folder / "tree", folder / "home", folder / "log"
            for path in (tree, scratch):
                await anyio.Path(path).mkdir()
            environment = build_base_environment(env, self.environ, tree, {})
            redactor = Redactor(secret_values(self.environ))
            scope = SandboxScope((tree, scratch), (), scratch)
            shell = Shell(self.sandbox, scope, tree, folder / "lock", environment, redactor, reach)
            ended = await shell.run(ShellCommand(f"{script}exit 0", log, _TIMEOUT, ""))
            match ended:
                case CommandNotRun(reason, exhausted=True):
                    remedy = "free that resource, or raise its limit (`ulimit -a` prints the limits)"
                    raise ResourceShortage(f"can't run commands in the sandbox: {reason}", remedy)
                case CommandNotRun(reason):
                    raise RefusedError(f"can't run commands in the sandbox: {reason}", "run `council doctor`")
                case CommandFailed() | CommandStopped():
                    raise RefusedError("can't run commands in the sandbox: they ended early", "run `council doctor`")
                case CommandSucceeded():
                    pass
            numbers = (await anyio.Path(log).read_text()).split()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(partial(shutil.rmtree, folder, ignore_errors=True))
        return {commands[int(number)] for number in numbers}

    def explain_missing_program(
        self, program: str, env: Sequence[str] = (), reach: PathAccess = _NO_REACH
    ) -> tuple[str, list[str]]:
        """Return the searched locations, and hidden folders on PATH with the program."""
        environment = build_base_environment(env, self.environ, Path("/"), {})
        hidden = self.sandbox.find_hidden_folders(program, environment, reach)
        if hidden:
            return f" (hidden from sessions: {', '.join(hidden)})", hidden
        return "" if "/" in program else f": PATH is {environment['PATH']}", []


async def check_adapter_programs(
    adapters: Mapping[str, Adapter],
    configs: Mapping[str, AdapterConfig],
    file: Path | None,
    probe: SandboxProbe,
    environ: Mapping[str, str],
    level: Level = Level.PROBLEM,
) -> list[Finding]:
    """Return a finding for each installed adapter program that sessions can't see.

    `configs` are the adapter entries of `file`, which may be missing.
    """
    findings: list[Finding] = []
    if probe.sandbox.kind is SandboxKind.OFF:
        return findings
    trials = [(name, adapter.command(make_trial_request("task", "prompt"))) for name, adapter in adapters.items()]
    found = [(name, command, program) for name, command in trials for program in list_programs(adapters[name], command)]
    for name, command, program in found:
        env = tuple(command.pass_env)
        is_on_path = shutil.which(program, path=environ.get("PATH", os.defpath)) is not None
        if is_in_worktree(program) or not is_on_path:  # missing programs are reported separately
            continue
        configured = configs[name].access if name in configs else PathAccess()
        reach = configured | PathAccess(readable=tuple(map(Path, command.readable)))
        lookup = make_lookup_command(program)
        if lookup not in await probe.find_succeeding([lookup], env, reach):
            searched, hidden = probe.explain_missing_program(program, env, reach)
            message = f"program {program!r} is installed, but not in the sandbox{searched}"
            remedy = f"add {', '.join(hidden) or 'its folder'} to `readable` of the adapter {name!r}"
            if file is None or not await anyio.Path(file).is_file():
                remedy = f"create a council.yaml with `council init`, and {remedy} there"
            remedy = printable_name(f"{remedy}, or install it elsewhere")
            findings.append(Finding(f"adapter {name}", level, printable_name(message), remedy))
    return findings


def list_programs(adapter: Adapter, command: SessionCommand) -> list[str]:
    """Return the program of a command, followed by the others that it starts: the last one is the CLI."""
    return list(dict.fromkeys((command.argv[0], *(program.name for program in adapter.programs()))))

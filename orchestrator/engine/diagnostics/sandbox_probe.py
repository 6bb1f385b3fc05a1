"""Asks inside the sandbox of sessions and checks: which programs are there, and what they answer."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.config.model import PathAccess, SandboxConfig
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.engine.run_context import hidden_folders
from orchestrator.errors import RefusedError
from orchestrator.project import Project, council_home
from orchestrator.repo.source.run_repository import RunRepository
from orchestrator.repo.worktrees.hub import locate_hub
from orchestrator.sandbox.credentials import find_credentials
from orchestrator.sessions.sandbox.policy import choose_sandbox
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.setup.environment import build_base_environment
from orchestrator.sessions.setup.shell import CommandSucceeded, Shell, ShellCommand

#: Seconds for all questions of one probe.
_TIMEOUT = 30.0
_NO_REACH = PathAccess()
DEFAULT_SANDBOX = SandboxConfig(sandbox="auto", network=True, reach=PathAccess())


@dataclass(frozen=True, slots=True)
class SandboxProbe:
    """A sandbox like that of a run's checks, and the environment that commands get there."""

    sandbox: RunSandbox
    environ: Mapping[str, str]

    @classmethod
    async def open(
        cls, fence: SandboxConfig, site: RunRepository, project: Project, store: str, environ: Mapping[str, str]
    ) -> SandboxProbe | None:
        """Return the sandbox that `fence` describes; None where this machine has no such sandbox."""
        try:
            kind = await choose_sandbox(fence.sandbox, network=fence.network, hosts=fence.hosts, environ=environ)
            hub = locate_hub(site.identity, council_home(environ))
        except RefusedError:
            return None
        hidden = await anyio.to_thread.run_sync(hidden_folders, site, project, store, hub)
        credentials = await anyio.to_thread.run_sync(find_credentials, environ)
        # What is asked needs no host, and a proxy would take its time.
        return cls(RunSandbox(kind, (*hidden, *credentials), fence.model_copy(update={"hosts": ()})), environ)

    async def find_succeeding(
        self, questions: Sequence[str], env: Sequence[str] = (), reach: PathAccess = _NO_REACH
    ) -> set[str]:
        """Return those shell commands that end with zero in an empty folder.

        `env` names further variables, `reach` what they may read and write in addition to what all sessions may.
        """
        if not questions:
            return set()
        script = "".join(f"(eval {shlex.quote(one)}) >/dev/null 2>&1 </dev/null && echo {number}\n"
                         for number, one in enumerate(questions))  # fmt: skip
        folder = Path(await anyio.to_thread.run_sync(partial(tempfile.mkdtemp, prefix="council-probe-")))
        try:
            tree, scratch, log = folder / "tree", folder / "home", folder / "log"
            for one in (tree, scratch):
                await anyio.Path(one).mkdir()
            environment = build_base_environment(env, self.environ, tree, {})
            redactor = Redactor(secret_values(self.environ))
            ground = SandboxScope((tree, scratch), (), scratch)
            shell = Shell(self.sandbox, ground, tree, folder / "lock", environment, redactor, reach)
            ended = await shell.run(ShellCommand(f"{script}exit 0", log, _TIMEOUT, ""))
            if not isinstance(ended, CommandSucceeded):
                raise RefusedError(f"no command can be run in the sandbox: {ended}", "see the finding `sandbox`")
            answers = (await anyio.Path(log).read_text()).split()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(partial(shutil.rmtree, folder, ignore_errors=True))
        return {questions[int(one)] for one in answers}

    def explain_missing_program(self, program: str, env: Sequence[str] = (), reach: PathAccess = _NO_REACH) -> str:
        """Return where a program was looked for, and why it may be on the user's PATH all the same."""
        environment = build_base_environment(env, self.environ, Path("/"), {})
        hint = self.sandbox.explain_missing_program(program, environment, reach)
        return hint or f": PATH is {environment['PATH']}"

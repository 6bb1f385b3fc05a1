"""Check that the programs of adapters are visible in the sandbox."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import anyio

from orchestrator.config.adapters import make_trial_request
from orchestrator.domain.sessions.shell_commands import is_in_worktree, make_lookup_command
from orchestrator.domain.settings.run_settings import AdapterConfig, PathAccess
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.diagnostics.sandbox_probe import SandboxProbe
from orchestrator.protocols import Adapter, SessionCommand
from orchestrator.repo.git.command import printable_name
from orchestrator.sessions.sandbox.policy import SandboxKind


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

"""The command that checks whether a run can start here."""

from __future__ import annotations

import os
from pathlib import Path

import click

from orchestrator.cli.core.adapter_state import read_adapter_state
from orchestrator.cli.core.command import CommandContext, async_command
from orchestrator.cli.core.confirm import trust_option
from orchestrator.cli.core.run_source import discover_environment
from orchestrator.cli.render.findings import findings_exit_code, show_findings
from orchestrator.engine.diagnostics.doctor import DoctorInput, run_doctor


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@trust_option
@async_command()
async def doctor(context: CommandContext, file: Path | None) -> int:
    """Check that this repository is ready to run, and suggest fixes.

    Checks the machine, the repository, the programs and the file: FILE, or council.yaml in the current folder or at the
    root of the repository. Changes nothing. The exit code is 1 if there is a problem, 0 if there are only warnings.

    \b
    Examples:
      council doctor
      council doctor night.yaml --json
    """
    scene = await discover_environment(file)
    subject = DoctorInput(scene.folder, scene.file, scene.config, scene.plugins.adapters, scene.plugins.left_out)
    findings = [*await run_doctor(subject, os.environ), *(await read_adapter_state(context)).findings()]
    code = findings_exit_code(findings)
    show_findings(findings, code, context.output)
    return code

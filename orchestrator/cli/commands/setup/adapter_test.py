"""The command that tests an adapter: adapter contract and a scratch task."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import click

from orchestrator.api.council import Council
from orchestrator.cli.core.command import CommandContext, async_command
from orchestrator.cli.core.confirm import trust_option
from orchestrator.cli.core.options import parse_duration_option
from orchestrator.cli.core.run_source import CommandEnvironment, discover_environment
from orchestrator.cli.render.text import one_line
from orchestrator.config.adapters import make_trial_request
from orchestrator.config.load import load_value
from orchestrator.config.model import RunConfig, make_adapters
from orchestrator.domain.settings.quantities import format_duration
from orchestrator.domain.settings.run_settings import AdapterConfig
from orchestrator.domain.wording import format_cost
from orchestrator.engine.diagnostics.findings import describe
from orchestrator.engine.diagnostics.programs import AdapterStatus, make_default_adapters, probe_adapters
from orchestrator.engine.reports.task_report import TaskReport
from orchestrator.errors import ConfigError, RefusedError
from orchestrator.protocols import JsonObject
from orchestrator.repo.git.command import IDENTITY, Git
from orchestrator.sessions.output.log_files import read_tail
from orchestrator.system import process

_PROMPT: Final = "Write the single word hello into a file hello.txt in the current folder. Change nothing else."
_CHECK: Final = "grep -qi hello hello.txt"
_CONTRACT_TIMEOUT: Final = 300.0  # seconds
_SHOWN: Final = 4_000  # bytes of each stream
_LONGEST_LINE: Final = 200


@click.command("test")
@click.argument("name")
@click.option("--no-live", is_flag=True, help="Check only the contract; start no session.")
@click.option("--prompt", default=None, help="The prompt of the task, which must write hello to hello.txt.")
@click.option(
    "--timeout",
    metavar="TIME",
    default="5m",
    callback=parse_duration_option,
    help="The time limit of the session.",
)
@trust_option
@async_command()
async def test(
    context: CommandContext,
    name: str,
    prompt: str | None,
    timeout: float,  # noqa: ASYNC109  it ends the run
    *,
    no_live: bool,
) -> int:
    """Test an adapter of council.yaml, or an installed type.

    First runs the adapter contract against the configured adapter. Then runs a small task in a scratch repository, in
    the same sandbox as a run: this uses your login, and costs as much as any such session.

    \b
    Examples:
      council adapters test claude
      council adapters test my-cli --no-live
    """
    scene = await discover_environment()
    adapter = await _find(scene, name)
    contract = await _check_contract(scene, adapter)
    status = (await probe_adapters(make_adapters({name: adapter}, scene.plugins.adapters), os.environ))[name]
    live, output = (None, "") if no_live else await _run_scratch_task(scene, name, adapter, prompt or _PROMPT, timeout)
    trial = _AdapterTestResult(name, adapter.use, contract, status, live, output, is_live=not no_live)
    context.output.answer(trial.to_json, trial.lines())
    return trial.code


@dataclass(frozen=True, slots=True)
class _AdapterTestResult:
    """The results of both tests.

    `contract` has the results of `testing.contract_run`. It is an error if the contract could not run, and so is `live`
    if no session started.
    """

    name: str
    use: str
    contract: Sequence[JsonObject] | str
    status: AdapterStatus
    live: TaskReport | str | None
    output: str
    """The end of the output of a session that did not land."""
    is_live: bool

    @property
    def failed(self) -> list[JsonObject]:
        return [] if isinstance(self.contract, str) else [one for one in self.contract if not one["passed"]]

    @property
    def code(self) -> int:
        landed = not self.is_live or (isinstance(self.live, TaskReport) and self.live.status == "landed")
        is_missing = self.status.error is not None or any(one.path is None for one in self.status.programs)
        return 0 if landed and not isinstance(self.contract, str) and not self.failed and not is_missing else 1

    def lines(self) -> Iterator[str]:
        if isinstance(self.contract, str):
            yield f"contract  not run: {one_line(self.contract)}"
        else:
            passed = len(self.contract) - len(self.failed)
            yield f"contract  {passed} of {len(self.contract)} checks passed"
            for one in self.failed:
                yield f"          {one['test']}: {one['rule']}"
                yield from (f"            {line}" for line in one["output"].splitlines()[-5:])
        for program in self.status.programs:
            yield f"program   {one_line(describe(program))}"
        if self.status.error is not None:
            yield f"program   {one_line(self.status.error)}"
        if self.is_live:
            yield from _live_lines(self.live)
            yield from (f"          | {line[:_LONGEST_LINE]}" for line in self.output.splitlines()[-8:])

    def to_json(self) -> JsonObject:
        live = {"error": self.live} if isinstance(self.live, str) else self.live and self.live.to_json()
        results = {"error": self.contract} if isinstance(self.contract, str) else {"results": self.contract}
        facts = {"name": self.name, "use": self.use, "contract": results, **self.status.to_json()}
        return {**facts, "live": live, "output": self.output, "exit": self.code}


def _live_lines(live: TaskReport | str | None) -> Iterator[str]:
    if not isinstance(live, TaskReport):
        yield f"session   {one_line(live or 'did not start')}"
        return
    if live.status != "landed":
        yield f"session   {live.status}: {one_line(live.reason or '')}"
        return
    tokens = f"{live.input_tokens:,} tokens in, {live.output_tokens:,} out" if live.input_tokens else "tokens unknown"
    cost = "cost unknown" if live.cost is None else format_cost(live.cost)
    yield f"session   landed; {tokens}; {cost}"
    if live.last_message:
        yield f"          message: {one_line(live.last_message)[:200]}"


async def _find(scene: CommandEnvironment, name: str) -> AdapterConfig:
    if isinstance(scene.config, ConfigError) and name not in scene.plugins.adapters:
        raise scene.config
    if isinstance(scene.config, RunConfig) and name in scene.config.adapters:
        return scene.config.adapters[name]
    types = scene.plugins.adapters
    of_file = list(scene.config.adapters) if isinstance(scene.config, RunConfig) else []
    if name not in types:
        known = ", ".join(sorted({*of_file, *types}))
        raise RefusedError(f"there is no adapter {name!r}", f"use one of: {known}")
    _, needs = await anyio.to_thread.run_sync(make_default_adapters, {name: types[name]})
    if name in needs:
        raise RefusedError(
            f"the type {name!r} {needs[name]}", "add an adapter of this type to council.yaml, and use its name"
        )
    options = types[name].Options.model_validate({})
    return AdapterConfig(use=name, options=options)


def contract_command() -> list[str]:
    """Return the command line that runs the adapter contract in its own process."""
    # Without `-P`, Python would prefer modules of the current folder, which is the user's repository.
    return [sys.executable, "-P", "-m", "orchestrator.testing.contract_run"]


async def _check_contract(scene: CommandEnvironment, adapter: AdapterConfig) -> Sequence[JsonObject] | str:
    spec = {
        "use": adapter.use,
        "options": adapter.options.model_dump(mode="json", exclude_unset=True),
        "plugin_folders": [str(place) for place in (scene.file, scene.top) if place is not None],
    }
    try:
        done = await process.run(
            contract_command(),
            env=os.environ,
            cwd=Path.cwd(),
            timeout=_CONTRACT_TIMEOUT,
            input=json.dumps(spec).encode(),
        )
    except TimeoutError:
        return f"did not end within {_CONTRACT_TIMEOUT:g} s"
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return done.stderr.decode(errors="replace").strip()[-500:] or f"ended with exit code {done.returncode}"
    return str(result["error"]) if "error" in result else result["results"]


async def _run_scratch_task(
    scene: CommandEnvironment,
    name: str,
    adapter: AdapterConfig,
    prompt: str,
    timeout: float,  # noqa: ASYNC109  (it ends the run)
) -> tuple[TaskReport | str, str]:
    """Return the result of a small task, and the session output if it did not land."""
    async with AsyncExitStack() as stack:
        folder = Path(await anyio.to_thread.run_sync(stack.enter_context, tempfile.TemporaryDirectory()))
        repo = folder / "repository"
        environ = {**os.environ, "COUNCIL_HOME": str(folder / "home"), "COUNCIL_STATE": ""}
        argv = (
            make_adapters({name: adapter}, scene.plugins.adapters)[name]
            .command(make_trial_request("hello", prompt))
            .argv
        )
        await _make_repository(repo, argv, scene.top)
        config = _config(scene, name, adapter, repo, prompt, timeout)
        if isinstance(scene.config, RunConfig) and name in scene.config.adapters:
            await anyio.Path(config.path).touch()  # remedies name the user's file if it has the adapter
        try:
            async with Council.open(config, plugins=scene.plugins, environ=environ) as council:
                report = await council.runs.run()
        except RefusedError as error:
            return str(error), ""
        (task,) = report.tasks
        output = "" if task.status == "landed" or task.log is None else await _session_output(Path(task.log))
        closed = next((one.disabled_reason for one in report.adapters if one.disabled_reason is not None), None)
        return (task if closed is None else f"stopped: {closed}"), output


async def _make_repository(repo: Path, argv: Sequence[str], top: Path | None) -> None:
    """Create the scratch repository, with the files of the user's checkout that `argv` names."""
    await anyio.Path(repo).mkdir()
    await anyio.Path(repo / "README.md").write_text("# A scratch repository\n")
    if top is not None:
        await anyio.to_thread.run_sync(_copy_named_files, argv, top, repo)
    git = Git(None, as_user=True)
    await git("init", "--quiet", "--initial-branch=main", cwd=repo)
    await git("add", "--all", cwd=repo)
    name, email = IDENTITY
    who = ("-c", f"user.name={name}", "-c", f"user.email={email}", "-c", "commit.gpgsign=false")
    await git(*who, "commit", "--quiet", "--message", "Begin", cwd=repo)


def _copy_named_files(argv: Sequence[str], top: Path, repo: Path) -> None:
    for word in map(os.path.normpath, argv):
        # An argument may be a whole prompt: unlike Path.is_file, this returns False for names that are too long.
        if not os.path.isabs(word) and not word.startswith("..") and os.path.isfile(top / word):  # noqa: PTH113, PTH117
            (repo / word).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(top / word, repo / word)


def _config(
    scene: CommandEnvironment, name: str, adapter: AdapterConfig, repo: Path, prompt: str, timeout: float
) -> RunConfig:
    """Return a run of one task with an adapter, in the file's sandbox."""
    value = {
        "version": 1,
        "repo": str(repo),
        "target": "landed",
        "adapters": {"tested": {"use": "command", "argv": ["true"]}},  # an account has no name in a file
        "defaults": {
            "attempts": 1,
            "timeout": format_duration(timeout),
            "checks": [_CHECK],
            "allow_failing_base": True,
            "on_checks_failed": "fail",
        },
        "tasks": [{"id": "hello", "prompt": prompt}],
    }
    config = load_value(value, repo, scene.plugins.adapters)
    tasks = tuple(task.model_copy(update={"adapter": name}) for task in config.tasks)
    changes: dict[str, Any] = {"adapters": {name: adapter}, "tasks": tasks}
    if isinstance(scene.config, RunConfig):
        changes |= {"sandbox": scene.config.sandbox, "prices": scene.config.prices}
    return config.model_copy(update=changes)


async def _session_output(log: Path) -> str:
    """Return the last output of a session; `log` is its standard error."""
    streams = [await read_tail(log.with_suffix(f".{name}"), _SHOWN) for name in ("stdout", "stderr")]
    return "\n".join(stream.strip() for stream in streams if stream.strip())

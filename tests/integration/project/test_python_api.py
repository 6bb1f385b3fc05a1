"""The Python package as a script uses it."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import anyio
import pytest

import orchestrator
from adapters.command.options import CommandOptions
from orchestrator import (
    AdapterSettings,
    Config,
    ConfigError,
    Council,
    RefusedError,
    RunReport,
    RunStatus,
    Task,
    TaskSettings,
)
from orchestrator.api import topics
from tests.conftest import FAKE_CLI, Repository
from tests.sandboxes import default_sandbox

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/python.md").read_text()
QUICK_START = (ROOT / "docs/quick-start.md").read_text()


def describe(repository: Repository, *tasks: Task, **settings: Any) -> Config:
    """Return a run of tasks for the fake CLI that lands on main."""
    argv = (sys.executable, "-S", str(FAKE_CLI), "{prompt_file}")
    fake = AdapterSettings.of("command", CommandOptions(argv=argv))
    readable = (sys.prefix, str(FAKE_CLI.parents[1]))
    values: dict[str, Any] = {"repo": str(repository.top), "target": "main", "readable": readable}
    values |= default_sandbox() | settings
    return Config(version=1, adapters={"fake": fake}, tasks=tasks, **values)


def test_every_public_name_is_documented_and_importable() -> None:
    """Each has a docstring, or is a documented class, and is listed in docs/python.md."""
    for name in orchestrator.__all__:
        assert inspect.getdoc(getattr(orchestrator, name)), name
        assert f"`{name}" in PAGE, name
    assert set(orchestrator.__all__) <= set(dir(orchestrator))
    with pytest.raises(AttributeError, match="no attribute 'Counsel'"):
        _ = orchestrator.Counsel  # type: ignore[attr-defined]


def test_every_public_method_is_documented() -> None:
    """Each method of a council is listed in docs/python.md and has a docstring."""
    names = [name for name in vars(Council) if not name.startswith("_")]
    assert [name for name in names if f"`{name}" not in PAGE and f"council.{name}" not in PAGE.lower()] == []
    assert [name for name in names if not inspect.getdoc(getattr(Council, name))] == []


@pytest.mark.parametrize("topic", [name for name, one in vars(Council).items() if isinstance(one, cached_property)])
def test_every_method_of_a_topic_is_documented(topic: str) -> None:
    """Each is in a table of docs/python.md and has a docstring."""
    kind = getattr(topics, vars(Council)[topic].func.__annotations__["return"].removeprefix("topics."))
    for name in (one for one in vars(kind) if not one.startswith("_")):
        where = f"docs/python.md, the table with `council.{topic}` in its heading: add `{name}`"
        assert re.search(rf"`({topic}\.)?{name}[`(]", PAGE), where
        assert inspect.getdoc(getattr(kind, name)), f"{kind.__name__}.{name} has no docstring"


@pytest.mark.extended_variants
@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE + QUICK_START, re.DOTALL))
def test_every_block_runs(block: str, repository: Repository) -> None:
    """Each block of the documents is a script that runs a file of the current folder."""
    path = repository.configure([{"id": "a", "prompt": "write a.txt a"}])
    (path.parent / "block.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "block.py"],
        cwd=path.parent,
        env=repository.environ,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert repository.git("show", "main:a.txt") == "a"


async def test_run_of_typed_objects_lands(repository: Repository) -> None:
    """Numbers are seconds and bytes; text is what a file would contain."""
    text: dict[str, Any] = {"timeout": "1m", "max_file": "1KB", "idle_timeout": "off"}
    config = describe(
        repository,
        Task(id="a", prompt="write a.txt a", timeout=60.0, max_file=1000, idle_timeout=None),
        Task(id="b", prompt="write b.txt b", needs=("a",), **text),
        defaults=TaskSettings(attempts=1),
    )
    async with Council.open(config, environ=repository.environ) as council:
        assert council.config is not None
        first, second = council.config.tasks
        assert (first.timeout, first.max_file, first.idle_timeout) == (60.0, 1000, None)
        assert (second.timeout, second.max_file, second.idle_timeout) == (60.0, 1000, None)
        report = await council.runs.run()
    assert report.status is RunStatus.LANDED
    assert repository.git("show", "main:b.txt") == "b"


async def test_mistakes_of_typed_objects_have_their_path(repository: Repository) -> None:
    """Mistakes across objects are found when the council is opened."""
    config = describe(repository, Task(id="a", prompt="x", needs=("b",)))
    with pytest.raises(ConfigError, match=re.escape("tasks[0].needs[0]")):
        async with Council.open(config, environ=repository.environ):
            pass


@pytest.mark.parametrize("wrong", [{"timeout": 0.0}, {"timeout": True}, {"max_file": 0}, {"max_file": 1.5}])
def test_numbers_out_of_range_are_rejected(wrong: dict[str, Any]) -> None:
    """A senseless duration or size is rejected by its constructor."""
    with pytest.raises(ValueError, match=r"duration|size"):
        Task(id="a", prompt="x", **wrong)


async def test_events_are_yielded_as_they_happen(repository: Repository) -> None:
    """A subscriber before the start gets all events of the run, and the iteration ends with it."""
    seen: list[str] = []

    async def listen(council: Council) -> None:
        seen.extend([recorded.event.type async for recorded in council.runs.events()])

    config = describe(repository, Task(id="a", prompt="write a.txt a"))
    async with Council.open(config, environ=repository.environ) as council:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(listen, council)
                report = await council.runs.run()
        again = [recorded.event.type async for recorded in council.runs.events(report.run)]
    assert seen == again
    assert (seen[0], seen[-1]) == ("run.created", "run.finished")


async def test_two_runs_work_concurrently(repository: Repository) -> None:
    """One council, with a target for each run; stop ends them all."""
    config = describe(repository, Task(id="a", prompt="hang"), target=None)
    reports = []

    async def resume(council: Council, run: str) -> None:
        reports.append(await council.runs.resume(run))

    async with Council.open(config, environ=repository.environ) as council:
        runs = [await council.runs.create(), await council.runs.create()]
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for run in runs:
                    group.start_soon(resume, council, run)
                started = 0
                async for record in council.history.follow(0):
                    started += sum(event.type == "task.started" for event in record.events)
                    if started == 2:
                        break
                council.stop()
    assert {report.run for report in reports} == set(runs)
    assert {report.status for report in reports} == {RunStatus.INTERRUPTED}


async def test_folder_without_a_run_is_rejected(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(RefusedError, match="cd to the repository of a run"):
        async with Council.open(tmp_path, environ=environ):
            pass


async def test_council_without_a_file_can_not_run(repository: Repository) -> None:
    """A folder is opened for its existing runs."""
    path = repository.configure([{"id": "a", "prompt": "write a.txt a"}])
    async with Council.open(path, environ=repository.environ) as council:
        await council.runs.run()
    async with Council.open(repository.top, environ=repository.environ) as council:
        assert [report.status for report in await council.runs.list()] == ["landed"]
        with pytest.raises(RefusedError, match="no file was opened"):
            await council.runs.run()


@pytest.mark.extended
async def test_two_councils_of_one_process_start_at_once(repository: Repository) -> None:
    """The temporary files next to a target file are distinct."""
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    settings = json.loads(config.read_text())
    del settings["target"]  # each has its own branch
    config.write_text(json.dumps(settings))
    reports: list[RunReport] = []

    async def run() -> None:
        async with Council.open(config) as council:
            reports.append(await council.runs.run())

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(run)
    assert [report.status for report in reports] == ["landed"] * 4
    exclude = repository.top / ".git" / "info" / "exclude"
    assert exclude.read_text().splitlines().count("/.council/") == 1

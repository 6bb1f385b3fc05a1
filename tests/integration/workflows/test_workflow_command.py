"""Workflows: shown, copied, and recorded with a run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from orchestrator import Config, Council
from orchestrator.config.workflows.load import builtin_phases
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.engine.state.records import read_run, read_spec
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import Repository

OWN = {"mine": [{"look": {"access": "read", "prompt": "Look at {{ task.id }}."}}, "build"]}


async def test_supplied_workflow_is_shown_as_yaml(repository: Repository) -> None:
    shown = repository.council("workflow", "show", "adw")
    assert (shown.code, shown.stderr) == (0, "")
    section = yaml.safe_load(shown.stdout)
    assert [next(iter(one)) for one in section["workflows"]["adw"]] == ["scout", "plan", "build", "review"]
    config = repository.configure([{"id": "a", "prompt": "p", "workflow": "adw"}], **section)
    assert repository.council("validate", str(config)).code == 0
    assert yaml.safe_load(repository.council("workflow", "show").stdout) == section


async def test_workflows_of_a_file_are_shown_too(repository: Repository) -> None:
    """The workflows of its tasks, with their custom prompts."""
    config = repository.configure([{"id": "a", "prompt": "p", "workflow": "mine"}], workflows=OWN)
    shown = repository.council("workflow", "show", "--file", str(config), "--json")
    assert shown.code == 0
    assert set(shown.result["workflows"]) == {"adw", "mine"}
    assert shown.result["workflows"]["mine"] == [
        {"name": "look", "access": "read", "prompt": "Look at {{ task.id }}."},
        {"name": "build"},
    ]


async def test_copied_workflow_can_be_changed(repository: Repository) -> None:
    """Sessions get the changed templates; existing files are not replaced."""
    copied = repository.council("workflow", "copy", "adw", "flows", "--json")
    assert copied.code == 0
    names = ["adw.yaml", *(f"{name}.md.j2" for name in ("scout", "plan", "build", "review"))]
    assert copied.result["files"] == [f"flows/{name}" for name in names]
    assert sorted(one.name for one in (repository.top / "flows").iterdir()) == sorted(names)
    (repository.top / "flows/scout.md.j2").write_text("Only look.\n")
    again = repository.council("workflow", "copy", "adw", "flows")
    assert (again.code, "already exists: replace it with --force" in again.stderr) == (2, True)
    assert (repository.top / "flows/scout.md.j2").read_text() == "Only look.\n"
    section = yaml.safe_load((repository.top / "flows/adw.yaml").read_text())
    tasks = [{"id": "a", "prompt": "p", "workflow": "adw"}]
    path = repository.top / "council.yaml"
    path.write_text(repository.configure(tasks, **section).read_text())
    shown = repository.council("workflow", "show", "adw", "--file", str(path), "--json")
    prompts = [one.get("prompt") for one in shown.result["workflows"]["adw"]]
    assert prompts == ["Only look.\n", None, None, None]
    assert repository.council("workflow", "copy", "adw", "flows", "--force").code == 0
    assert (repository.top / "flows/scout.md.j2").read_text() == builtin_phases()["adw"][0].prompt


async def test_unknown_workflow_is_rejected(repository: Repository) -> None:
    """With the known ones; and so is an impossible folder."""
    refused = repository.council("workflow", "copy", "adv", "flows")
    assert (refused.code, refused.stderr) == (
        2,
        "council: there is no workflow 'adv': did you mean 'adw'?; --file adds the workflows of a file\n",
    )
    assert not (repository.top / "flows").exists()
    (repository.top / "file").write_text("")
    refused = repository.council("workflow", "copy", "adw", "file/flows")
    assert (refused.code, "can't be written" in refused.stderr) == (2, True)


@pytest.mark.extended_variants
@pytest.mark.parametrize("from_code", [False, True])
async def test_run_records_its_workflows(repository: Repository, from_code: bool) -> None:
    """A resume knows phases, values and the tracker of each task without the file."""
    todo = repository.top.parent / "todo.md"
    todo.write_text("- [ ] write t.txt t\n")
    settings: dict[str, Any] = {
        "workflows": {**OWN, "unused": ["build"]},
        "context": {"style": "plain"},
        "defaults": {"workflow": "mine"},
        "trackers": {"todo": {"use": "checklist", "file": str(todo)}},
    }
    tasks: list[dict[str, Any]] = [
        {"id": "a", "prompt": "p", "context": {"n": 1}},
        {"id": "b", "prompt": "p", "workflow": "none"},
    ]
    path = repository.configure(tasks, **settings)
    source = Config.model_validate(json.loads(path.read_text())) if from_code else path
    async with Council.open(source, environ=repository.environ) as council:
        run = await council.runs.create()
    async with FileStore.open(repository.log, SystemClock()) as store:
        document = await read_run(store, run)
        specs = [await read_spec(store, run, task) for task in document.tasks]
    assert set(document.workflows) == {"mine"}
    phases = [Phase.model_validate(one) for one in document.workflows["mine"]]
    assert [(one.name, one.writes) for one in phases] == [("look", False), ("build", True)]
    assert phases[0].prompt == "Look at {{ task.id }}."
    assert [(one.id, one.workflow, one.context, one.tracker) for one in specs] == [
        ("a", "mine", {"style": "plain", "n": 1}, None),
        ("b", None, {}, None),
        ("write-t-txt-t", "mine", {"style": "plain"}, "todo"),
    ]

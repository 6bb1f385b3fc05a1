"""The documents say what the code does."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import click
import pytest
import yaml

from adapters.command import CommandAdapter
from orchestrator.cli.main import main
from orchestrator.cli.output import SENTENCES
from orchestrator.config.load import load_config
from orchestrator.config.schema import AdapterEntry, BackoffEntry, DefaultsEntry, FileConfig, TaskEntry
from orchestrator.domain.failures import FailureClass
from orchestrator.domain.model import TaskStatus
from orchestrator.engine.ledger import TASK_EVENTS
from orchestrator.engine.report import RunReport, RunStatus, TaskReport
from orchestrator.plugins import load_adapter_types
from orchestrator.sessions.environment import BASE_ENVIRONMENT

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
OUTPUT = (ROOT / "docs/output.md").read_text()
CONFIGURATION = (ROOT / "docs/configuration.md").read_text()


def test_the_readme_names_every_command() -> None:
    """Each command stands in the README's table, and no other."""
    assert isinstance(main, click.Group)
    assert set(re.findall(r"^\| `council (\w+)", README, re.MULTILINE)) == set(main.commands)


def test_the_readmes_file_loads(tmp_path: Path) -> None:
    """The example of the README is a file that runs."""
    match = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert match
    (tmp_path / "council.yaml").write_text(match[1])
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/api.md").write_text("Add an API.\n")
    config = load_config(tmp_path / "council.yaml", load_adapter_types())
    assert [task.id for task in config.tasks] == ["models", "api"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_loads(path: Path) -> None:
    """Each file under configs/ is valid."""
    assert load_config(path, load_adapter_types()).tasks


def test_every_key_is_documented() -> None:
    """docs/configuration.md has each key of the file, of `command` and of the base environment."""
    models = (FileConfig, TaskEntry, DefaultsEntry, BackoffEntry, AdapterEntry, CommandAdapter.Options)
    keys = {field.alias or name for model in models for name, field in model.model_fields.items()}
    missing = [key for key in sorted(keys | set(BASE_ENVIRONMENT)) if f"`{key}`" not in CONFIGURATION]
    assert missing == []


def test_every_class_of_failure_is_documented() -> None:
    """docs/configuration.md says what each leads to."""
    assert [one for one in FailureClass if f"| `{one}` |" not in CONFIGURATION] == []


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", CONFIGURATION, re.DOTALL))
def test_every_example_of_the_reference_loads(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put into an otherwise smallest file, each example is valid."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (".some-cli", ".venvs/app"):
        (tmp_path / folder).mkdir(parents=True)
    smallest = {"version": 1, "adapters": {"x": {"use": "command", "argv": ["x"]}}}
    text = json.dumps({**smallest, "tasks": [{"id": "a", "prompt": "Fix it."}], **yaml.safe_load(block)})
    (tmp_path / "council.yaml").write_text(text)
    assert load_config(tmp_path / "council.yaml", load_adapter_types()).tasks


def test_the_readme_explains_every_final_state() -> None:
    """A state that a result can show at the end stands in the README's table."""
    transient = {TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.CHECKING, TaskStatus.LANDING}
    for state in [*(set(TaskStatus) - transient), "blocked"]:
        assert f"| `{state}` |" in README


def test_every_event_and_status_is_documented() -> None:
    """docs/output.md has each event, each status of a run and each field of the result."""
    fields = {field.name for model in (RunReport, TaskReport) for field in dataclasses.fields(model)}
    names = {*TASK_EVENTS.values(), *SENTENCES, *RunStatus, *TaskStatus, *fields}
    assert [name for name in sorted(names) if f"`{name}`" not in OUTPUT] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_make_targets_exist(path: Path) -> None:
    """Every relative link leads somewhere and every `make` target is one."""
    text = path.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (path.parent / link).exists()] == []
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=`|\n)", text)) <= targets

"""The docs match the code."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import click
import pytest
import yaml

from adapters.command.adapter import CommandAdapter
from adapters.command.output_rules import OutputRule
from adapters.command.profile import Profile
from orchestrator.builtin.checklist import ChecklistTracker, read_items
from orchestrator.builtin.jsonlines import JsonLinesSink
from orchestrator.cli.main import COMMANDS_BY_SECTION, main
from orchestrator.config.load import load_config
from orchestrator.config.model import RunConfig
from orchestrator.config.profiles import ProfileAdapterType
from orchestrator.config.schema import AdapterSettings, Config, SinkSettings, StateSettings, Task, TrackerSettings
from orchestrator.domain.events import EVENT_TYPES
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.phase_settings import ExpansionSettings, HandoffSettings, PhaseSettings
from orchestrator.domain.settings.run_settings import (
    Backoff,
    CoordinationSettings,
    SetupStep,
    TaskSettings,
    WorktreeSettings,
)
from orchestrator.engine.reports.report import RunReport, RunStatus
from orchestrator.engine.reports.task_report import TaskReport
from orchestrator.plugins import load_plugins
from orchestrator.protocols import SessionRequest
from orchestrator.sessions.setup.environment import BASE_VARIABLES
from tests.printed_commands import check_syntax

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
QUICK_START = (ROOT / "docs/quick-start.md").read_text()
COMMANDS_PAGE = (ROOT / "docs/commands.md").read_text()
TASK_STATES = (ROOT / "docs/task-states.md").read_text()
OUTPUT = (ROOT / "docs/output.md").read_text()
EVENTS = (ROOT / "docs/events.md").read_text()
CONFIGURATION = (ROOT / "docs/configuration.md").read_text()
ADAPTERS = (ROOT / "docs/adapters.md").read_text()


def test_commands_page_names_every_command() -> None:
    documented = set(re.findall(r"^\| `council ([\w-]+)", COMMANDS_PAGE, re.MULTILINE))
    missing, unknown = sorted(set(_commands()) - documented), sorted(documented - set(_commands()))
    assert not missing, f"docs/commands.md: add a row `| `council NAME` | … |` for {missing}"
    assert not unknown, f"docs/commands.md has {unknown}: add them to COMMANDS_BY_SECTION in orchestrator/cli/main.py"


def test_command_list_matches_the_commands() -> None:
    """The text in `--help` is the first sentence of the command's own help."""
    for name, command in _commands().items():
        _, summary = next(entries[name] for entries in COMMANDS_BY_SECTION.values() if name in entries)
        sentence, place = (command.help or "").split("\n\n")[0].replace("\n", " "), "in orchestrator/cli/main.py"
        assert sentence == summary, (
            f"`council {name}`: use its docstring's first sentence in COMMANDS_BY_SECTION {place}"
        )
        assert command.name == name, f"COMMANDS_BY_SECTION {place} has {command.name!r} as {name!r}"


def test_json_output_of_every_command_is_documented() -> None:
    """docs/output.md names each command with `--json`; its section on `council state` omits the group."""
    state = OUTPUT.partition("\n## State\n")[2].partition("\n## ")[0]
    missing = [
        name
        for name, command in _leaves(_commands())
        if any("--json" in parameter.opts for parameter in command.params)
        and f"`{name}`" not in OUTPUT
        and f"`{name.removeprefix('state ')}`" not in state
    ]
    assert not missing, f"docs/output.md: describe what {missing} print with `--json`"


def _leaves(commands: Mapping[str, click.Command], prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in commands.items():
        yield f"{prefix}{name}", command
        if isinstance(command, click.Group):
            yield from _leaves(command.commands, f"{prefix}{name} ")


def _commands() -> dict[str, click.Command]:
    context = click.Context(main)
    assert isinstance(main, click.Group)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


_plugins = cache(load_plugins)


def _load(path: Path) -> RunConfig:
    plugins = _plugins()
    return load_config(path, plugins.adapters, plugins.extensions())


@pytest.mark.parametrize("page", [README, QUICK_START], ids=["README", "quick-start"])
def test_first_example_of_a_page_loads(page: str, tmp_path: Path) -> None:
    """The first example is a complete file."""
    match = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert match
    (tmp_path / "council.yaml").write_text(match[1])
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/api.md").write_text("Add an API.\n")
    config = _load(tmp_path / "council.yaml")
    assert [task.id for task in config.tasks] == ["models", "api"]


def test_example_of_pull_requests_loads(tmp_path: Path) -> None:
    """It is a complete file, too."""
    match = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/pull-requests.md").read_text(), re.DOTALL)
    assert match
    (tmp_path / "council.yaml").write_text(match[1])
    config = _load(tmp_path / "council.yaml")
    assert config.pull_requests is not None
    assert (config.target, config.pull_requests.reviewers) == ("main", ("ana",))


def test_example_of_many_machines_loads(tmp_path: Path) -> None:
    """It is a complete file of a run that spans machines."""
    match = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/machines.md").read_text(), re.DOTALL)
    assert match
    (tmp_path / "council.yaml").write_text(textwrap.dedent(match[1]))
    config = _load(tmp_path / "council.yaml")
    assert (config.is_url, config.tasks[1].labels) == (True, ("gpu",))


def test_commands_of_the_example_workflow_exist() -> None:
    """With their options."""
    workflow = yaml.safe_load((ROOT / "examples/ci/council.yml").read_text())
    commands = [shlex.split(step["run"]) for step in workflow["jobs"]["run"]["steps"] if "run" in step]
    ours = [command[1:] for command in commands if command[0] == "council"]
    assert len(ours) == 2
    for arguments in ours:
        check_syntax(arguments)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_loads(path: Path) -> None:
    """Each file under configs/ is valid."""
    config = _load(path)
    assert config.tasks or config.trackers


def test_every_key_is_documented() -> None:
    """docs/configuration.md has each key of the file, of `command` and of the base environment."""
    sections = (Config, Task, TaskSettings, Backoff, AdapterSettings, SinkSettings, TrackerSettings)
    models = (
        *sections,
        StateSettings,
        CoordinationSettings,
        WorktreeSettings,
        SetupStep,
        PhaseSettings,
        HandoffSettings,
        ExpansionSettings,
        CommandAdapter.Options,
        OutputRule,
        JsonLinesSink.Options,
        ChecklistTracker.Options,
    )
    keys = {field.alias or name for model in models for name, field in model.model_fields.items()}
    missing = [key for key in sorted(keys | set(BASE_VARIABLES)) if f"`{key}`" not in CONFIGURATION]
    assert missing == []


def test_every_adapter_is_documented(tmp_path: Path) -> None:
    """docs/adapters.md has a section per bundled adapter, with exactly its options and variables."""
    sections = dict(re.findall(r"^## `([a-z-]+)`\n(.*?)(?=^## |\Z)", ADAPTERS, re.MULTILINE | re.DOTALL))
    request = SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home")
    for use, adapter_type in load_plugins({"COUNCIL_PLUGINS": ""}).adapters.items():
        if use != "command" and not isinstance(adapter_type, ProfileAdapterType):
            keys = set(re.findall(r"^\| `(\w+)` \|", sections[use], re.MULTILINE))
            assert keys == adapter_type.Options.model_fields.keys(), use
            example = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", sections[use], re.DOTALL)[0])["adapters"]
            own = {key: value for key, value in next(iter(example.values())).items() if key in keys - {"env"}}
            homes = [adapter_type.Options.model_validate({**own, "home": home}) for home in ("own", "shared")]
            passed = [name for one in homes for name in adapter_type(one).command(request).pass_env]
            row = next(line for line in sections[use].splitlines() if line.startswith("| `env`"))
            assert set(re.findall(r"`([A-Z_]+)`", row)) == set(passed), use


def test_table_of_profiles_is_generated() -> None:
    """`python docs/profiles.py` regenerates it."""
    command = [sys.executable, str(ROOT / "docs" / "profiles.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run `python docs/profiles.py`"


def test_every_key_of_a_profile_is_documented() -> None:
    """docs/adapters.md has the keys that `command` lacks."""
    keys = set(Profile.model_fields) - set(CommandAdapter.Options.model_fields) | {"extends", "bin", "args"}
    assert [key for key in sorted(keys) if f"`{key}`" not in ADAPTERS] == []


def test_every_failure_class_is_documented() -> None:
    """docs/configuration.md names the consequence of each."""
    assert [one for one in FailureClass if f"| `{one}` |" not in CONFIGURATION] == []


@pytest.mark.parametrize(
    "block",
    # Profiles, which begin with `docs`, are tested with their programs.
    [
        one
        for one in re.findall(r"```yaml\n(.*?)```", CONFIGURATION + ADAPTERS, re.DOTALL)
        if not one.startswith("docs:")
    ],
)
def test_every_example_of_the_reference_loads(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example is valid once the required keys are added."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in {".codex", *re.findall(r"~/([\w.-]+)", block)}:
        (tmp_path / folder).mkdir(parents=True)
    smallest = {"version": 1, "adapters": {"x": {"use": "command", "argv": ["x"]}}}
    text = json.dumps({**smallest, "tasks": [{"id": "a", "prompt": "Fix it."}], **yaml.safe_load(block)})
    (tmp_path / "council.yaml").write_text(text)
    assert _load(tmp_path / "council.yaml").tasks


def test_checklist_example_gives_the_described_tasks() -> None:
    match = re.search(r"```markdown\n(.*?)```", CONFIGURATION, re.DOTALL)
    assert match
    items = read_items(match[1].encode())
    assert [item.id for item in items if not item.done] == ["models", "fix-the-typo-in-the-readme"]
    assert [item.done for item in items] == [False, False, True]
    assert "below an item" in items[1].text


def test_every_final_status_is_explained() -> None:
    """The table in docs/task-states.md has each state that a final result can contain."""
    transient = {TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.CHECKING, TaskStatus.LANDING}
    states = [*(status.value for status in TaskStatus if status not in transient), "blocked"]
    missing = [state for state in states if f"| `{state}` |" not in TASK_STATES]
    assert not missing, f"docs/task-states.md: add a row `| `STATUS` | meaning |` for {missing}"


def test_events_page_matches_the_event_classes() -> None:
    """`python docs/events.py` regenerates its tables."""
    command = [sys.executable, str(ROOT / "docs" / "events.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run `python docs/events.py`"
    missing = [name for name in EVENT_TYPES if f"| `{name}` |" not in EVENTS]
    assert not missing, f"docs/events.md lacks {missing}: run `python docs/events.py`"


def test_every_status_and_field_is_documented() -> None:
    """docs/output.md has each status of runs and tasks, and each field of the result."""
    fields = {field.name for model in (RunReport, TaskReport) for field in dataclasses.fields(model)}
    names = {*RunStatus, *TaskStatus, *fields}
    missing = [name for name in sorted(names) if f"`{name}`" not in OUTPUT]
    assert not missing, f"docs/output.md: name {missing} in the tables of the result (statuses: in the row `status`)"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_make_targets_exist(path: Path) -> None:
    """Each relative link has a target and each `make` target exists."""
    text = path.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (path.parent / link).exists()] == []
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=`|\n)", text)) <= targets


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_anchors_of_links_exist(path: Path) -> None:
    """Each `#anchor` is a heading of the linked page."""
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", path.read_text())
    assert [
        (page, anchor) for page, anchor in links if anchor not in _anchors(path.parent / page if page else path)
    ] == []


@cache
def _anchors(path: Path) -> frozenset[str]:
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return frozenset(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings)


def test_readme_is_short() -> None:
    """Details belong in docs/."""
    assert len(README.splitlines()) <= 150


def test_glossary_is_short_and_sorted() -> None:
    """At most thirty terms, each once."""
    terms = re.findall(r"^\| ([a-z][a-z ]+) \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)[1:]
    assert 20 < len(set(terms)) == len(terms) <= 30

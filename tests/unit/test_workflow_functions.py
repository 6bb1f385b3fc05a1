"""docs/workflows.md matches the code: examples, tables, and the function mapping of workflows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

import pytest
import yaml
from pydantic import BaseModel

from orchestrator.client.commands import MAX_HANDOFF_BYTES
from orchestrator.config.load import load_config
from orchestrator.domain.runs.phases import PhaseStatus
from orchestrator.domain.workflow import handoff_models
from orchestrator.domain.workflow.handoff_kinds import HANDOFF_KINDS, PHASE_NEEDS
from orchestrator.domain.workflow.violations import HandoffContext
from orchestrator.engine.phases.prompts import MAX_VALUE_LENGTH
from orchestrator.engine.session_api.shared_values import DEFAULT_WAIT
from orchestrator.plugins import load_plugins
from tests.replaced_functions import ReplacedFunctionsContract, rows, sections
from tests.unit.test_consistency import BROKEN

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs/workflows.md").read_text()
QUICK_START: Final = sections((ROOT / "docs/quick-start.md").read_text())["Workflows"]
SECTIONS: Final = sections(PAGE)
MAPPING: Final = sections((ROOT / "docs/function-mapping.md").read_text())["Workflows and handoffs"]
FUNCTIONS: Final = rows(MAPPING)

#: Other words in code spans: keys of the file, arguments, and names of values.
_WORDS: Final = {"KIND_to_KIND", "if_version", "key", "results.PHASE"}
_SETTING: Final = re.compile(r"(handoff|workflow|mediator): ?\w*")
_RULE: Final = re.compile(r"(chain|sessions)\.\w+")


class TestFunctions(ReplacedFunctionsContract):
    """Check the functions of workflows, handoffs and validation."""

    functions = FUNCTIONS
    fewest = 40

    def is_word(self, name: str) -> bool:
        """Accept events, rules, settings and arguments."""
        known = name in _WORDS or name in {status.record.event.type for status in PhaseStatus}
        return known or _SETTING.fullmatch(name) is not None or _RULE.fullmatch(name) is not None


@pytest.mark.parametrize(
    "function",
    [
        *("initialize_workflow", "enter_phase", "complete_phase", "fail_phase", "get_phase_results", "save", "load"),
        *("emit_event", "execute_adw_with_state", "create_phase_context", "update_context", "get_context_for_phase"),
        *("create_handoff_context", "filter_context", "execute_handoff", "verify_handoff", "register_transformation"),
        *("scout_to_planner_transform", "write_shared_state", "read_shared_state", "notify_subscribers"),
        *("coordinate_handoff", "register_validator", "add_constraint", "validate_state"),
        *("validate_workflow_consistency", "validate_plan_state", "validate_build_state"),
    ],
)
def test_every_function_is_mapped(function: str) -> None:
    """Each has a row."""
    assert any(f"`{function}(" in row[0] for row in FUNCTIONS)


def test_each_command_of_the_page_exists() -> None:
    """Including commands in sentences, with their options."""
    lines = set(re.findall(r"`(council \w[^`]*)`", " ".join((PAGE + MAPPING).split())))
    assert {"council approve TASK", "council retry TASK --from plan"} <= lines
    for line in lines:
        TestFunctions().test_each_documented_command_exists(line)


def test_each_named_rule_exists() -> None:
    """A test record violates it."""
    named = set(re.findall(r"`((?:chain|sessions)\.\w+)`", MAPPING))
    broken = {rule for rule, _ in BROKEN}
    assert {name for name in named if name.startswith("chain.")} == {
        rule for rule in broken if rule.startswith("chain.")
    }


def test_phase_requirements_match_the_page() -> None:
    """The requirements are the defaults of the filter."""
    table = {row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in rows(SECTIONS["Phase inputs"])[1:]}
    assert table == {name: list(needs) for name, needs in PHASE_NEEDS.items()}


def test_kind_fields_match_the_page() -> None:
    """The required fields and their aliases."""
    table = {row[0].split("`")[0] + row[0].split("`")[1]: row[1] for row in rows(SECTIONS["Kinds of handoffs"])[1:]}
    parts = {
        "a task of a plan": "PlannedTask",
        "an artifact of a build": "Artifact",
        "a finding of a review": "Finding",
    }
    assert set(table) == {*HANDOFF_KINDS, *parts}
    for name, reported in table.items():
        model: type[BaseModel] = getattr(handoff_models, parts.get(name, name.capitalize()))
        assert reported == ", ".join(_field(field, model) for field in model.model_fields), name


def _field(name: str, model: type[BaseModel]) -> str:
    field = model.model_fields[name]
    others = [one for one in getattr(field.validation_alias, "choices", ()) if one != name]
    also = f" ({', '.join(f'`{one}`' for one in others)})" if others else ""
    return (f"**`{name}`**" if field.is_required() else f"`{name}`") + also


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE + QUICK_START, re.DOTALL))
def test_each_file_loads(block: str, tmp_path: Path) -> None:
    """Each example is valid once the required keys are added."""
    smallest = {"version": 1, "adapters": {"x": {"use": "command", "argv": ["x"]}}, "defaults": {"adapter": "x"}}
    (tmp_path / "council.yaml").write_text(json.dumps({**smallest, **yaml.safe_load(block)}))
    plugins = load_plugins({"COUNCIL_PLUGINS": ""})
    config = load_config(tmp_path / "council.yaml", plugins.adapters, plugins.extensions())
    assert all(task.workflow in config.workflows for task in config.tasks)


@pytest.mark.parametrize(("kind", "block"), re.findall(r"\nA (\w+) [^`]*:\n\n```json\n(.*?)```", PAGE, re.DOTALL))
def test_each_handoff_is_valid(kind: str, block: str) -> None:
    """Each example is valid for the kind at the beginning of its sentence."""
    checked = HANDOFF_KINDS[kind].check(json.loads(block), HandoffContext())
    assert (checked.data is not None, checked.violations, checked.ignored) == (True, (), ())


def test_each_handoff_is_checked() -> None:
    """Each sentence begins with a kind."""
    assert len(re.findall(r"```json\n", PAGE)) == len(re.findall(r"\nA \w+ [^`]*:\n\n```json\n", PAGE)) == 3


def test_bounds_match_the_code() -> None:
    """As written in sentences."""
    text = " ".join(PAGE.split())
    assert f"cut at {MAX_VALUE_LENGTH:,} characters, a handoff has at most {MAX_HANDOFF_BYTES >> 20} MiB" in text
    assert f"({DEFAULT_WAIT:g} seconds by default)" in text

"""Workflow settings: resolved phases, and mistakes with their positions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters.claude_code import ClaudeCodeAdapter
from adapters.codex import CodexAdapter
from adapters.command.adapter import CommandAdapter
from orchestrator.cli.commands.setup.workflow import build_workflow_files, workflows_to_yaml
from orchestrator.config.load import load_config, load_value
from orchestrator.config.model import RunConfig, used_adapters
from orchestrator.config.workflows.load import builtin_phases
from orchestrator.config.workflows.templates import BUILTIN_TEMPLATES, read_builtin_template
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.settings.phase_settings import ExpansionSettings, Phase
from orchestrator.domain.workflow.routing import Workflow
from orchestrator.errors import ConfigError
from orchestrator.protocols import AdapterType

TYPES: Mapping[str, AdapterType] = {"command": CommandAdapter, "codex": CodexAdapter, "claude-code": ClaudeCodeAdapter}
COMMAND = {"x": {"use": "command", "argv": ["x"]}}
TOKEN = "ghp_" + "a1B2" * 9


def read(tmp_path: Path, *phases: Any, task: Mapping[str, Any] | None = None, **settings: Any) -> RunConfig:
    """Return the run of one task with these phases."""
    value = {
        "version": 1,
        "adapters": COMMAND,
        "workflows": {"w": list(phases)} if phases else {},
        "tasks": [{"id": "a", "prompt": "p", "workflow": "w", **(task or {})}],
        **settings,
    }
    return load_value(value, tmp_path, TYPES)


def mistakes(tmp_path: Path, *phases: Any, **settings: Any) -> list[tuple[str | None, str]]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, *phases, **settings)
    return [(one.path, f"{one.message}: {one.remedy}") for one in caught.value.problems]


def test_phase_has_all_settings(tmp_path: Path) -> None:
    """Each key sets its field, and omitted keys have their defaults."""
    (tmp_path / "build.md").write_text("Build {{ task.id }}.\n")
    schema = {"type": "object", "required": ["seconds"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    config = read(
        tmp_path,
        {"look": {"access": "read", "produces": {"kind": "measurement", "schema": "schema.json"}, "handoff": "mediated",
                  "transform": "scout_to_plan"}},
        {"plan": {"produces": "plan", "expand": True, "approve": True, "needs": ["measurement"], "context": {"n": 1},
                  "session": "continue", "handoff": "shared", "key": "plans/first"}},
        {"build": {"adapter": "x", "fallback": ["codex"], "prompt_file": "build.md", "until": ["true"],
                   "max_rounds": 5, "timeout": "5m", "when": "plan is defined", "session": {"continue": "look"}}},
        {"review": {"produces": "review", "on_reject": "plan"}},
        "end",
    )  # fmt: skip
    look, plan, build, review, end = config.workflows["w"]
    assert (look.writes, look.kind, look.handoff_schema, look.handoff) == (False, "measurement", schema, "mediated")
    assert look.transform == "scout_to_plan"
    assert look.prompt == read_builtin_template("phase")
    assert (plan.writes, plan.expand, plan.approve, plan.needs) == (
        True,
        ExpansionSettings(max=20),
        True,
        ("measurement",),
    )
    assert (plan.context, plan.continues, plan.handoff, plan.key) == ({"n": 1}, "look", "shared", "plans/first")
    assert plan.prompt == read_builtin_template("plan")
    assert (build.adapter, build.fallback, build.until, build.max_rounds) == ("x", ("codex",), ("true",), 5)
    assert (build.timeout, build.when, build.continues) == (300.0, "plan is defined", "look")
    assert build.prompt == "Build {{ task.id }}.\n"
    assert (review.on_reject, review.max_rounds, review.kind) == ("plan", 3, "review")
    assert end == Phase(name="end", prompt=read_builtin_template("phase"))


def test_supplied_workflow_has_scout_plan_build_and_review(tmp_path: Path) -> None:
    """`adw` is built in; only `build` may change files, and a rejection returns to it."""
    config = read(tmp_path, task={"workflow": "adw"})
    phases = config.workflows["adw"]
    assert [(one.name, one.kind, one.writes) for one in phases] == [
        ("scout", "scout", False),
        ("plan", "plan", False),
        ("build", "build", True),
        ("review", "review", False),
    ]
    assert Workflow(phases).find_rejection_target("review", TaskDocument()).name == "build"
    assert config.tasks[0].adapter == "x"


def test_file_may_define_an_adw(tmp_path: Path) -> None:
    """It replaces the supplied one."""
    config = read(tmp_path, workflows={"adw": ["build"]}, task={"workflow": "adw"})
    assert [one.name for one in config.workflows["adw"]] == ["build"]


def test_only_used_workflows_are_recorded(tmp_path: Path) -> None:
    """Including those of planned tasks."""
    workflows = {
        "w": [{"plan": {"produces": "plan", "expand": {"max": 3, "workflow": "inner"}}}],
        "inner": ["build"],
        "unused": ["build"],
    }
    config = read(tmp_path, workflows=workflows)
    assert set(config.workflows) == {"w", "inner"}
    assert config.workflows["w"][0].expand == ExpansionSettings(max=3, workflow="inner")


def test_task_without_a_workflow_has_none(tmp_path: Path) -> None:
    """`none` overrides the default workflow."""
    tasks = [{"id": "a", "prompt": "p"}, {"id": "b", "prompt": "p", "workflow": "none"}]
    config = read(tmp_path, tasks=tasks, defaults={"workflow": "adw"}, context={"a": 1})
    assert [(one.workflow, one.context) for one in config.tasks] == [("adw", {"a": 1}), (None, {})]


def test_values_of_a_task_override_those_of_the_file(tmp_path: Path) -> None:
    """Each task with a workflow has all values that its first phase inherits."""
    config = read(tmp_path, "build", context={"a": 1, "b": [1]}, task={"context": {"b": {"c": None}}})
    assert config.tasks[0].context == {"a": 1, "b": {"c": None}}


def test_types_without_options_need_no_entry(tmp_path: Path) -> None:
    """Wherever they are named; without a name the only adapter entry of the file is used."""
    config = read(
        tmp_path,
        {"scout": {"adapter": "codex", "fallback": ["claude-code"]}},
        "build",
        tasks=[{"id": "a", "prompt": "p", "workflow": "w"}, {"id": "b", "prompt": "p", "fallback": ["codex"]}],
    )
    assert set(config.adapters) == {"x", "codex", "claude-code"}
    assert [one.adapter for one in config.tasks] == ["x", "x"]
    assert config.adapters_of(config.tasks[0]) == ("x", "codex", "claude-code")
    assert set(used_adapters(config, TYPES)) == {"x", "codex", "claude-code"}


def test_file_without_adapters_loads_if_all_are_named(tmp_path: Path) -> None:
    """The adapter of such a task is that of its working phase."""
    phases = [{"scout": {"adapter": "codex", "access": "read"}}, {"build": {"adapter": "claude-code"}}]
    (tmp_path / "council.yaml").write_text(
        yaml.safe_dump(
            {"version": 1, "workflows": {"w": phases}, "tasks": [{"id": "a", "prompt": "p", "workflow": "w"}]}
        )
    )
    config = load_config(tmp_path / "council.yaml", TYPES)
    assert set(config.adapters) == {"codex", "claude-code"}
    assert config.tasks[0].adapter == "claude-code"
    assert config.adapters_of(config.tasks[0]) == ("codex", "claude-code")


def test_adapter_with_required_options_needs_an_entry(tmp_path: Path) -> None:
    """Reported where it is named, in a phase or a task."""
    found = mistakes(tmp_path, {"build": {"adapter": "command", "fallback": ["codecks"]}}, adapters=COMMAND)
    assert found == [
        ("workflows.w[0].build.adapter", "there is no adapter 'command': the adapters are x"),
        ("workflows.w[0].build.fallback[0]", "there is no adapter 'codecks': did you mean 'codex'?"),
    ]


REVIEW = {"review": {"produces": "review"}}
AT = "workflows.w[0].build"
MISTAKES: dict[str, tuple[list[Any], str, str]] = {
    "no phase": ([7], "workflows.w[0]", "a phase can't be the number 7: use `- NAME: {…}`"),
    "two phases in one": ([{"a": {}, "b": {}}], "workflows.w[0]", "a phase can't be a mapping"),
    "keys beside the name": (
        [{"a": None, "access": "read"}],
        "workflows.w[0]",
        "at the level of its name: indent them",
    ),
    "empty phase": ([{"a": None}], "workflows.w[0]", "the phase 'a' is empty: use `- a`"),
    "bad name": (["a b"], "workflows.w[0]", "'a b' can't be a name"),
    "unknown key": ([{"build": {"acess": "read"}}], f"{AT}.acess", "unknown key 'acess': did you mean 'access'?"),
    "unknown access": ([{"build": {"access": "look"}}], f"{AT}.access", "use 'read' or 'write'"),
    "unknown kind": ([{"build": {"produces": "pln"}}], f"{AT}.produces", "'pln': did you mean 'plan', or add a schema"),
    "schema of a kind that is there": (
        [{"build": {"produces": {"kind": "plan", "schema": {}}}}],
        f"{AT}.produces.kind",
        "'plan' is already defined",
    ),
    "unknown key of a handoff": (
        [{"build": {"produces": {"kind": "plan", "skema": 1}}}],
        f"{AT}.produces.skema",
        "did you mean 'schema'?",
    ),
    "handoff that is a number": (
        [{"build": {"produces": 1}}],
        f"{AT}.produces",
        "can't be the number 1: write its kind",
    ),
    "no schema": (
        [{"build": {"produces": {"kind": "k", "schema": {"type": "objct"}}}}],
        f"{AT}.produces",
        "does not describe an object",
    ),
    "wrong schema": (
        [{"build": {"produces": {"kind": "k", "schema": {"required": 1}}}}],
        f"{AT}.produces",
        "required is invalid: 1 is",
    ),
    "schema from elsewhere": (
        [{"build": {"produces": {"kind": "k", "schema": {"$ref": "http://a.b"}}}}],
        f"{AT}.produces",
        "external reference 'http://a.b' is not fetched",
    ),
    "no schema file": (
        [{"build": {"produces": {"kind": "k", "schema": "nix.json"}}}],
        f"{AT}.produces",
        "can't read ",
    ),
    "two prompts": (
        [{"build": {"prompt": "p", "prompt_file": "f"}}],
        f"{AT}.prompt_file",
        "both prompt and prompt_file",
    ),
    "no prompt file": ([{"build": {"prompt_file": "nix"}}], f"{AT}.prompt_file", "can't read "),
    "template that can't be read": (
        [{"build": {"prompt": "a\n{% if %}"}}],
        f"{AT}.prompt",
        "invalid template: line 2: ",
    ),
    "unknown name in a template": (
        [{"build": {"prompt": "{{ tsk.prompt }}"}}],
        f"{AT}.prompt",
        "unknown name 'tsk' in the template: did you mean 'task'?",
    ),
    "template with another": ([{"build": {"prompt": "{% include 'x' %}"}}], f"{AT}.prompt", "includes another"),
    "secret in a template": ([{"build": {"prompt": TOKEN}}], f"{AT}.prompt", "seems to contain a secret key"),
    "secret in a command": ([{"build": {"until": [f"x {TOKEN}"]}}], f"{AT}.until[0]", "seems to contain a secret key"),
    "secret in a value": (
        [{"build": {"context": {"a": [TOKEN]}}}],
        f"{AT}.context.a[0]",
        "seems to contain a secret key",
    ),
    "condition that can't be read": ([{"build": {"when": "a >"}}], f"{AT}.when", "invalid condition"),
    "name of a value": ([{"build": {"needs": ["a-b"]}}], f"{AT}.needs[0]", "'a-b' is not a valid value name"),
    "too large a context": ([{"build": {"context": {"a": "x" * 70_000}}}], f"{AT}.context", "use at most 65536"),
    "replacement without an adapter": (
        [{"build": {"fallback": ["x"]}}],
        f"{AT}.fallback",
        "fallback adapters, but no adapter",
    ),
    "until without work": (
        [{"build": {"access": "read", "until": ["true"]}}],
        f"{AT}.until",
        "has no work for commands to check",
    ),
    "rejection without a review": (
        ["a", {"b": {"on_reject": "a"}}],
        "workflows.w[1].b.on_reject",
        "only a review rejects",
    ),
    "rejection to nowhere": (
        ["a", {"review": {"produces": "review", "on_reject": "b"}}],
        "workflows.w[1].review.on_reject",
        "'b' is not a phase before 'review': the phases before this one are a",
    ),
    "rejection with nothing before": (
        [{"review": {"produces": "review", "on_reject": "b"}}],
        "workflows.w[0].review.on_reject",
        "no phase before",
    ),
    "rounds of nothing": (
        [{"build": {"max_rounds": 2}}],
        f"{AT}.max_rounds",
        "the work of this phase is never sent back",
    ),
    "too many rounds": ([{"build": {"until": ["x"], "max_rounds": 21}}], f"{AT}.max_rounds", "use 20 or less"),
    "expansion of no plan": ([{"build": {"expand": True}}], f"{AT}.expand", "only a plan has tasks"),
    "expansion that is text": ([{"build": {"produces": "plan", "expand": "yes"}}], f"{AT}.expand", "write true, or"),
    "expansion into nothing": (
        [{"build": {"produces": "plan", "expand": {"workflow": "v"}}}],
        f"{AT}.expand.workflow",
        "no workflow 'v'",
    ),
    "expansion into itself": (
        [{"build": {"produces": "plan", "expand": {"workflow": "w"}}}],
        "workflows.w",
        "would expand endlessly: w -> w",
    ),
    "handoff of nothing": ([{"build": {"handoff": "shared"}}], f"{AT}.handoff", "produces no handoff"),
    "transformation of what is direct": (
        [{"build": {"produces": "plan", "transform": "scout_to_plan"}}],
        f"{AT}.transform",
        "is only for mediated handoffs",
    ),
    "mediator of what is direct": (
        [{"build": {"produces": "plan", "mediator": "b"}}, "b"],
        f"{AT}.mediator",
        "is only for mediated handoffs",
    ),
    "two that mediate": (
        [
            {"build": {"produces": "plan", "handoff": "mediated", "mediator": "b", "transform": "scout_to_plan"}},
            "b",
            "c",
        ],
        f"{AT}.mediator",
        "both transform and mediator",
    ),
    "mediator that is not next": (
        [{"build": {"produces": "plan", "handoff": "mediated", "mediator": "c"}}, "b", "c"],
        f"{AT}.mediator",
        "use b",
    ),
    "mediator for nobody": (
        [{"build": {"produces": "plan", "handoff": "mediated", "mediator": "b"}}, "b"],
        f"{AT}.mediator",
        "no phase follows",
    ),
    "mediated for nobody": (
        [{"build": {"produces": "plan", "handoff": "mediated"}}],
        f"{AT}.handoff",
        "no phase follows",
    ),
    "unknown transformation": (
        [{"build": {"produces": "plan", "handoff": "mediated", "transform": "scout_to_pln"}}, "b"],
        f"{AT}.transform",
        "did you mean 'scout_to_plan'?",
    ),
    "key of what is not shared": (
        [{"build": {"produces": "plan", "key": "a"}}],
        f"{AT}.key",
        "is only for shared handoffs",
    ),
    "bad key": ([{"build": {"produces": "plan", "handoff": "shared", "key": "a//b"}}], f"{AT}.key", "can't be a name"),
    "session of nobody": ([{"build": {"session": "continue"}}], f"{AT}.session", "no phase before"),
    "session of a later phase": (
        ["a", {"b": {"session": {"continue": "c"}}}, "c"],
        "workflows.w[1].b.session.continue",
        "'c' is not a phase before",
    ),
    "session that is a list": ([{"build": {"session": []}}], f"{AT}.session", "write `continue`, or"),
    "session of another CLI": (
        [{"a": {"adapter": "codex"}}, {"b": {"adapter": "x", "session": "continue"}}],
        "workflows.w[1].b.session",
        "belongs to 'codex', not to 'x': use the same",
    ),
    "the same name twice": (["a", REVIEW, "a"], "workflows.w[2]", "the phase 'a' is already defined at workflows.w[0]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_a_phase_has_its_position(name: str, tmp_path: Path) -> None:
    """With the fix, and without further mistakes."""
    phases, place, reported = MISTAKES[name]
    found = mistakes(tmp_path, *phases)
    assert [path for path, _ in found] == [place], found
    assert reported in found[0][1]


def test_mistakes_outside_of_phases_have_their_position(tmp_path: Path) -> None:
    """Workflow names, and values without a recipient."""
    assert mistakes(tmp_path, "build", task={"workflow": "v"}) == [
        ("tasks[0].workflow", "there is no workflow 'v': the workflows are adw, w, none")
    ]
    assert mistakes(tmp_path, "build", defaults={"workflow": "adv"}) == [
        ("defaults.workflow", "there is no workflow 'adv': did you mean 'adw'?")
    ]
    (found,) = mistakes(tmp_path, task={"workflow": "none", "context": {"a": 1}})
    assert found[0] == "tasks[0].context"
    assert "but no workflow: add `workflow:`" in found[1]
    (found,) = mistakes(tmp_path, "build", workflows={"none": ["build"]}, task={"workflow": "none"})
    assert found[0] == "workflows.none"
    assert "choose another name" in found[1]
    (found,) = mistakes(tmp_path, workflows={"w": []})
    assert found == ("workflows.w", "w is an empty list: use at least 1")
    (found,) = mistakes(tmp_path, "build", context={"a": {"b": TOKEN}})
    assert found[0] == "context.a.b"


def test_mistakes_do_not_hide_each_other(tmp_path: Path) -> None:
    """Mistakes of shape, order, names and unused workflows are reported together."""
    found = mistakes(
        tmp_path,
        workflows={
            "w": [{"a": {"acess": "read"}}, {"b": {"session": {"continue": "z"}, "when": "("}}],
            "unused": [{"c": {"prompt": "{{ x }}"}}],
        },
    )
    assert [path for path, _ in found] == [
        "workflows.w[0].a.acess",
        "workflows.w[1].b.session.continue",
        "workflows.w[1].b.when",
        "workflows.unused[0].c.prompt",
    ]


def test_invalid_key_hides_no_other_mistake_of_its_phase(tmp_path: Path) -> None:
    """Nor does its default conflict with other keys."""
    plan = {"plan": {"access": "red", "produces": "nokind", "when": "(((", "prompt": "{{ nope"}}
    build = {"build": {"until": "make", "max_rounds": 3, "produces": "other"}}
    review = {"review": {"produces": "review", "max_rounds": 0, "on_reject": "zzz"}}
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, plan, build, review)
    reported = [str(problem) for problem in raised.value.problems]
    words = ("access", "'nokind'", "condition", "template", "until", "'other'", "max_rounds is the number 0", "'zzz'")
    assert all(any(word in one for one in reported) for word in words), reported
    assert len(reported) == len(words), reported


def test_positions_in_a_file_have_lines(tmp_path: Path) -> None:
    """With line and column."""
    text = "version: 1\nadapters: {x: {use: command, argv: [x]}}\nworkflows:\n  w:\n    - build:\n        when: '('\n"
    (tmp_path / "council.yaml").write_text(f"{text}tasks: [{{id: a, prompt: p, workflow: w}}]\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "council.yaml", TYPES)
    assert [(one.line, one.column) for one in caught.value.problems] == [(6, 15)]


def test_exported_workflow_is_equal(tmp_path: Path) -> None:
    """A file accepts the phases that `council workflow show` prints."""
    config = read(
        tmp_path,
        {"look": {"access": "read", "produces": {"kind": "k", "schema": {"type": "object"}},
                  "prompt": "a\n\n  b: c\n"}},
        {"plan": {"produces": "plan", "expand": {"max": 3, "workflow": "adw"}, "session": "continue", "timeout": "90s",
                  "handoff": "mediated", "mediator": "build", "needs": [], "context": {"a": ["on", "1", None]}}},
        {"build": {"adapter": "x", "fallback": ["codex"], "until": ["true"], "max_rounds": 2, "when": "k is defined",
                   "session": {"continue": "look"}, "approve": True, "produces": "build", "handoff": "shared",
                   "key": "a/b"}},
        {"review": {"produces": "review", "on_reject": "look"}},
    )  # fmt: skip
    again = yaml.safe_load(workflows_to_yaml(config.workflows))
    assert read(tmp_path, workflows=again["workflows"]).workflows == config.workflows


def test_copied_workflow_is_equal(tmp_path: Path) -> None:
    """The files of `council workflow copy` define the copied workflow."""
    phases = builtin_phases()["adw"]
    files = build_workflow_files("adw", phases, Path("flows"))
    (tmp_path / "flows").mkdir()
    for path, text in files.items():
        (tmp_path / path).write_text(text)
    section = yaml.safe_load((tmp_path / "flows/adw.yaml").read_text())
    config = read(tmp_path, workflows=section["workflows"], task={"workflow": "adw"})
    assert config.workflows["adw"] == phases
    (tmp_path / "flows/plan.md.j2").write_text("Plan {{ task.id }}.\n")
    config = read(tmp_path, workflows=section["workflows"], task={"workflow": "adw"})
    assert config.workflows["adw"][1].prompt == "Plan {{ task.id }}.\n"


def test_phases_survive_json(tmp_path: Path) -> None:
    """A resumed run has its original phases."""
    phases = read(tmp_path, {"a": {"produces": {"kind": "k", "schema": {}}}}, "b").workflows["w"]
    stored = json.loads(json.dumps([one.model_dump(mode="json", by_alias=True) for one in phases]))
    assert tuple(map(Phase.model_validate, stored)) == phases


def test_each_kind_has_a_template() -> None:
    """Each phase of the supplied workflow has one, and other kinds share one."""
    assert all(read_builtin_template(name).strip() for name in BUILTIN_TEMPLATES)
    assert {one.prompt for one in builtin_phases()["adw"]} < {read_builtin_template(name) for name in BUILTIN_TEMPLATES}

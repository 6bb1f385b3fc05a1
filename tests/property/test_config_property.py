"""Loading any file gives a run config or a ConfigError."""

import string
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from adapters.command.adapter import CommandAdapter
from orchestrator.config.load import load_config
from orchestrator.config.model import RunConfig
from orchestrator.domain.scheduling.dependencies import find_cycles
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.errors import ConfigError
from tests.hypothesis_settings import example_settings

# The machine may be busy: the duration of an example has no meaning.
unhurried = example_settings(60)
PIECES = [
    "version",
    "adapters",
    "tasks",
    "defaults",
    "backoff",
    "id",
    "prompt",
    "prompt_file",
    "needs",
    "adapter",
    "use",
    "command",
    "argv",
    "env",
    "repo",
    "base",
    "worktrees",
    "setup",
    "run",
    "copy",
    "link",
    "keep_ignored",
    "1",
    "0",
    "-1",
    "1e999",
    ".nan",
    "0x",
    "30m",
    "1ms",
    "main",
    "a..b",
    "refs/",
    "{prompt}",
    "{nope}",
    "{{x}}",
    ":",
    "-",
    "?",
    "|",
    ">",
    "&",
    "*",
    "!",
    "%YAML",
    "---",
    "...",
    ",",
    "[",
    "]",
    "{",
    "}",
    "'",
    '"',
    "#",
    "<<:",
    "&a",
    "*a",
    "!!str",
    "!x",
    "\\",
    "\\u0000",
    '"\\ud800"',
    "~",
    "null",
    "true",
    "on",
    "@",
    "`",
    "a",
    "A",
    "b",
    ".",
    "..",
    "\n",
    "\n  ",
    "\n    ",
    " ",
    ": ",
    "- ",
    "\t",
    "\0",
    "\x85",
    "\u2028",
    "\ufeff",
    "\r",
    "é",
    "\U0001f642",
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(PIECES)
KEYS = st.sampled_from([piece for piece in PIECES if piece[0] in string.ascii_letters]) | st.text(max_size=4)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)


def load(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> RunConfig | ConfigError:
    path = tmp_path_factory.getbasetemp() / "council.yaml"
    path.write_bytes(data)
    try:
        return load_config(path, {"command": CommandAdapter})
    except ConfigError as error:
        refused = error
    places = [(found.line, found.column) for found in refused.problems]
    assert places
    assert places == sorted(places)
    assert min(min(place) for place in places) > 0
    assert all(found.message and found.remedy for found in refused.problems)
    return refused


@unhurried
@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf\xef\xbb\xbfa: b")
def test_config_of_any_bytes_is_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Arbitrary bytes end in a ConfigError."""
    load(tmp_path_factory, data)


@example_settings(100)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
@example("? ? ? a")
@example("- - - {[}")
@example("%YAML 3.0\n---\na")
@example("%TAG ! tag:x,2000:\n---\na: !b c")
@example("a: \ufeffb")
@example('a: "\\UFFFFFFFF"')
def test_config_of_any_text_is_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Text built from fragments of YAML and the format."""
    load(tmp_path_factory, text.encode())


@unhurried
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
@example('a: "\\UFFFFFFFF"')
@example('a: "\\ud800"')
def test_config_of_any_text_without_libyaml_is_read_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """The same without the C part of PyYAML."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(yaml, "CSafeLoader")
        load(tmp_path_factory, text.encode())


@example_settings(100)
@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("version", "repo", "base", "adapters", "defaults", "worktrees", "tasks"), TREES)
    )
)
def test_config_of_any_values_is_read_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    """Valid YAML with any value at any place."""
    load(tmp_path_factory, yaml.safe_dump(tree, allow_unicode=True).encode(errors="replace"))


PROMPTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)


@unhurried
@given(st.lists(PROMPTS, min_size=1, max_size=5))
def test_prompt_is_read_unchanged(tmp_path_factory: pytest.TempPathFactory, prompts: list[str]) -> None:
    """Also after being stored."""
    # Quoted, because YAML 1.2 reads more plain scalars as numbers than the dumper knows.
    quoted = [yaml.safe_dump(prompt, default_style='"', width=1 << 20).rstrip("\n") for prompt in prompts]
    lines = ["version: 1", "adapters: {x: {use: command, argv: [x]}}", "tasks:"]
    lines += [f"  - {{id: t{number}, prompt: {text}}}" for number, text in enumerate(quoted)]
    config = load(tmp_path_factory, "\n".join(lines).encode())
    assert isinstance(config, RunConfig)
    assert [task.prompt for task in config.tasks] == prompts
    assert tuple(TaskSpec.model_validate(task.model_dump(mode="json")) for task in config.tasks) == config.tasks


NODES = st.sampled_from("abcdefg")


def leads_back(needs: dict[str, list[str]], start: str) -> bool:
    """Return whether a task reaches itself."""
    reached, waiting = set(), list(needs[start])
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting.extend(needs.get(node, ()))
    return start in reached


@unhurried
@given(st.dictionaries(NODES, st.lists(NODES, unique=True, max_size=4)))
def test_circular_needs_are_found(needs: dict[str, list[str]]) -> None:
    circles = find_cycles(needs)
    for circle in circles:
        assert all(after in needs[task] for task, after in zip(circle, [*circle[1:], circle[0]], strict=True))
    named = [task for circle in circles for task in circle]
    assert len(named) == len(set(named))
    for task in needs:
        if leads_back(needs, task):
            assert any(knotted(needs, task, other) for other in named)


def knotted(needs: dict[str, list[str]], one: str, other: str) -> bool:
    """Return whether two tasks reach each other."""
    return one == other or (leads_to(needs, one, other) and leads_to(needs, other, one))


def leads_to(needs: dict[str, list[str]], start: str, end: str) -> bool:
    """Return whether one task reaches another."""
    return leads_back({**needs, "start": [start], end: [*needs[end], "start"]}, "start")

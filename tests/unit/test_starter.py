"""The generated first file loads for any findings."""

from __future__ import annotations

from pathlib import Path

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.config.load import load_config
from orchestrator.config.source.document import read_document
from orchestrator.config.source.problems import Problems
from orchestrator.config.starter import Starter, StarterAdapter, scalar, starter_text
from orchestrator.domain.settings.run_settings import WorktreeSettings
from orchestrator.plugins import load_plugins

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(TEXT)
@example("on")
@example("No")
@example("null")
@example("0x10")
@example("1.0")
@example("a: b")
@example("a #b")
@example("-")
def test_any_text_becomes_one_scalar(text: str) -> None:
    """It parses to the same text in our reader and in YAML 1.1, and is one line."""
    line = f"key: {scalar(text)}"
    assert "\n" not in line
    problems = Problems("x")
    node = read_document(line + "\n", problems)
    assert node is not None
    assert node.value == {"key": text}
    assert not problems
    assert yaml.safe_load(line) == {"key": text}


@given(found=TEXT, check=TEXT.filter(str.strip), missing=st.none() | TEXT)
def test_starter_is_valid_yaml_for_any_findings(found: str, check: str, missing: str | None) -> None:
    """Output of programs and file names cannot break out of a comment or a value."""
    adapters = [StarterAdapter("a", found), StarterAdapter("b", "")]
    value = yaml.safe_load(starter_text(Starter(".", "main", adapters, check, check, check, [check], missing, None)))
    assert value["adapters"] == {"a": {"use": "a"}, "b": {"use": "b"}}
    if missing is None:
        assert value["defaults"]["checks"] == [check]
        assert value["worktrees"] == {"setup": [{"run": check, "inputs": [check]}]}
    else:
        assert "checks" not in value["defaults"]
        assert "worktrees" not in value
    assert value["defaults"]["adapter"] == "a"


def test_starter_without_an_adapter_loads(tmp_path: Path) -> None:
    """The placeholder program is valid, and only the schema name depends on it."""
    for schema in (None, ".council/schema.json"):
        text = starter_text(Starter(".", "main", [], None, None, None, (), None, schema))
        (tmp_path / "council.yaml").write_text(text)
        config = load_config(tmp_path / "council.yaml", load_plugins().adapters)
        assert [task.adapter for task in config.tasks] == ["my-cli"]
        assert config.worktrees == WorktreeSettings()
        assert text.startswith("# yaml-language-server: $schema=.council/schema.json\n") is (schema is not None)


def test_hinted_lines_load(tmp_path: Path) -> None:
    """Commented keys at the top become valid by removing the `#`."""
    text = starter_text(Starter(".", "trunk", [], None, None, None, (), None, None)).replace("\n# target", "\ntarget")
    (tmp_path / "council.yaml").write_text(text.replace("\n# worktrees", "\nworktrees"))
    config = load_config(tmp_path / "council.yaml", load_plugins().adapters)
    assert (config.target, config.worktrees.copied) == ("trunk", (".env",))

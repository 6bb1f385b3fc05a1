"""The documented recipes for a virtual environment work as written, in sessions and in checks."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import FAKE_CLI, Repository
from tests.integration.shell.test_init import PASSES, RUNNER, wheel

DOCS = Path(__file__).parents[3] / "docs"
RECIPES = {
    page: [
        found
        for block in re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
        if isinstance(found := yaml.safe_load(block), dict)
        and any("-m venv" in str(step) for step in found.get("worktrees", {}).get("setup", ()))
    ]
    for page in ("configuration.md", "quick-start.md")
}
#: The check of recipes that show none.
CHECKS = [".venv/bin/python -m pytest -q"]


@pytest.mark.extended
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("page", "number"), [(page, number) for page, found in RECIPES.items() for number in range(len(found))]
)
async def test_documented_virtual_environment_works_in_checks(repository: Repository, page: str, number: int) -> None:
    """Setup installs the requirements, here of a folder; the base and the merge pass, and doctor finds no problem."""
    recipe = RECIPES[page][number]
    setup = [step for step in recipe["worktrees"]["setup"] if "-m venv" in str(step)]
    checks = recipe.get("defaults", {}).get("checks", CHECKS)
    (repository.top / "vendor").mkdir()
    wheel(repository.top / "vendor", "pytest", RUNNER)
    wheel(repository.top / "vendor", "dependency", "")
    requirements = "--no-index\n--find-links vendor\npytest\ndependency\n"
    test = {"tests/__init__.py": "", "tests/test_it.py": PASSES.format(module="dependency")}
    repository.commit({".gitignore": ".venv/\n", "requirements.txt": requirements, **test})
    repository.remember()
    settings: dict[str, Any] = {"worktrees": {"setup": setup}, "defaults": {"checks": checks}}
    readable = [sys.prefix, str(FAKE_CLI.parents[1])]
    task = {"id": "a", "prompt": "write a.txt a"}
    config = str(repository.configure([task], readable=readable, **settings))
    found = repository.council("doctor", config, "--json").result["findings"]
    assert [one for one in found if one["name"] == "programs" and one["level"] != "ok"] == []
    ended = repository.council("run", config, "--json", timeout=250)
    assert ended.states == {"a": "landed"}, ended
    passed = [line.get("event") for line in ended.lines]
    assert ("base.passed" in passed, "task.checking" in passed) == (True, True)
    await repository.assert_invariants()


def test_each_documented_page_has_a_recipe() -> None:
    """Otherwise the test above would pass without one."""
    assert [page for page, found in RECIPES.items() if not found] == []
    assert any("checks" in recipe.get("defaults", {}) for recipe in RECIPES["configuration.md"])

"""`council validate` reads a file as `run` does; the schemas of `council schema` match real output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.conftest import Repository

TASKS = [{"id": "one", "prompt": "write one.txt 1"}]


async def test_valid_file_is_accepted(repository: Repository) -> None:
    """It summarizes the file, starts nothing, and creates no project."""
    config = repository.configure(TASKS, target="out", defaults={"checks": ["true"]})
    text = repository.council("validate", str(config))
    assert (text.code, text.stderr) == (0, "")
    assert text.stdout == f"{config} is valid: 1 task, 1 adapter, from main onto out\n"
    reported = repository.council("validate", str(config), "--json")
    assert reported.lines == [
        {
            "status": "valid",
            "file": str(config),
            "tasks": 1,
            "adapters": ["fake"],
            "errors": [],
            "warnings": [],
            "exit": 0,
        }
    ]
    assert not (repository.top / ".council").exists()
    assert not repository.spawns.exists()


async def test_invalid_file_is_reported_like_by_run(repository: Repository) -> None:
    """Exit code 2 with every mistake, in the same words."""
    config = repository.top / "bad.yaml"
    config.write_text("version: 1\nrepositry: .\ntasks:\n  - id: a\n    needs: [b]\n    prompt: x\n")
    for options in ([], ["--json"]):
        validated, ran = (repository.council(command, str(config), *options) for command in ("validate", "run"))
        assert validated.code == 2
        assert validated == ran
    assert repository.council("validate", str(config), "--json").result["errors"][0]["line"] == 1


async def test_unusual_settings_are_warnings_with_a_remedy(repository: Repository) -> None:
    """A checked-out target, a writable repository, unchecked work, unused servers; exit code 0."""
    servers = {"tickets": {"command": ["tickets-mcp"]}}
    config = repository.configure(TASKS, target="main", writable=[str(repository.top)], mcp_servers=servers)
    reported = repository.council("validate", str(config), "--json")
    assert (reported.code, reported.result["exit"]) == (0, 0)
    assert [warning["message"].split(" ", 2)[0:2] for warning in reported.result["warnings"]] == [
        ["the", "target"], ["`writable`", "lets"], ["no", "task"], ["adapters", "'fake'"],
    ]  # fmt: skip
    assert all(warning["remedy"] for warning in reported.result["warnings"])
    text = repository.council("validate", str(config))
    assert text.stdout.count("\nwarning: ") == 4
    (repository.top / ".git").rename(repository.top / "no-git")
    assert len(repository.council("validate", str(config), "--json").result["warnings"]) == 2


@pytest.mark.extended_variants
@pytest.mark.parametrize("checks", [[], ["true"]])
async def test_doctor_has_the_same_warnings(repository: Repository, checks: list[str]) -> None:
    """With its remedies: for the checked-out target, and for the file's settings."""
    config = str(repository.configure([{"id": "a", "prompt": "x", "checks": checks}]))
    warnings = repository.council("validate", config, "--json").result["warnings"]
    findings = repository.council("doctor", config, "--json").result["findings"]
    reported = [{"message": one["message"], "remedy": one["remedy"]} for one in findings if one["level"] == "warning"]
    assert any("checked out in" in one["message"] for one in warnings)
    assert [one for one in reported if one in warnings] == warnings
    planned = repository.council("run", config, "--dry-run", "--json").result["findings"]
    assert [one for one in findings if one["name"] == "file"][1:] == [one for one in planned if one["name"] == "file"]


async def test_default_file_is_found(repository: Repository) -> None:
    """council.yaml in this folder, then at the top of the repository; otherwise it reports that there is none."""
    missing = repository.council("validate", "--json")
    assert (missing.code, missing.result["status"]) == (2, "refused")
    assert "council init" in missing.result["remedy"]
    (repository.top / "council.yaml").write_text(repository.configure(TASKS).read_text())
    (repository.top / "sub").mkdir()
    inner = Repository(repository.top / "sub", repository.environ, repository.spawns)
    assert inner.council("validate", "--json").result["file"] == str(repository.top / "council.yaml")


async def test_real_results_match_their_schema(repository: Repository) -> None:
    """The last output of run, status and cancel, with tasks of every outcome."""
    schema = json.loads(repository.council("schema", "--result").stdout)
    validator = Draft202012Validator(schema)
    tasks: list[dict[str, Any]] = [
        {"id": "good", "prompt": "write good.txt 1"},
        {"id": "idle", "prompt": "print nothing"},
        {"id": "bad", "prompt": "write bad.txt 1\nexit 3", "attempts": 1},
        {"id": "after", "prompt": "write after.txt 1", "needs": ["bad"]},
    ]
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    assert set(ended.states.values()) == {"landed", "no_change", "failed", "blocked"}
    for result in (
        ended.result,
        *(repository.council(*command, "--json").result for command in (["status"], ["cancel", "--yes"])),
    ):
        validator.validate(result)
        assert not validator.is_valid({**result, "status": "done"})
        assert not validator.is_valid({**result, "tasks": [{**result["tasks"][0], "status": "lost"}]})
    await repository.assert_invariants()


async def test_schema_of_the_file_is_the_shipped_one(repository: Repository) -> None:
    """The command prints the schema next to the examples."""
    shipped = Path(__file__).parents[3] / "configs/council.schema.json"
    assert repository.council("schema").stdout == shipped.read_text()

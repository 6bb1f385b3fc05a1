"""Coordination settings: options override the environment, which overrides the file."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from adapters.command.adapter import CommandAdapter
from orchestrator.cli.commands.runs.run_options import coordination_options
from orchestrator.config.coordination import (
    ENVIRONMENT_VARIABLES,
    CoordinationOverrides,
    read_environment,
    resolve_coordination,
)
from orchestrator.config.load import load_config
from orchestrator.domain.settings.run_settings import CoordinationSettings
from orchestrator.errors import ConfigError, RefusedError
from tests.unit.test_config_load import SMALLEST

ROOT = Path(__file__).parents[2]
EXAMPLE = (ROOT / ".env.example").read_text()
LINES = dict(re.findall(r"^([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE))
DEFAULT = CoordinationSettings()


def loaded(folder: Path, section: str) -> CoordinationSettings:
    path = folder / "council.yaml"
    path.write_text(f"coordination: {section}\n{SMALLEST}")
    return load_config(path, {"command": CommandAdapter}).coordination


def refused(environ: dict[str, str], options: CoordinationOverrides | None = None) -> str:
    with pytest.raises(RefusedError) as caught:
        resolve_coordination(DEFAULT, environ, options)
    return str(caught.value)


def test_example_environment_has_each_variable_with_its_default() -> None:
    """`.env.example` used unchanged equals the defaults, and has no other variables."""
    assert LINES.keys() == set(ENVIRONMENT_VARIABLES.values())
    assert read_environment(LINES).explicit() == {key: getattr(DEFAULT, key) for key in ENVIRONMENT_VARIABLES}
    assert resolve_coordination(DEFAULT, LINES) == DEFAULT


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("SHARED_STATE_ENABLED", "false", "enabled", False),
        ("SHARED_STATE_ENABLED", "0", "enabled", False),
        ("SHARED_STATE_HEARTBEAT_INTERVAL_MS", "1500", "heartbeat_interval", 1.5),
        ("SHARED_STATE_STALE_THRESHOLD_MS", "240000", "stale_after", 240.0),
        ("TASK_CLAIM_OWNER_STALE_TTL_MS", "300000", "owner_stale_after", 300.0),
        ("SHARED_STATE_MAX_RETRIES", "0", "max_retries", 0),
    ],
)
def test_each_variable_is_read(variable: str, text: str, key: str, value: float | bool) -> None:
    """A variable overrides the file; an empty one is ignored."""
    assert resolve_coordination(DEFAULT, {variable: text}) == DEFAULT.model_copy(update={key: value})
    assert resolve_coordination(DEFAULT, {variable: " "}) == DEFAULT


def test_options_override_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    """Each key is resolved by itself."""
    file = loaded(tmp_path, "{heartbeat_interval: 10s, stale_after: 100s, max_retries: 7, when_unreachable: continue}")
    environ = {"SHARED_STATE_STALE_THRESHOLD_MS": "200000", "SHARED_STATE_MAX_RETRIES": "8"}
    found = resolve_coordination(file, environ, CoordinationOverrides(max_retries=9))
    assert found == CoordinationSettings(
        heartbeat_interval=10.0, stale_after=200.0, max_retries=9, when_unreachable="continue"
    )


def test_empty_file_gets_the_defaults(tmp_path: Path) -> None:
    """The defaults are defined once."""
    assert loaded(tmp_path, "{}") == DEFAULT
    assert DEFAULT.model_dump(include={"heartbeat_interval", "stale_after", "owner_stale_after", "max_retries"}) == {
        "heartbeat_interval": 60.0,
        "stale_after": 300.0,
        "owner_stale_after": 600.0,
        "max_retries": 3,
    }


def test_every_key_is_accepted(tmp_path: Path) -> None:
    """No key is dropped, and the resolved settings survive being recorded."""
    section = (
        "{enabled: false, heartbeat_interval: 1s, stale_after: 3s, owner_stale_after: 4s, stale_check_interval: 5s, "
        "max_retries: 6, when_unreachable: continue, role: worker, tools: false, lock_timeout: 7s}"
    )
    found = loaded(tmp_path, section)
    assert list(found.model_dump().values()) == [False, 1.0, 3.0, 4.0, 5.0, 6, "continue", "worker", False, 7.0]
    assert CoordinationSettings.model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("section", "column", "message"),
    [
        ("{heartbeat_interval: 2m}", 36, ("`heartbeat_interval` (2m) is more than a third of `stale_after` (5m): "
         "use at most")),
        ("{heartbeat_interval: 2m}", 36, "`heartbeat_interval: 1m40s`, or at least `stale_after: 6m`"),
        ("{stale_after: 30s}", 29, ("`heartbeat_interval` (1m) is more than a third of `stale_after` (30s): "
         "use at most `heartbeat_interval: 10s`")),
        ("{stale_after: 15m}", 29, ("`stale_after` (15m) is more than `owner_stale_after` (10m): "
         "use at most `stale_after: 10m`")),
        ("{owner_stale_after: 1m}", 35, "`stale_after` (5m) is more than `owner_stale_after` (1m)"),
        ("{heartbeat_interval: 60}", 36, "a duration can't be the bare number 60: add its unit"),
        ("{max_retries: 100}", 29, "use 99 or less"),
        ("{when_unreachable: wait}", 34, "use 'pause' or 'continue'"),
        ("{heartbeat_intervals: 1s}", 16, "did you mean 'heartbeat_interval'?"),
        ("{stale_after: }", 29, "stale_after is empty"),
    ],
)  # fmt: skip
def test_mistake_has_its_position(tmp_path: Path, section: str, column: int, message: str) -> None:
    """The message has the fix; for two contradicting durations it names both."""
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, section)
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (1, column), problem
    assert message in str(problem)


@pytest.mark.parametrize(
    ("variable", "text", "remedy"),
    [
        ("SHARED_STATE_ENABLED", "maybe", "use true or false"),
        ("SHARED_STATE_HEARTBEAT_INTERVAL_MS", "60s", "use a positive whole number of milliseconds, such as 60000"),
        ("SHARED_STATE_STALE_THRESHOLD_MS", "0", "such as 300000"),
        ("TASK_CLAIM_OWNER_STALE_TTL_MS", "9" * 12, "such as 600000"),
        ("SHARED_STATE_MAX_RETRIES", "-1", "use a whole number from 0 to 99, such as 3"),
        ("SHARED_STATE_MAX_RETRIES", "٣", "use a whole number from 0 to 99, such as 3"),
    ],
)
def test_unreadable_variable_is_named(variable: str, text: str, remedy: str) -> None:
    """The message says what to write."""
    assert refused({variable: text}).startswith(f"invalid value {text!r} of {variable}: ")
    assert remedy in refused({variable: text})


def test_all_mistakes_of_the_environment_are_reported_at_once() -> None:
    """Each by its variable."""
    reported = refused({"SHARED_STATE_ENABLED": "x", "SHARED_STATE_MAX_RETRIES": "y"})
    assert "SHARED_STATE_ENABLED" in reported
    assert "SHARED_STATE_MAX_RETRIES" in reported


def test_contradiction_is_reported_for_its_source() -> None:
    reported = refused({"SHARED_STATE_STALE_THRESHOLD_MS": "30000"})
    assert "`heartbeat_interval` (1m) is more than a third of SHARED_STATE_STALE_THRESHOLD_MS (30000)" in reported
    assert "use at most SHARED_STATE_HEARTBEAT_INTERVAL_MS=10000" in reported
    assert "or at least SHARED_STATE_STALE_THRESHOLD_MS=180000" in reported
    reported = refused({}, CoordinationOverrides(stale_after=10.0))
    assert "more than a third of --stale (10s): use at most --heartbeat 3s333ms, or at least --stale 3m" in reported
    reported = refused({}, CoordinationOverrides(stale_after=700.0))
    assert "or at least TASK_CLAIM_OWNER_STALE_TTL_MS=700000" in reported, "no option sets this value"


def test_options_reach_the_command() -> None:
    got = []

    @click.command()
    @click.option("--other")
    @coordination_options
    def command(other: str | None, coordination: CoordinationOverrides) -> None:
        got.append((other, coordination))

    words = ["--heartbeat=1s", "--stale=1m", "--max-retries=2", "--when-unreachable=continue", "--no-coordination"]
    assert CliRunner().invoke(command, [*words, "--other=x"]).exit_code == 0
    given = CoordinationOverrides(
        enabled=False, heartbeat_interval=1.0, stale_after=60.0, max_retries=2, when_unreachable="continue"
    )
    assert CliRunner().invoke(command, []).exit_code == 0
    assert got == [("x", given), (None, CoordinationOverrides())]
    for wrong in ("--heartbeat 1", "--max-retries -1", "--when-unreachable stop"):
        assert CliRunner().invoke(command, wrong.split()).exit_code == 2

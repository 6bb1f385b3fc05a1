"""Options that all commands share."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Repository


def test_exclusive_options_are_a_usage_error(repository: Repository) -> None:
    refused = repository.council("schema", "--result", "--task-details")
    assert refused.code == 2
    assert "--result, --task-details and --events cannot be combined." in refused.stderr
    assert "internal error" not in refused.stderr


@pytest.mark.parametrize("words", [("locks", "--json", "break"), ("locks", "break", "--json")])
def test_json_applies_to_a_subcommand_before_and_after_its_name(repository: Repository, words: tuple[str, ...]) -> None:
    refused = repository.council(*words, "ownership/none", "--reason", "a test")
    assert refused.code == 2
    assert json.loads(refused.stdout)["status"] == "refused"

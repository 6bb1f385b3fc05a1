"""docs/coordination.md and its part of docs/function-mapping.md match the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from orchestrator.client.commands import MAX_HANDOFF_BYTES, MAX_REQUEST_BYTES, MAX_SHARED_BYTES, MAX_WAIT_SECONDS
from orchestrator.client.strict_json import MAX_DEPTH
from orchestrator.domain.scheduling.path_ownership import MAX_OWNED_CHARS, MAX_OWNED_PATTERNS
from orchestrator.domain.sessions.contexts import MAX_MESSAGE_CHARS, STALE_CONTEXT_SECONDS, SessionContext
from orchestrator.domain.sessions.notes import (
    MAX_BLOCK_CHARS,
    MAX_NOTES,
    MAX_PATHS_CHARS,
    MAX_TASK_NOTES,
    MAX_TEXT_BYTES,
)
from orchestrator.engine.session_api import details
from orchestrator.engine.session_api.shared_values import DEFAULT_WAIT, MAX_BYTES, MAX_KEY_LENGTH, MAX_KEYS
from tests.replaced_functions import ReplacedFunctionsContract, check_test, rows, sections

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs/coordination.md").read_text()
MAPPING: Final = (ROOT / "docs/function-mapping.md").read_text()
CLAIMS, SESSIONS = "Distributed claims", "Parallel sessions"
TEN: Final = (
    "test_create_session_worktree",
    "test_parallel_sessions_same_task",
    "test_commit_in_worktree",
    "test_file_lock_acquisition",
    "test_lock_conflict_detection",
    "test_merge_lock_coordination",
    "test_update_and_read_context",
    "test_conflict_detection",
    "test_task_summary",
    "test_parallel_execution_workflow",
)

#: The tables of functions; each is followed by another table of two columns.
FUNCTIONS: Final = [row for name in (CLAIMS, SESSIONS) for row in rows(sections(MAPPING)[name]) if len(row) == 3]
#: Other words in code spans: keys, values, arguments, and the name of a logger.
_WORDS: Final = {
    *("async with", "continue", "enabled", "heartbeat_interval", "max_retries", "orchestrator.claims", "override"),
    *("owner_stale_after", "pause", "stale_after", "when_unreachable"),
}


class TestFunctions(ReplacedFunctionsContract):
    """Check both tables of functions."""

    functions = FUNCTIONS
    fewest = 40

    def is_word(self, name: str) -> bool:
        """Accept keys, values, arguments and a logger."""
        return name in _WORDS


def test_ten_parallel_session_tests_exist() -> None:
    for name in TEN:
        whole = f"tests/integration/coordination/test_coordination.py::{name}"
        check_test(whole)
        assert f"`{whole}`" in MAPPING


def test_each_variable_is_in_the_example() -> None:
    """And the example has no others."""
    named = {row[0].strip("`") for row in rows(sections(MAPPING)[CLAIMS]) if row[0].startswith(("`SHARED", "`TASK"))}
    assert named == set(re.findall(r"^([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))


def test_record_fields_and_bounds_match_the_code() -> None:
    """Both ways: none is missing and none is invented."""
    reported = {name for row in rows(sections(PAGE)["Session context"]) for name in re.findall(r"`(\w+)`", row[0])}
    assert reported == set(SessionContext.model_fields)
    text = " ".join(PAGE.split())
    assert (STALE_CONTEXT_SECONDS, MAX_MESSAGE_CHARS) == (1800, 500)
    for bound in (f"up to {MAX_TEXT_BYTES // 1024} KiB", f"most {MAX_NOTES} notes are kept",
                  f"limited to {MAX_BLOCK_CHARS:,} char",
                  f"up to {MAX_PATHS_CHARS:,} characters", f"at most {MAX_TASK_NOTES} per task",
                  f"{MAX_OWNED_PATTERNS:,} paths, with {MAX_OWNED_CHARS:,} characters"):  # fmt: skip
        assert bound in text
    assert (
        f"at most {MAX_SHARED_BYTES >> 10} KiB. A run has up to {MAX_KEYS} values, with {MAX_BYTES >> 20} MiB" in text
    )
    assert f"up to {MAX_KEY_LENGTH} characters" in text
    assert f"times out after {DEFAULT_WAIT:g} s (`--timeout`, at most {MAX_WAIT_SECONDS:g} s)" in text
    assert f"at most {MAX_HANDOFF_BYTES >> 20} MiB of JSON in UTF-8, nested at most {MAX_DEPTH} levels" in text
    assert f"has at most {MAX_REQUEST_BYTES / (1 << 20):g} MiB" in text
    assert f"{details.MAX_DIFF_LENGTH:,} characters, and the log to the last {details.MAX_LOG_LENGTH:,}" in text

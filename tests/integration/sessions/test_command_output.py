"""A program configured in YAML alone: its output decides the outcome, and the next session resumes."""

from __future__ import annotations

from typing import Any

from tests.conftest import Repository

#: It keeps its conversation in its home, and prints the total usage; it aborts in the first session.
PROGRAM = r"""
id=${2:-s1}
echo "$id $*" >> "$HOME/conversation"
sessions=$(wc -l < "$HOME/conversation")
echo "{\"id\": \"$id\"}"
echo "{\"type\": \"usage\", \"in\": $((sessions * 100)), \"out\": $((sessions * 10))}"
echo "$sessions" > sessions.txt
test "$sessions" -lt 2 || echo '{"type": "end", "text": "All is done."}'
"""
OPTIONS: dict[str, Any] = {
    "use": "command",
    "argv": ["sh", "-c", PROGRAM, "program"],
    "home": "own",
    "resume": ["--resume", "{session}"],
    "output": "jsonl",
    "read": [
        {"session": "id"},
        {"when": {"type": "usage"}, "input_tokens": "in", "output_tokens": "out", "usage": "conversation"},
        {"when": {"type": "end"}, "text": "text", "done": True},
    ],
}


async def test_half_work_does_not_land_and_is_continued(repository: Repository) -> None:
    """Exit code 0 without the configured final line is a failure; the next attempt has the conversation."""
    tasks = [{"id": "t", "prompt": "x", "attempts": 2}]
    backoff = {"initial": "10ms", "max": "10ms"}
    config = repository.configure(tasks, adapters={"x": OPTIONS}, defaults={"backoff": backoff})
    ended = repository.council("run", str(config), "--json")
    task = ended.result["tasks"][0]
    assert (task["status"], task["attempts"]) == ("landed", 2), ended
    assert (repository.top / "sessions.txt").read_text() == "2\n"
    assert (task["input_tokens"], task["output_tokens"]) == (200, 20)
    await repository.assert_invariants()


async def test_attempts_without_a_result_fail(repository: Repository) -> None:
    """Also if the attempt has changed files; the reason names the missing output."""
    options = {**OPTIONS, "argv": ["sh", "-c", "echo x > x.txt"]}
    config = repository.configure([{"id": "t", "prompt": "x", "attempts": 1}], adapters={"x": options})
    task = repository.council("run", str(config), "--json").result["tasks"][0]
    assert (task["status"], task["failure"]) == ("failed", "crashed")
    assert task["reason"] == 'it ended without a line with type: "end"'
    await repository.assert_invariants()

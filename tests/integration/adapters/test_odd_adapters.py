"""A faulty output parser of an adapter affects its own tasks only."""

from __future__ import annotations

import pytest

from adapters.claude_code import ClaudeCodeAdapter, ClaudeCodeOptions
from adapters.json_output import parse_bridge_line
from tests.conftest import Repository
from tests.fake_programs import install_plugin

_ODD = """
import pluggy
from pydantic import BaseModel
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.runs.outcome import Failed
from orchestrator.protocols import SessionCommand, FinalResult, ConversationStarted, Program, AgentMessage, UsageReport

hookimpl = pluggy.HookimplMarker("cli_council")


class Odd:
    class Options(BaseModel):
        model_config = {"extra": "forbid"}

    def __init__(self, options, /):
        pass

    def capabilities(self):
        return frozenset()

    def programs(self):
        return (Program("sh"),)

    def command(self, request):
        return SessionCommand(argv=["sh", str(request.prompt_file)])

    def parse(self, line):
        if line == "raise":
            raise OverflowError("int too large to convert to float")
        failed = Failed(FailureClass.INVALID, "cut in \\ud83d", float("nan")) if line == "fail" else None
        spent = UsageReport(1, 1, float("inf"))
        said = AgentMessage("half \\ud83d")
        return (ConversationStarted("\\udc80\\0"), spent, said, FinalResult("end \\ud83d", failed))

    def verdict(self, end):
        return next((one.failed for one in end.events if isinstance(one, FinalResult) and one.failed), None)


@hookimpl
def council_register_adapters(register):
    register("odd", Odd)
"""


async def test_error_of_an_adapter_fails_its_task_only(repository: Repository) -> None:
    """Exceptions, half characters and invalid numbers end no run: the other tasks land."""
    install_plugin(repository.top.parent, repository, "odd", _ODD)
    prompts = {name: f"echo {name} > {name}.txt; echo {name}" for name in ("raise", "fail", "go")}
    prompts["fail"] += "; exit 1"
    tasks = [{"id": name, "attempts": 1, "prompt": prompt} for name, prompt in prompts.items()]
    config = repository.configure(tasks, adapters={"odd": {"use": "odd"}}, sandbox="off")
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 1, ended
    assert ended.states == {"raise": "failed", "fail": "failed", "go": "landed"}
    reported = {task["id"]: task for task in ended.result["tasks"]}
    assert reported["raise"]["reason"] == (
        "the adapter could not parse the output: OverflowError: int too large to convert to float"
    )
    assert reported["raise"]["branch"], "its work is kept"
    assert reported["fail"]["reason"] == "cut in ?"
    assert (reported["go"]["last_message"], reported["go"]["cost"]) == ("end ?", None)
    await repository.assert_invariants()


@pytest.mark.parametrize(
    ("command", "reported"),
    [
        (
            "SessionCommand(argv=['sh', request.prompt_file])",
            "built a command with values other than strings: ['sh', PosixPath(",
        ),
        ("1 / 0", "failed to build its command: ZeroDivisionError: division by zero"),
    ],
)
def test_adapter_without_a_command_is_a_mistake_in_the_file(
    repository: Repository, command: str, reported: str
) -> None:
    """It is reported before anything starts, and not as an internal error."""
    install_plugin(
        repository.top.parent,
        repository,
        "odd",
        _ODD.replace('SessionCommand(argv=["sh", str(request.prompt_file)])', command),
    )
    config = repository.configure([{"id": "go", "prompt": "true"}], adapters={"odd": {"use": "odd"}})
    ended = repository.council("validate", str(config))
    assert ended.code == 2, ended
    assert f"the adapter 'odd' {reported}" in ended.stderr


@pytest.mark.parametrize("number", ["9" * 400, "9" * 4200, "1e999", "NaN", "-1", "true", '"1"'])
def test_meaningless_numbers_are_ignored(number: str) -> None:
    """JSON numbers are unbounded; values that no float or store accepts are unknown."""
    claude = ClaudeCodeAdapter(ClaudeCodeOptions())
    spent = f'{{"type":"result","total_cost_usd":{number},"usage":{{"input_tokens":{number},"output_tokens":7}}}}'
    event = claude.parse(spent)[0]
    assert (event.input_tokens, event.output_tokens, event.cost) == (0, 7, None)  # type: ignore[union-attr]
    limit = f'{{"type":"rate_limit_event","rate_limit_info":{{"status":"rejected","resetsAt":{number}}}}}'
    assert claude.parse(limit)[0].failed.until is None  # type: ignore[union-attr]
    for event in parse_bridge_line(f'{{"type":"spent","input_tokens":0,"output_tokens":7,"cost":{number}}}'):
        assert event.cost is None  # type: ignore[union-attr]

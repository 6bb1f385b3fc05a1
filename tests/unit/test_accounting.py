"""Usage and cost of single sessions, computed from CLI output."""

from __future__ import annotations

from functools import reduce

import pytest

from adapters.claude_code import ClaudeCodeAdapter, ClaudeCodeOptions
from orchestrator.domain.runs.model import Attempt
from orchestrator.domain.settings.run_settings import Price
from orchestrator.engine.accounting import Accounting
from orchestrator.protocols import UsageReport
from orchestrator.sessions.output.transcript import Transcript
from orchestrator.testing.recordings import read_recordings
from tests.contract.verdicts import TRANSCRIPTS

ATTEMPT = {"number": 1, "adapter": "a", "base": "b", "started": 0.0}
ACCOUNTING = Accounting({"m": Price(input=10, output=20, cached_input=1)})


def earlier(session: str | None, **used: float) -> Attempt:
    return Attempt.model_validate(
        {"number": 1, "adapter": "a", "base": "b", "started": 0.0, "session": session, **used}
    )


def test_usage_of_a_resumed_conversation_excludes_earlier_sessions() -> None:
    said = Transcript(
        session="s", input_tokens=100, output_tokens=50, cached_tokens=40, cost=3.0, includes_resumed=True
    )
    before = [
        earlier("s", input_tokens=60, output_tokens=20, cached_tokens=10, cost=1.0),
        earlier("s", input_tokens=10, output_tokens=5, cached_tokens=50),
        earlier("other", input_tokens=1000, cost=9.0),
        earlier(None, input_tokens=1000),
    ]
    own = ACCOUNTING.net_usage(said, before)
    assert (own.input_tokens, own.output_tokens, own.cached_tokens, own.cost) == (30, 25, 0, 2.0)


def test_usage_of_a_session_alone_is_unchanged() -> None:
    said = Transcript(session="s", input_tokens=100, cost=3.0)
    assert ACCOUNTING.net_usage(said, [earlier("s", input_tokens=60, cost=1.0)]) == said


@pytest.mark.parametrize("name", ["resumed", "resumed-total-cost", "resumed-both-costs"])
def test_cost_of_each_claude_version_excludes_earlier_sessions(name: str) -> None:
    """Some versions report the cost of the session, others that of the whole conversation."""
    adapter = ClaudeCodeAdapter(ClaudeCodeOptions())
    recording = read_recordings(TRANSCRIPTS / "claude-code")[name]
    events = [event for line in recording.stdout for event in adapter.parse(line)]
    said = reduce(Transcript.after, events, Transcript())
    before = [earlier(said.session, input_tokens=240, output_tokens=68, cost=0.00232)]
    own = ACCOUNTING.net_usage(said, before)
    assert (own.input_tokens, own.output_tokens) == (40, 8)
    assert own.cost == pytest.approx(0.0004 if name == "resumed" else 0.00032)
    assert ACCOUNTING.recorded(said, before)["is_estimated"] is False


def test_cost_of_subagents_is_not_an_earlier_session() -> None:
    """The cost covers tokens that the session does not count as its own, but fewer than earlier sessions used."""
    said = Transcript(session="s", input_tokens=100, output_tokens=10, cost=3.0, priced_tokens=150)
    assert ACCOUNTING.net_usage(said, [earlier("s", input_tokens=60, cost=1.0)]).cost == 3.0
    assert ACCOUNTING.net_usage(said, [earlier("s", input_tokens=40, cost=1.0)]).cost == 2.0
    assert ACCOUNTING.net_usage(said, [earlier("s", cost=1.0)]).cost == 3.0


def test_missing_cost_is_estimated_for_the_session_alone() -> None:
    said = Transcript(
        session="s", input_tokens=300, output_tokens=100, cached_tokens=100, model="m-2", includes_resumed=True
    )
    found = ACCOUNTING.recorded(said, [earlier("s", input_tokens=100, output_tokens=50)])
    assert found["cost"] == pytest.approx((100 * 10 + 100 * 1 + 50 * 20) / 1e6)
    assert found["is_estimated"] is True
    assert ACCOUNTING.recorded(Transcript(cost=0.5), [])["is_estimated"] is False


def test_usage_that_the_cli_estimates_is_marked() -> None:
    said = Transcript().after(UsageReport(10, 5, 0.5, is_estimate=True)).after(UsageReport(model="m"))
    assert ACCOUNTING.recorded(said, [])["is_estimated"] is True


def test_missing_tokens_or_price_give_no_estimate() -> None:
    assert ACCOUNTING.recorded(Transcript(model="m"), [])["cost"] is None
    assert ACCOUNTING.recorded(Transcript(model="unknown", input_tokens=5), [])["cost"] is None

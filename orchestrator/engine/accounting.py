"""Usage and cost of a single session, from the transcript of its CLI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.domain.runs.model import Attempt, sum_known_cost
from orchestrator.domain.settings.run_settings import Price, find_price
from orchestrator.protocols import JsonObject
from orchestrator.sessions.output.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Accounting:
    """Computes the usage and cost of sessions; `prices` maps model names to prices."""

    prices: Mapping[str, Price]

    def net_usage(self, transcript: Transcript, attempts: Sequence[Attempt]) -> Transcript:
        """Return a transcript without the usage of earlier sessions of its conversation.

        `attempts` are the attempts of the task. They may include the session's own attempt, whose usage is not recorded
        yet. The cost is estimated if the CLI did not report it.
        """
        earlier = [
            attempt for attempt in attempts if transcript.session is not None and attempt.session == transcript.session
        ]
        cost = transcript.cost
        if cost is not None and (transcript.includes_resumed or _includes_earlier_cost(transcript, earlier)):
            transcript = replace(transcript, cost=max(cost - (sum_known_cost(earlier) or 0.0), 0.0))
        if transcript.includes_resumed:
            transcript = replace(
                transcript,
                input_tokens=max(transcript.input_tokens - sum(attempt.input_tokens for attempt in earlier), 0),
                output_tokens=max(transcript.output_tokens - sum(attempt.output_tokens for attempt in earlier), 0),
                cached_tokens=max(transcript.cached_tokens - sum(attempt.cached_tokens for attempt in earlier), 0),
            )
        return transcript if transcript.cost is not None else replace(transcript, cost=self._estimate(transcript))

    def recorded(self, transcript: Transcript, attempts: Sequence[Attempt]) -> JsonObject:
        """Return the attempt fields to record for a transcript.

        `attempts` as for `net_usage`.
        """
        net = self.net_usage(transcript, attempts)
        return {
            "last_message": net.last_message,
            "session": net.session,
            "input_tokens": net.input_tokens,
            "output_tokens": net.output_tokens,
            "cached_tokens": net.cached_tokens,
            "model": net.model,
            "cost": net.cost,
            "is_estimated": net.is_estimate or (transcript.cost is None and net.cost is not None),
        }

    def _estimate(self, transcript: Transcript) -> float | None:
        price = find_price(transcript.model, self.prices)
        if price is None or not (transcript.input_tokens or transcript.output_tokens):
            return None
        return price.cost(transcript.input_tokens, transcript.output_tokens, transcript.cached_tokens)


def _includes_earlier_cost(transcript: Transcript, earlier: Sequence[Attempt]) -> bool:
    """Return True if the reported cost covers earlier sessions.

    This is derived from the number of tokens that it covers.
    """
    earlier_tokens = sum(attempt.input_tokens + attempt.output_tokens for attempt in earlier)
    return 0 < earlier_tokens <= transcript.priced_tokens - transcript.input_tokens - transcript.output_tokens

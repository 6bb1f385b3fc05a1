"""What a session used up by itself, and what that cost, from what its CLI told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.domain.runs.model import Attempt, sum_known_cost
from orchestrator.domain.runs.prices import Price, find_price
from orchestrator.protocols import JsonObject
from orchestrator.sessions.output.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Accounting:
    """`prices` are those of models, by name."""

    prices: Mapping[str, Price]

    def net_usage(self, said: Transcript, attempts: Sequence[Attempt]) -> Transcript:
        """Return what a session said without what the task's `attempts` before it used up in the same conversation.

        Its own attempt may be among them, since nothing is recorded of that yet. Its cost is estimated where the CLI
        did not tell it.
        """
        before = [one for one in attempts if said.session is not None and one.session == said.session]
        cost = said.cost
        if cost is not None and (said.includes_resumed or _includes_earlier_cost(said, before)):
            said = replace(said, cost=max(cost - (sum_known_cost(before) or 0.0), 0.0))
        if said.includes_resumed:
            said = replace(
                said,
                input_tokens=max(said.input_tokens - sum(one.input_tokens for one in before), 0),
                output_tokens=max(said.output_tokens - sum(one.output_tokens for one in before), 0),
                cached_tokens=max(said.cached_tokens - sum(one.cached_tokens for one in before), 0),
            )
        return said if said.cost is not None else replace(said, cost=self._estimate(said))

    def recorded(self, said: Transcript, attempts: Sequence[Attempt]) -> JsonObject:
        """Return what is recorded of an attempt for what it said; `attempts` are those of its task, as for `own`."""
        own = self.net_usage(said, attempts)
        return {
            "words": own.last_message,
            "session": own.session,
            "input_tokens": own.input_tokens,
            "output_tokens": own.output_tokens,
            "cached_tokens": own.cached_tokens,
            "model": own.model,
            "cost": own.cost,
            "is_estimated": said.cost is None and own.cost is not None,
        }

    def _estimate(self, said: Transcript) -> float | None:
        price = find_price(said.model, self.prices)
        if price is None or not (said.input_tokens or said.output_tokens):
            return None
        return price.cost(said.input_tokens, said.output_tokens, said.cached_tokens)


def _includes_earlier_cost(said: Transcript, before: Sequence[Attempt]) -> bool:
    """Return whether the reported cost includes that of earlier sessions, judged by the tokens that it covers."""
    earlier = sum(one.input_tokens + one.output_tokens for one in before)
    return 0 < earlier <= said.priced_tokens - said.input_tokens - said.output_tokens

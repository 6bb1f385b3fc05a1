"""What tokens cost where a CLI does not say so. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field


class Price(BaseModel):
    """US dollars for a million tokens of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    input: float = Field(ge=0, le=1_000_000, strict=False)
    """Of what it reads."""
    output: float = Field(ge=0, le=1_000_000, strict=False)
    """Of what it writes."""
    cached_input: float | None = Field(default=None, ge=0, le=1_000_000, strict=False)
    """Of what it reads from a cache: as much as the rest unless given."""

    def cost(self, input_tokens: int, output_tokens: int, cached_tokens: int) -> float:
        """Return the dollars of so many tokens; `cached_tokens` are among the input's."""
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = max(input_tokens - cached_tokens, 0)
        return (fresh * self.input + cached_tokens * cached + output_tokens * self.output) / 1e6


def find_price(model: str | None, prices: Mapping[str, Price]) -> Price | None:
    """Return the price of a model by its name: its own, or that of the longest name that its name goes on from.

    So `anthropic/claude-opus-4-8-20260101` is found under `claude-opus-4`, where none is nearer.
    """
    if model is None:
        return None
    bare = model.rpartition("/")[2]
    for name in (model, bare):
        if name in prices:
            return prices[name]
    begins = [name for name in prices if bare.startswith(name) and bare[len(name)] in "-.@:"]
    return prices[max(begins, key=len)] if begins else None

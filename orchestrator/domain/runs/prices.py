"""Token prices, for CLIs that report no cost."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field


class Price(BaseModel):
    """Prices of a model in US dollars per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    input: float = Field(ge=0, le=1_000_000, strict=False)
    """Input tokens."""
    output: float = Field(ge=0, le=1_000_000, strict=False)
    """Output tokens."""
    cached_input: float | None = Field(default=None, ge=0, le=1_000_000, strict=False)
    """Input tokens read from a cache. Default: the price of input tokens."""

    def cost(self, input_tokens: int, output_tokens: int, cached_tokens: int) -> float:
        """Return the cost in US dollars; `input_tokens` include the `cached_tokens`."""
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = max(input_tokens - cached_tokens, 0)
        return (fresh * self.input + cached_tokens * cached + output_tokens * self.output) / 1e6


def find_price(model: str | None, prices: Mapping[str, Price]) -> Price | None:
    """Return the price of a model by its full name, or by the longest known prefix of it.

    For example, `anthropic/claude-opus-4-8-20260101` matches `claude-opus-4` if there is no longer prefix.
    """
    if model is None:
        return None
    bare = model.rpartition("/")[2]
    for name in (model, bare):
        if name in prices:
            return prices[name]
    prefixes = [name for name in prices if bare.startswith(name) and bare[len(name)] in "-.@:"]
    return prices[max(prefixes, key=len)] if prefixes else None

"""Built-in model prices, from `prices.json`; the config file overrides them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from orchestrator.domain.runs.prices import Price

_FILE = Path(__file__).with_name("prices.json")


@cache
def known_prices() -> dict[str, Price]:
    """Return the prices by model name or prefix. Blocks on the first call."""
    return TypeAdapter(dict[str, Price]).validate_json(_FILE.read_bytes())

"""The prices of models that come with us, in `prices.json` beside this file; a run's file goes over them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from orchestrator.domain.runs.prices import Price

_FILE = Path(__file__).with_name("prices.json")


@cache
def known_prices() -> dict[str, Price]:
    """Return what a million tokens of a model cost, by the model's name or the beginning of it. Blocks once."""
    return TypeAdapter(dict[str, Price]).validate_json(_FILE.read_bytes())

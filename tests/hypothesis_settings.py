"""How many examples a property test draws: a quarter of them each time, all of them with the slow tests."""

from __future__ import annotations

import os
from typing import Any, Final

from hypothesis import settings

ALL_EXAMPLES: Final = "COUNCIL_ALL_EXAMPLES" in os.environ
#: What hypothesis draws unless a test says otherwise.
DEFAULT_EXAMPLES: Final = 100


def example_settings(complete: int, **more: Any) -> settings:
    """Return the settings of a test that draws so many examples with the slow tests."""
    return settings(max_examples=complete if ALL_EXAMPLES else max(complete // 4, 5), **more)

"""How many examples a property test draws: a quarter of them each time, all of them with the slow tests."""

from __future__ import annotations

import os
from typing import Any, Final

from hypothesis import settings

COMPLETE: Final = "COUNCIL_ALL_EXAMPLES" in os.environ
#: What hypothesis draws unless a test says otherwise.
USUAL: Final = 100


def examples(complete: int, **more: Any) -> settings:
    """Return the settings of a test that draws so many examples with the slow tests."""
    return settings(max_examples=complete if COMPLETE else max(complete // 4, 5), **more)

"""The number of examples of property tests: a quarter by default, all with the slow tests."""

from __future__ import annotations

import os
from typing import Any, Final

from hypothesis import settings

ALL_EXAMPLES: Final = "COUNCIL_ALL_EXAMPLES" in os.environ
#: The default of hypothesis.
DEFAULT_EXAMPLES: Final = 100


def example_settings(complete: int, **more: Any) -> settings:
    """Return the settings of a test with that many examples in the slow tests."""
    return settings(max_examples=complete if ALL_EXAMPLES else max(complete // 4, 5), **more)

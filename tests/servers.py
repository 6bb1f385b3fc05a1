"""Servers of stores in tests: without one, a test is skipped, or fails in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NOBODY = 65534
"""The user that runs servers if the tests run as root."""


class MissingServer(Exception):
    """This machine has no server program."""


@contextmanager
def skipping(variable: str) -> Iterator[None]:
    """Skip the test if there is no server program; fail it in CI. `variable` contains the URL of a running server."""
    try:
        yield
    except MissingServer as error:
        if os.environ.get("CI"):
            pytest.fail(f"{error}, or set {variable}")
        pytest.skip(f"{error}, or set {variable}")

"""Limits of wall-clock times in documents, so that they are dates in every zone."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

EARLIEST: Final = -62e9
LATEST: Final = 253e9

Instant = Annotated[float, Field(ge=EARLIEST, le=LATEST, allow_inf_nan=False)]

"""Wall-clock times of documents: seconds since the epoch, limited to values that are valid dates in every time zone."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

EARLIEST: Final = -62e9
LATEST: Final = 253e9

Instant = Annotated[float, Field(ge=EARLIEST, le=LATEST, allow_inf_nan=False)]

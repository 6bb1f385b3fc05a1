"""Parse and format the reason for a halted run as text.

The text has a headline, the last output, a log file and a remedy.
"""

from __future__ import annotations

from dataclasses import dataclass

_LOG = "log: "


@dataclass(frozen=True, slots=True)
class HaltReason:
    """The reason for a halted run; `headline` is its summary."""

    headline: str
    output: tuple[str, ...] = ()
    log: str | None = None
    """The file with the full output."""
    remedy: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> HaltReason:
        """Parse the output of `str(reason)`; the first line of other text is the headline."""
        first, *lines = text.splitlines() or [""]
        at = max((number for number, line in enumerate(lines) if line.startswith(_LOG)), default=None)
        if at is None:
            return cls(first, remedy=tuple(lines))
        return cls(first, tuple(lines[:at]), lines[at].removeprefix(_LOG), tuple(lines[at + 1 :]))

    def __str__(self) -> str:
        """Return the full text."""
        log = () if self.log is None else (f"{_LOG}{self.log}",)
        return "\n".join((self.headline, *self.output, *log, *self.remedy))

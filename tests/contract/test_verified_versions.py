"""Recorded versions are listed as verified by their adapters."""

from __future__ import annotations

import pytest
from packaging.version import Version

from orchestrator.engine.diagnostics.programs import read_version
from orchestrator.system.process import CompletedCommand
from orchestrator.testing.recordings import read_recordings
from tests.contract.verdicts import TRANSCRIPTS
from tests.transcripts.programs import PROGRAMS


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_recorded_versions_are_verified(name: str) -> None:
    """All of them, by the adapter of the recorded program."""
    program = PROGRAMS[name]
    (listed, *_) = program.adapter(program.adapter.Options.model_validate(program.options)).programs()
    if listed.verified is None:
        pytest.skip("its program is that of an entry's `argv`, or this Python")
    recorded = {one.program for one in read_recordings(TRANSCRIPTS / name).values()}
    found = {read_version(CompletedCommand(0, text.encode(), b"")) for text in recorded}
    assert found <= {*map(Version, listed.verified), None}

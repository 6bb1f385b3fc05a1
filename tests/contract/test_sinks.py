"""The bundled sinks meet the sink contract."""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.builtin import jsonlines
from orchestrator.builtin.jsonlines import JsonLinesSink
from orchestrator.protocols import Event, RecordedEvent
from orchestrator.testing.sink_contract import SinkContract, sample_events


class TestJsonLines(SinkContract):
    """Run the contract with a file."""

    sink_type = JsonLinesSink

    def make_options(self, folder: Path) -> Mapping[str, Any]:
        """Return a file that does not exist."""
        return {"file": str(folder / "events.jsonl")}

    def delivered_positions(self, folder: Path) -> Sequence[int]:
        """Return the events in the file."""
        return [line["position"] for line in self.lines(folder)]

    def lines(self, folder: Path) -> list[dict[str, Any]]:
        """Return the lines as objects."""
        return [json.loads(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]

    async def test_line_has_the_whole_event(self, tmp_path: Path) -> None:
        """Position, time, type and fields; the file is private."""
        (event, *_) = events = sample_events()
        await self.deliver(self.validated(tmp_path), events)
        assert self.lines(tmp_path)[0] == {
            "position": event.position, "time": event.time, "event": event.event.type, **event.event.data,
        }  # fmt: skip
        assert (tmp_path / "events.jsonl").stat().st_mode & 0o777 == 0o600

    async def test_event_is_written_once(self, tmp_path: Path) -> None:
        """Repeated events, after a restart or from two runs in one file, have one line."""
        options, ours, theirs = self.validated(tmp_path), sample_events(), sample_events(run="another")
        for events in (ours[:5], theirs[:3], ours[:6], ours, theirs, theirs[-1:], ours[-1:]):
            await self.deliver(options, events)
        expected = [(one.event.data["run"], one.position) for one in (*ours[:5], *theirs[:3], *ours[5:], *theirs[3:])]
        assert [(line["run"], line["position"]) for line in self.lines(tmp_path)] == expected

    async def test_events_of_one_position_are_distinguished(self, tmp_path: Path) -> None:
        """If only some events of a commit are in the file, the others follow."""
        both = [RecordedEvent(3, 0.0, Event(kind, {"run": "r"})) for kind in ("first", "second")]
        await self.deliver(self.validated(tmp_path), both)
        path = tmp_path / "events.jsonl"
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
        await self.deliver(self.validated(tmp_path), both)
        assert [line["event"] for line in self.lines(tmp_path)] == ["first", "second"]

    @pytest.mark.parametrize("kept", [1, 5, 13, 40, -1])
    async def test_truncated_line_is_written_again(self, tmp_path: Path, kept: int) -> None:
        """A partial line left by a kill is replaced; foreign content is unchanged."""
        options, events, path = self.validated(tmp_path), sample_events(), tmp_path / "events.jsonl"
        path.write_text("a note of mine, without a line break")
        await self.deliver(options, events[:3])
        note, *rest = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join((note, *rest[:-1], rest[-1][:kept])))
        await self.deliver(options, events)
        note, *rest = path.read_bytes().splitlines()
        assert note == b"a note of mine, without a line break"
        assert [json.loads(line)["position"] for line in rest] == [one.position for one in events]

    async def test_emptied_file_is_continued(self, tmp_path: Path) -> None:
        """Rotating it during a run loses no later event."""
        events, path = sample_events(), tmp_path / "events.jsonl"
        async with JsonLinesSink(self.validated(tmp_path)) as sink:
            await sink.send(events[:4])
            path.write_bytes(b"")
            await sink.send(events[4:6])
            path.unlink()
            await sink.send(events[6:])
        assert self.delivered_positions(tmp_path) == [one.position for one in events[6:]]

    async def test_foreign_lock_does_not_block_forever(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is an error, so that the sink is reported as failing and retried."""
        monkeypatch.setattr(jsonlines, "LOCK_TIMEOUT", 0.05)
        with (tmp_path / "events.jsonl").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            async with JsonLinesSink(self.validated(tmp_path)) as sink:
                with pytest.raises(TimeoutError, match=r"another process keeps .*events\.jsonl locked"):
                    await sink.send(sample_events())
        assert self.delivered_positions(tmp_path) == []

    async def test_concurrent_writers_write_complete_lines(self, tmp_path: Path) -> None:
        """Every line is one event, and each event has one line."""
        options = self.validated(tmp_path)
        runs = [[RecordedEvent(n, 0.0, Event("x", {"run": f"r{run}", "text": "x" * 500})) for n in range(1, 40)]
                for run in range(4)]  # fmt: skip

        def write(events: list[RecordedEvent]) -> None:
            sink = JsonLinesSink(options)
            for one in events:
                sink._append([one])

        threads = [threading.Thread(target=write, args=(run,)) for run in runs for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = [(line["run"], line["position"]) for line in self.lines(tmp_path)]
        assert len(found) == len(set(found)) == 4 * 39

"""A task that did not pass continues from the current target: another task may have changed its paths meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.api.council import Council
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.engine.phases.start import NextPhase
from orchestrator.engine.scheduler.active_attempts import ActiveAttempt
from orchestrator.engine.scheduler.attempts import AttemptRunner
from tests.conftest import Repository

pytestmark = pytest.mark.extended_rest


def repaired(path: str) -> list[dict[str, Any]]:
    """Return a task that is repaired once, and one that owns the same paths and lands while the first waits."""
    repair = [
        f"attempt 1 append {path} bad",
        "attempt 2 without other.txt exit 1 what has landed is not here",
        f"attempt 2 append {path} good",
    ]
    return [
        {
            "id": "repaired",
            "prompt": "\n".join(repair),
            "owns": ["src/**"],
            "allow_failing_base": True,
            "checks": [f"grep -q good {path}"],
        },
        {"id": "other", "prompt": "write other.txt x\nappend src/shared.txt x", "owns": ["src/**", "other.txt"]},
    ]


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("path", "content", "reason"),
    [
        ("src/own.txt", "bad\ngood\n", None),
        (
            "src/shared.txt",
            "x\ngood\n",
            "the earlier work (repaired/1) conflicts with the target in src/shared.txt: starting from scratch",
        ),
    ],
)
async def test_paths_acquired_concurrently_are_merged_or_repeated(
    repository: Repository, path: str, content: str, reason: str | None
) -> None:
    """If both merge, the earlier work continues; a task with owned paths never ends in a conflict."""
    config = repository.configure(repaired(path), capacity=1)
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"repaired": "landed", "other": "landed"}, ended
    assert (repository.top / path).read_text() == content
    started = [one for one in ended.lines if one.get("event") == "task.started" and one["task"] == "repaired"]
    assert [one.get("reason") or None for one in started] == [None, reason]
    await repository.assert_invariants()


async def test_start_after_owned_files_changed_chooses_a_new_base(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other owner has landed in between: the attempt starts from that commit, not from the one seen before."""
    prepare, looks = AttemptRunner.prepare, [1, 2]

    async def land_meanwhile(
        attempts: AttemptRunner, task: str, spec: TaskSpec, turn: NextPhase, adapter: str, **options: Any
    ) -> ActiveAttempt:
        if looks.pop() == 2:
            repository.commit({"s.txt": "another\n"}, "another")
            repository.remember()
        return await prepare(attempts, task, spec, turn, adapter, **options)

    monkeypatch.setattr(AttemptRunner, "prepare", land_meanwhile)
    path = repository.configure([{"id": "t", "prompt": "append s.txt mine", "owns": ["s.txt"]}])
    async with Council.open(path, environ=repository.environ) as council:
        report = await council.runs.resume(await council.runs.create())
    assert [(one.status, one.attempts) for one in report.tasks] == [("landed", 1)], report
    assert (repository.top / "s.txt").read_text() == "another\nmine\n"
    await repository.assert_invariants()

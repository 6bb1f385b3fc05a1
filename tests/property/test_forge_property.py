"""Over random histories of people, runs and faults, a board shows each task once and each request is passed on once."""

from __future__ import annotations

import os
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import wait_none

from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.errors import RefusedError
from orchestrator.forges import http
from orchestrator.forges.github import GitHubOptions, GitHubTracker
from orchestrator.forges.gitlab import GitLabOptions, GitLabTracker
from orchestrator.forges.issues import RETRY_LABEL
from orchestrator.forges.state_comment import STATUS_LABELS, is_state_comment, read_state, status_label
from orchestrator.forges.tracker import ForgeTracker
from orchestrator.testing.forge_servers import GitHubServer, GitLabServer
from orchestrator.testing.forge_servers.server import ForgeServer
from orchestrator.testing.tracker_contract import make_state
from tests.hypothesis_settings import ALL_EXAMPLES, example_settings

NUMBERS = (1, 2, 3)
DONE = {TaskStatus.LANDED, TaskStatus.DONE}
STATUSES = [
    TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.QUEUED, TaskStatus.AWAITING_APPROVAL, TaskStatus.FAILED,
    TaskStatus.LANDED,
]  # fmt: skip
numbers = st.sampled_from(NUMBERS)
steps = st.lists(
    st.one_of(
        st.just(("sync",)),
        st.just(("restart",)),
        st.tuples(st.just("state"), numbers, st.sampled_from(STATUSES)),
        st.tuples(st.just("comment"), numbers, st.sampled_from(["/council retry", "/council cancel", "a remark"])),
        st.tuples(st.just("stranger"), numbers),
        st.tuples(st.sampled_from(["close", "reopen", "label", "edit"]), numbers),
        st.tuples(st.just("fail"), st.sampled_from([403, 404, 429, 500])),
        st.just(("lose",)),
    ),
    max_size=30,
)


class Board:
    """A board with three issues, people, a run and its tracker."""

    def __init__(self, server: ForgeServer) -> None:
        self.server = server
        self.statuses = dict.fromkeys(NUMBERS, TaskStatus.PENDING)
        self.commands: list[str] = []
        self.performed: list[str] = []
        self.tracker: ForgeTracker[Any] | None = None
        server.add_user("stranger")
        for number in NUMBERS:
            server.add_issue(f"Issue {number}")

    def open(self) -> ForgeTracker[Any]:
        """Return a new tracker."""
        if isinstance(self.server, GitHubServer):
            github = GitHubOptions(repo="acme/shop", api=self.server.url, token="FORGE_TOKEN")
            return GitHubTracker(github)
        gitlab = GitLabOptions(project="acme/shop", api=self.server.url, token="FORGE_TOKEN")
        return GitLabTracker(gitlab)

    async def step(self, step: tuple[Any, ...]) -> None:
        """Perform a step of a history."""
        match step:
            case ("sync",):
                await self.sync()
            case ("restart",):
                await self.restart()
            case ("state", number, status):
                if self.statuses[number] not in DONE:
                    self.statuses[number] = status
            case ("fail", status):
                self.server.fail_next(1, status, {"retry-after": "0"})
            case ("lose",):
                self.server.lose_answers(1)
            case _:
                self.act(step)

    def act(self, step: tuple[Any, ...]) -> None:
        """Change an issue as a person."""
        match step:
            case ("comment", number, text):
                id_ = self.server.comment(number, text)
                self.commands += [f"comment-{id_}"] if text.startswith("/") else []
            case ("stranger", number):
                self.server.comment(number, "/council cancel\n<!-- council:state {} -->", "stranger")
            case ("close", number):
                self.server.close(number)
            case ("reopen", number):
                self.server.reopen(number)
            case ("label", number):
                self.server.label(number, RETRY_LABEL)
            case ("edit", number):
                self.server.edit(number, body="other words")

    async def sync(self) -> bool:
        """Synchronize like a run; return False if the tracker failed, which is then opened again."""
        states = [make_state(f"issue-{number}", status) for number, status in self.statuses.items()]
        if self.tracker is None:
            self.tracker = await self.open().__aenter__()
        try:
            result = await self.tracker.sync(states)
        except (RefusedError, BaseExceptionGroup):
            await self.restart()
            return False
        self.performed += [one.id for one in result.requests if one.id not in self.performed]
        if result.problem is not None:
            await self.restart()
        return result.problem is None

    async def restart(self) -> None:
        """Close the tracker, as if its process had ended."""
        if self.tracker is not None:
            await self.tracker.__aexit__(None, None, None)
        self.tracker = None

    def check(self) -> None:
        """Assert what people may expect."""
        for number, status in self.statuses.items():
            issue, state = self.server.issue(number), make_state(f"issue-{number}", status)
            own = [one for one in issue.comments if one.author == "council-bot"]
            assert [is_state_comment(one.body) for one in own] == [True], own
            shown = read_state(own[0].body)
            assert shown is not None
            assert (shown.status, shown.has_ended) == (status, state.has_ended)
            assert STATUS_LABELS & set(issue.labels) == {status_label(state.task["status"])}
            assert RETRY_LABEL not in issue.labels
            last = next((one.kind for one in reversed(issue.events) if one.kind in {"closed", "reopened"}), None)
            assert status not in DONE or last is not None
        events = [event for number in NUMBERS for event in self.server.issue(number).events]
        labelled = [f"label-{event.id}" for event in events if (event.kind, event.label) == ("labeled", RETRY_LABEL)]
        by_comment_or_label = [one for one in self.performed if not one.startswith("closed-")]
        assert sorted(by_comment_or_label) == sorted([*self.commands, *labelled])
        closings = {event.time for event in events if event.kind == "closed" and event.actor == "person"}
        closed = [one.rpartition("-")[2] for one in self.performed if one.startswith("closed-")]
        assert set(closed) <= {"".join(filter(str.isdigit, time)) for time in closings}


@pytest.mark.parametrize("server_type", [GitHubServer, GitLabServer])
def test_board_shows_each_task_once_and_passes_each_request_on_once(
    server_type: type[ForgeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Despite errors before and after writes took effect, restarts, and concurrent changes by people."""
    monkeypatch.setattr(http, "_WAIT", wait_none())
    monkeypatch.setitem(os.environ, "FORGE_TOKEN", "t0ken")

    @example_settings(1000 if ALL_EXAMPLES else 40, deadline=None)
    @given(steps)
    def check(history: list[tuple[Any, ...]]) -> None:
        async def run() -> None:
            with server_type() as server:
                board = Board(server)
                for step in history:
                    await board.step(step)
                server.recover()
                while not await board.sync():
                    pass
                await board.sync()
                board.check()
                await board.restart()

        anyio.run(run)

    check()

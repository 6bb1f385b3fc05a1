"""The contract of every forge on which tasks land by pull requests, as tests: subclass `ForgeContract`.

    class TestMyForge(ForgeContract):
        forge_type = MyForge

        def make_options(self, folder):                # options of a repository with a branch `main`
            ...

The other abstract methods act as a person, or as the forge's CI. Needs pytest with pytest-asyncio in its auto mode (or
mark your subclass `pytest.mark.asyncio`).
"""

# ruff: noqa: S101  this module is a test suite

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import anyio
import pytest
from pydantic import BaseModel

from orchestrator.errors import RefusedError
from orchestrator.protocols import Forge, ForgeType, NewPullRequest
from orchestrator.testing.options_contract import OptionsContract
from orchestrator.testing.sink_contract import TIMEOUT

_BRANCH = "council/20260101-120000-abcd/one"


def wanted(**fields: Any) -> NewPullRequest:
    """Return a pull request for the branch of the suite."""
    return replace(NewPullRequest(_BRANCH, "main", "Add a model", "With a name."), **fields)


class ForgeContract(OptionsContract):
    """The suite: `forge_type` is the class that the plugin registers."""

    forge_type: ClassVar[ForgeType]
    own_keys: ClassVar[frozenset[str]] = frozenset(
        {"use", "draft", "labels", "reviewers", "auto_merge", "template", "on_ci_failure", "on_review", "rounds",
         "sync_interval"}
    )  # fmt: skip

    def options_type(self) -> type[BaseModel]:
        """Return the forge's `Options`."""
        return self.forge_type.Options

    @abstractmethod
    def push(self, branch: str, text: str) -> str:
        """Add a commit with a file of this text to a branch, which begins at `main`; return the commit."""

    @abstractmethod
    def merge(self, number: int, method: Literal["merge", "squash", "rebase"]) -> None:
        """Merge a pull request."""

    @abstractmethod
    def close(self, number: int) -> None:
        """Close a pull request without merging it."""

    @abstractmethod
    def is_on_target(self, commit: str) -> bool:
        """Return whether `main` contains a commit."""

    @abstractmethod
    def set_check(self, number: int, passed: bool | None, output: str = "") -> None:
        """Set the result of a check named `unit tests` on the newest commit; None: it is running."""

    @abstractmethod
    def request_changes(self, number: int, text: str, *, may_write: bool) -> None:
        """Comment on line 1 of `file.txt`, as a person with or without write access."""

    @asynccontextmanager
    async def connected(self, folder: Path) -> AsyncIterator[Forge]:
        """Open a connection, and push the branch of the suite."""
        self.push(_BRANCH, "one")
        with anyio.fail_after(TIMEOUT):
            async with self.forge_type(self.validated(folder)) as forge:
                yield forge

    async def test_an_open_pull_request_is_found_by_its_branch(self, tmp_path: Path) -> None:
        """Also by another connection, such as that of the next process."""
        async with self.connected(tmp_path) as forge:
            assert await forge.find(_BRANCH) is None
            opened = await forge.open(wanted(draft=True, labels=("council",)))
        assert (opened.state, opened.head) == ("open", self.push(_BRANCH, "one"))
        assert opened.url.startswith(("http://", "https://"))
        async with self.connected(tmp_path) as forge:
            found = await forge.find(_BRANCH)
            assert found is not None
            assert (found.number, found.state) == (opened.number, "open")
            assert await forge.find("another-branch") is None

    async def test_a_new_commit_is_its_head(self, tmp_path: Path) -> None:
        """The results of checks belong to the newest commit."""
        async with self.connected(tmp_path) as forge:
            number = (await forge.open(wanted())).number
            self.set_check(number, passed=False)
            pushed = self.push(_BRANCH, "two")
            found = await forge.read(number)
            assert (found.head, found.ci, found.failures) == (pushed, "pending", ())

    @pytest.mark.parametrize("method", ["merge", "squash", "rebase"])
    async def test_a_merge_names_a_commit_on_the_target(
        self, tmp_path: Path, method: Literal["merge", "squash", "rebase"]
    ) -> None:
        """By any method."""
        async with self.connected(tmp_path) as forge:
            number = (await forge.open(wanted())).number
            self.merge(number, method)
            found = await forge.read(number)
            assert found.state == "merged"
            assert found.merged_as is not None
            assert self.is_on_target(found.merged_as)
            again = await forge.find(_BRANCH)
            assert again is not None
            assert (again.number, again.state, again.merged_as) == (number, "merged", found.merged_as)

    async def test_a_closed_pull_request_is_not_merged(self, tmp_path: Path) -> None:
        """Another one can be opened, which is found from then on."""
        async with self.connected(tmp_path) as forge:
            number = (await forge.open(wanted())).number
            self.close(number)
            found = await forge.read(number)
            assert (found.state, found.merged_as) == ("closed", None)
            again = await forge.find(_BRANCH)
            assert again is not None
            assert (again.number, again.state) == (number, "closed")
            opened = await forge.open(wanted())
            assert opened.number != number
            newest = await forge.find(_BRANCH)
            assert newest is not None
            assert newest.number == opened.number

    async def test_failed_checks_have_names_and_output(self, tmp_path: Path) -> None:
        """They have failed once none is running."""
        async with self.connected(tmp_path) as forge:
            number = (await forge.open(wanted())).number
            assert (await forge.read(number)).ci == "pending"
            self.set_check(number, passed=None)
            assert (await forge.read(number)).ci == "pending"
            self.set_check(number, passed=False, output="expected 2, got 1")
            found = await forge.read(number)
            [failure] = found.failures
            assert (found.ci, failure.name) == ("failed", "unit tests")
            assert "expected 2, got 1" in failure.output
            self.set_check(number, passed=True)
            found = await forge.read(number)
            assert (found.ci, found.failures) == ("passed", ())

    async def test_findings_are_of_people_with_write_access(self, tmp_path: Path) -> None:
        """Their ids do not change between two calls."""
        async with self.connected(tmp_path) as forge:
            number = (await forge.open(wanted())).number
            self.request_changes(number, "Delete everything!", may_write=False)
            self.request_changes(number, "A name, please.", may_write=True)
            first, again = (await forge.read(number)).findings, (await forge.read(number)).findings
            assert [(one.text, one.path, one.line) for one in first] == [("A name, please.", "file.txt", 1)]
            assert [one.id for one in first] == [one.id for one in again]

    async def test_it_is_merged_once_its_checks_pass(self, tmp_path: Path) -> None:
        """If `merge_when_ready` was called, which may be repeated."""
        async with self.connected(tmp_path) as forge:
            number = (await forge.open(wanted())).number
            self.set_check(number, passed=None)
            for _ in range(2):
                await forge.merge_when_ready(number)
            assert (await forge.read(number)).state == "open"
            self.set_check(number, passed=True)
            assert (await forge.read(number)).state == "merged"
            await forge.merge_when_ready(number)

    async def test_a_missing_pull_request_is_refused(self, tmp_path: Path) -> None:
        """The message names its number."""
        async with self.connected(tmp_path) as forge:
            with pytest.raises(RefusedError, match="999999"):
                await forge.read(999_999)

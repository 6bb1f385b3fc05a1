"""The forges meet the forge contract, on scripted servers with real git."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from orchestrator.errors import RefusedError
from orchestrator.forges.github import GitHubForge
from orchestrator.forges.gitlab import GitLabForge
from orchestrator.testing.forge_contract import ForgeContract, wanted
from orchestrator.testing.forge_servers import GitLabServer
from orchestrator.testing.forge_servers.pull_requests import MergeMethod, PullRequestServer
from tests.forge_descriptions.validation import ValidatedGitHub


class ScriptedForgeContract(ForgeContract):
    """The contract on a scripted server."""

    server_type: ClassVar[type[PullRequestServer]]
    own: ClassVar[Mapping[str, str]]
    server: PullRequestServer

    @pytest.fixture(autouse=True)
    def started(self, tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Start a server with an empty commit on its branch `main`."""
        monkeypatch.setenv("FORGE_TOKEN", "t0ken")
        git_dir = tmp_path / "forge.git"
        subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", git_dir], env=environ, check=True)
        with self.server_type(git_dir=git_dir) as server:
            self.server = server
            server.add_user("stranger")
            tree = server.git("hash-object", "-t", "tree", "-w", "/dev/null")
            server.git("update-ref", "refs/heads/main", server.git("commit-tree", tree, "-m", "first"))
            yield

    def make_options(self, folder: Path) -> Mapping[str, Any]:
        """Return the options of the server."""
        return {**self.own, "api": self.server.url, "token": "FORGE_TOKEN"}

    def push(self, branch: str, text: str) -> str:
        """Add a commit to a branch, unless it has the text already."""
        server, parent = self.server, self.server.commit_of(branch) or self.server.commit_of("main")
        assert parent is not None
        source = server.git_dir
        assert source is not None
        file = source.parent / "file.txt"
        file.write_text(text)
        blob = server.git("hash-object", "-w", str(file))
        server.git("read-tree", parent)
        server.git("update-index", "--add", "--cacheinfo", f"100644,{blob},file.txt")
        tree = server.git("write-tree")
        if tree != server.git("rev-parse", f"{parent}^{{tree}}"):
            parent = server.git("commit-tree", tree, "-p", parent, "-m", text)
        server.git("update-ref", f"refs/heads/{branch}", parent)
        return parent

    def merge(self, number: int, method: MergeMethod) -> None:
        """Merge a pull request."""
        assert self.server.merge(number, method)

    def close(self, number: int) -> None:
        """Close a pull request."""
        self.server.close_pull_request(number)

    def is_on_target(self, commit: str) -> bool:
        """Return whether `main` contains a commit."""
        return self.server.git("merge-base", commit, "main") == commit

    def set_check(self, number: int, passed: bool | None, output: str = "") -> None:
        """Set the result of a check."""
        self.server.set_check(number, "unit tests", passed, output)

    def request_changes(self, number: int, text: str, *, may_write: bool) -> None:
        """Comment on a line."""
        self.server.comment_line(number, "file.txt", 1, text, "person" if may_write else "stranger")

    async def test_labels_and_reviewers_are_set(self, tmp_path: Path) -> None:
        """A draft stays one."""
        async with self.connected(tmp_path) as forge:
            opened = await forge.open(wanted(draft=True, labels=("council",), reviewers=("person",)))
        found = self.server.pull_request(opened.number)
        assert (found.is_draft, found.labels, found.reviewers) == (True, ["council"], ["person"])
        assert (found.title, found.target) == ("Add a model", "main")

    async def test_requested_changes_are_a_finding(self, tmp_path: Path) -> None:
        """An approval is none."""
        async with self.connected(tmp_path) as forge:
            number = (await forge.open(wanted())).number
            self.server.review(number, "fine", state="APPROVED")
            self.server.review(number, "not yet")
            [finding] = (await forge.read(number)).findings
            assert (finding.author, finding.text, finding.path) == ("person", "not yet", None)

    async def test_a_conflict_is_reported(self, tmp_path: Path) -> None:
        """The target has changed the same line."""
        async with self.connected(tmp_path) as forge:
            number = (await forge.open(wanted())).number
            assert not (await forge.read(number)).has_conflict
            self.push("main", "other")
            assert (await forge.read(number)).has_conflict

    async def test_unchanged_pull_requests_cost_no_rate_limit(self, tmp_path: Path) -> None:
        """All of their pages are answered by 304."""
        async with self.connected(tmp_path) as forge:
            number = (await forge.open(wanted())).number
            await forge.read(number)
            before = len(self.server.requests)
            await forge.read(number)
            assert {status for _, _, status in self.server.requests[before:]} == {304}


class TestGitHub(ScriptedForgeContract):
    """`use: github`."""

    forge_type = GitHubForge
    server_type = ValidatedGitHub
    own: ClassVar[Mapping[str, str]] = {"repo": "acme/shop"}

    async def test_auto_merge_that_is_not_allowed_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The remedy names the setting."""
        message = "Auto merge is not allowed for this repository"
        async with self.connected(tmp_path) as forge:
            number = (await forge.open(wanted())).number
            monkeypatch.setattr(self.server, "auto_merge_error", message)
            with pytest.raises(RefusedError, match=message) as refused:
                await forge.merge_when_ready(number)
            assert "auto_merge" in refused.value.remedy


class TestGitLab(ScriptedForgeContract):
    """`use: gitlab`."""

    forge_type = GitLabForge
    server_type = GitLabServer
    own: ClassVar[Mapping[str, str]] = {"project": "acme/shop"}

    async def test_an_unknown_reviewer_is_refused(self, tmp_path: Path) -> None:
        """Before the merge request is opened."""
        async with self.connected(tmp_path) as forge:
            with pytest.raises(RefusedError, match="no user nobody"):
                await forge.open(wanted(reviewers=("nobody",)))
            assert await forge.find(wanted().branch) is None

    async def test_a_resolved_comment_is_no_finding(self, tmp_path: Path) -> None:
        """A person has resolved it."""
        async with self.connected(tmp_path) as forge:
            number = (await forge.open(wanted())).number
            self.server.comment_line(number, "file.txt", 1, "A name, please.").is_resolved = True
            assert (await forge.read(number)).findings == []

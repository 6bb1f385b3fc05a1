"""The pull requests of a scripted forge, whose branches are in a bare git repository on this machine."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from orchestrator.testing.forge_servers.git_http import CgiRequest, is_push, read_password, run_backend
from orchestrator.testing.forge_servers.server import Answer, ForgeServer

_FIRST_NUMBER: Final = 1001
#: The hook that protects branches: `git update-ref`, by which the forge merges, does not run it.
_PROTECTION: Final = """#!/bin/sh
case " {branches} " in *" ${{1#refs/heads/}} "*) ;; *) exit 0 ;; esac
echo "error: GH006: Protected branch update failed for $1." >&2
exit 1
"""
_ENVIRON: Final = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_NAME": "Forge" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "forge@example.com" for who in ("AUTHOR", "COMMITTER")},
}

MergeMethod = Literal["merge", "squash", "rebase"]


@dataclass
class CheckResult:
    """The result of a check of the forge on a commit; None: it is running."""

    id: int
    name: str
    passed: bool | None
    output: str = ""


@dataclass
class Review:
    """A review: a request for changes, an approval or a comment."""

    id: int
    author: str
    state: Literal["CHANGES_REQUESTED", "APPROVED", "COMMENTED"]
    body: str


@dataclass
class LineComment:
    """A comment on a line."""

    id: int
    author: str
    body: str
    path: str
    line: int
    is_resolved: bool = False


@dataclass
class ForgePullRequest:
    """A pull request."""

    number: int
    branch: str
    target: str
    title: str
    body: str
    author: str
    is_draft: bool = False
    state: Literal["open", "closed", "merged"] = "open"
    head: str = ""
    """The newest commit of its branch, or the last one before it was merged or closed."""
    merged_as: str | None = None
    was_squashed: bool = False
    is_auto_merged: bool = False
    """Whether it is merged as soon as its checks pass."""
    labels: list[str] = field(default_factory=list)
    reviewers: list[str] = field(default_factory=list)
    reviews: list[Review] = field(default_factory=list)
    line_comments: list[LineComment] = field(default_factory=list)


class PullRequestServer(ForgeServer):
    """A forge with pull requests. Its methods act as a person, and are safe during requests."""

    def __init__(
        self, repository: str = "acme/shop", git_dir: Path | None = None, certificate: Path | None = None
    ) -> None:
        """Create a server for the branches of the bare repository `git_dir`."""
        super().__init__(repository, certificate)
        self.git_dir = git_dir
        self.pull_requests: dict[int, ForgePullRequest] = {}
        self._checks: dict[str, list[CheckResult]] = {}

    @property
    def clone_url(self) -> str:
        """The URL of the repository for git: the password is the token of a user, who needs write access to push."""
        return f"{self.origin}/{self.repository}.git"

    def _answer(self, method: str, target: str, headers: Mapping[str, str], data: bytes) -> Answer:
        url = urlsplit(target)
        path = url.path.removeprefix(f"/{self.repository}.git/")
        if path == url.path or self.git_dir is None:
            return super()._answer(method, target, headers, data)
        login = self._tokens.get(read_password(headers) or "")
        if login is None:
            return Answer(401, b"no access\n", {"WWW-Authenticate": 'Basic realm="forge"'})
        if is_push(path, url.query) and self._users[login].permission == "read":
            return Answer(403, b"no write access\n")
        return run_backend(self.git_dir, CgiRequest(method, path, url.query, headers, data, login))

    def protect(self, *branches: str) -> None:
        """Refuse pushes to these branches."""
        assert self.git_dir is not None, "the server has a repository"  # noqa: S101  a test's own mistake
        hook = self.git_dir / "hooks" / "update"
        hook.write_text(_PROTECTION.format(branches=" ".join(branches)))
        hook.chmod(0o755)

    def pull_request(self, number: int) -> ForgePullRequest:
        """Return a pull request with its newest commit."""
        with self._lock:
            found = self.pull_requests[number]
            if found.state == "open":
                found.head = self.commit_of(found.branch) or found.head
            return found

    def open_pull_request(self, values: Mapping[str, Any], author: str) -> ForgePullRequest | None:
        """Open a pull request; None if its branch is missing, or has an open one."""
        with self._lock:
            head = self.commit_of(values["branch"])
            if head is None or any(
                one.state == "open" and one.branch == values["branch"] for one in self.pull_requests.values()
            ):
                return None
            number = _FIRST_NUMBER + len(self.pull_requests)
            self.pull_requests[number] = ForgePullRequest(number, author=author, head=head, **values)
            return self.pull_requests[number]

    def set_check(self, number: int, name: str, passed: bool | None, output: str = "") -> None:
        """Set the result of a check on the newest commit of a pull request; None: it is running."""
        with self._lock:
            found = self.pull_request(number)
            results = self._checks.setdefault(found.head, [])
            results[:] = [one for one in results if one.name != name]
            results.append(CheckResult(self._next_id(), name, passed, output))
            self.merge_if_ready(found)

    def checks_of(self, commit: str) -> list[CheckResult]:
        """Return the results of the checks on a commit."""
        return self._checks.get(commit, [])

    def merge_if_ready(self, found: ForgePullRequest) -> None:
        """Merge a pull request that is to be merged as soon as its checks pass."""
        checks = self.checks_of(found.head)
        if found.is_auto_merged and found.state == "open" and checks and all(one.passed for one in checks):
            self.merge(found.number)

    def review(
        self,
        number: int,
        body: str,
        author: str = "person",
        state: Literal["CHANGES_REQUESTED", "APPROVED", "COMMENTED"] = "CHANGES_REQUESTED",
    ) -> None:
        """Review a pull request."""
        with self._lock:
            self.pull_request(number).reviews.append(Review(self._next_id(), author, state, body))

    def comment_line(self, number: int, path: str, line: int, body: str, author: str = "person") -> LineComment:
        """Comment on a line of a pull request."""
        with self._lock:
            comment = LineComment(self._next_id(), author, body, path, line)
            self.pull_request(number).line_comments.append(comment)
            return comment

    def close_pull_request(self, number: int) -> None:
        """Close a pull request without merging it."""
        with self._lock:
            self.pull_request(number).state = "closed"

    def merge(self, number: int, method: MergeMethod = "merge") -> bool:
        """Merge a pull request; return False if it conflicts."""
        with self._lock:
            found = self.pull_request(number)
            target = self.commit_of(found.target)
            assert target is not None, "the target exists"  # noqa: S101  a test's own mistake
            commit = self._merge_commit(found, target, method)
            if commit is None:
                return False
            self.git("update-ref", f"refs/heads/{found.target}", commit, target)
            found.state, found.merged_as, found.was_squashed = "merged", commit, method == "squash"
            return True

    def has_conflict(self, found: ForgePullRequest) -> bool:
        """Return True if an open pull request can't be merged."""
        target = self.commit_of(found.target)
        return found.state == "open" and target is not None and self._merged_tree(target, found.head) is None

    def _merge_commit(self, found: ForgePullRequest, target: str, method: MergeMethod) -> str | None:
        if method == "rebase":
            return self._rebase(found.head, target)
        tree = self._merged_tree(target, found.head)
        if tree is None:
            return None
        parents = ["-p", target] if method == "squash" else ["-p", target, "-p", found.head]
        return self.git("commit-tree", tree, *parents, "-m", f"{found.title} (#{found.number})")

    def _merged_tree(self, target: str, head: str) -> str | None:
        done = self._run("merge-tree", "--write-tree", target, head)
        return done.stdout.split("\n")[0] if done.returncode == 0 else None

    def _rebase(self, head: str, target: str) -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            self.git("worktree", "add", "--detach", folder, head)
            try:
                done = self._run("-C", folder, "rebase", "--quiet", target)
                return self.git("-C", folder, "rev-parse", "HEAD") if done.returncode == 0 else None
            finally:
                self.git("worktree", "remove", "--force", folder)

    def commit_of(self, branch: str) -> str | None:
        """Return the newest commit of a branch; None if it does not exist."""
        done = self._run("rev-parse", "--verify", "--quiet", f"refs/heads/{branch}")
        return done.stdout.strip() or None

    def git(self, *args: str) -> str:
        """Return the output of a git command in the repository."""
        done = self._run(*args)
        if done.returncode:
            raise RuntimeError(f"git {' '.join(args)}: {done.stderr}")
        return done.stdout.strip()

    def _run(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "--git-dir", str(self.git_dir), *args]
        if args[0] == "-C":  # a worktree finds the repository by itself
            command = ["git", *args]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_ENVIRON}, check=False)

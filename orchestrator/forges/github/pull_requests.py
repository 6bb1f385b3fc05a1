"""The pull requests of a repository on GitHub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from pydantic import BaseModel

from orchestrator.errors import RefusedError
from orchestrator.forges.connection import Connected
from orchestrator.forges.github.repository import GitHubRepository
from orchestrator.protocols import CiFailure, NewPullRequest, PullRequest, ReviewFinding

#: The conclusions of a check run that keep a pull request from being merged (docs.github.com, "About status checks").
_FAILED: Final = frozenset({"failure", "timed_out", "cancelled", "action_required", "startup_failure"})
_AUTO_MERGE: Final = (
    "mutation($id: ID!) { enablePullRequestAutoMerge(input: {pullRequestId: $id}) { clientMutationId } }"
)


class GitHubForge(Connected[GitHubRepository]):
    """A repository on GitHub, on which tasks land by pull requests."""

    Options: ClassVar[type[BaseModel]] = GitHubRepository

    def __init__(self, options: GitHubRepository, /) -> None:
        super().__init__(options)
        self._repo = f"repos/{options.repo}"

    async def find(self, branch: str) -> PullRequest | None:
        """Return the newest pull request of a branch."""
        owner = self._options.repo.partition("/")[0]
        found = await self._http.pages(f"{self._repo}/pulls", {"head": f"{owner}:{branch}", "state": "all"})
        return None if not found else self._convert(max(found, key=lambda one: int(one["number"])))

    async def open(self, wanted: NewPullRequest) -> PullRequest:
        """Open a pull request."""
        values = {"title": wanted.title, "head": wanted.branch, "base": wanted.target, "body": wanted.body}
        found = await self._http.send("POST", f"{self._repo}/pulls", {**values, "draft": wanted.draft})
        number = found["number"]
        if wanted.labels:
            await self._http.send("POST", f"{self._repo}/issues/{number}/labels", {"labels": list(wanted.labels)})
        if wanted.reviewers:
            reviewers = {"reviewers": list(wanted.reviewers)}
            await self._http.send("POST", f"{self._repo}/pulls/{number}/requested_reviewers", reviewers)
        return self._convert(found)

    async def read(self, number: int) -> PullRequest:
        """Return a pull request with the results of checks and reviews."""
        found = await self._http.get(f"{self._repo}/pulls/{number}")
        if found is None:
            raise RefusedError(f"{self._options.repo} has no pull request {number}", "check `repo` and the token")
        if found["state"] != "open":
            return self._convert(found)
        ci, failures = await self._read_checks(found["head"]["sha"])
        return self._convert(found, ci=ci, failures=failures, findings=await self._read_findings(number))

    async def merge_when_ready(self, number: int) -> None:
        """Let GitHub merge a pull request as soon as its rules allow it, or now if they do."""
        found = await self._http.get(f"{self._repo}/pulls/{number}") or {}
        if found.get("merged") or found.get("auto_merge") is not None:
            return
        body = {"query": _AUTO_MERGE, "variables": {"id": found.get("node_id")}}
        answer = await self._http.send("POST", self._graphql, body) or {}
        messages = [str(one.get("message")) for one in answer.get("errors") or ()]
        if any("clean status" in message for message in messages):
            await self._http.send("PUT", f"{self._repo}/pulls/{number}/merge", {"sha": found["head"]["sha"]})
        elif messages:
            remedy = "allow auto-merge in the settings of the repository, or remove `auto_merge`"
            raise RefusedError(f"GitHub does not merge pull request {number} by itself: {messages[0][:200]}", remedy)

    @property
    def _graphql(self) -> str:
        """The URL of the GraphQL API (docs.github.com, "Forming calls with GraphQL")."""
        url = urlsplit(self._options.api)
        path = url.path.rstrip("/").removesuffix("/v3")
        return f"{url.scheme}://{url.netloc}{path}/graphql"

    async def _read_checks(self, commit: str) -> tuple[Any, Sequence[CiFailure]]:
        path = f"{self._repo}/commits/{commit}"
        runs = await self._http.pages(f"{path}/check-runs", field="check_runs")
        statuses = ((await self._http.get(f"{path}/status")) or {}).get("statuses", [])
        is_running = any(one["status"] != "completed" for one in runs)
        if is_running or any(one["state"] == "pending" for one in statuses):
            return "pending", ()
        failures = [
            CiFailure(one["name"], _output(one.get("output") or {})) for one in runs if one.get("conclusion") in _FAILED
        ]
        failures += [
            CiFailure(one["context"], one.get("description") or "")
            for one in statuses
            if one["state"] in {"failure", "error"}
        ]
        return ("failed" if failures else "passed" if runs or statuses else "pending"), tuple(failures)

    async def _read_findings(self, number: int) -> Sequence[ReviewFinding]:
        path = f"{self._repo}/pulls/{number}"
        found = [
            ReviewFinding(f"review-{one['id']}", _login(one), one.get("body") or "changes requested")
            for one in await self._http.pages(f"{path}/reviews")
            if one["state"] == "CHANGES_REQUESTED" and await self._is_trusted(one)
        ]
        found += [
            ReviewFinding(f"comment-{one['id']}", _login(one), one.get("body") or "", one.get("path"), one.get("line"))
            for one in await self._http.pages(f"{path}/comments")
            if await self._is_trusted(one)
        ]
        return found

    async def _is_trusted(self, one: Mapping[str, Any]) -> bool:
        is_person = (one.get("user") or {}).get("type") != "Bot"
        return is_person and await self._members.is_trusted(_login(one))

    def _convert(self, found: Mapping[str, Any], **results: Any) -> PullRequest:
        is_merged = bool(found.get("merged_at"))
        return PullRequest(
            number=found["number"],
            url=found["html_url"],
            state="merged" if is_merged else "open" if found["state"] == "open" else "closed",
            head=found["head"]["sha"],
            merged_as=found.get("merge_commit_sha") if is_merged else None,
            has_conflict=found.get("mergeable_state") == "dirty",
            **results,
        )


def _login(one: Mapping[str, Any]) -> str:
    return str((one.get("user") or {}).get("login", ""))


def _output(output: Mapping[str, Any]) -> str:
    return "\n".join(filter(None, (output.get("title"), output.get("summary"), output.get("text"))))

"""The merge requests of a project on GitLab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from pydantic import BaseModel

from orchestrator.domain.wording import join_names
from orchestrator.errors import RefusedError
from orchestrator.forges.connection import Connected
from orchestrator.forges.gitlab.repository import GitLabProject
from orchestrator.protocols import CiFailure, NewPullRequest, PullRequest, ReviewFinding

#: The states of pipelines that have ended (docs.gitlab.com, "Pipelines API"); all others are running or waiting.
_PASSED: Final = frozenset({"success", "skipped"})
_FAILED: Final = frozenset({"failed", "canceled"})
_LONGEST_OUTPUT: Final = 16_384


class GitLabForge(Connected[GitLabProject]):
    """A project on GitLab, on which tasks land by merge requests."""

    Options: ClassVar[type[BaseModel]] = GitLabProject

    async def find(self, branch: str) -> PullRequest | None:
        """Return the newest merge request of a branch."""
        path = f"{self._options.path}/merge_requests"
        found = await self._http.pages(path, {"source_branch": branch, "state": "all"})
        return None if not found else _convert(max(found, key=lambda one: int(one["iid"])))

    async def open(self, wanted: NewPullRequest) -> PullRequest:
        """Open a merge request; raise RefusedError for an unknown reviewer."""
        values: dict[str, Any] = {
            "source_branch": wanted.branch,
            "target_branch": wanted.target,
            "title": f"Draft: {wanted.title}" if wanted.draft else wanted.title,
            "description": wanted.body,
            "remove_source_branch": True,
        }
        values |= {"labels": ",".join(wanted.labels)} if wanted.labels else {}
        values |= {"reviewer_ids": await self._find_users(wanted.reviewers)} if wanted.reviewers else {}
        return _convert(await self._http.send("POST", f"{self._options.path}/merge_requests", values))

    async def _find_users(self, logins: Sequence[str]) -> list[int]:
        found = {login: await self._http.pages("users", {"username": login}) for login in logins}
        if unknown := [login for login, users in found.items() if not users]:
            raise RefusedError(f"GitLab has no user {join_names(unknown)}", "correct `reviewers`")
        return [int(users[0]["id"]) for users in found.values()]

    async def read(self, number: int) -> PullRequest:
        """Return a merge request with the results of pipelines and reviews."""
        path = f"{self._options.path}/merge_requests/{number}"
        found = await self._http.get(path)
        if found is None:
            message = f"{self._options.project} has no merge request {number}"
            raise RefusedError(message, "check `project` and the token")
        if found["state"] != "opened":
            return _convert(found)
        ci, failures = await self._read_pipeline(found)
        findings = await self._read_findings(f"{path}/discussions")
        return _convert(found, ci=ci, failures=failures, findings=findings)

    async def merge_when_ready(self, number: int) -> None:
        """Let GitLab merge a merge request as soon as its pipeline has passed."""
        path = f"{self._options.path}/merge_requests/{number}"
        found = await self._http.get(path) or {}
        if found.get("state") == "opened" and not found.get("merge_when_pipeline_succeeds"):
            await self._http.send("PUT", f"{path}/merge", {"merge_when_pipeline_succeeds": True, "sha": found["sha"]})

    async def _read_pipeline(self, found: Mapping[str, Any]) -> tuple[Any, Sequence[CiFailure]]:
        pipeline = found.get("head_pipeline") or {}
        status = pipeline.get("status")
        if pipeline.get("sha") != found["sha"] or status not in _PASSED | _FAILED:
            return "pending", ()
        if status in _PASSED:
            return "passed", ()
        path = f"{self._options.path}/pipelines/{pipeline['id']}/jobs"
        jobs = await self._http.pages(path, {"scope[]": "failed"})
        failures = [
            CiFailure(one["name"], await self._http.read_text(f"{self._options.path}/jobs/{one['id']}/trace"))
            for one in jobs
        ]
        return "failed", [CiFailure(one.name, one.output[-_LONGEST_OUTPUT:]) for one in failures]

    async def _read_findings(self, path: str) -> Sequence[ReviewFinding]:
        notes = [note for discussion in await self._http.pages(path) for note in discussion["notes"]]
        return [
            _finding(note)
            for note in notes
            if note.get("resolvable") and not note.get("resolved") and await self._is_trusted(note)
        ]

    async def _is_trusted(self, note: Mapping[str, Any]) -> bool:
        return await self._members.is_trusted((note.get("author") or {}).get("id"))


def _finding(note: Mapping[str, Any]) -> ReviewFinding:
    place = note.get("position") or {}
    author = str((note.get("author") or {}).get("username", ""))
    path, line = place.get("new_path"), place.get("new_line")
    return ReviewFinding(f"note-{note['id']}", author, note.get("body") or "", path, line)


def _convert(found: Mapping[str, Any], **results: Any) -> PullRequest:
    is_merged = found["state"] == "merged"
    merged_as = found.get("merge_commit_sha") or found.get("squash_commit_sha") or found["sha"]  # fast-forward
    return PullRequest(
        number=found["iid"],
        url=found["web_url"],
        state="merged" if is_merged else "closed" if found["state"] == "closed" else "open",
        head=found["sha"],
        merged_as=merged_as if is_merged else None,
        has_conflict=bool(found.get("has_conflicts")),
        **results,
    )

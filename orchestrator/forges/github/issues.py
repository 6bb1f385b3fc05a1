"""The issues of a repository on GitHub as tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import quote

from pydantic import BaseModel

from orchestrator.domain.wording import join_names
from orchestrator.errors import RefusedError
from orchestrator.forges.connection import Members
from orchestrator.forges.github.repository import GitHubRepository
from orchestrator.forges.issue_api import IssueApi
from orchestrator.forges.issues import REQUEST_LABELS, Comment, Issue
from orchestrator.forges.tracker import ForgeOptions, ForgeTracker


class GitHubOptions(GitHubRepository, ForgeOptions):
    """The options of a tracker with `use: github`."""

    query: str | None = None
    """A search instead of the other filters, such as `label:bug no:assignee`."""


class GitHubIssues(IssueApi):
    """The issues of one repository on GitHub."""

    number_field, open_state = "number", "open"

    def __init__(self, members: Members, options: GitHubOptions) -> None:
        super().__init__(members)
        self._options, self._repo = options, f"repos/{options.repo}"

    async def list_selected(self) -> Sequence[Mapping[str, Any]]:
        """Return the selected open issues, as the API lists them."""
        options = self._options
        if options.query is not None:
            query = f"repo:{options.repo} is:issue state:open {options.query}"
            return await self.http.pages("search/issues", {"q": query}, field="items")
        filters: dict[str, str] = {"state": "open", "sort": "created", "direction": "asc"}
        filters |= {"labels": ",".join(options.labels)} if options.labels else {}
        filters |= {"assignee": options.assignee} if options.assignee else {}
        filters |= {"milestone": await self._milestone(options.milestone)} if options.milestone else {}
        found = await self.http.pages(f"{self._repo}/issues", filters)
        return [one for one in found if "pull_request" not in one]

    async def _milestone(self, title: str) -> str:
        found = await self.http.pages(f"{self._repo}/milestones", {"state": "all"})
        number = next((str(one["number"]) for one in found if one["title"] == title), None)
        if number is None:
            titles = join_names([repr(one["title"]) for one in found]) or "none"
            raise RefusedError(f"{self._options.repo} has no milestone {title!r}", f"its milestones are: {titles}")
        return number

    async def read(self, number: int) -> Mapping[str, Any] | None:
        """Return an issue; None if it does not exist, or is a pull request."""
        found = await self.http.get(f"{self._repo}/issues/{number}")
        return None if found is None or "pull_request" in found else dict(found)

    async def complete(self, found: Mapping[str, Any]) -> Issue:
        """Return a listed issue with its comments, dependencies and permissions."""
        labels = frozenset(label["name"] for label in found["labels"])
        path = f"{self._repo}/issues/{found['number']}"
        comments = await self.http.pages(f"{path}/comments") if found.get("comments") else []
        is_blocked = (found.get("issue_dependencies_summary") or {}).get("blocked_by")
        blocked_by = await self.http.pages(f"{path}/dependencies/blocked_by") if is_blocked else []
        has_parts = (found.get("sub_issues_summary") or {}).get("total")
        parts = await self.http.pages(f"{path}/sub_issues") if has_parts else []
        events = await self.http.pages(f"{path}/events") if REQUEST_LABELS & labels else []
        author = (found.get("user") or {}).get("login", "")
        return Issue(
            number=found["number"],
            title=found["title"],
            body=found.get("body") or "",
            is_open=found["state"] == "open",
            labels=labels,
            is_trusted=await self.members.is_trusted(author),
            blocked_by=tuple(one["number"] for one in blocked_by if one["state"] == "open"),
            sub_issues=tuple(one["number"] for one in parts if one["state"] == "open"),
            closed=found.get("closed_at"),
            comments=tuple([await self._comment(one) for one in comments]),
            label_events=tuple(
                (one["label"]["name"], str(one["id"]))
                for one in events
                if one["event"] == "labeled" and (one.get("label") or {}).get("name") in REQUEST_LABELS
            ),
        )

    async def _comment(self, found: Mapping[str, Any]) -> Comment:
        user = found.get("user") or {}
        login, is_person = user.get("login", ""), user.get("type") != "Bot"
        # Only administrators install apps.
        is_trusted = await self.members.is_trusted(login) if is_person else True
        return Comment(found["id"], login, found.get("body") or "", is_trusted, is_person)

    async def write_comment(self, number: int, comment: int | None, body: str) -> None:
        """Write a comment, or replace an existing one."""
        if comment is None:
            await self.http.send("POST", f"{self._repo}/issues/{number}/comments", {"body": body})
        else:
            await self.http.send("PATCH", f"{self._repo}/issues/comments/{comment}", {"body": body})

    async def delete_comment(self, number: int, comment: int) -> None:  # noqa: ARG002  the id is of the repository
        """Delete a comment."""
        await self.http.send("DELETE", f"{self._repo}/issues/comments/{comment}")

    async def change_labels(self, number: int, added: Collection[str], removed: Collection[str]) -> None:
        """Add and remove labels; the others stay."""
        path = f"{self._repo}/issues/{number}/labels"
        if added:
            await self.http.send("POST", path, {"labels": sorted(added)})
        for label in sorted(removed):
            await self.http.send("DELETE", f"{path}/{quote(label, safe='')}")

    async def close(self, number: int) -> None:
        """Close an issue as completed."""
        body = {"state": "closed", "state_reason": "completed"}
        await self.http.send("PATCH", f"{self._repo}/issues/{number}", body)


class GitHubTracker(ForgeTracker[GitHubOptions]):
    """A tracker whose tasks are issues on GitHub."""

    Options: ClassVar[type[BaseModel]] = GitHubOptions

    def issue_api(self, members: Members) -> IssueApi:
        """Return the issues of the repository."""
        return GitHubIssues(members, self._options)

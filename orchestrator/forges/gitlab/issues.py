"""The issues of a project on GitLab as tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel

from orchestrator.forges.connection import Members
from orchestrator.forges.gitlab.repository import GitLabProject
from orchestrator.forges.issue_api import IssueApi
from orchestrator.forges.issues import REQUEST_LABELS, Comment, Issue
from orchestrator.forges.tracker import ForgeOptions, ForgeTracker


class GitLabOptions(GitLabProject, ForgeOptions):
    """The options of a tracker with `use: gitlab`."""

    query: str | None = None
    """Only issues whose title or description contains this text."""


class GitLabIssues(IssueApi):
    """The issues of one project on GitLab."""

    number_field, open_state = "iid", "opened"

    def __init__(self, members: Members, options: GitLabOptions) -> None:
        super().__init__(members)
        self._options, self._project = options, options.path

    async def list_selected(self) -> Sequence[Mapping[str, Any]]:
        """Return the selected open issues, as the API lists them."""
        options = self._options
        filters: dict[str, str] = {"state": "opened", "order_by": "created_at", "sort": "asc"}
        filters |= {"labels": ",".join(options.labels)} if options.labels else {}
        filters |= {"assignee_username": options.assignee} if options.assignee else {}
        filters |= {"milestone": options.milestone} if options.milestone else {}
        filters |= {"search": options.query} if options.query else {}
        return await self.http.pages(f"{self._project}/issues", filters)

    async def read(self, number: int) -> Mapping[str, Any] | None:
        """Return an issue; None if it does not exist."""
        found = await self.http.get(f"{self._project}/issues/{number}")
        return None if found is None else dict(found)

    async def complete(self, found: Mapping[str, Any]) -> Issue:
        """Return a listed issue with its comments, dependencies and permissions."""
        labels = frozenset(found["labels"])
        path = f"{self._project}/issues/{found['iid']}"
        notes = await self.http.pages(f"{path}/notes", {"sort": "asc"}) if found.get("user_notes_count", 1) else []
        links = await self.http.get(f"{path}/links") or []  # not in every edition
        events = await self.http.pages(f"{path}/resource_label_events") if REQUEST_LABELS & labels else []
        author = found.get("author") or {}
        return Issue(
            number=found["iid"],
            title=found["title"],
            body=found.get("description") or "",
            is_open=found["state"] == "opened",
            labels=labels,
            is_trusted=await self.members.is_trusted(author.get("id")),
            blocked_by=tuple(
                one["iid"] for one in links if one.get("link_type") == "is_blocked_by" and one["state"] == "opened"
            ),
            closed=found.get("closed_at"),
            comments=tuple([await self._comment(one) for one in notes if not one.get("system")]),
            label_events=tuple(
                (one["label"]["name"], str(one["id"]))
                for one in events
                if one["action"] == "add" and (one.get("label") or {}).get("name") in REQUEST_LABELS
            ),
        )

    async def _comment(self, found: Mapping[str, Any]) -> Comment:
        author = found.get("author") or {}
        is_trusted = await self.members.is_trusted(author.get("id"))
        return Comment(found["id"], author.get("username", ""), found.get("body") or "", is_trusted)

    async def write_comment(self, number: int, comment: int | None, body: str) -> None:
        """Write a comment, or replace an existing one."""
        path = f"{self._project}/issues/{number}/notes"
        if comment is None:
            await self.http.send("POST", path, {"body": body})
        else:
            await self.http.send("PUT", f"{path}/{comment}", {"body": body})

    async def delete_comment(self, number: int, comment: int) -> None:
        """Delete a comment."""
        await self.http.send("DELETE", f"{self._project}/issues/{number}/notes/{comment}")

    async def change_labels(self, number: int, added: Collection[str], removed: Collection[str]) -> None:
        """Add and remove labels; the others stay."""
        body = {"add_labels": ",".join(sorted(added)), "remove_labels": ",".join(sorted(removed))}
        await self.http.send("PUT", f"{self._project}/issues/{number}", body)

    async def close(self, number: int) -> None:
        """Close an issue."""
        await self.http.send("PUT", f"{self._project}/issues/{number}", {"state_event": "close"})


class GitLabTracker(ForgeTracker[GitLabOptions]):
    """A tracker whose tasks are issues on GitLab."""

    Options: ClassVar[type[BaseModel]] = GitLabOptions

    def issue_api(self, members: Members) -> IssueApi:
        """Return the issues of the project."""
        return GitLabIssues(members, self._options)

"""A scripted GitHub: the issues of one repository by REST (docs.github.com/rest)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from orchestrator.testing.forge_servers.server import Answer, ForgeComment, ForgeIssue, ForgeServer, Request

_NOT_FOUND = Answer(404, {"message": "Not Found", "documentation_url": "https://docs.github.com/rest"})
_FORBIDDEN = Answer(403, {"message": "Resource not accessible by personal access token"})


class GitHubServer(ForgeServer):
    """A GitHub with one repository."""

    @property
    def url(self) -> str:
        """The URL of the API."""
        return self.origin

    def answer(self, request: Request) -> Answer:
        """Return the answer to an authenticated request."""
        match request.parts:
            case ["user"]:
                return Answer(200, {"login": request.user.login, "type": "User"})
            case ["search", "issues"] if request.method == "GET":
                return self._search(request.query.get("q", ""))
            case ["repos", owner, name, *rest] if f"{owner}/{name}" == self.repository:
                if request.method != "GET" and request.user.permission == "read":
                    return _FORBIDDEN
                return self._answer_repository(request, rest)
        return _NOT_FOUND

    def _answer_repository(self, request: Request, parts: Sequence[str]) -> Answer:
        match request.method, parts:
            case "GET", ["issues"]:
                return Answer(200, [self._issue(one) for one in self._list(request.query)])
            case "GET", ["milestones"]:
                titles = sorted({one.milestone for one in self._issues.values() if one.milestone is not None})
                return Answer(200, [{"number": number, "title": title} for number, title in enumerate(titles, 1)])
            case "GET", ["collaborators", login, "permission"]:
                user = self._users.get(unquote(login))
                found = None if user is None else {"permission": user.permission, "role_name": user.permission}
                return _NOT_FOUND if found is None else Answer(200, found)
            case "PATCH", ["issues", "comments", id_]:
                return self._edit_comment(int(id_), request)
            case method, ["issues", number, *rest] if number.isdigit() and int(number) in self._issues:
                issue = self._issues[int(number)]
                return self._read_issue(issue, rest) if method == "GET" else self._change_issue(issue, rest, request)
        return _NOT_FOUND

    def _read_issue(self, issue: ForgeIssue, parts: Sequence[str]) -> Answer:
        match parts:
            case []:
                return Answer(200, self._issue(issue))
            case ["comments"]:
                return Answer(200, [self._comment(one) for one in issue.comments])
            case ["events"]:
                return Answer(200, [self._event(one.id, one.kind, one.actor, one.label) for one in issue.events])
            case ["dependencies", "blocked_by"]:
                return Answer(200, [self._issue(self._issues[number]) for number in issue.blocked_by])
            case ["sub_issues"]:
                return Answer(200, [self._issue(self._issues[number]) for number in issue.sub_issues])
        return _NOT_FOUND

    def _change_issue(self, issue: ForgeIssue, parts: Sequence[str], request: Request) -> Answer:
        by = request.user.login
        match request.method, parts:
            case "PATCH", []:
                if (state := request.body.get("state")) is not None:
                    self._set_open(issue.number, by, is_open=state == "open")
                self.edit(issue.number, title=request.body.get("title"), body=request.body.get("body"))
                return Answer(200, self._issue(issue))
            case "POST", ["comments"]:
                id_ = self.comment(issue.number, request.body["body"], by)
                return Answer(201, next(self._comment(one) for one in issue.comments if one.id == id_))
            case "POST", ["labels"]:
                for label in request.body["labels"]:
                    self.label(issue.number, label, by)
                return Answer(200, [{"name": label} for label in issue.labels])
            case "DELETE", ["labels", label] if unquote(label) in issue.labels:
                self.unlabel(issue.number, unquote(label), by)
                return Answer(200, [{"name": one} for one in issue.labels])
        return _NOT_FOUND

    def _list(self, query: Mapping[str, str]) -> list[ForgeIssue]:
        state = {"open": True, "closed": False, "all": None}[query.get("state", "open")]
        labels = [label for label in query.get("labels", "").split(",") if label]
        titles = sorted({one.milestone for one in self._issues.values() if one.milestone is not None})
        milestone = titles[int(query["milestone"]) - 1] if "milestone" in query else ""
        found = self.select(is_open=state, labels=labels, assignee=query.get("assignee", ""), milestone=milestone)
        return found if query.get("direction") == "asc" else found[::-1]

    def _search(self, query: str) -> Answer:
        if f"repo:{self.repository}" not in query.split():
            return Answer(422, {"message": "Validation Failed"})
        labels = [first or second for first, second in re.findall(r'\blabel:(?:"([^"]*)"|(\S+))', query)]
        found = self.select(is_open=True if "state:open" in query else None, labels=labels)
        return Answer(200, {"total_count": len(found), "items": [self._issue(one) for one in found]})

    def _edit_comment(self, id_: int, request: Request) -> Answer:
        for issue in self._issues.values():
            for comment in issue.comments:
                if comment.id == id_:
                    comment.body = request.body["body"]
                    self._touch(issue.number)
                    return Answer(200, self._comment(comment))
        return _NOT_FOUND

    def _user(self, login: str) -> dict[str, Any]:
        user = self._users.get(login)
        return {"login": login, "type": "Bot" if user is not None and user.is_bot else "User"}

    def _issue(self, issue: ForgeIssue) -> dict[str, Any]:
        open_blockers = [number for number in issue.blocked_by if self._issues[number].is_open]
        return {
            "number": issue.number,
            "title": issue.title,
            "body": issue.body or None,
            "state": "open" if issue.is_open else "closed",
            "user": self._user(issue.author),
            "labels": [{"name": label} for label in issue.labels],
            "assignees": [self._user(login) for login in issue.assignees],
            "milestone": None if issue.milestone is None else {"title": issue.milestone},
            "comments": len(issue.comments),
            "created_at": issue.created,
            "updated_at": issue.updated,
            "closed_at": issue.closed,
            "html_url": f"{self.origin}/{self.repository}/issues/{issue.number}",
            "sub_issues_summary": {"total": len(issue.sub_issues)},
            "issue_dependencies_summary": {"blocked_by": len(open_blockers), "total_blocked_by": len(issue.blocked_by)},
        }

    def _comment(self, comment: ForgeComment) -> dict[str, Any]:
        return {
            "id": comment.id,
            "user": self._user(comment.author),
            "body": comment.body,
            "created_at": comment.time,
        }

    def _event(self, id_: int, kind: str, actor: str, label: str | None) -> dict[str, Any]:
        found = {"id": id_, "event": kind, "actor": self._user(actor)}
        return found if label is None else {**found, "label": {"name": label}}

"""A scripted GitLab: the issues of one project by REST (docs.gitlab.com/api)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from orchestrator.testing.forge_servers.server import Answer, ForgeComment, ForgeIssue, ForgeServer, Request

_NOT_FOUND: Final = Answer(404, {"message": "404 Not found"})
_FORBIDDEN: Final = Answer(403, {"message": "403 Forbidden"})
_LEVELS: Final = {"read": 20, "write": 30, "admin": 50}


class GitLabServer(ForgeServer):
    """A GitLab with one project."""

    @property
    def url(self) -> str:
        """The URL of the API."""
        return f"{self.origin}/api/v4"

    def answer(self, request: Request) -> Answer:
        """Return the answer to an authenticated request."""
        match request.parts:
            case ["user"]:
                return Answer(200, {"id": request.user.id, "username": request.user.login})
            case ["projects", project, *rest] if project == quote(self.repository, safe=""):
                if request.method != "GET" and request.user.permission == "read":
                    return _FORBIDDEN
                return self._answer_project(request, rest)
        return _NOT_FOUND

    def _answer_project(self, request: Request, parts: Sequence[str]) -> Answer:
        match request.method, parts:
            case "GET", ["issues"]:
                return Answer(200, [self._issue(one) for one in self._list(request.query)])
            case "GET", ["members", "all", id_]:
                user = next((one for one in self._users.values() if str(one.id) == id_), None)
                return _NOT_FOUND if user is None else Answer(200, {"access_level": _LEVELS[user.permission]})
            case method, ["issues", number, *rest] if number.isdigit() and int(number) in self._issues:
                return self._answer_issue(method, self._issues[int(number)], rest, request)
        return _NOT_FOUND

    def _answer_issue(self, method: str, issue: ForgeIssue, parts: Sequence[str], request: Request) -> Answer:
        by = request.user.login
        match method, parts:
            case "GET", []:
                return Answer(200, self._issue(issue))
            case "PUT", []:
                self._change(issue, request.body, by)
                return Answer(200, self._issue(issue))
            case "GET", ["notes"]:
                notes = [self._note(one) for one in issue.comments]
                system = [
                    {**self._note(ForgeComment(one.id, one.actor, one.kind, one.time)), "system": True}
                    for one in issue.events
                ]
                found = sorted([*notes, *system], key=lambda one: int(one["id"]))
                return Answer(200, found if request.query.get("sort") == "asc" else found[::-1])
            case "POST", ["notes"]:
                id_ = self.comment(issue.number, request.body["body"], by)
                return Answer(201, next(self._note(one) for one in issue.comments if one.id == id_))
            case "PUT", ["notes", id_]:
                for comment in issue.comments:
                    if comment.id == int(id_):
                        comment.body = request.body["body"]
                        self._touch(issue.number)
                        return Answer(200, self._note(comment))
            case "GET", ["links"]:
                found = [self._issue(self._issues[number]) for number in issue.blocked_by]
                return Answer(200, [{**one, "link_type": "is_blocked_by"} for one in found])
            case "GET", ["resource_label_events"]:
                return Answer(200, [
                    {"id": one.id, "action": {"labeled": "add", "unlabeled": "remove"}[one.kind],
                     "label": {"name": one.label}, "user": self._user(one.actor)}
                    for one in issue.events if one.label is not None
                ])  # fmt: skip
        return _NOT_FOUND

    def _change(self, issue: ForgeIssue, body: Mapping[str, Any], by: str) -> None:
        for label in filter(None, body.get("add_labels", "").split(",")):
            self.label(issue.number, label, by)
        for label in filter(None, body.get("remove_labels", "").split(",")):
            self.unlabel(issue.number, label, by)
        if (change := body.get("state_event")) is not None:
            self._set_open(issue.number, by, is_open=change == "reopen")
        self.edit(issue.number, title=body.get("title"), body=body.get("description"))

    def _list(self, query: Mapping[str, str]) -> list[ForgeIssue]:
        state = {"opened": True, "closed": False, "all": None}[query.get("state", "all")]
        labels = [label for label in query.get("labels", "").split(",") if label]
        found = self.select(
            is_open=state,
            labels=labels,
            assignee=query.get("assignee_username", ""),
            milestone=query.get("milestone", ""),
        )
        text = query.get("search", "").lower()
        found = [one for one in found if text in f"{one.title}\n{one.body}".lower()]
        return found if query.get("sort") == "asc" else found[::-1]

    def _user(self, login: str) -> dict[str, Any]:
        user = self._users.get(login)
        return {"id": 0 if user is None else user.id, "username": login}

    def _issue(self, issue: ForgeIssue) -> dict[str, Any]:
        return {
            "iid": issue.number,
            "title": issue.title,
            "description": issue.body or None,
            "state": "opened" if issue.is_open else "closed",
            "author": self._user(issue.author),
            "labels": list(issue.labels),
            "assignees": [self._user(login) for login in issue.assignees],
            "milestone": None if issue.milestone is None else {"title": issue.milestone},
            "user_notes_count": len(issue.comments),
            "created_at": issue.created,
            "updated_at": issue.updated,
            "closed_at": issue.closed,
            "web_url": f"{self.origin}/{self.repository}/-/issues/{issue.number}",
        }

    def _note(self, comment: ForgeComment) -> dict[str, Any]:
        return {
            "id": comment.id,
            "author": self._user(comment.author),
            "body": comment.body,
            "created_at": comment.time,
            "system": False,
        }

"""A scripted GitLab: the issues of one project by REST (docs.gitlab.com/api)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from orchestrator.testing.forge_servers.pull_requests import ForgePullRequest, LineComment, PullRequestServer
from orchestrator.testing.forge_servers.server import Answer, ForgeComment, ForgeIssue, Request

_NOT_FOUND: Final = Answer(404, {"message": "404 Not found"})
_FORBIDDEN: Final = Answer(403, {"message": "403 Forbidden"})
_LEVELS: Final = {"read": 20, "write": 30, "admin": 50}


class GitLabServer(PullRequestServer):
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
            case ["users"]:
                login = request.query.get("username", "")
                return Answer(200, [self._user(login)] if login in self._users else [])
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
            case _, ["merge_requests", *rest]:
                return self._answer_merge_requests(request, rest)
            case "GET", ["pipelines", id_, "jobs"]:
                checks = self.checks_of(self.pull_request(int(id_)).head)
                return Answer(200, [{"id": one.id, "name": one.name} for one in checks if one.passed is False])
            case "GET", ["jobs", id_, "trace"]:
                results = (one for checks in self._checks.values() for one in checks)
                return Answer(200, next((one.output for one in results if one.id == int(id_)), ""))
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
            case "PUT" | "DELETE", ["notes", id_]:
                return self._edit_note(int(id_), request)
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

    def _edit_note(self, id_: int, request: Request) -> Answer:
        comment = self.edit_comment(id_, request.body.get("body"))
        if comment is None:
            return _NOT_FOUND
        return Answer(204, None) if request.method == "DELETE" else Answer(200, self._note(comment))

    def _answer_merge_requests(self, request: Request, parts: Sequence[str]) -> Answer:
        match request.method, parts:
            case "GET", []:
                branch, state = request.query.get("source_branch"), request.query.get("state", "all")
                shown = [self.pull_request(number) for number in self.pull_requests]
                wanted = {"opened": "open"}.get(state, state)
                found = [one for one in shown if branch in (None, one.branch) and wanted in ("all", one.state)]
                return Answer(200, [self._merge_request(one) for one in found])
            case "POST", []:
                return self._open_merge_request(request)
            case method, [number, *rest] if number.isdigit() and int(number) in self.pull_requests:
                return self._answer_merge_request(method, self.pull_request(int(number)), rest)
        return _NOT_FOUND

    def _open_merge_request(self, request: Request) -> Answer:
        body = request.body
        title = body["title"].removeprefix("Draft: ")
        values = {"branch": body["source_branch"], "target": body["target_branch"], "title": title}
        values |= {"is_draft": title != body["title"], "body": body.get("description") or ""}
        opened = self.open_pull_request(values, request.user.login)
        if opened is None:
            return Answer(409, {"message": ["Another open merge request already exists for this source branch"]})
        opened.labels += list(filter(None, body.get("labels", "").split(",")))
        reviewers = body.get("reviewer_ids", [])
        opened.reviewers += [one.login for one in self._users.values() if one.id in reviewers]
        return Answer(201, self._merge_request(opened))

    def _answer_merge_request(self, method: str, found: ForgePullRequest, parts: Sequence[str]) -> Answer:
        match method, parts:
            case "GET", []:
                return Answer(200, self._merge_request(found))
            case "GET", ["discussions"]:
                notes = [self._review_note(one) for one in found.line_comments]
                notes += [
                    {"id": one.id, "author": self._user(one.author), "body": one.body, "resolvable": True,
                     "resolved": False}
                    for one in found.reviews if one.state == "CHANGES_REQUESTED"
                ]  # fmt: skip
                return Answer(200, [{"id": str(one["id"]), "notes": [one]} for one in notes])
            case "PUT", ["merge"]:
                found.is_auto_merged = True
                self.merge_if_ready(found)
                return Answer(200, self._merge_request(found))
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

    def _merge_request(self, found: ForgePullRequest) -> dict[str, Any]:
        checks = self.checks_of(found.head)
        status = "success" if all(one.passed for one in checks) else "failed"
        status = "running" if any(one.passed is None for one in checks) else status
        is_merge = found.merged_as is not None and not found.was_squashed
        return {
            "iid": found.number,
            "web_url": f"{self.origin}/{self.repository}/-/merge_requests/{found.number}",
            "state": {"open": "opened"}.get(found.state, found.state),
            "title": f"Draft: {found.title}" if found.is_draft else found.title,
            "description": found.body,
            "author": self._user(found.author),
            "source_branch": found.branch,
            "target_branch": found.target,
            "sha": found.head,
            "labels": found.labels,
            "reviewers": [self._user(login) for login in found.reviewers],
            "merge_commit_sha": found.merged_as if is_merge else None,
            "squash_commit_sha": found.merged_as if found.was_squashed else None,
            "has_conflicts": self.has_conflict(found),
            "merge_when_pipeline_succeeds": found.is_auto_merged,
            "head_pipeline": {"id": found.number, "sha": found.head, "status": status} if checks else None,
        }

    def _review_note(self, comment: LineComment) -> dict[str, Any]:
        return {
            "id": comment.id,
            "author": self._user(comment.author),
            "body": comment.body,
            "resolvable": True,
            "resolved": comment.is_resolved,
            "position": {"new_path": comment.path, "new_line": comment.line},
        }

    def _note(self, comment: ForgeComment) -> dict[str, Any]:
        return {
            "id": comment.id,
            "author": self._user(comment.author),
            "body": comment.body,
            "created_at": comment.time,
            "system": False,
        }

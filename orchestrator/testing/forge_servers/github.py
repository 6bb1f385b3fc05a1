"""A scripted GitHub: the issues of one repository by REST (docs.github.com/rest)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from orchestrator.testing.forge_servers.pull_requests import CheckResult, ForgePullRequest, PullRequestServer
from orchestrator.testing.forge_servers.server import Answer, ForgeComment, ForgeIssue, Request

_NOT_FOUND = Answer(404, {"message": "Not Found", "documentation_url": "https://docs.github.com/rest"})
_FORBIDDEN = Answer(403, {"message": "Resource not accessible by personal access token"})


class GitHubServer(PullRequestServer):
    """A GitHub with one repository; with a certificate, a GitHub Enterprise server, as `gh` can use."""

    auto_merge_error: str | None = None
    """Why auto-merge is refused; None: it is not."""

    @property
    def url(self) -> str:
        """The URL of the API."""
        return f"{self.origin}/api/v3" if self.is_encrypted else self.origin

    def answer(self, request: Request) -> Answer:
        """Return the answer to an authenticated request."""
        match request.parts:
            case ["user"]:
                return Answer(200, {"login": request.user.login, "type": "User"})
            case ["graphql"] | ["api", "graphql"] if request.method == "POST":
                return self._answer_graphql(request.body["query"], request.body.get("variables", {}))
            case ["meta"]:
                return Answer(200, {"installed_version": "3.14.0"})
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
            case _, ["pulls" | "commits", *_]:
                return self._answer_pull_requests(request, parts)
            case "POST", ["issues", number, "labels"] if number.isdigit() and int(number) in self.pull_requests:
                return self._answer_pull_requests(request, parts)
            case "PATCH" | "DELETE", ["issues", "comments", id_]:
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

    def _answer_pull_requests(self, request: Request, parts: Sequence[str]) -> Answer:
        match request.method, parts:
            case "POST", ["issues", number, "labels"]:
                self.pull_requests[int(number)].labels += request.body["labels"]
                return Answer(200, [{"name": label} for label in self.pull_requests[int(number)].labels])
            case "GET", ["commits", commit, "check-runs"]:
                runs = [self._check_run(one) for one in self.checks_of(commit)]
                return Answer(200, {"total_count": len(runs), "check_runs": runs})
            case "GET", ["commits", commit, "status"]:
                return Answer(200, {"state": "pending", "statuses": [], "sha": commit, "total_count": 0})
            case "GET", ["pulls"]:
                branch = request.query.get("head", "").partition(":")[2]
                state = request.query.get("state", "open")
                shown = [self.pull_request(number) for number in self.pull_requests]
                found = [one for one in shown if branch in ("", one.branch) and state in ("all", one.state)]
                return Answer(200, [self._listed_pull_request(one) for one in found])
            case "POST", ["pulls"]:
                body = request.body
                values = {"branch": body["head"], "target": body["base"], "is_draft": body.get("draft", False)}
                values |= {"title": body["title"], "body": body.get("body") or ""}
                opened = self.open_pull_request(values, request.user.login)
                if opened is None:
                    return Answer(422, {"message": "Validation Failed"})
                return Answer(201, self._pull_request(opened))
            case method, ["pulls", number, *rest] if number.isdigit() and int(number) in self.pull_requests:
                return self._answer_pull_request(method, self.pull_request(int(number)), rest, request)
        return _NOT_FOUND

    def _answer_pull_request(
        self, method: str, found: ForgePullRequest, parts: Sequence[str], request: Request
    ) -> Answer:
        match method, parts:
            case "GET", []:
                return Answer(200, self._pull_request(found))
            case "GET", ["reviews"]:
                return Answer(200, [
                    {"id": one.id, "user": self._user(one.author), "state": one.state, "body": one.body}
                    for one in found.reviews
                ])  # fmt: skip
            case "GET", ["comments"]:
                return Answer(200, [
                    {"id": one.id, "user": self._user(one.author), "body": one.body, "path": one.path, "line": one.line}
                    for one in found.line_comments
                ])  # fmt: skip
            case "POST", ["requested_reviewers"]:
                found.reviewers += request.body["reviewers"]
                return Answer(201, self._listed_pull_request(found))
            case "PUT", ["merge"]:
                if self.merge(found.number):
                    return Answer(200, {"merged": True, "sha": found.merged_as, "message": "merged"})
                return Answer(405, {"message": "Pull Request is not mergeable"})
        return _NOT_FOUND

    def _answer_graphql(self, query: str, variables: Mapping[str, Any]) -> Answer:
        """Answer the mutation `enablePullRequestAutoMerge`, and the queries of `gh issue list`."""
        if "enablePullRequestAutoMerge" in query:
            return self._enable_auto_merge(str(variables["id"]))
        if "__type" in query:  # optional features
            return Answer(200, {"data": {}})
        found = self._find(variables["query"]) if "query" in variables else self.select(is_open=True)
        nodes = [
            {"number": one.number, "title": one.title, "labels": {"nodes": [{"name": label} for label in one.labels]}}
            for one in found
        ]
        listed = {"nodes": nodes, "pageInfo": {"hasNextPage": False, "endCursor": None}}
        repository = {"hasIssuesEnabled": True, "issues": {"totalCount": len(nodes), **listed}}
        return Answer(200, {"data": {"repository": repository, "search": {"issueCount": len(nodes), **listed}}})

    def _enable_auto_merge(self, node: str) -> Answer:
        """Enable auto-merge as the mutation `enablePullRequestAutoMerge` does."""
        found = next((one for one in self.pull_requests.values() if f"PR_{one.number}" == node), None)
        if found is None:
            return Answer(200, {"data": None, "errors": [{"message": f"Could not resolve to a node: {node}"}]})
        checks = self.checks_of(self.pull_request(found.number).head)
        if self.auto_merge_error is not None:
            return Answer(200, {"data": None, "errors": [{"message": self.auto_merge_error}]})
        if checks and all(one.passed for one in checks):
            message = "Pull request Pull request is in clean status"
            return Answer(200, {"data": None, "errors": [{"message": message}]})
        found.is_auto_merged = True
        return Answer(200, {"data": {"enablePullRequestAutoMerge": {"clientMutationId": None}}})

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
        found = self._find(query)
        return Answer(200, {"total_count": len(found), "items": [self._issue(one) for one in found]})

    def _find(self, query: str) -> list[ForgeIssue]:
        labels = [first or second for first, second in re.findall(r'\blabel:(?:"([^"]*)"|(\S+))', query)]
        return self.select(is_open=True if "state:open" in query else None, labels=labels)

    def _edit_comment(self, id_: int, request: Request) -> Answer:
        comment = self.edit_comment(id_, request.body.get("body"))
        if comment is None:
            return _NOT_FOUND
        return Answer(204, None) if request.method == "DELETE" else Answer(200, self._comment(comment))

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

    def _pull_request(self, found: ForgePullRequest) -> dict[str, Any]:
        """Return a pull request by itself; lists lack some of its fields."""
        state = "dirty" if self.has_conflict(found) else "clean"
        return {**self._listed_pull_request(found), "merged": found.state == "merged", "mergeable_state": state}

    def _listed_pull_request(self, found: ForgePullRequest) -> dict[str, Any]:
        is_merged = found.state == "merged"
        return {
            "number": found.number,
            "node_id": f"PR_{found.number}",
            "html_url": f"{self.origin}/{self.repository}/pull/{found.number}",
            "state": "open" if found.state == "open" else "closed",
            "title": found.title,
            "body": found.body,
            "draft": found.is_draft,
            "user": self._user(found.author),
            "head": {"ref": found.branch, "sha": found.head},
            "base": {"ref": found.target},
            "labels": [{"name": label} for label in found.labels],
            "requested_reviewers": [self._user(login) for login in found.reviewers],
            "merged_at": "2026-01-01T00:00:00Z" if is_merged else None,
            "merge_commit_sha": found.merged_as,
            "auto_merge": {"merge_method": "merge"} if found.is_auto_merged else None,
        }

    def _check_run(self, check: CheckResult) -> dict[str, Any]:
        return {
            "id": check.id,
            "name": check.name,
            "status": "in_progress" if check.passed is None else "completed",
            "conclusion": None if check.passed is None else "success" if check.passed else "failure",
            "output": {"title": check.name, "summary": check.output, "text": None},
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

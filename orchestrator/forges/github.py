"""The tracker `github`: issues of a repository on GitHub, or on a GitHub Enterprise server, are tasks.

    trackers:
      issues:
        use: github
        repo: acme/shop
        labels: [council]

The API is that of docs.github.com/rest, version 2022-11-28.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final
from urllib.parse import quote, urlsplit

import pluggy
from pydantic import BaseModel, Field

from orchestrator.domain.wording import join_names
from orchestrator.errors import RefusedError
from orchestrator.forges.forge import Forge
from orchestrator.forges.issues import RETRY_LABEL, Comment, Issue
from orchestrator.forges.tracker import Connection, ForgeOptions, ForgeTracker, find_token
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterTracker

if TYPE_CHECKING:
    from orchestrator.forges.http import ForgeHttp

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

_REMEDIES: Final = {
    401: "set the variable of `token` to a valid token, or run `gh auth login`",
    403: "use a token that may read and write issues",
    404: "check `repo`, and that the token may read it",
    410: "enable issues in the settings of the repository",
}
_WRITERS: Final = frozenset({"admin", "maintain", "write"})
_PUBLIC_API: Final = "https://api.github.com"


class GitHubOptions(ForgeOptions):
    """The options of a tracker with `use: github`."""

    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
    """The repository, `owner/name`."""
    api: str = _PUBLIC_API
    """The URL of the API; for a GitHub Enterprise server `https://HOST/api/v3`."""
    token: str = "GITHUB_TOKEN"  # noqa: S105  the name of a variable
    """The variable with the token. If it is not set, `gh auth token` is asked."""
    query: str | None = None
    """A search instead of the other filters, such as `label:bug no:assignee`."""


class GitHub(Forge):
    """The issues of one repository on GitHub."""

    number_field, open_state = "number", "open"

    def __init__(self, http: ForgeHttp, options: GitHubOptions) -> None:
        super().__init__(http)
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
        events = await self.http.pages(f"{path}/events") if RETRY_LABEL in labels else []
        author = (found.get("user") or {}).get("login", "")
        return Issue(
            number=found["number"],
            title=found["title"],
            body=found.get("body") or "",
            is_open=found["state"] == "open",
            labels=labels,
            is_trusted=await self.is_trusted(author),
            blocked_by=tuple(one["number"] for one in blocked_by if one["state"] == "open"),
            sub_issues=tuple(one["number"] for one in parts if one["state"] == "open"),
            closed=found.get("closed_at"),
            comments=tuple([await self._comment(one) for one in comments]),
            retry_requests=tuple(
                str(one["id"])
                for one in events
                if one["event"] == "labeled" and (one.get("label") or {}).get("name") == RETRY_LABEL
            ),
        )

    async def _comment(self, found: Mapping[str, Any]) -> Comment:
        user = found.get("user") or {}
        login, is_person = user.get("login", ""), user.get("type") != "Bot"
        # Only administrators install apps.
        is_trusted = await self.is_trusted(login) if is_person else True
        return Comment(found["id"], login, found.get("body") or "", is_trusted, is_person)

    async def read_own_user(self) -> Any:
        """Return the login of the token's user; None for the token of an app."""
        return ((await self.http.get("user")) or {}).get("login")

    async def may_write(self, user: Any) -> bool:
        """Return True if a login may write to the repository."""
        found = await self.http.get(f"{self._repo}/collaborators/{quote(user, safe='')}/permission") or {}
        return not _WRITERS.isdisjoint({found.get("role_name"), found.get("permission")})

    async def write_comment(self, number: int, comment: int | None, body: str) -> None:
        """Write a comment, or replace an existing one."""
        if comment is None:
            await self.http.send("POST", f"{self._repo}/issues/{number}/comments", {"body": body})
        else:
            await self.http.send("PATCH", f"{self._repo}/issues/comments/{comment}", {"body": body})

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

    async def connection(self) -> Connection:
        """Return the API, and the headers with the token."""
        options = self._options
        host = "github.com" if options.api == _PUBLIC_API else urlsplit(options.api).netloc
        token = await find_token(options.token, ["gh", "auth", "token", "--hostname", host])
        headers = {
            "Authorization": f"Bearer {token}",
            "Accept": "application/vnd.github+json",
            "X-GitHub-Api-Version": "2022-11-28",
        }
        return Connection(options.api, headers, _REMEDIES)

    def forge(self, http: ForgeHttp) -> Forge:
        """Return the repository."""
        return GitHub(http, self._options)


@hookimpl
def council_register_trackers(register: RegisterTracker) -> None:
    """Register `use: github`."""
    register("github", GitHubTracker)

"""A project on GitLab: its options, its API, and who may write to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote, urlsplit

from pydantic import Field

from orchestrator.forges.connection import Connection, Members, RepositoryOptions, find_token

if TYPE_CHECKING:
    from orchestrator.forges.http import ForgeHttp


_REMEDIES: Final = {
    401: "set the variable of `token` to a valid token with the scope `api`",
    403: "use a token with the scope `api` of a user who may edit issues",
    404: "check `project`, and that the token may read it",
}
#: The access level of developers, who may push (docs.gitlab.com, "Valid access levels").
_DEVELOPER: Final = 30


class GitLabProject(RepositoryOptions):
    """A project on gitlab.com, or on another GitLab server."""

    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)+$")]
    """The project, `group/name`."""
    api: str = "https://gitlab.com/api/v4"
    """The URL of the API."""
    token: str = "GITLAB_TOKEN"  # noqa: S105  the name of a variable
    """The variable with the token. If it is not set, `glab config get token` is asked."""

    @property
    def path(self) -> str:
        """The path of the project in the API."""
        return f"projects/{quote(self.project, safe='')}"

    async def connection(self) -> Connection:
        """Return the API, and the header with the token."""
        host = urlsplit(self.api).netloc
        token = await find_token(self.token, ["glab", "config", "get", "token", "--host", host])
        return Connection(self.api, {"PRIVATE-TOKEN": token}, _REMEDIES)

    def members(self, http: ForgeHttp) -> Members:
        """Return the users who may write to it."""
        return GitLabMembers(http, self.path)


class GitLabMembers(Members):
    """The users who may push to a project on GitLab, by id."""

    def __init__(self, http: ForgeHttp, project: str) -> None:
        super().__init__(http)
        self._project = project

    async def read_own_user(self) -> Any:
        """Return the id of the token's user."""
        return ((await self.http.get("user")) or {}).get("id")

    async def may_write(self, user: Any) -> bool:
        """Return True if the user with an id may push to the project."""
        found = await self.http.get(f"{self._project}/members/all/{user}") or {}
        return int(found.get("access_level", 0)) >= _DEVELOPER

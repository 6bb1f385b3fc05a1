"""A repository on GitHub: its options, its API, and who may write to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote, urlsplit

from pydantic import Field

from orchestrator.forges.connection import Connection, Members, RepositoryOptions, find_token

if TYPE_CHECKING:
    from orchestrator.forges.http import ForgeHttp


_REMEDIES: Final = {
    401: "set the variable of `token` to a valid token, or run `gh auth login`",
    403: "use a token that may read and write issues",
    404: "check `repo`, and that the token may read it",
    410: "enable issues in the settings of the repository",
}
_WRITERS: Final = frozenset({"admin", "maintain", "write"})
_PUBLIC_API: Final = "https://api.github.com"


class GitHubRepository(RepositoryOptions):
    """A repository on GitHub, or on a GitHub Enterprise server."""

    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
    """The repository, `owner/name`."""
    api: str = _PUBLIC_API
    """The URL of the API; for a GitHub Enterprise server `https://HOST/api/v3`."""
    token: str = "GITHUB_TOKEN"  # noqa: S105  the name of a variable
    """The variable with the token. If it is not set, `gh auth token` is asked."""

    async def connection(self) -> Connection:
        """Return the API, and the headers with the token."""
        host = "github.com" if self.api == _PUBLIC_API else urlsplit(self.api).netloc
        token = await find_token(self.token, ["gh", "auth", "token", "--hostname", host])
        headers = {
            "Authorization": f"Bearer {token}",
            "Accept": "application/vnd.github+json",
            "X-GitHub-Api-Version": "2022-11-28",
        }
        return Connection(self.api, headers, _REMEDIES)

    def members(self, http: ForgeHttp) -> Members:
        """Return the users who may write to it."""
        return GitHubMembers(http, self.repo)


class GitHubMembers(Members):
    """The users who may write to a repository on GitHub, by login."""

    def __init__(self, http: ForgeHttp, repo: str) -> None:
        super().__init__(http)
        self._repo = repo

    async def read_own_user(self) -> Any:
        """Return the login of the token's user; None for the token of an app."""
        return ((await self.http.get("user")) or {}).get("login")

    async def may_write(self, user: Any) -> bool:
        """Return True if a login may write to the repository."""
        found = await self.http.get(f"repos/{self._repo}/collaborators/{quote(user, safe='')}/permission") or {}
        return not _WRITERS.isdisjoint({found.get("role_name"), found.get("permission")})

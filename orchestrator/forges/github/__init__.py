"""The tracker `github`: issues of a repository on GitHub, or on a GitHub Enterprise server, are tasks.

Also the forge `github`, on which tasks land by pull requests.

    trackers:
      issues:
        use: github
        repo: acme/shop
        labels: [council]

The API is that of docs.github.com/rest, version 2022-11-28.
"""

from __future__ import annotations

import pluggy

from orchestrator.forges.github.issues import GitHubOptions, GitHubTracker
from orchestrator.forges.github.pull_requests import GitHubForge
from orchestrator.forges.github.repository import GitHubRepository
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterForge, RegisterTracker

__all__ = ["GitHubForge", "GitHubOptions", "GitHubRepository", "GitHubTracker"]

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


@hookimpl
def council_register_trackers(register: RegisterTracker) -> None:
    """Register `use: github`."""
    register("github", GitHubTracker)


@hookimpl
def council_register_forges(register: RegisterForge) -> None:
    """Register `use: github` for pull requests."""
    register("github", GitHubForge)

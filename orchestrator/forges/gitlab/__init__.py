"""The tracker `gitlab`: issues of a project on gitlab.com or on another GitLab server are tasks.

Also the forge `gitlab`, on which tasks land by merge requests.

    trackers:
      issues:
        use: gitlab
        project: acme/shop
        labels: [council]

The API is that of docs.gitlab.com/api, version 4.
"""

from __future__ import annotations

import pluggy

from orchestrator.forges.gitlab.issues import GitLabOptions, GitLabTracker
from orchestrator.forges.gitlab.merge_requests import GitLabForge
from orchestrator.forges.gitlab.repository import GitLabProject
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterForge, RegisterTracker

__all__ = ["GitLabForge", "GitLabOptions", "GitLabProject", "GitLabTracker"]

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


@hookimpl
def council_register_trackers(register: RegisterTracker) -> None:
    """Register `use: gitlab`."""
    register("gitlab", GitLabTracker)


@hookimpl
def council_register_forges(register: RegisterForge) -> None:
    """Register `use: gitlab` for pull requests."""
    register("gitlab", GitLabForge)

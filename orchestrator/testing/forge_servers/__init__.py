"""Scripted forges for tests: servers on this machine with issues, comments, labels, permissions, ETags and faults.

They answer like the public APIs as far as trackers use them. A test acts as a person by calling their methods.
"""

from orchestrator.testing.forge_servers.github import GitHubServer
from orchestrator.testing.forge_servers.gitlab import GitLabServer

__all__ = ["GitHubServer", "GitLabServer"]

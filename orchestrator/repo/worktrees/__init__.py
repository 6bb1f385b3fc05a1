"""Worktrees of sessions and checks: hubs and slots. Entry point: `pool`."""

"""Worktrees of sessions and checks: hubs, slots, and the pool that assigns slots. Entry point: `pool`."""

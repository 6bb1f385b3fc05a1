"""Worktrees of sessions and checks: hubs, slots, the pool that hands slots out. `pool` is the entry point."""

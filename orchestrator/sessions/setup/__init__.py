"""Prepare a worktree: environment, setup steps, hooks, checks, adapter homes."""

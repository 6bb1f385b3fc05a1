"""The user's repository: branches, checkouts, hooks, and external changes."""

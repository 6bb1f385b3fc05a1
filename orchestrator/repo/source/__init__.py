"""The user's repository: branches, checkouts, hooks, and detection of external changes."""

"""Decide which tasks may start: dispatch, path ownership, claims, deadlocks, admission."""

"""Decide which tasks may start: dispatch, ownership, claims, deadlocks, admission."""

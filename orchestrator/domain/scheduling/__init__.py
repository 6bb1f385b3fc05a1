"""Which task may start: dispatch, path ownership, claims, deadlocks, admission."""

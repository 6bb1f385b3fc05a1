"""The merge queue: merge, check, record the intent, move the target."""

"""The merge queue: merge, check, record the intent, update the target."""

"""The merge queue: merge, check, record the intent, move the target. `merge_queue` is the entry point."""

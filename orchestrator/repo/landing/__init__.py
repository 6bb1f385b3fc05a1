"""Move the target branch, and recover work that did not land."""

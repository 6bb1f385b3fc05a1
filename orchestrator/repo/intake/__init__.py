"""Bring the work of a session into the hub: staged, inspected, quarantined. `collect` is the entry point."""

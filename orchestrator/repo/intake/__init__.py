"""Stage, inspect and quarantine a session's work, and import it into the hub. Entry point: `collect`."""

"""Stage, inspect, quarantine and import a session's work; see `collect`."""

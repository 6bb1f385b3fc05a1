"""Answer requests of active sessions: `service` is the entry point."""

"""The socket through which a session calls its orchestrator."""

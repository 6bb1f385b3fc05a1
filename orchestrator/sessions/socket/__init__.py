"""The socket by which a session calls its orchestrator."""

"""Logs and transcripts of sessions."""

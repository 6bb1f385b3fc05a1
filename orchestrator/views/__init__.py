"""Readable copies of the state as files."""

"""Workflows of a file: their phases, templates and conditions, compiled when the file is read."""

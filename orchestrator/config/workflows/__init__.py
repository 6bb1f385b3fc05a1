"""Workflows of a file: phases, their templates and conditions, compiled when the file is read."""

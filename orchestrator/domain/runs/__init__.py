"""Stored runs and tasks, and their changes of status."""

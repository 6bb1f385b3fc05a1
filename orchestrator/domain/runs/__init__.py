"""Runs and tasks as they are stored, and how their status changes."""

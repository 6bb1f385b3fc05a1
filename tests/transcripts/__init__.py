"""Recordings of real programs, and the recorder."""

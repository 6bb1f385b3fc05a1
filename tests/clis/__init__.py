"""Runs of the real command through the real programs, against the scripted model server: `make test-clis`."""

"""Runs of the real command with real CLIs against the scripted model server: `make test-clis`."""

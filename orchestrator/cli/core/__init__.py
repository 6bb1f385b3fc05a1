"""Shared parts of all commands: options, run names, errors, signals, confirmation, trust."""

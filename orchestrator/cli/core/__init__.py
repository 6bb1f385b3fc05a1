"""Shared by all commands: options, run names, errors, signals, confirmation, trust."""

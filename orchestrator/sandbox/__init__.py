"""Kernel mechanisms that take rights from a process: Landlock and seccomp. Standard library only."""

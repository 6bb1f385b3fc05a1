"""Kernel mechanisms that restrict a process: Landlock and seccomp. Standard library only."""

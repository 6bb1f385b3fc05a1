"""Kernel mechanisms that restrict a process; standard library only."""

"""Confine sessions and checks by bubblewrap or Landlock, and a network proxy."""

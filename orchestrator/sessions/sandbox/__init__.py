"""Confine sessions and checks: bubblewrap or Landlock, and a proxy for allowed hosts."""

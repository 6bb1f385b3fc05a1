"""Secrets, untrusted text and names, network hosts."""

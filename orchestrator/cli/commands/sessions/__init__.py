"""Commands that programs inside a session call."""

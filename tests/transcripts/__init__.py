"""What real programs printed, by program, and how that is recorded."""

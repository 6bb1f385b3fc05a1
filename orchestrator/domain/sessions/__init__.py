"""What sessions report to each other."""

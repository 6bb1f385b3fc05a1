"""Import state in earlier formats."""

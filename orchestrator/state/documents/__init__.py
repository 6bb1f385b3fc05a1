"""Read, change, validate and restore documents of any store."""

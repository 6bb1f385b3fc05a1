"""JSON values: canonical form, differences, competing updates, times."""

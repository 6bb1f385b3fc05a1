"""JSON values: canonical form, differences, conflicting updates, times."""

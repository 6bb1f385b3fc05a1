"""YAML text as values that know their position, and the checks of single values."""

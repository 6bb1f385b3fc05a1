"""YAML values with their positions, and checks of single values."""

"""Data that sessions share with each other."""

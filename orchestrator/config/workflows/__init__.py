"""Workflows in a config file: phases, templates and conditions, compiled when the file is read."""

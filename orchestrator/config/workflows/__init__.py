"""Workflows in a config file: phases, templates and conditions."""

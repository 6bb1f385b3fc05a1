"""Settings in the config file and in the run document, defined once."""

"""Settings of a run, as in the config file and in the run document: each is defined once, with its default."""

"""Turn results into text. Pure but for `output`, through which everything is printed."""

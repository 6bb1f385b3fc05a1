"""Commands, grouped by topic. `cli.main` imports each module on first use."""

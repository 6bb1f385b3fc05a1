"""The commands, grouped by topic. `cli.main` imports each module when its command is called."""

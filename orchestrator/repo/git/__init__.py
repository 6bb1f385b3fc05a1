"""Run and read git in a sealed environment. `command.Git` is the entry point."""

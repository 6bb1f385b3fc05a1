"""Live progress of an active run: `display.show_progress` is the entry point."""

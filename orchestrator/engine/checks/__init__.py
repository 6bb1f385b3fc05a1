"""Run the commands that decide whether work may land: on the base before the first session, and on merges."""

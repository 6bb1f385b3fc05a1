"""Export the state as files for people: `export.export_views`. May import `repo`, `state` and below."""

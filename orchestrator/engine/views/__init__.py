"""Readable files of the state: `export.export_views` writes them. May import `repo`, `state` and below."""

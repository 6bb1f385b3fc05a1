"""Readable files of the state, written by `export.export_views`.

May import `repo`, `state` and below.
"""

"""Rendering of results as text. Pure, except `output`, which prints."""

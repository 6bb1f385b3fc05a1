"""Render results as text. Pure, except `output`, which prints."""

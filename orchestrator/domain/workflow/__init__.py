"""Phases of a workflow and the handoffs between them."""

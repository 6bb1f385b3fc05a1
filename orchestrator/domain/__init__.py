"""Decisions without effects: no I/O, no clock, no randomness.

`runs` has the documents of runs and tasks and the table of task states, `scheduling` decides which task starts next,
`workflow` which phase follows; `sessions` has the data that sessions share, `documents` compares and merges JSON
values, `security` finds secrets and untrusted names. May import `client` and `errors` only.
"""

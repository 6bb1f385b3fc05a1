"""Locks and leases between sessions, tasks and processes.

`claims` and `ownership` are documents in the store, `file_locks` are kernel locks on one machine, and `merge_lease`
orders landings. May import `state` and below.
"""

"""Locks and leases between sessions, tasks and processes.

`claims` and `ownership` are documents in the store; `file_locks` are kernel locks of one machine; `merge_permit` orders
landings. May import `state` and below.
"""

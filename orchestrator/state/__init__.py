"""Stores of documents, events and leases in one log.

`stores.file` is the default store, `log` is its on-disk format, `documents` reads and changes individual documents,
`transfer` copies whole stores, `offline` buffers commits during outages, `legacy` imports earlier formats.
"""

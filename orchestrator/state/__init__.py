"""Stores: documents, events and leases in one log. `stores.file` is the default store.

`log` is its format on disk, `documents` reads and changes single documents, `transfer` copies whole stores, `offline`
buffers commits while a store is unreachable, `legacy` imports older layouts.
"""

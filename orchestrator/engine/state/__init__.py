"""The documents of a run: `records` reads them, `ledger` changes them through `writer`, under the lease epoch."""

"""The documents of a run: `records` reads them, `ledger` changes them under the lease epoch."""

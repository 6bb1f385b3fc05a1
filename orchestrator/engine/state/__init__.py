"""The documents of a run: `records` reads them, `ledger` changes them by `writer`."""

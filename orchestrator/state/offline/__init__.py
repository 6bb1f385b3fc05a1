"""Continue while a store is unreachable."""

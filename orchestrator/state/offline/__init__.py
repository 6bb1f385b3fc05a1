"""Continue while a store is unreachable: `fork.survive_outages` is the entry point."""

"""Continue while a store is unreachable. Entry point: `fork.survive_outages`."""

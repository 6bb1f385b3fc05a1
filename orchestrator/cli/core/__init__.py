"""Parts that all commands share: options, run names, errors, signals, trust."""

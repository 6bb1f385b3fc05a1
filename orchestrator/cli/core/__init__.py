"""What all commands share: options, the run they mean, errors, signals, confirmation, trust."""

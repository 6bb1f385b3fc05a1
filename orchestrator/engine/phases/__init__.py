"""Start and complete phases: start commits, prompts, handoffs, and plans that become tasks."""

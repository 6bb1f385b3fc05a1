"""Start and complete phases: prompts, handoffs, and plans that become tasks."""

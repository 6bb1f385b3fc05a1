"""Start and complete the phases of a task: prompts, handoffs, plans that become tasks."""

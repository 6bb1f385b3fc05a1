"""Commands that inspect, copy and maintain the state."""

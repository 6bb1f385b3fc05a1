"""The loop of a run: decide, start attempts, follow other processes, recover after a crash."""

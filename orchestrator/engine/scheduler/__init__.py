"""The scheduler of a run: start attempts, land work, follow other processes, recover after a crash."""

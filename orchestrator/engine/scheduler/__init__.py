"""Start attempts, land work, follow other processes, and recover after a crash."""
